"""A GGUF file as a checkpoint: architecture, text facts and weights under their Hugging Face names.

What an architecture is called there is in `gguf_families.py`, the container in `gguf_header.py`. Torch-free at import.
Any thread.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import TextFacts
from asyncllm.weights.families import read_architecture
from asyncllm.weights.gguf_families import (
    ROPE_TENSORS,
    GGUFFamily,
    family_of,
    hugging_face_config,
    hugging_face_name,
)
from asyncllm.weights.gguf_header import GGUFHeader, TensorInfo, read_header
from asyncllm.weights.gguf_tokenizer import build_tokenizer, text_facts
from asyncllm.weights.progress import Progress
from asyncllm.weights.sampling_defaults import of_gguf

if TYPE_CHECKING:
    import numpy
    import torch
    from tokenizers import Tokenizer

    from asyncllm.layers.blocks import BlockRows

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Those whose values a test compares with the gguf package's, one by one.
SERVED_TYPES = (*DTYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
EXPERT = "{expert}"  # in names of tensors that have all experts' matrices, [E, out, in]
SLAB_VALUES = 1 << 20  # dequantized at once: gguf joins pieces, so a whole embedding would take twice its size


class GGUFCheckpoint:
    """One .gguf file. The header is read and checked on opening."""

    def __init__(self, path: Path, name: str, generation_config: bool = True) -> None:
        """`generation_config`: whether the sampling defaults in the file count."""
        self.name = name
        self.source = str(path)
        self._path = path
        header = read_header(path)
        self._metadata = header.metadata
        self._family = family_of(path, header)
        self._tensors = header.tensors
        self.num_bytes = sum(num_tensor_bytes(path, tensor) for tensor in header.tensors)
        _check_extents(path, header.tensors)
        self.architecture = read_architecture(path, self._config(header))
        self.text: TextFacts = text_facts(path, header.metadata)
        if generation_config:
            self.text = msgspec.structs.replace(self.text, sampling=of_gguf(header.metadata, str(path)))

    def tokenizer(self) -> "Tokenizer":
        """Built from the vocabulary in the metadata."""
        return build_tokenizer(self._path, self._metadata)

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Dequantized one by one, float32, as Hugging Face stores them."""
        import torch

        for name, info, data in self._stored():
            tensor = torch.from_numpy(dequantized(self._path, data, info))
            yield from _as_hugging_face(self._family, name, self._in_halves(name, tensor))

    def tensors_in_blocks(self) -> "Iterator[tuple[str, torch.Tensor | BlockRows]]":
        """See `BlockCheckpoint`: quantized matrices of which converters changed nothing but the order of rows."""
        import torch

        from asyncllm.layers.blocks import BlockRows
        from asyncllm.weights.gguf_blocks import as_blocks, blocks_kind

        for name, info, data in self._stored():
            if self._stays_in_blocks(name, info):
                num_bytes, kind = num_tensor_bytes(self._path, info), ggml_type(self._path, info).name
                stored = data[info.offset : info.offset + num_bytes].reshape(_num_rows(info), -1)
                rows = torch.from_numpy(as_blocks(kind, stored))
                if EXPERT in name:
                    for expert, matrix in enumerate(rows.chunk(info.shape[0])):
                        yield name.format(expert=expert), BlockRows(blocks_kind(kind), matrix)
                else:
                    yield name, BlockRows(blocks_kind(kind), self._in_halves(name, rows))
            else:
                tensor = torch.from_numpy(dequantized(self._path, data, info))
                yield from _as_hugging_face(self._family, name, self._in_halves(name, tensor))

    def num_bytes_in_blocks(self, bytes_per_value: int) -> int:
        """See `BlockCheckpoint`."""
        from asyncllm.layers.blocks import BLOCK_BYTES, BLOCK_VALUES
        from asyncllm.weights.gguf_blocks import blocks_kind

        num_bytes = 0
        for info in self._tensors:
            if info.name not in ROPE_TENSORS:
                num_values = _num_rows(info) * info.shape[-1]
                if self._stays_in_blocks(hugging_face_name(self._path, self._family, info.name), info):
                    kind = blocks_kind(ggml_type(self._path, info).name)
                    num_bytes += num_values // BLOCK_VALUES * BLOCK_BYTES[kind]
                else:
                    num_bytes += num_values * bytes_per_value
        return num_bytes

    def _stays_in_blocks(self, name: str, info: TensorInfo) -> bool:
        from asyncllm.layers.blocks import BLOCK_VALUES

        is_matrix = len(info.shape) == (3 if EXPERT in name else 2) and info.shape[-1] % BLOCK_VALUES == 0
        transposed = name.rpartition(".")[0].endswith(self._family.transposed)
        return is_matrix and not transposed and ggml_type(self._path, info).name != "F32"

    def _stored(self) -> "Iterator[tuple[str, TensorInfo, numpy.ndarray]]":
        """Each tensor by its Hugging Face name, and the bytes of the file: a page that is changed becomes a copy."""
        import numpy

        data = numpy.memmap(self._path, mode="c")
        with Progress(f"loading {self._path.name}", self.num_bytes) as progress:
            for info in self._tensors:
                if info.name in ROPE_TENSORS:
                    continue
                yield hugging_face_name(self._path, self._family, info.name), info, data
                progress.advance(num_tensor_bytes(self._path, info))

    def _in_halves(self, name: str, rows: "torch.Tensor") -> "torch.Tensor":
        """Rows of queries and keys in the order of Hugging Face's rope, where the converter changed that."""
        if not self._family.interleaved:
            return rows
        num_heads = {"q_proj": self.architecture.num_heads, "k_proj": self.architecture.num_kv_heads}
        heads = num_heads.get(name.split(".")[-2])
        return rows if heads is None else unpermute(rows, heads)

    def _config(self, header: GGUFHeader) -> dict[str, Any]:
        def read_floats(name: str) -> tuple[float, ...]:
            import numpy

            info = next(tensor for tensor in header.tensors if tensor.name == name)
            return tuple(dequantized(self._path, numpy.memmap(self._path, mode="r"), info).ravel().tolist())

        return hugging_face_config(self._path, header, read_floats) | {"dtype": _dtype(self._path, header)}


def _as_hugging_face(family: GGUFFamily, name: str, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
    """Undo what the family's converter did to a tensor."""
    module = name.rpartition(".")[0]
    if EXPERT in name:
        for expert, matrix in enumerate(tensor):
            yield name.format(expert=expert), matrix
    elif family.norm_plus_one and module.endswith("norm"):
        yield name, tensor - 1.0
    elif tensor.ndim == 2 and module.endswith(family.transposed):
        yield name, tensor.T
    else:
        yield name, tensor


def dequantized(path: Path, data: "numpy.ndarray", info: TensorInfo) -> "numpy.ndarray":
    """A tensor's values in memory of their own, float32; `data` are the bytes of the file."""
    import gguf.quants
    import numpy

    kind, num_bytes, num_rows = ggml_type(path, info), num_tensor_bytes(path, info), _num_rows(info)
    # dequantize wants rows of bytes.
    stored = data[info.offset : info.offset + num_bytes].reshape(num_rows, -1)
    values = numpy.empty((num_rows, info.shape[-1]), numpy.float32)
    step = max(1, SLAB_VALUES // info.shape[-1])
    for start in range(0, num_rows, step):
        values[start : start + step] = gguf.quants.dequantize(stored[start : start + step], kind)
    return values.reshape(info.shape)


def unpermute(tensor: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """Rows of q or k, weight or bias, from GGUF's interleaved rope order (x0 y0 x1 …) to halves (x0 x1 … y0 y1 …)."""
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, pairs, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def ggml_type(path: Path, info: TensorInfo) -> Any:
    """The `gguf.GGMLQuantizationType` of a tensor, or StartupError for one that is unknown or not served."""
    from gguf.constants import GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(info.type)
    except ValueError:
        raise StartupError(f"{path}: tensor {show(info.name)} has the unknown type {info.type}") from None
    if kind.name not in SERVED_TYPES:
        raise StartupError(
            f"{path}: tensor {show(info.name)} has type {kind.name}, which is not served; "
            f"served: {', '.join(SERVED_TYPES)}"
        )
    return kind


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


def _dtype(path: Path, header: GGUFHeader) -> str:
    """The one float type of all matrices, else bfloat16: quantized values need no more than its 8 bits."""
    kinds = {ggml_type(path, tensor).name for tensor in header.tensors if len(tensor.shape) > 1}
    return DTYPES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"
