"""A tiny model with two adapters on disk, and what each of the three would answer by itself."""

from pathlib import Path
from typing import Any

import torch

from asyncllm.config import CacheConfig, Config, ExecutorConfig, LoRAConfig, ModelConfig, SchedulerConfig
from tests.weights.adapters import save_adapter
from tests.weights.tiny import save_llama

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class AdaptedModel:
    """The model in `directory`; its adapters are `sql`, of rank 4 in all layers, and `chat`, of rank 6 in some."""

    def __init__(self, directory: Path, **model: Any) -> None:
        self.directory = directory
        base = save_llama(directory, **model)
        sql = save_adapter(directory / "sql", base, 1, r=4, target_modules=LAYERS)
        chat = save_adapter(
            directory / "chat", base, 2, r=6, lora_alpha=5, target_modules=["q_proj", "v_proj", "up_proj"]
        )
        self.references = [base, sql, chat]
        self.lora = LoRAConfig(adapters={name: str(directory / name) for name in ("sql", "chat")})

    def chosen(self, adapter: int, prompt: list[int], output: list[int]) -> list[int]:
        """What the merged model would choose behind each token: `output` itself, where that is its greedy answer."""
        with torch.inference_mode():
            logits = self.references[adapter](torch.tensor([prompt + output])).logits[0]
        return logits.argmax(-1)[len(prompt) - 1 : -1].tolist()

    def config(self, num_blocks: int = 100, **executor: Any) -> Config:
        return Config(
            model=ModelConfig(path=str(self.directory), device="cpu", dtype="float32"),
            cache=CacheConfig(num_blocks=num_blocks, block_size=4),
            scheduler=SchedulerConfig(max_sequences=8, max_batched_tokens=24, max_chunk_tokens=8),
            executor=ExecutorConfig(threads=torch.get_num_threads(), **executor),
            lora=self.lora,
        )
