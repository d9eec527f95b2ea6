"""The Llama code against transformers, on tiny random models, through a paged cache with shuffled blocks.

In plain torch, and with every Triton kernel a model has (interpreted where there is no CUDA).
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.errors import StartupError
from asyncllm.models.base import CausalLM
from asyncllm.models.config import ModelArchitecture
from asyncllm.models.registry import build_model
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from tests.models.paged import PagedRunner
from tests.weights.tiny import TINY, save_llama

CPU = torch.device("cpu")
VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd-sizes": {"vocab_size": 97, "hidden_size": 39, "intermediate_size": 53, "head_dim": 14,
                  "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3-tied": {"family": "qwen3", "head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "kernels-grouped-query": {"head_dim": 64},
    "kernels-qwen3": {"family": "qwen3", "head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 1},
    "kernels-odd-sizes": {"vocab_size": 97, "hidden_size": 39, "intermediate_size": 53, "head_dim": 96,
                          "num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True},
    "wide-heads": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> tuple[CausalLM, LlamaForCausalLM]:
    directory = tmp_path_factory.mktemp("llama")
    reference = save_llama(directory, **VARIANTS[request.param])
    checkpoint = open_checkpoint(str(directory))
    a = checkpoint.architecture
    if not request.param.startswith("kernels"):
        return load_model(checkpoint, TorchAttention(), torch.float32, CPU), reference
    attention = TritonAttention(8, a.num_heads, a.num_kv_heads, a.head_dim, device, num_sms=4)
    return load_model(checkpoint, attention, torch.float32, device), reference


def tokens_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, TINY["vocab_size"]), k=length)


def reference_logits(reference: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # atol on top of rtol: the logits of these models reach 100, where one float32 ulp is 8e-6.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_whole_prompt_gives_the_logits_of_transformers(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, reference = pair
    tokens = tokens_of(1, 23)
    assert_same(PagedRunner(model).step([("a", tokens)])[0], reference_logits(reference, tokens))


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, reference = pair
    tokens = tokens_of(2, 31)
    runner = PagedRunner(model)
    logits, start = [], 0
    for length in (5, 1, 8, 3, 14):
        logits += runner.step([("a", tokens[start : start + length])])
        start += length
    assert_same(torch.cat(logits), reference_logits(reference, tokens))


def test_rows_of_a_mixed_step_do_not_see_each_other(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, reference = pair
    texts = {name: tokens_of(seed, length) for seed, (name, length) in enumerate(zip("abcd", (9, 18, 14, 7)), 3)}
    runner = PagedRunner(model)
    first = runner.step([("a", texts["a"][:8]), ("b", texts["b"][:17]), ("c", texts["c"][:6])])
    # Two decode rows of unlike lengths, a chunk behind a prefix, and a new prompt, in one step.
    second = runner.step([("a", texts["a"][8:]), ("b", texts["b"][17:]), ("c", texts["c"][6:]), ("d", texts["d"])])
    for name, logits in zip("abc", first):
        assert_same(logits, reference_logits(reference, texts[name])[: len(logits)])
    for name, logits in zip("abcd", second):
        assert_same(logits, reference_logits(reference, texts[name])[-len(logits) :])


def test_greedy_tokens_are_those_of_transformers(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, reference = pair
    prompt = tokens_of(11, 6)
    expected: list[int] = []
    for _ in range(36):
        expected.append(int(reference_logits(reference, prompt + expected)[-1].argmax()))
    assert PagedRunner(model).greedy(prompt, 36) == expected


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    # Packed weights, mirrored norms and bfloat16 attention at once. bfloat16 has 8 bits, so one rounding is 0.4 %;
    # over two layers of random weights the logits, whose spread is about 20, come out within 3 % of that spread.
    save_llama(tmp_path, num_key_value_heads=2)
    checkpoint = open_checkpoint(str(tmp_path))
    runners = [
        PagedRunner(load_model(checkpoint, TorchAttention(), dtype, CPU), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    tokens = tokens_of(12, 24)
    exact, rounded = (
        torch.cat([runner.step([("a", tokens[:20])])[0], *(runner.step([("a", [t])])[0] for t in tokens[20:])])
        for runner in runners
    )
    assert float((rounded - exact).pow(2).mean().sqrt()) < 0.03 * float(exact.std())


def test_an_unknown_family_is_refused_with_those_served() -> None:
    architecture = ModelArchitecture(
        family="mamba", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position=8, tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(StartupError, match=r"mamba.* is not served; served: llama"):
        build_model(architecture, TorchAttention())
