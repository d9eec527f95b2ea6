"""A GGUF file as a checkpoint: architecture, text facts and weights under their Hugging Face names.

Knows the `llama` keys and tensor names of GGUF; the container is in `gguf_header.py`. Torch-free at import. Any thread.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.gguf_header import GGUFHeader, TensorInfo, read_header
from asyncllm.weights.gguf_tokenizer import build_tokenizer, text_facts

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

T = TypeVar("T", int, float, str, bool)

SERVED_ARCHITECTURES = ("llama",)

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFCheckpoint:
    """One .gguf file. The header is read and checked on opening."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._path = path
        header = read_header(path)
        self._metadata = header.metadata
        self._tensors = header.tensors
        self.architecture = _architecture(path, header)
        self.text: TextFacts = text_facts(path, header.metadata)
        self.num_bytes = sum(num_tensor_bytes(path, tensor) for tensor in header.tensors)
        _check_extents(path, header.tensors)

    def tokenizer(self) -> "Tokenizer":
        """Built from the vocabulary in the metadata."""
        return build_tokenizer(self._path, self._metadata)

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Dequantized one by one, float32; q and k rows back in Hugging Face's order."""
        import gguf.quants
        import numpy
        import torch

        data = numpy.memmap(self._path, mode="r")
        num_heads = {"q_proj": self.architecture.num_heads, "k_proj": self.architecture.num_kv_heads}
        for info in self._tensors:
            kind, num_bytes = ggml_type(self._path, info), num_tensor_bytes(self._path, info)
            stored = data[info.offset : info.offset + num_bytes]
            try:
                # dequantize wants rows of bytes; the plain float types are views of the whole.
                flat = gguf.quants.dequantize(stored.reshape(-1, num_bytes // _num_rows(info)), kind)
            except NotImplementedError:
                raise StartupError(
                    f"{self._path}: tensor {info.name}: type {kind.name} cannot be dequantized"
                ) from None
            name = hugging_face_name(self._path, info.name)
            # A float32 tensor is a read-only view of the map; torch wants memory it may write.
            tensor = torch.from_numpy(flat if flat.flags.writeable else flat.copy()).reshape(info.shape)
            heads = num_heads.get(name.split(".")[-2])
            yield name, tensor if heads is None else unpermute(tensor, heads)


def unpermute(tensor: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """Rows of q or k, weight or bias, from GGUF's interleaved rope order (x0 y0 x1 …) to halves (x0 x1 … y0 y1 …)."""
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, pairs, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def hugging_face_name(path: Path, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    known = BLOCK_NAMES.get(block[2]) if block else GLOBAL_NAMES.get(stem)
    if known is None or suffix not in ("weight", "bias"):
        raise StartupError(f"{path}: unexpected tensor {show(name)} for architecture llama")
    return f"model.layers.{block[1]}.{known}.{suffix}" if block else f"{known}.{suffix}"


def ggml_type(path: Path, info: TensorInfo) -> Any:
    """The `gguf.GGMLQuantizationType` of a tensor, or StartupError for a number that names none."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(info.type)
    except ValueError:
        raise StartupError(f"{path}: tensor {show(info.name)} has the unknown type {info.type}") from None


def num_tensor_bytes(path: Path, info: TensorInfo) -> int:
    """Bytes a tensor takes in the file."""
    from gguf.constants import GGML_QUANT_SIZES

    kind = ggml_type(path, info)
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % values_per_block:
        raise StartupError(
            f"{path}: tensor {show(info.name)} of type {kind.name} has rows of {info.shape[-1]} values, "
            f"not a multiple of {values_per_block}"
        )
    return _num_rows(info) * (info.shape[-1] // values_per_block) * bytes_per_block


def _num_rows(info: TensorInfo) -> int:
    rows = 1
    for dimension in info.shape[:-1]:
        rows *= dimension
    return rows


def _check_extents(path: Path, tensors: list[TensorInfo]) -> None:
    """A download that stopped half-way is found on opening, not after a minute of loading."""
    size = path.stat().st_size
    for tensor in tensors:
        end = tensor.offset + num_tensor_bytes(path, tensor)
        if end > size:
            raise StartupError(f"{path}: truncated: tensor {show(tensor.name)} ends at byte {end} of {size}")


def _architecture(path: Path, header: GGUFHeader) -> ModelArchitecture:
    metadata = header.metadata
    family = _value(path, metadata, "general.architecture", str)
    if family not in SERVED_ARCHITECTURES:
        served = ", ".join(SERVED_ARCHITECTURES)
        raise StartupError(f"{path}: GGUF architecture {show(family)} is not served; served: {served}")
    names = {tensor.name for tensor in header.tensors}
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        kind = scaling if scaling != "none" else "llama3"
        raise StartupError(f"{path}: rope scaling {show(kind)} is not served; served: none")
    hidden_size = _value(path, metadata, f"{family}.embedding_length", int)
    num_heads = _value(path, metadata, f"{family}.attention.head_count", int)
    if hidden_size < 1 or num_heads < 1:
        raise StartupError(f"{path}: embedding_length {hidden_size} with head_count {num_heads} makes no model")
    head_dim = _value(path, metadata, f"{family}.attention.key_length", int, hidden_size // num_heads)
    rope_dim = _value(path, metadata, f"{family}.rope.dimension_count", int, head_dim)
    if rope_dim != head_dim:
        raise StartupError(f"{path}: rope over {rope_dim} of {head_dim} dimensions is not served; served: all of them")
    return ModelArchitecture(
        family=family,
        vocab_size=_vocab_size(path, header),
        hidden_size=hidden_size,
        intermediate_size=_value(path, metadata, f"{family}.feed_forward_length", int),
        num_layers=_value(path, metadata, f"{family}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=_value(path, metadata, f"{family}.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=_value(path, metadata, f"{family}.attention.layer_norm_rms_epsilon", float),
        rope_theta=_value(path, metadata, f"{family}.rope.freq_base", float, 10000.0),
        max_position=_value(path, metadata, f"{family}.context_length", int),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        dtype=_dtype(path, header),
    )


def _vocab_size(path: Path, header: GGUFHeader) -> int:
    """Rows of the embedding: the only figure that every writer agrees on."""
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    raise StartupError(f"{path}: tensor token_embd.weight is missing")


def _dtype(path: Path, header: GGUFHeader) -> str:
    """The one float type of all matrices, else bfloat16: quantized values need no more than its 8 bits."""
    kinds = {ggml_type(path, tensor).name for tensor in header.tensors if len(tensor.shape) > 1}
    return DTYPES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _value(path: Path, metadata: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """A metadata value of one type; StartupError where it is missing or of another type."""
    value = metadata.get(key, default)
    if value is None:
        raise StartupError(f"{path}: GGUF key {key} is missing")
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise StartupError(f"{path}: GGUF key {key} = {show(value)}: expected {kind.__name__}")
    return value
