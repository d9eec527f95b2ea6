"""Every build of the native kernels that this processor can run; one torch thread."""

import pytest

from asyncllm.executor.host import cpu_flags
from asyncllm.native.library import BUILDS, Library, find_library, open_build
from tests.one_thread import one_thread

__all__ = ["best_library", "library", "one_thread"]


@pytest.fixture(scope="session", params=BUILDS, ids=lambda build: build[0])
def library(request: pytest.FixtureRequest) -> Library:
    """Skipped only for what the processor lacks: one that was not built fails, and says how to build it."""
    name, needed, _ = request.param
    if lacking := needed - cpu_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    return open_build(name)


@pytest.fixture(scope="session")
def best_library() -> Library:
    """The build that a server here would run."""
    found = find_library(cpu_flags())
    if found == "no build for this processor":
        pytest.skip(found)
    assert isinstance(found, Library), found
    return found
