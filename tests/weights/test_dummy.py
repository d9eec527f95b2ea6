"""Random weights in a model's shapes: what a load test runs on where no checkpoint is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.errors import StartupError
from asyncllm.models.config import Experts, LayerKind, ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.dummy import STD, DummyCheckpoint
from asyncllm.weights.loader import load_model
from tests.weights.tiny import TINY, save_gguf, tiny_tokenizer
from tests.weights.tiny import llama as tiny_llama

LLAMA = ModelArchitecture(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position=512,
    tie_word_embeddings=False,
    attention_bias=True,
    dtype="float16",
)
QWEN3 = ModelArchitecture(
    **{field: getattr(LLAMA, field) for field in LLAMA.__struct_fields__}
    | {"family": "qwen3", "qk_norm": True, "attention_bias": False, "tie_word_embeddings": True, "dtype": "bfloat16"}
)

QWEN3_MOE = ModelArchitecture(
    **{field: getattr(QWEN3, field) for field in QWEN3.__struct_fields__}
    | {
        "family": "qwen3_moe",
        "layer_kinds": (LayerKind(has_experts=True), LayerKind()),
        "experts": Experts(num_experts=5, num_experts_per_token=2, intermediate_size=24, norm_topk_prob=True),
    }
)


def dummy(architecture: ModelArchitecture) -> DummyCheckpoint:
    return DummyCheckpoint("dummy", architecture, TextFacts(), tiny_tokenizer)


def write_directory(directory: Path, model_type: str = "llama", name: str = "LlamaForCausalLM") -> None:
    config = TINY | {"architectures": [name], "model_type": model_type, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("architecture", [LLAMA, QWEN3, QWEN3_MOE], ids=lambda a: a.family)
def test_every_parameter_of_the_model_is_filled(architecture: ModelArchitecture) -> None:
    model = load_model(dummy(architecture), TorchAttention(), torch.float32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) >= architecture.num_parameters
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and (parameter != 0).all(), name
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.ndim > 1:
            assert abs(parameter.std().item() / STD - 1) < 0.1 and abs(parameter.mean().item()) < STD / 10, name


def test_names_are_those_of_the_checkpoint_not_of_the_stacked_layers() -> None:
    names = {name for name, _ in dummy(QWEN3).tensors()}
    assert "model.layers.1.self_attn.q_proj.weight" in names and "model.layers.0.self_attn.k_norm.weight" in names
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in names)
    assert "lm_head.weight" not in names  # tied: the embedding is stored once


def test_experts_are_drawn_one_by_one() -> None:
    shapes = {name: list(tensor.shape) for name, tensor in dummy(QWEN3_MOE).tensors() if ".experts." in name}
    single = "model.layers.0.mlp.experts.{}.{}_proj.weight"
    expected = {"gate": [24, 64], "up": [24, 64], "down": [64, 24]}
    assert shapes == {single.format(index, part): expected[part] for index in range(5) for part in expected}


def test_the_same_weights_come_every_time_and_no_two_tensors_are_alike() -> None:
    first, second = dict(dummy(LLAMA).tensors()), dict(dummy(LLAMA).tensors())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    projections = [tensor for name, tensor in first.items() if name.endswith("o_proj.weight")]
    assert len(projections) == 2 and not torch.equal(*projections)
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}


def test_num_bytes_is_what_the_tensors_take() -> None:
    checkpoint = dummy(QWEN3)
    assert checkpoint.num_bytes == sum(tensor.numel() * tensor.element_size() for _, tensor in checkpoint.tensors())


def test_a_directory_without_weight_files_opens_without_torch(tmp_path: Path) -> None:
    write_directory(tmp_path)
    program = (
        "import sys; from asyncllm.weights.checkpoint import open_checkpoint; "
        f"checkpoint = open_checkpoint({str(tmp_path)!r}, load_format='dummy'); "
        "assert checkpoint.tokenizer().get_vocab_size() == 259 and checkpoint.text.eos_token_ids == (2,); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_each_call_gives_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    write_directory(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), load_format="dummy")
    checkpoint.tokenizer().add_tokens(["onlyhere"])
    assert checkpoint.tokenizer().token_to_id("onlyhere") is None
    assert checkpoint.name == tmp_path.name


def refusal(path: str) -> str:
    with pytest.raises(StartupError) as caught:
        open_checkpoint(path, load_format="dummy")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_gguf_file_is_refused_with_what_would_work(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf", tiny_llama(vocab_size=259))
    assert "is a GGUF file, and model.load_format = dummy needs a directory" in refusal(str(tmp_path / "a.gguf"))
    assert "is a GGUF file" in refusal("smollm2-135m-instruct")
    assert "config.json" in refusal(str(tmp_path))
    assert "no such file, directory or model" in refusal("no-such-model")
