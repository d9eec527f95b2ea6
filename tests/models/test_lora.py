"""LoRA adapters against the models that PEFT merges them into, on tiny random models of several families."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.config import LoRAConfig
from asyncllm.layers.lora import AdapterMask
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from asyncllm.weights.lora_stacks import install_adapters, plan_adapters
from tests.models.paged import PagedRunner
from tests.models.test_decoder import CPU, assert_same, reference_logits, tokens_of
from tests.weights.adapters import save_adapter
from tests.weights.tiny import save_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# The model, and the settings of two adapters.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"attention_bias": True},
        {"r": 4, "target_modules": ALL},
        {"r": 7, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    ),
    "llama-patterns": (
        {"num_hidden_layers": 3},
        {"r": 3, "target_modules": ALL, "rank_pattern": {"down_proj": 9, r".*\.1\.self_attn\.q_proj": 1},
         "alpha_pattern": {"k_proj": 20, "model.layers.0.mlp.up_proj": 1}},
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    ),
    "gemma3": (
        {"family": "gemma3", "sliding_window": 6, "sliding_window_pattern": 2},
        {"r": 4, "target_modules": ALL},
        {"r": 8, "target_modules": r".*\.(k_proj|o_proj|down_proj)"},
    ),
    "qwen3-moe": (
        {"family": "qwen3_moe"},
        {"r": 4, "target_modules": ATTENTION},
        {"r": 6, "target_modules": ["k_proj", "o_proj"]},
    ),
    "phi3": (
        {"family": "phi3", "num_key_value_heads": 2, "rope_parameters": HALF_TURNED},
        {"r": 4, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
        {"r": 6, "target_modules": ["qkv_proj"]},
    ),
    "gpt2": (
        {"family": "gpt2", "tie_word_embeddings": True},
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"r": 6, "target_modules": ["attn.c_proj"]},
    ),
    "opt": (
        {"family": "opt", "tie_word_embeddings": True},
        {"r": 4, "target_modules": ["q_proj", "out_proj", "fc1", "fc2"]},
        {"r": 6, "target_modules": ["k_proj", "v_proj"]},
    ),
}  # fmt: skip


class Adapted(NamedTuple):
    """A model with two adapters, and what each should compute: none, the first, the second."""

    runner: PagedRunner
    mask: AdapterMask
    references: list[PreTrainedModel]

    def step(self, rows: list[tuple[str, int, list[int]]]) -> list[torch.Tensor]:
        """rows: name, adapter, tokens; logits of each."""
        adapters = [adapter for _, adapter, tokens in rows for _ in tokens]
        self.mask.choose(torch.tensor(adapters) if any(adapters) else None)
        return self.runner.step([(name, tokens) for name, _, tokens in rows])


@pytest.fixture(scope="module", params=CASES)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted_model(tmp_path_factory.mktemp("adapted"), *CASES[request.param])


def adapted_model(directory: Path, model: dict[str, Any], *settings: dict[str, Any]) -> Adapted:
    base = save_llama(directory, **model)
    places = {f"adapter{number}": directory / f"adapter{number}" for number in range(len(settings))}
    merged = [
        save_adapter(place, base, seed, **setting)
        for seed, (place, setting) in enumerate(zip(places.values(), settings))
    ]
    checkpoint = open_checkpoint(str(directory))
    plan = plan_adapters(LoRAConfig(adapters={k: str(v) for k, v in places.items()}), checkpoint.architecture)
    loaded = load_model(checkpoint, TorchAttention(), torch.float32, CPU)
    mask = install_adapters(plan, loaded, torch.float32, CPU)
    assert mask is not None
    return Adapted(PagedRunner(loaded), mask, [base, *merged])


def test_each_alone_gives_the_logits_of_the_merged_model(adapted: Adapted) -> None:
    tokens = tokens_of(1, 17)
    for adapter, reference in enumerate(adapted.references):
        [logits] = adapted.step([(f"alone {adapter}", adapter, tokens)])
        assert_same(logits, reference_logits(reference, tokens))


def test_the_three_differ(adapted: Adapted) -> None:
    logits = [reference_logits(reference, tokens_of(1, 17)) for reference in adapted.references]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (logits[first] - logits[second]).abs().mean() > 0.1


def test_a_mixed_batch_gives_every_row_its_own_32_greedy_tokens(adapted: Adapted) -> None:
    prompts = {0: tokens_of(2, 5), 1: tokens_of(3, 11), 2: tokens_of(4, 8)}
    tokens, outputs = dict(prompts), {adapter: list[int]() for adapter in prompts}
    for _ in range(32):
        logits = adapted.step([(f"mixed {adapter}", adapter, new) for adapter, new in tokens.items()])
        tokens = {adapter: [int(rows[-1].argmax())] for adapter, rows in zip(prompts, logits)}
        for adapter, new in tokens.items():
            outputs[adapter] += new
    for adapter, prompt in prompts.items():
        # Token by token: what the merged model would choose behind the same text, which by induction is its own.
        expected = reference_logits(adapted.references[adapter], prompt + outputs[adapter]).argmax(-1)
        assert outputs[adapter] == expected[len(prompt) - 1 : -1].tolist()


def test_a_row_without_adapter_gets_the_same_bits_as_where_nobody_has_one(adapted: Adapted) -> None:
    tokens = tokens_of(5, 9)
    [alone] = adapted.step([("bits alone", 0, tokens)])
    adapted.mask.choose(torch.zeros(len(tokens), dtype=torch.int64))
    [masked] = adapted.runner.step([("bits masked", tokens)])
    assert torch.equal(alone, masked)
