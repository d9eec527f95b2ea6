"""GGUF files: written by gguf's own writer, read by ours."""

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.errors import StartupError
from asyncllm.layers.blocks import BlockRows
from asyncllm.weights.base import BlockCheckpoint
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.gguf_header import read_header
from asyncllm.weights.loader import load_model
from perf.gguf_file import write_and_close
from tests.models.paged import PagedRunner
from tests.weights.converted import write_converted
from tests.weights.tiny import llama, save_gguf

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # rows of whole quantization blocks


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    save_gguf(path, llama(vocab_size=259))
    return path


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_tensors_are_what_gguf_dequantizes(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "model.gguf"
    expected = save_gguf(path, llama(vocab_size=259, **WIDE), kind)
    checkpoint = open_checkpoint(str(path))
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        numpy.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)
    plain = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
    assert checkpoint.architecture.dtype == plain.get(kind, "bfloat16")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_logits_are_those_of_the_model_that_was_written(tmp_path: Path, tied: bool, biases: bool) -> None:
    reference = llama(vocab_size=259, tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    save_gguf(tmp_path / "model.gguf", reference)
    model = load_model(open_checkpoint(str(tmp_path)), TorchAttention(), torch.float32, torch.device("cpu"))
    tokens = list(range(3, 20))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(PagedRunner(model).step([("a", tokens)])[0], expected, rtol=1e-4, atol=1e-4)


def test_metadata_reads_as_the_reference_reader_has_it(small_file: Path) -> None:
    header, reference = read_header(small_file), gguf.GGUFReader(small_file)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents(), key
    for ours, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert (ours.name, ours.type, ours.offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert ours.shape == tuple(int(size) for size in theirs.shape[::-1])


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(StartupError) as caught:
        open_checkpoint(str(path))
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert_refused(path, "empty")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html>rate limited</html>")
    assert_refused(path, "not a GGUF file")


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_an_unknown_version_is_refused(tmp_path: Path, small_file: Path, version: int) -> None:
    data = bytearray(small_file.read_bytes())
    data[4:8] = version.to_bytes(4, "little")
    path = tmp_path / "version.gguf"
    path.write_bytes(data)
    assert_refused(path, f"version {version}")


@pytest.mark.parametrize("share", [0.00003, 0.001, 0.01, 0.03, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, small_file: Path, share: float) -> None:
    data = small_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(path)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 1 << 30), value=st.integers(0, 255))
def test_one_wrong_byte_in_the_header_is_a_startup_error_or_harmless(small_file: Path, place: int, value: int) -> None:
    data = bytearray(small_file.read_bytes())
    first_tensor = read_header(small_file).tensors[0].offset
    data[place % first_tensor] = value
    path = small_file.with_name("flipped.gguf")
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(str(path))
        checkpoint.tokenizer()
    except StartupError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.rope.scaling.type": "spiral"}, ["rope scaling spiral"]),
        ({"llama.rope.dimension_count": 14}, ["rope over 14 of 12"]),
        ({"tokenizer.ggml.pre": "tekken"}, ["tekken", "smollm"]),
        ({"tokenizer.ggml.bos_token_id": 999}, ["bos_token_id = 999"]),
        ({"llama.block_count": "many"}, ["llama.block_count", "expected int"]),
    ],
)
def test_what_is_not_served_is_named(tmp_path: Path, extra: dict[str, object], words: list[str]) -> None:
    path = tmp_path / "other.gguf"
    save_gguf(path, llama(vocab_size=259), extra=extra)
    assert_refused(path, *words)


def test_another_architecture_is_refused_with_those_served(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    write_and_close(writer)
    assert_refused(path, "architecture mamba is not served; served: llama")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    save_gguf(path, llama(vocab_size=259), leave_out=("llama.feed_forward_length",))
    assert_refused(path, "llama.feed_forward_length is missing")


@pytest.mark.parametrize("kind", [Kind.I32, Kind.IQ4_NL, Kind.TQ1_0, Kind.MXFP4, Kind.Q8_K, 999])
def test_a_type_that_is_not_served_is_named_on_opening(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "other.gguf"
    save_gguf(path, llama(vocab_size=259))
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    # Behind the name: number of dimensions (4 bytes), two dimensions (16), type (4).
    place = data.index(name) + len(name) + 20
    data[place : place + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(data)
    said = f"has type {kind.name}, which is not served; served: F32, F16" if kind in list(Kind) else "unknown type 999"
    assert_refused(path, "blk.1.ffn_up.weight", said)


K_QUANTS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.mark.parametrize("kind", K_QUANTS)
def test_blocks_that_only_llama_cpp_can_write_load_as_gguf_dequantizes_them(tmp_path: Path, kind: Kind) -> None:
    """The package reads K-quants but does not write them, so here every block is random, its float16 scales finite."""
    reference = llama(vocab_size=259, hidden_size=256, intermediate_size=512, head_dim=64)
    rng = numpy.random.default_rng(kind)
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]

    def random_blocks(data: numpy.ndarray, asked: Kind) -> numpy.ndarray:
        if asked is not kind:
            return quantize(data, asked)
        blocks = rng.integers(0, 0x3C, (*data.shape[:-1], data.shape[-1] // values * num_bytes), dtype=numpy.uint8)
        return blocks

    quantize = gguf.quants.quantize
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf.quants, "quantize", random_blocks)
        expected = save_gguf(tmp_path / "model.gguf", reference, kind)
    tensors = dict(open_checkpoint(str(tmp_path / "model.gguf")).tensors())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert numpy.isfinite(expected[name]).all() and expected[name].any()
        numpy.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.F16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_matrices_are_also_handed_out_in_blocks_with_rows_in_the_same_order(tmp_path: Path, kind: Kind) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **WIDE), kind)
    checkpoint = open_checkpoint(str(tmp_path))
    assert isinstance(checkpoint, BlockCheckpoint)
    in_blocks = dict(checkpoint.tensors_in_blocks())
    plain = dict(checkpoint.tensors())
    assert in_blocks.keys() == plain.keys()
    for name, tensor in plain.items():
        found = in_blocks[name]
        assert isinstance(found, BlockRows) == (tensor.ndim == 2), name
        values = found.values().float() if isinstance(found, BlockRows) else found
        torch.testing.assert_close(values, tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_0, Kind.F16])
def test_the_bytes_in_blocks_are_known_before_they_are_read(tmp_path: Path, kind: Kind) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **WIDE), kind)
    checkpoint = open_checkpoint(str(tmp_path))
    assert isinstance(checkpoint, BlockCheckpoint)
    found = [tensor for _, tensor in checkpoint.tensors_in_blocks()]
    expected = sum(part.rows.nbytes if isinstance(part, BlockRows) else 2 * part.numel() for part in found)
    assert checkpoint.num_bytes_in_blocks(2) == expected


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1])
def test_matrices_of_other_types_are_handed_out_in_eight_bits(tmp_path: Path, kind: Kind) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **WIDE), kind)
    checkpoint = open_checkpoint(str(tmp_path))
    assert isinstance(checkpoint, BlockCheckpoint)
    plain = dict(checkpoint.tensors())
    for name, tensor in checkpoint.tensors_in_blocks():
        if isinstance(tensor, torch.Tensor):
            assert tensor.ndim == 1 and torch.equal(tensor, plain[name]), name
        else:
            most = plain[name].abs().max()
            torch.testing.assert_close(tensor.values(), plain[name], rtol=0, atol=0.01 * float(most), msg=name)


def test_matrices_of_plain_floats_are_handed_out_as_values(tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **WIDE), Kind.F32)
    checkpoint = open_checkpoint(str(tmp_path))
    assert isinstance(checkpoint, BlockCheckpoint)
    plain = dict(checkpoint.tensors())
    for name, tensor in checkpoint.tensors_in_blocks():
        assert isinstance(tensor, torch.Tensor) and torch.equal(tensor, plain[name]), name


def test_a_large_tensor_is_dequantized_in_slabs_with_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **WIDE), Kind.Q8_0)
    whole = dict(open_checkpoint(str(tmp_path)).tensors())
    monkeypatch.setattr("asyncllm.weights.gguf.SLAB_VALUES", 5 * WIDE["hidden_size"])
    for name, tensor in open_checkpoint(str(tmp_path)).tensors():
        assert torch.equal(tensor, whole[name]), name


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [1.0, 2.0, 3.0, 4.5],
    "partial_rotary_factor": 0.5,
}
CONVERTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    ("qwen2", {}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": True}),
    ("smollm3", {"num_hidden_layers": 5, "use_sliding_window": False}),
    ("gemma", {"tie_word_embeddings": True}),
    ("gemma2", {"query_pre_attn_scalar": 12, "sliding_window": 5, "tie_word_embeddings": True}),
    ("gemma3", {"query_pre_attn_scalar": 12, "sliding_window": 5, "num_hidden_layers": 7}),
    ("phi3", {"sliding_window": 7}),
    ("phi3", {"rope_parameters": LONGROPE, "head_dim": 16, "hidden_size": 64, "original_max_position_embeddings": 24}),
    ("gpt2", {}),
]


@pytest.mark.parametrize(("family", "settings"), CONVERTED, ids=lambda item: item if isinstance(item, str) else "")
def test_a_converted_file_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    reference = llama(family=family, **{"vocab_size": 259} | settings)
    write_converted(tmp_path / "model.gguf", family, reference)
    model = load_model(open_checkpoint(str(tmp_path)), TorchAttention(), torch.float32, torch.device("cpu"))
    tokens = [(7 * i) % 250 + 3 for i in range(40)]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(PagedRunner(model).step([("a", tokens)])[0], expected, rtol=1e-4, atol=1e-4)
