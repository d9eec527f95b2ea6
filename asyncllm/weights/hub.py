"""Models from the Hugging Face hub, by way of its client, which knows caches, tokens, revisions, mirrors, resumption.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count as they do everywhere. Nothing is fetched that could run code:
no pickles, no Python. Torch-free; the client is imported on first use, since that takes longer than opening a file.
Any thread.
"""

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncllm.errors import StartupError
from asyncllm.weights.hugging_face import architecture
from asyncllm.weights.progress import LOG_INTERVAL_S, described
from asyncllm.weights.safetensors import INDEX_FILE, SINGLE_FILE, shard_names_of_index

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"({HUB_NAME.pattern})/([\w./-]+\.gguf)")
TEXT_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]

log = logging.getLogger("asyncllm.weights")


def fetch_text(repository: str, revision: str) -> Path:
    """The directory of a model with all but its weights. Raises StartupError, one line."""
    return _fetch(repository, revision, TEXT_PATTERNS)


def fetch_model(repository: str, revision: str) -> Path:
    """The directory of a model. One that is not served is refused before its weights are fetched."""
    directory = fetch_text(repository, revision)
    if not (directory / "config.json").is_file():
        raise StartupError(
            f"{repository} on the hub has no config.json; if it holds .gguf files, name one: {repository}/FILE.gguf"
        )
    architecture(directory)
    # The snapshot's directory is named after the commit: what the branch says by now does not matter.
    commit = directory.name
    if (directory / INDEX_FILE).is_file():
        return _fetch(repository, commit, shard_names_of_index(directory))
    directory = _fetch(repository, commit, [SINGLE_FILE])
    if not (directory / SINGLE_FILE).is_file():
        directory = _fetch(repository, commit, ["*.safetensors"])
    return directory


def fetch_file(repository: str, name: str, revision: str) -> Path:
    """One file of a repository, such as a quantized model. Raises StartupError, one line."""
    directory = _fetch(repository, revision, [name])
    if not (directory / name).is_file():
        raise StartupError(f"{repository} on the hub has no file {name}")
    return directory / name


def fetch_adapter(repository: str, names: Sequence[str]) -> Path:
    """The directory of an adapter, with those of these files that it has. Raises StartupError, one line."""
    return _fetch(repository, "", list(names))


def stored_on_hub(repository: str, revision: str) -> dict[str, int]:
    """Values of each type in a repository's safetensors, from headers alone; empty where that is not to be had.

    Raises StartupError for a repository without any.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(repository, revision=revision or None)
        return {str(kind): count for kind, count in metadata.parameter_count.items()}
    except NotASafetensorsRepoError:
        raise StartupError(
            f"{repository} on the hub has no .safetensors file (pickled .bin and .pt files are never loaded)"
        ) from None
    except Exception:  # offline, or refused: a probe that knows less is still one
        log.debug("no safetensors metadata of %s", repository, exc_info=True)
        return {}


def _fetch(repository: str, revision: str, patterns: list[str]) -> Path:
    """The snapshot's directory, with the files that match in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label = f"{repository} at {revision}" if revision else repository
    bar = None if sys.stderr.isatty() else logging_bar(f"downloading {repository}")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns, tqdm_class=bar))
    except GatedRepoError:
        reason = "access is gated; accept its terms and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such model on the hub (or it is private: set HF_TOKEN), and no such file or directory"
    except RevisionNotFoundError:
        reason = "no such revision"
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        # The client's name for a snapshot of which files are missing; older ones do not tell the two apart.
        partly = "only a part of it is" if type(error).__name__ == "IncompleteSnapshotError" else "not"
        reason = f"{partly} in the local cache, and " + (
            "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        )
    except Exception as error:  # of the client, of its HTTP library, of the file system: all end the start alike
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StartupError(f"cannot download {label}: {reason}") from None
    raise StartupError(f"no such file or directory, and the hub has no {label}: {reason}")


def logging_bar(what: str, clock: Callable[[], float] = time.monotonic) -> type[Any]:
    """A progress bar class for the client that writes a log line now and then: a bar makes no sense in a file."""
    from huggingface_hub.utils import tqdm as hub_bar

    class LoggingBar(hub_bar):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            name = str(options.get("name", ""))
            # Of the client's bars, one counts files and one counts bytes on the wire before they are decompressed.
            self._counts = options.get("unit") == "B" and not name.endswith(".transfer")
            self._started_s = self._said_s = clock()
            # Without a terminal the client's bars are off; on, they write into a text that nobody reads.
            super().__init__(*arguments, **options | {"disable": False, "file": io.StringIO(), "mininterval": 0.5})

        def display(self, *arguments: Any, **options: Any) -> None:
            now_s = clock()
            if self._counts and self.n and now_s - self._said_s >= LOG_INTERVAL_S:
                self._said_s = now_s
                log.info("%s", described(what, int(self.n), int(self.total or 0), now_s - self._started_s))

    return LoggingBar
