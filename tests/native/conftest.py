"""Every build of the native kernels that this processor can run."""

from collections.abc import Iterator

import pytest
import torch

from asyncllm.executor.host import cpu_flags
from asyncllm.native.library import BUILDS, Library, open_build


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
    flags = cpu_flags()
    name = next((name for name, needed, _ in BUILDS if needed <= flags), None)
    if name is None:
        pytest.skip("no build for this processor")
    return open_build(name)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
