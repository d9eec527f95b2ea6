"""What the engine does with time nobody needs: it lets the executor improve itself, then parks."""

import threading
import time
from collections.abc import Callable

import pytest

from asyncllm.engine.worker import IMPROVE_EVERY_STEPS
from tests.engine.harness import DEPTHS, expected_tokens, submit
from tests.engine.loop import PATIENCE_S, Loop
from tests.fakes import greedy

ROOMY = {"max_context_length": 1024, "num_blocks": 300}


def until_at_rest(loop: Loop) -> None:
    """Wait until the engine thread does not execute one instruction any more."""
    clock_id = time.pthread_getcpuclockid(loop.engine_thread_id)
    for _ in range(50):  # it may still be on its way to bed
        before_s = time.clock_gettime(clock_id)
        threading.Event().wait(0.1)
        if time.clock_gettime(clock_id) == before_s:
            return
    pytest.fail("the engine thread never came to rest")


def test_an_idle_engine_improves_until_nothing_is_left_and_parks(serve: Callable[..., Loop]) -> None:
    loop = serve(num_improvements=5)
    for _ in range(6):  # five pieces, and one answer that there are no more
        assert loop.executor.improving.acquire(timeout=PATIENCE_S)
    until_at_rest(loop)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=30)))
    loop.until_finished(1)
    assert loop.executor.improved_at == [0] * 6


def test_a_parked_engine_burns_no_cpu(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.until_finished(1)
    until_at_rest(loop)
    loop.engine.submit(submit(2, [1, 2, 3]))
    loop.until_finished(2)


def test_work_that_comes_during_an_improvement_is_served_before_the_next_one(serve: Callable[..., Loop]) -> None:
    gate = threading.Semaphore(0)
    loop = serve(num_improvements=3, improve_gate=gate)
    assert loop.executor.improving.acquire(timeout=PATIENCE_S)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=8)))
    gate.release(1000)
    loop.until_finished(1)
    for _ in range(3):
        assert loop.executor.improving.acquire(timeout=PATIENCE_S)
    assert loop.executor.improved_at == [0, 8, 8, 8]


@DEPTHS
def test_an_engine_that_is_never_idle_improves_now_and_then_between_two_steps(
    serve: Callable[..., Loop], depth: int
) -> None:
    gate = threading.Semaphore(0)
    loop = serve(depth, num_improvements=1000, improve_gate=gate, **ROOMY)
    assert loop.executor.improving.acquire(timeout=PATIENCE_S)
    params = greedy(max_tokens=5 * IMPROVE_EVERY_STEPS)
    loop.engine.submit(submit(1, [1, 2, 3], params))
    gate.release(1000)
    loop.until_finished(1)
    # With two in flight, the second one is finished first: one step more between two improvements.
    every = IMPROVE_EVERY_STEPS + depth - 1
    assert loop.executor.improved_at[:5] == [0, every, 2 * every, 3 * every, 4 * every]
    assert loop.tokens[1] == expected_tokens([1, 2, 3], params, max_length=1024)[0]


def test_a_busy_engine_asks_once_where_there_is_nothing_to_improve(serve: Callable[..., Loop]) -> None:
    gate = threading.Semaphore(0)
    loop = serve(gate=gate, improve_gate=threading.Semaphore(1), **ROOMY)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=3 * IMPROVE_EVERY_STEPS)))
    gate.release(1000)
    loop.until_finished(1)
    until_at_rest(loop)
    assert len(loop.executor.improved_at) == 1


def test_stop_ends_an_engine_that_still_has_much_to_improve(serve: Callable[..., Loop]) -> None:
    loop = serve(num_improvements=10**9)
    loop.engine.stop()
    assert loop.engine.join(PATIENCE_S)
    assert loop.executor.closed
