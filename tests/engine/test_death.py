"""How the engine thread ends when something breaks: what it says, and in which order."""

import threading
from collections.abc import Callable

import pytest

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.errors import StartupError
from asyncllm.types import EngineDead
from tests.engine.harness import DEPTHS, submit
from tests.engine.loop import PATIENCE_S, Loop
from tests.fakes import FakeExecutor, greedy, small_capacity


@pytest.mark.parametrize("phase", ["launch", "wait"])
@DEPTHS
def test_a_failing_step_kills_the_engine_and_says_so_once(serve: Callable[..., Loop], phase: str, depth: int) -> None:
    loop = serve(depth, **{f"fail_{phase}_at": 3})
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=30)))
    dead = loop.until_dead()
    assert (dead.message, dead.during_startup) == ("the engine stopped: RuntimeError", False)
    assert (dead.phase, dead.step, dead.request_ids) == (phase, 3, [1])
    assert "Traceback" in dead.detail
    assert len(loop.tokens[1]) < 3
    assert 1 not in loop.finished
    assert loop.executor.closed


@DEPTHS
def test_a_death_names_the_requests_of_every_step_in_flight_and_no_other(
    serve: Callable[..., Loop], depth: int
) -> None:
    gate = threading.Semaphore(0)
    loop = serve(depth, gate=gate, max_sequences=2, fail_wait_at=2)
    for request_id in (7, 8, 9):
        loop.engine.submit(submit(request_id, [request_id, 2, 3], greedy(max_tokens=30)))
    gate.release(1000)
    dead = loop.until_dead()
    assert (dead.phase, dead.step) == ("wait", 2)
    assert dead.request_ids[0] == 7 and set(dead.request_ids) <= {7, 8}, "9 waits: there is room for two"


def test_a_broken_plan_is_told_with_the_step_it_was_for(
    serve: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = serve()
    monkeypatch.setattr("asyncllm.engine.scheduler.StepBuilder.build", lambda builder: 1 // 0)
    loop.engine.submit(submit(1, [1, 2, 3]))
    dead = loop.until_dead()
    assert (dead.message, dead.phase, dead.step, dead.request_ids) == (
        "the engine stopped: ZeroDivisionError", "schedule", 1, [],
    )  # fmt: skip


def test_a_failing_improvement_is_no_steps_fault(loops: list[Loop]) -> None:
    loop = Loop(FakeExecutor(small_capacity(), num_improvements=-1))  # asking it once is asking too often
    loops.append(loop)
    loop.start()
    dead = loop.until_dead()
    assert (dead.message, dead.during_startup) == ("the engine stopped: AssertionError", False)
    assert (dead.phase, dead.step, dead.request_ids) == ("improve", 0, [])


def test_death_is_told_before_the_device_is_closed_even_where_closing_never_ends(serve: Callable[..., Loop]) -> None:
    closing, closed = threading.Event(), threading.Event()

    def on_close() -> None:
        closing.set()
        closed.wait()

    loop = serve(fail_launch_at=1, on_close=on_close)
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.drain_until(lambda: isinstance(loop.outputs[-1], EngineDead))
    loop.engine.stop()
    assert closing.wait(PATIENCE_S)
    assert loop.engine.is_alive
    closed.set()


def test_a_dead_engine_closes_its_device_also_where_nobody_asks_it_to_stop(serve: Callable[..., Loop]) -> None:
    loop = serve(fail_launch_at=1)
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.drain_until(lambda: isinstance(loop.outputs[-1], EngineDead))
    assert loop.engine.join(PATIENCE_S)
    assert loop.executor.closed


@pytest.mark.parametrize("fault", [{"fail_launch_at": 1}, {}])
def test_an_error_while_closing_is_logged_and_ends_nothing_else(
    serve: Callable[..., Loop], caplog: pytest.LogCaptureFixture, fault: dict[str, int]
) -> None:
    loop = serve(on_close=lambda: 1 // 0, **fault)
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.drain_until(lambda: bool(loop.finished) or isinstance(loop.outputs[-1], EngineDead))
    loop.engine.stop()
    assert loop.engine.join(PATIENCE_S)
    loop.drain()
    assert sum(isinstance(output, EngineDead) for output in loop.outputs) == len(fault)
    assert "closing the executor failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_notify_that_fails_because_the_loop_is_gone_ends_the_thread_and_closes_the_executor() -> None:
    def notify() -> None:
        raise RuntimeError("Event loop is closed")

    executor = FakeExecutor(small_capacity())
    engine = Engine(lambda report: executor, SchedulerConfig(), CacheConfig())
    engine.start(notify)
    assert engine.join(PATIENCE_S)
    assert executor.closed


def test_a_start_up_error_reaches_the_loop_in_its_own_words(loops: list[Loop]) -> None:
    loop = Loop(StartupError("model.path: no such file"))
    loops.append(loop)
    loop.start()
    dead = loop.until_dead()
    assert (dead.message, dead.during_startup) == ("model.path: no such file", True)
    assert dead.detail == "", "the message of a user's mistake says it all"
    assert not loop.engine.is_alive


def test_an_unexpected_error_at_start_is_named_without_its_details(loops: list[Loop]) -> None:
    loop = Loop(ZeroDivisionError("secret path"))
    loops.append(loop)
    loop.start()
    dead = loop.until_dead()
    assert (dead.message, dead.during_startup) == ("the engine stopped: ZeroDivisionError", True)
    assert "secret path" in dead.detail and "secret path" not in dead.message
