"""`model.rope_scaling`: a context longer than the model's own."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import asyncllm
from asyncllm.errors import StartupError
from asyncllm.layers.rotary import frequencies
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights.families import read_architecture
from asyncllm.weights.rope import stretched
from tests.weights.tiny import TINY, save_llama


def tiny(**settings: Any) -> ModelArchitecture:
    return read_architecture(Path("config.json"), {"architectures": ["LlamaForCausalLM"], **TINY, **settings})


@pytest.mark.parametrize(("kind", "scaling"), [
    ("linear", {"rope_type": "linear", "factor": 3.0}),
    ("yarn", {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 512}),
])  # fmt: skip
def test_it_is_what_the_file_would_say(kind: str, scaling: dict[str, Any]) -> None:
    written = tiny(rope_scaling=scaling)
    assert stretched(tiny(), kind, 1536) == msgspec.structs.replace(written, max_position=1536)


def test_dynamic_is_a_base_for_the_whole_context() -> None:
    model = stretched(tiny(), "dynamic", 1536)
    found, amplitude = frequencies(12, 10000.0, model.max_position, model.rope_scaling)
    base = 10000.0 * 3 ** (12 / 10)  # https://arxiv.org/abs/2309.00071, equation 16
    torch.testing.assert_close(found, base ** -(torch.arange(0, 12, 2) / 12))
    assert amplitude == 1.0


def test_a_context_that_is_long_enough_stays_as_it_is() -> None:
    assert stretched(tiny(), "yarn", 512) == tiny()
    assert stretched(tiny(), "none", 1536) == tiny()


def opt(**settings: Any) -> ModelArchitecture:
    raw = {"architectures": ["OPTForCausalLM"], **TINY, "ffn_dim": 80, **settings}
    return read_architecture(Path("config.json"), raw)


@pytest.mark.parametrize(("model", "length", "words"), [
    (opt(), 1536, "learned positions"),
    (tiny(rope_scaling={"rope_type": "linear", "factor": 2.0}), 1536, r"stretched already \(linear\)"),
    (tiny(), 0, "needs model.max_context_length"),
])  # fmt: skip
def test_what_cannot_be_stretched_is_refused(model: ModelArchitecture, length: int, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        stretched(model, "yarn", length)


def test_a_prompt_longer_than_the_models_own_context_is_answered(tmp_path: Path) -> None:
    save_llama(tmp_path, max_position_embeddings=64, vocab_size=300)
    prompt = "three times as long as this model was made for " * 3
    options = {"max_context_length": 192, "memory_gib": 0.01, "dtype": "float32"}
    with asyncllm.LLM(str(tmp_path), rope_scaling="yarn", **options) as llm:
        [output] = llm.generate([prompt], temperature=0, max_tokens=8, ignore_eos=True)
        assert output.error is None
        assert (len(output.prompt_token_ids), len(output.choices[0].token_ids)) == (len(prompt), 8)
    with pytest.raises(StartupError, match=r"choose model\.rope_scaling"):
        asyncllm.LLM(str(tmp_path), **options)
