"""A Hugging Face directory as a checkpoint: config.json, *.safetensors (one or sharded), tokenizer files.

Reads headers itself, so that opening needs no torch; tensors come through the safetensors library. Any thread.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.hugging_face import architecture, read_json, text_facts

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SERVED_DTYPES = {"F32", "F16", "BF16"}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


class SafetensorsCheckpoint:
    """A directory with config.json. Headers of all shards are read and checked on opening."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._directory = directory
        self.architecture: ModelArchitecture = architecture(directory)
        self._shards = [directory / file for file in _shard_names(directory)]
        self.num_bytes = sum(_checked_data_bytes(shard) for shard in self._shards)
        self._tokenizer: Tokenizer | None = None
        self.text: TextFacts = text_facts(directory, self.tokenizer())

    def tokenizer(self) -> "Tokenizer":
        """From tokenizer.json; other formats are converted by transformers. Read once: conversion can take seconds."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._directory)
        return self._tokenizer.from_str(self._tokenizer.to_str())

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Views of one mapped shard after another; rotary tables that old exporters wrote are left out."""
        from safetensors import SafetensorError, safe_open

        for shard in self._shards:
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        if not name.endswith(".rotary_emb.inv_freq"):
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise StartupError(f"{shard}: damaged safetensors file: {show(str(error))}") from None


def _shard_names(directory: Path) -> list[str]:
    """File names from the index, or the one file there is."""
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StartupError(f"{directory / INDEX_FILE}: weight_map is missing or empty")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # An index is data of strangers: it may not lead out of its directory.
            if Path(name).name != name:
                raise StartupError(f"{directory / INDEX_FILE}: shard {show(name)} is not a plain file name")
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
    raise StartupError(f"{directory}: no .safetensors file (pickled .bin and .pt files are not loaded)")


def _checked_data_bytes(shard: Path) -> int:
    """Bytes of tensor data, after checking that the header is sound and the file as long as it says."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise StartupError(f"{shard}: truncated or damaged safetensors file ({size} bytes)")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for _, entry in entries), default=0)
        dtypes = {name: str(entry["dtype"]) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise StartupError(f"{shard}: damaged safetensors file: its header is not readable") from None
    if 8 + length + end != size:
        raise StartupError(f"{shard}: truncated or damaged: {size} bytes, its header says {8 + length + end}")
    for name, dtype in dtypes.items():
        if dtype not in SERVED_DTYPES:
            raise StartupError(f"{shard}: tensor {show(name)} has dtype {dtype}; served: F32, F16, BF16")
    return end


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
