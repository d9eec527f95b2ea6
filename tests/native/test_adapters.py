"""LoRA adapters in C++: against the models that PEFT merges them into, and the same to the last bit in any company."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from asyncllm.attention.base import AttentionMetadata
from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.config import CacheConfig, Config, ExecutorConfig, LoRAConfig, ModelConfig
from asyncllm.models.base import CausalLM
from asyncllm.native.decoder import NativeDecoder
from asyncllm.native.library import Library
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import prepare, read_model
from asyncllm.weights.lora_stacks import install_adapters, plan_adapters
from tests.engine.harness import submit
from tests.executor.adapted import AdaptedModel
from tests.executor.test_lora import Run
from tests.fakes import greedy
from tests.models.paged import PagedRunner
from tests.models.test_decoder import tokens_of
from tests.native.test_models import SIZES, error, logits_of
from tests.weights.adapters import save_adapter
from tests.weights.tiny import llama, save_gguf, save_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# The model, and the settings of two adapters. Ranks above 32 are wider than one block of inputs.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 4, "target_modules": ALL},
        {"r": 40, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    ),
    "gemma3": (
        {"family": "gemma3", "sliding_window": 20, "sliding_window_pattern": 2, "head_dim": 32},
        {"r": 4, "target_modules": ALL},
        {"r": 8, "target_modules": ["k_proj", "o_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "phi3": (
        {"family": "phi3", "num_key_value_heads": 2, "rope_parameters": HALF_TURNED},
        {"r": 4, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
        {"r": 6, "target_modules": ["qkv_proj"]},
    ),
    "gpt2": (
        {"family": "gpt2", "tie_word_embeddings": True, "n_inner": 96},
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"r": 6, "target_modules": ["attn.c_proj"]},
    ),
    "qwen3-moe": (
        {"family": "qwen3_moe", "head_dim": 32, "moe_intermediate_size": 32},
        {"r": 4, "target_modules": ATTENTION},
        {"r": 6, "target_modules": ["k_proj", "o_proj"]},
    ),
}  # fmt: skip
PROMPT = tokens_of(1, 60)


class Adapted:
    """A model on disk with two adapters, and what each should compute: none, the first, the second."""

    def __init__(self, directory: Path, name: str) -> None:
        model, *settings = CASES[name]
        sizes = dict(SIZES)
        if model.get("family") in ("gpt2", "phi3"):
            del sizes["head_dim"]  # theirs is hidden size by heads
        base = save_llama(directory, **{**sizes, "initializer_range": 0.1, **model})
        self.file = directory
        self.references: list[PreTrainedModel] = [base]
        places = {f"adapter{number}": directory / f"adapter{number}" for number in range(len(settings))}
        for seed, (place, setting) in enumerate(zip(places.values(), settings)):
            self.references.append(save_adapter(place, base, seed, **setting))
        self.config = LoRAConfig(adapters={name: str(place) for name, place in places.items()})

    def native(self, library: Library, num_threads: int = 2, adapted: bool = True) -> NativeDecoder:
        checkpoint = open_checkpoint(str(self.file))
        model = read_model(checkpoint, TorchAttention(), torch.bfloat16, torch.device("cpu"), keep_blocks=True)
        prepare(model, fused=False, products=False)
        plan = plan_adapters(self.config, checkpoint.architecture) if adapted else None
        install_adapters(plan, model, torch.bfloat16, torch.device("cpu"), products=False)
        return NativeDecoder(model, library, 16, num_threads, adapter_spans=[] if plan is None else plan.spans)


class Runner(PagedRunner):
    """Whose sequences have adapters, by their names' last character."""

    def __init__(self, model: NativeDecoder) -> None:
        super().__init__(model, 0, 64, 16, torch.bfloat16)
        self.adapters: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self.native = model
        self.model: CausalLM = self
        self.compute_logits = model.compute_logits
        self.architecture = model.architecture

    def forward(
        self, input_ids: torch.Tensor, metadata: AttentionMetadata, kv_caches: list[torch.Tensor]
    ) -> torch.Tensor:
        return self.native.forward(input_ids, metadata, kv_caches, self.adapters)

    def step(self, rows: list[tuple[str, list[int]]]) -> list[torch.Tensor]:
        self.adapters = np.array([int(name[-1]) for name, _ in rows])
        return super().step(rows)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    made: dict[str, Adapted] = {}

    def make(name: str) -> Adapted:
        if name not in made:
            made[name] = Adapted(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


def check_against_merged(model: Adapted, native: NativeDecoder) -> None:
    runner = Runner(native)
    for adapter, reference in enumerate(model.references):
        exact = logits_of(reference, PROMPT)
        narrow = type(reference).from_pretrained(model.file, dtype=torch.bfloat16)
        narrow.load_state_dict(reference.state_dict())
        [ours] = runner.step([(f"whole {adapter}", PROMPT)])
        assert error(ours, exact) < 1.2 * error(logits_of(narrow, PROMPT), exact), adapter
        others = [logits_of(other, PROMPT) for other in model.references if other is not reference]
        assert all(error(other, exact) > 10 * error(ours, exact) for other in others)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_near_to_the_merged_models_as_merging_in_bfloat16_is(
    adapted: Callable[[str], Adapted], best_library: Library, name: str
) -> None:
    check_against_merged(adapted(name), adapted(name).native(best_library))


def test_every_build_is_as_near(adapted: Callable[[str], Adapted], library: Library) -> None:
    check_against_merged(adapted("llama"), adapted("llama").native(library))


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_sequence_in_any_company_has_the_logits_it_has_alone(
    adapted: Callable[[str], Adapted], library: Library, name: str
) -> None:
    model = adapted(name)
    texts = {f"{i} {i * 7 % 3}": tokens_of(40 + i, length) for i, length in enumerate((50, 3, 17, 33, 9, 16, 40, 1))}
    alone: dict[str, torch.Tensor] = {}
    for num_threads in (1, 3):
        native = model.native(library, num_threads)
        for text_name, text in texts.items():
            [logits] = Runner(native).step([(text_name, text)])
            assert torch.equal(alone.setdefault(text_name, logits), logits)
        runner = Runner(native)
        long = {text_name: text for text_name, text in texts.items() if len(text) > 2}
        together = runner.step([(text_name, text[:-1]) for text_name, text in long.items()])
        for text_name, logits in zip(long, together):
            assert torch.equal(logits, alone[text_name][:-1])
        mixed = runner.step([(text_name, text[-1:]) for text_name, text in long.items()] + [("7 1", texts["7 1"])])
        for text_name, logits in zip([*long, "7 1"], mixed):
            assert torch.equal(logits[-1], alone[text_name][-1])


def test_a_sequence_without_adapter_has_the_logits_of_the_model_alone(
    adapted: Callable[[str], Adapted], library: Library
) -> None:
    model = adapted("llama")
    [expected] = PagedRunner(model.native(library, adapted=False), 0, 64, 16, torch.bfloat16).step([("a", PROMPT)])
    runner = Runner(model.native(library))
    assert torch.equal(runner.step([("alone 0", PROMPT)])[0], expected)
    assert torch.equal(runner.step([("beside 2", PROMPT[:20]), ("in company 0", PROMPT)])[1], expected)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
def test_adapters_of_a_file_in_blocks_change_it_as_they_change_its_values(
    tmp_path: Path, library: Library, kind: Kind
) -> None:
    reference = llama(**{**SIZES, "initializer_range": 0.1})
    values = save_gguf(tmp_path / "model.gguf", reference, kind)
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
    merged = save_adapter(tmp_path / "adapter", reference, 0, r=4, target_modules=ALL)
    model = Adapted.__new__(Adapted)
    model.file, model.config = tmp_path, LoRAConfig(adapters={"one": str(tmp_path / "adapter")})
    exact = logits_of(merged, PROMPT)
    [ours] = Runner(model.native(library)).step([("a 1", PROMPT)])
    # Adapters are in bfloat16, and these are as strong as the model itself.
    assert error(ours, exact) < 0.08 * float(exact.std())
    assert error(logits_of(reference, PROMPT), exact) > 0.8 * float(exact.std())


@pytest.mark.parametrize("num_blocks", [64, 9], ids=["roomy", "preempting"])
def test_through_the_step_loop_each_has_the_tokens_it_has_alone(
    tmp_path: Path, best_library: Library, num_blocks: int
) -> None:
    model = AdaptedModel(tmp_path, **{**SIZES, "vocab_size": 259})
    asked = model.config()
    config = Config(
        model=ModelConfig(path=asked.model.path, device="cpu", dtype="bfloat16"),
        cache=CacheConfig(num_blocks=num_blocks, block_size=16),
        scheduler=asked.scheduler,
        executor=ExecutorConfig(threads=2, attention_backend="native"),
        lora=asked.lora,
    )
    together, alone = Run(config), Run(config)
    assert together.real.facts["kernels"] == f"native, {best_library.description}"
    assert together.real.facts["adapters"].startswith("sql (rank 4), chat (rank 6)")
    wanted = {1 + i: (i % 3, tokens_of(7 + i // 3, 13 + i // 3)) for i in range(9)}
    together.add(*(submit(i, prompt, greedy(24), adapter=adapter) for i, (adapter, prompt) in wanted.items()))
    together.run()
    assert (together.scheduler.stats().num_preemptions > 0) == (num_blocks == 9)
    for i, (adapter, prompt) in wanted.items():
        alone.add(submit(i, prompt, greedy(24), adapter=adapter))
        alone.run()
        assert len(alone.tokens[i]) == 24 and together.tokens[i] == alone.tokens[i]
    assert len({tuple(alone.tokens[i]) for i in (1, 2, 3)}) == 3
