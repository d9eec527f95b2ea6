"""A Hugging Face directory as a checkpoint: config.json, *.safetensors (one or sharded), tokenizer files.

Reads headers itself, so that opening needs no torch; tensors come through the safetensors library. Any thread.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.hugging_face import architecture, read_json, text_facts
from asyncllm.weights.progress import Progress

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SERVED_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a value
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorEntry(msgspec.Struct, frozen=True):
    """What a shard's header says of one tensor."""

    name: str
    dtype: str  # in the format's spelling: F32, BF16, …
    shape: tuple[int, ...]
    num_bytes: int


class SafetensorsCheckpoint:
    """A directory with config.json. Headers of all shards are read and checked on opening."""

    def __init__(self, directory: Path, name: str, generation_config: bool = True) -> None:
        """`generation_config`: whether generation_config.json counts."""
        self.name = name
        self.source = str(directory)
        self._directory = directory
        self.architecture: ModelArchitecture = architecture(directory)
        self._shards = read_shards(directory)
        for shard, entries in self._shards.items():
            _check_dtypes(shard, entries)
        self.num_bytes = sum(entry.num_bytes for entries in self._shards.values() for entry in entries)
        self._tokenizer: Tokenizer | None = None
        self.text: TextFacts = text_facts(directory, self.tokenizer(), generation_config)

    def tokenizer(self) -> "Tokenizer":
        """From tokenizer.json; other formats are converted by transformers. Read once: conversion can take seconds."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._directory)
        return self._tokenizer.from_str(self._tokenizer.to_str())

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Views of one mapped shard after another; rotary tables that old exporters wrote are left out.

        A shard is unmapped once nobody holds a view of it: keep none beyond the next one.
        """
        from safetensors import SafetensorError, safe_open

        with Progress(f"loading {self.name}", self.num_bytes) as progress:
            for shard, entries in self._shards.items():
                try:
                    with safe_open(shard, framework="pt") as file:
                        for entry in entries:
                            if not entry.name.endswith(".rotary_emb.inv_freq"):
                                yield entry.name, file.get_tensor(entry.name)
                            progress.advance(entry.num_bytes)
                except (SafetensorError, OSError) as error:
                    raise StartupError(f"{shard}: damaged safetensors file: {show(str(error))}") from None


def read_shards(directory: Path) -> dict[Path, list[TensorEntry]]:
    """Every shard's header, in the order of names. Raises StartupError for files that are missing or do not add up."""
    shards = {directory / name: read_header(directory / name) for name in shard_names(directory)}
    place: dict[str, str] = {}
    for shard, entries in shards.items():
        for entry in entries:
            if entry.name in place:
                raise StartupError(f"{shard}: tensor {show(entry.name)} is in {place[entry.name]} as well")
            place[entry.name] = shard.name
    if (directory / INDEX_FILE).is_file():
        for name, file in _weight_map(directory).items():
            if place.get(name) != file:
                there = f"it is in {place[name]}" if name in place else "no shard has it"
                raise StartupError(f"{directory / INDEX_FILE}: tensor {show(name)} should be in {file}, but {there}")
    return shards


def shard_names(directory: Path) -> list[str]:
    """File names from the index, or the one file there is."""
    if (directory / INDEX_FILE).is_file():
        names = shard_names_of_index(directory)
        for name in names:
            if not (directory / name).is_file():
                raise StartupError(f"{directory}: shard {name} is missing ({len(names)} are listed in {INDEX_FILE})")
        return names
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    if len(names) == 1:
        return names
    if names:
        raise StartupError(f"{directory}: {len(names)} .safetensors files but no {INDEX_FILE}")
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise StartupError(
            f"{directory / pickles[0]}: pickled weights can run any code and are never loaded: "
            "convert the model to safetensors"
        )
    raise StartupError(f"{directory}: no .safetensors file (pickled .bin and .pt files are never loaded)")


def shard_names_of_index(directory: Path) -> list[str]:
    """The files that the index lists, there or not."""
    return sorted(set(_weight_map(directory).values()))


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> shard."""
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{directory / INDEX_FILE}: weight_map is missing or empty")
    for name in weight_map.values():
        # An index is data of strangers: it may not lead out of its directory.
        if not isinstance(name, str) or Path(name).name != name:
            raise StartupError(f"{directory / INDEX_FILE}: shard {show(name)} is not a plain file name")
    return weight_map


def read_header(shard: Path) -> list[TensorEntry]:
    """A shard's tensors in file order, after checking that they fill the file exactly."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise StartupError(f"{shard}: truncated or damaged safetensors file ({size} bytes)")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        placed = sorted(
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]), name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        )
        entries = [
            TensorEntry(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), end - start)
            for start, end, name, entry in placed
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise StartupError(f"{shard}: damaged safetensors file: its header is not readable") from None
    expected = 0
    for (start, end, name, _), entry in zip(placed, entries):
        num_bytes = math.prod(entry.shape) * SERVED_DTYPES.get(entry.dtype, 0)
        if start != expected or end < start or (num_bytes and num_bytes != end - start):
            raise StartupError(f"{shard}: damaged safetensors file: tensor {show(name)} is not where it should be")
        expected = end
    if 8 + length + expected != size:
        raise StartupError(f"{shard}: truncated or damaged: {size} bytes, its header says {8 + length + expected}")
    return entries


def _check_dtypes(shard: Path, entries: list[TensorEntry]) -> None:
    for entry in entries:
        if entry.dtype not in SERVED_DTYPES:
            raise StartupError(
                f"{shard}: tensor {show(entry.name)} has dtype {entry.dtype}; served: {', '.join(SERVED_DTYPES)}"
            )


def load_tokenizer(directory: Path) -> "Tokenizer":
    """From tokenizer.json, or converted by transformers. Raises StartupError where there is none."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise StartupError(f"{file}: not a tokenizer: {show(str(error))}") from None
    if not any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise StartupError(f"{directory}: no tokenizer.json")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory).backend_tokenizer
    except Exception as error:  # whatever a converter meets in a stranger's files
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(
            f"{directory}: no tokenizer.json, and its tokenizer cannot be converted: {show(reason)}"
        ) from None
