"""Every build of the native kernels that this processor can run; one torch thread."""

import subprocess
from pathlib import Path

import pytest

from asyncllm.executor.host import cpu_flags
from asyncllm.native import library as c
from asyncllm.native.builds import AVX512, BUILDS, find_library, open_build
from asyncllm.native.library import Library
from tests.one_thread import one_thread

__all__ = ["best_library", "emulated_tiles", "library", "one_thread"]

RUNNABLE = [name for name, needed, _ in BUILDS if needed <= cpu_flags()]
EMULATED = "emulated tiles"


@pytest.fixture(scope="session")
def emulated_tiles(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The build for AMX with memory in the place of its registers, for all that is built on them."""
    if lacking := AVX512 - cpu_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    file = tmp_path_factory.mktemp("emulated") / "amx.so"
    instructions = ["avx2", "fma", "f16c", *sorted(AVX512), "amx-tile", "amx-int8", "amx-bf16"]
    flags = [f"-m{name.replace('_', '')}" for name in instructions] + ["-std=c++20", "-O3", "-ffp-contract=off"]
    macros = [f'-DASYNCLLM_SOURCES="{c.sources_digest()}"', "-DASYNCLLM_EMULATED_TILES"]
    source = Path(c.__file__).with_name("decoder.cpp")
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-pthread", *flags, *macros, source, "-o", file],
        check=True,
        timeout=600,
        capture_output=True,
    )
    return Library(file, "AVX-512 with bfloat16 and emulated AMX")


@pytest.fixture(scope="session", params=[*RUNNABLE, EMULATED])
def library(request: pytest.FixtureRequest) -> Library:
    """One that was not built fails, and says how to build it."""
    if request.param == EMULATED:
        return request.getfixturevalue("emulated_tiles")
    return open_build(request.param)


@pytest.fixture(scope="session")
def best_library() -> Library:
    """The build that a server here would run."""
    found = find_library(cpu_flags())
    if found == "no build for this processor":
        pytest.skip(found)
    assert isinstance(found, Library), found
    return found
