"""Every family against transformers, on tiny random models, through a paged cache with shuffled blocks.

In plain torch, and with every Triton kernel a model has (interpreted where there is no CUDA).
"""

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.errors import StartupError
from asyncllm.models.base import CausalLM
from asyncllm.models.config import ModelArchitecture
from asyncllm.models.registry import build_model
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from asyncllm.weights.names import OPT_POSITIONS_OFFSET
from tests.models.paged import PagedRunner
from tests.weights.tiny import TINY, save_llama, tiny_tokenizer

CPU = torch.device("cpu")
ODD = {"vocab_size": 97, "hidden_size": 39, "intermediate_size": 53, "num_attention_heads": 3, "num_key_value_heads": 3}
# Longer than any prompt here: transformers changes these frequencies with the length of the prompt, we never.
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4,
        "short_factor": [1.0] * 6, "long_factor": [1.0, 1.3, 1.9, 2.5, 3.0, 4.0]}  # fmt: skip
HALF_LONG = LONG | {"partial_rotary_factor": 0.5, "short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 3.0]}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-grouped-query": {},
    "llama-multi-head": {"num_key_value_heads": 4},
    "llama-one-kv-head": {"num_key_value_heads": 1},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-odd-sizes": {**ODD, "head_dim": 14},
    "llama-wide-heads": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
    "llama-llama3": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "llama-yarn": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "mistral-odd-sizes": {"family": "mistral", **ODD, "head_dim": 14, "sliding_window": 9},
    "smollm3": {"family": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "smollm3-windows": {"family": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [0, 1, 0],
                        "use_sliding_window": True, "sliding_window": 7, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "qwen2-windows": {"family": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
                      "max_window_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3-tied": {"family": "qwen3", "head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe-some-layers": {"family": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2,
                              "mlp_only_layers": [3], "norm_topk_prob": True, "tie_word_embeddings": True},
    "phi3": {"family": "phi3", "sliding_window": 8, "num_key_value_heads": 4},
    "phi3-long": {"family": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": 4},
    "phi3-partial-long": {"family": "phi3", "rope_parameters": HALF_LONG, "original_max_position_embeddings": 4,
                          "tie_word_embeddings": True},
    "starcoder2": {"family": "starcoder2", "sliding_window": 7, "use_bias": True},
    "starcoder2-tied": {"family": "starcoder2", "use_bias": False, "tie_word_embeddings": True},
    "gemma": {"family": "gemma", "tie_word_embeddings": True},
    "gemma2": {"family": "gemma2", "num_hidden_layers": 4, "sliding_window": 6, "tie_word_embeddings": True},
    "gemma2-odd-sizes": {"family": "gemma2", **ODD, "head_dim": 14, "num_hidden_layers": 3, "sliding_window": 9,
                         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
    "gemma3": {"family": "gemma3", "num_hidden_layers": 4, "sliding_window": 6, "sliding_window_pattern": 3},
    "gemma3-scaled": {"family": "gemma3", "num_hidden_layers": 3, "sliding_window": 11, "tie_word_embeddings": True,
                      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                      "final_logit_softcapping": 15.0, "rope_parameters": {
                          "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    "opt": {"family": "opt", "tie_word_embeddings": True},
    "opt-odd-sizes": {"family": "opt", "vocab_size": 97, "hidden_size": 39, "word_embed_proj_dim": 39, "ffn_dim": 53,
                      "num_attention_heads": 3, "activation_function": "gelu", "enable_bias": False},
    "gpt2": {"family": "gpt2", "tie_word_embeddings": True},
    "gpt2-odd-sizes": {"family": "gpt2", "vocab_size": 97, "hidden_size": 39, "num_attention_heads": 3, "n_inner": 53,
                       "num_hidden_layers": 3, "tie_word_embeddings": False, "scale_attn_weights": False},
    "kernels-llama": {"head_dim": 64},
    "kernels-qwen3": {"family": "qwen3", "head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 1},
    "kernels-phi3": {"family": "phi3", "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "kernels-gemma2": {"family": "gemma2", **ODD, "head_dim": 96, "sliding_window": 6, "attn_logit_softcapping": 5.0},
    "kernels-qwen3-moe": {"family": "qwen3_moe", "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "kernels-gpt2": {"family": "gpt2", "hidden_size": 128, "num_attention_heads": 2, "tie_word_embeddings": True},
    "kernels-gemma3": {"family": "gemma3", "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
                       "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
}  # fmt: skip
# Interpreted, a token costs a tenth of a second: some tests are for plain torch.
in_plain_torch = pytest.mark.parametrize(
    "pair", [name for name in VARIANTS if not name.startswith("kernels")], indirect=True
)


class Pair(NamedTuple):
    """A model and what it should compute."""

    model: CausalLM
    reference: PreTrainedModel
    directory: Path


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Pair:
    directory = tmp_path_factory.mktemp("model")
    reference = save_llama(directory, **VARIANTS[request.param])
    checkpoint = open_checkpoint(str(directory))
    a = checkpoint.architecture
    if not request.param.startswith("kernels"):
        return Pair(load_model(checkpoint, TorchAttention(), torch.float32, CPU), reference, directory)
    attention = TritonAttention(8, a.num_heads, a.num_kv_heads, a.head_dim, device, num_sms=4)
    return Pair(load_model(checkpoint, attention, torch.float32, device), reference, directory)


def tokens_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, TINY["vocab_size"]), k=length)


def reference_logits(reference: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # atol on top of rtol: the logits of these models reach 100, where one float32 ulp is 8e-6.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_has_as_many_weights_as_its_architecture_says(pair: Pair) -> None:
    a = pair.model.architecture
    expected = sum(parameter.numel() for parameter in pair.reference.parameters())
    if a.family == "opt":
        expected -= OPT_POSITIONS_OFFSET * a.hidden_size  # rows that belong to no position, and are not loaded
    assert a.num_parameters == expected


@in_plain_torch
def test_a_whole_prompt_gives_the_logits_of_transformers(pair: Pair) -> None:
    tokens = tokens_of(1, 23)
    assert_same(PagedRunner(pair.model).step([("a", tokens)])[0], reference_logits(pair.reference, tokens))


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(pair: Pair) -> None:
    tokens = tokens_of(2, 31)
    runner = PagedRunner(pair.model)
    logits, start = [], 0
    for length in (5, 1, 8, 3, 14):
        logits += runner.step([("a", tokens[start : start + length])])
        start += length
    assert_same(torch.cat(logits), reference_logits(pair.reference, tokens))


def test_rows_of_a_mixed_step_do_not_see_each_other(pair: Pair) -> None:
    texts = {name: tokens_of(seed, length) for seed, (name, length) in enumerate(zip("abcd", (9, 18, 14, 7)), 3)}
    runner = PagedRunner(pair.model)
    first = runner.step([("a", texts["a"][:8]), ("b", texts["b"][:17]), ("c", texts["c"][:6])])
    # Two decode rows of unlike lengths, a chunk behind a prefix, and a new prompt, in one step.
    second = runner.step([("a", texts["a"][8:]), ("b", texts["b"][17:]), ("c", texts["c"][6:]), ("d", texts["d"])])
    for name, logits in zip("abc", first):
        assert_same(logits, reference_logits(pair.reference, texts[name])[: len(logits)])
    for name, logits in zip("abcd", second):
        assert_same(logits, reference_logits(pair.reference, texts[name])[-len(logits) :])


def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    num_tokens = 10 if isinstance(pair.model.attention, TritonAttention) else 64  # type: ignore[attr-defined]
    prompt = tokens_of(11, 6)
    ours = PagedRunner(pair.model).greedy(prompt, num_tokens)
    # Token by token: what transformers would choose behind the same text, which by induction is its own.
    chosen = reference_logits(pair.reference, prompt + ours).argmax(-1)[len(prompt) - 1 : -1]
    assert ours == chosen.tolist()


@in_plain_torch
def test_greedy_tokens_in_a_mixed_batch_are_those_alone(pair: Pair) -> None:
    prompts = {"a": tokens_of(21, 5), "b": tokens_of(22, 17)}
    runner, late, outputs = PagedRunner(pair.model), tokens_of(23, 40), {"a": [], "b": []}
    tokens = dict(prompts)
    for step in range(64):
        # A third prompt comes in chunks beside them.
        chunk = [("late", late[:7])] if step >= 3 and late else []
        late = late[7:] if chunk else late
        logits = runner.step([*tokens.items(), *chunk])
        tokens = {name: [int(rows[-1].argmax())] for name, rows in zip(tokens, logits)}
        for name, new in tokens.items():
            outputs[name] += new
    for name, prompt in prompts.items():
        chosen = reference_logits(pair.reference, prompt + outputs[name]).argmax(-1)[len(prompt) - 1 : -1]
        assert outputs[name] == chosen.tolist()


@in_plain_torch
def test_bfloat16_is_as_near_to_float32_as_it_is_in_transformers(pair: Pair) -> None:
    # Packed weights, mirrored norms and bfloat16 attention at once. Which sums are rounded when differs, and with them
    # the luck of 24 tokens; a lost row or an unrounded scale would be several times the noise.
    tokens = tokens_of(12, 24)
    checkpoint = open_checkpoint(str(pair.directory))
    runner = PagedRunner(load_model(checkpoint, TorchAttention(), torch.bfloat16, CPU), dtype=torch.bfloat16)
    rounded = torch.cat([runner.step([("a", tokens[:20])])[0], *(runner.step([("a", [t])])[0] for t in tokens[20:])])
    their_model = type(pair.reference).from_pretrained(pair.directory, dtype=torch.bfloat16)
    exact, theirs = reference_logits(pair.reference, tokens), reference_logits(their_model, tokens).float()
    noise = float((theirs - exact).pow(2).mean().sqrt())
    assert float((rounded - exact).pow(2).mean().sqrt()) < 1.5 * noise + 0.005 * float(exact.std())


def test_of_a_gemma_3_that_sees_the_text_part_is_served_under_old_and_new_names(tmp_path: Path) -> None:
    text = {**TINY, "head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2, "initializer_range": 0.3}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(
        text_config={**text, "tie_word_embeddings": True}, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    reference = Gemma3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokens, file = tokens_of(31, 20), tmp_path / "model.safetensors"
    expected = reference_logits(reference, tokens)
    stored, new, old = load_file(file), "model.language_model.", "language_model.model."
    assert any("vision_tower" in name for name in stored)
    for prefix in (new, old):
        save_file({re.sub(f"^({new}|{old})", prefix, name): tensor for name, tensor in stored.items()}, file)
        model = load_model(open_checkpoint(str(tmp_path)), TorchAttention(), torch.float32, CPU)
        assert_same(PagedRunner(model).step([("a", tokens)])[0], expected)


def test_an_unknown_family_is_refused_with_those_served() -> None:
    architecture = ModelArchitecture(
        family="mamba", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position=8, tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(StartupError, match=r"mamba.* is not served; served: llama"):
        build_model(architecture, TorchAttention())
