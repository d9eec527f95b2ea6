"""Engines for tests, always stopped."""

from collections.abc import Callable, Iterator

import pytest

from asyncllm.types import Capacity
from tests.engine.loop import PATIENCE_S, Loop
from tests.fakes import FakeExecutor, small_capacity

CAPACITY_FIELDS = set(Capacity.__struct_fields__)


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    """Loops whose engines are stopped at the end, whatever the test did."""
    started: list[Loop] = []
    yield started
    for loop in started:
        loop.engine.stop()
        if isinstance(loop.executor, FakeExecutor):
            for gate in (loop.executor.gate, loop.executor.improve_gate):
                if gate is not None:
                    gate.release(1000)
        assert loop.engine.join(PATIENCE_S)


@pytest.fixture
def serve(loops: list[Loop]) -> Callable[..., Loop]:
    """Start an engine on a fake executor and wait until it is ready."""

    def start(depth: int = 1, max_queued: int = 64, **options) -> Loop:
        capacity = small_capacity(**{key: options.pop(key) for key in CAPACITY_FIELDS & options.keys()})
        loop = Loop(FakeExecutor(capacity, depth, **options), max_queued=max_queued)
        loops.append(loop)
        loop.start()
        loop.until_ready()
        return loop

    return start
