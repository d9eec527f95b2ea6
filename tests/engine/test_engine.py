"""The engine thread from outside: start-up, work, aborts, parking, failure, stop."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.errors import StartupError
from asyncllm.types import (
    EngineDead,
    EngineOutput,
    EngineReady,
    Finished,
    FinishReason,
    StartupPhase,
    StepOutput,
    StepStats,
)
from tests.engine.harness import expected_tokens, submit
from tests.fakes import FakeExecutor, greedy, small_capacity

PATIENCE_S = 30.0  # a bound for a broken engine, never waited for by a working one


class Loop:
    """The loop thread's side: owns the handle, collects what comes out."""

    def __init__(self, executor: FakeExecutor | Exception, *, max_queued: int = 64, **config: int) -> None:
        self.executor = executor
        self.engine = Engine(
            self.make_executor, SchedulerConfig(max_queued=max_queued, **config), CacheConfig(), debug=True
        )
        self.wakeups = threading.Semaphore(0)
        self.outputs: list[EngineOutput] = []
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.stats = StepStats()
        self.engine_thread_id = 0

    def make_executor(self, report: Callable[[str], None]) -> FakeExecutor:
        self.engine_thread_id = threading.get_ident()
        report("load weights")
        if isinstance(self.executor, Exception):
            raise self.executor
        report("allocate kv cache")
        return self.executor

    def start(self) -> None:
        self.engine.start(self.wakeups.release)

    def drain(self) -> None:
        while (output := self.engine.pop_output()) is not None:
            self.outputs.append(output)
            if isinstance(output, StepOutput):
                for request_id, token_id in zip(output.request_ids, output.token_ids):
                    self.tokens.setdefault(request_id, []).append(token_id)
                assert not self.finished.keys() & output.finished.keys(), "finished twice"
                self.finished |= output.finished
                assert output.stats is not None
                self.stats = output.stats

    def drain_until(self, done: Callable[[], bool]) -> None:
        self.drain()
        while not done():
            assert self.wakeups.acquire(timeout=PATIENCE_S), f"the engine went silent; so far {self.outputs[-3:]}"
            self.drain()

    def until_ready(self) -> EngineReady:
        self.drain_until(lambda: any(isinstance(output, EngineReady) for output in self.outputs))
        return next(output for output in self.outputs if isinstance(output, EngineReady))

    def until_dead(self) -> EngineDead:
        self.drain_until(lambda: any(isinstance(output, EngineDead) for output in self.outputs))
        assert self.engine.join(PATIENCE_S)
        self.drain()
        [dead] = [output for output in self.outputs if isinstance(output, EngineDead)]
        assert self.outputs[-1] is dead, "nothing comes after it"
        return dead

    def until_finished(self, *request_ids: int) -> None:
        self.drain_until(lambda: self.finished.keys() >= set(request_ids))


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    """Loops whose engines are stopped at the end, whatever the test did."""
    started: list[Loop] = []
    yield started
    for loop in started:
        loop.engine.stop()
        if isinstance(loop.executor, FakeExecutor) and loop.executor.gate is not None:
            loop.executor.gate.release(1000)
        assert loop.engine.join(PATIENCE_S)


@pytest.fixture
def serve(loops: list[Loop]) -> Callable[..., Loop]:
    """Start an engine on a fake executor and wait until it is ready."""

    def start(depth: int = 1, gate: threading.Semaphore | None = None, max_queued: int = 64, **fields: int) -> Loop:
        faults = {key: fields.pop(key) for key in ("fail_launch_at", "fail_wait_at") if key in fields}
        loop = Loop(FakeExecutor(small_capacity(**fields), depth, gate=gate, **faults), max_queued=max_queued)
        loops.append(loop)
        loop.start()
        loop.until_ready()
        return loop

    return start


def test_start_up_tells_each_phase_and_then_the_capacity(serve: Callable[..., Loop]) -> None:
    loop = serve()
    names = [(o.name, o.seconds is None) for o in loop.outputs if isinstance(o, StartupPhase)]
    assert names == [
        ("load weights", True),
        ("load weights", False),
        ("allocate kv cache", True),
        ("allocate kv cache", False),
    ]
    ready = loop.outputs[-1]
    assert isinstance(ready, EngineReady)
    assert (ready.capacity, ready.facts) == (small_capacity(), {"device": "fake"})


def test_the_executor_is_made_on_the_engine_thread(serve: Callable[..., Loop]) -> None:
    loop = serve()
    assert loop.engine_thread_id not in (0, threading.get_ident())


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


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_are_answered(serve: Callable[..., Loop], depth: int) -> None:
    loop = serve(depth)
    prompts = {request_id: [request_id, 3, 5] for request_id in range(1, 13)}
    for request_id, prompt in prompts.items():
        assert loop.engine.submit(submit(request_id, prompt))
    loop.until_finished(*prompts)
    for request_id, prompt in prompts.items():
        assert loop.tokens[request_id] == expected_tokens(prompt, greedy())[0]
    assert loop.stats.num_steps == sum(isinstance(output, StepOutput) for output in loop.outputs)


def test_every_step_brings_its_statistics(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.until_finished(1)
    for output in loop.outputs:
        if isinstance(output, StepOutput):
            assert output.stats is not None and output.committed_s > 0
            assert min(output.stats.schedule_s, output.stats.launch_s, output.stats.wait_s, output.stats.commit_s) >= 0
    assert (loop.stats.num_running, loop.stats.num_used_blocks) == (0, 0)
    assert loop.stats.max_wake_s > 0


def test_a_prompt_that_never_fits_ends_that_request_only(serve: Callable[..., Loop]) -> None:
    loop = serve(num_blocks=4)
    loop.engine.submit(submit(1, list(range(50))))
    loop.engine.submit(submit(2, [1, 2]))
    loop.until_finished(1, 2)
    assert loop.finished[1].reason is FinishReason.ERROR
    assert "50 tokens" in (loop.finished[1].error or "")
    assert loop.tokens[2] == expected_tokens([1, 2], greedy())[0]


def test_a_refusal_is_told_even_when_nothing_else_runs(serve: Callable[..., Loop]) -> None:
    loop = serve(num_blocks=4)
    loop.engine.submit(submit(1, list(range(50))))
    loop.until_finished(1)
    assert loop.finished[1].reason is FinishReason.ERROR


def test_an_abort_while_waiting_frees_the_queue(serve: Callable[..., Loop]) -> None:
    gate = threading.Semaphore(0)
    loop = serve(gate=gate, max_sequences=1)
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.executor.launched.acquire()  # 1 runs, and its step is held
    loop.engine.submit(submit(2, [4, 5]))
    loop.engine.abort(2)
    gate.release(1000)
    loop.until_finished(1, 2)
    assert loop.finished[2].reason is FinishReason.ABORT
    assert 2 not in loop.tokens
    assert loop.stats.num_waiting == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_an_abort_of_the_last_running_request_brings_the_gauges_back_to_zero(
    serve: Callable[..., Loop], depth: int
) -> None:
    gate = threading.Semaphore(0)
    loop = serve(depth, gate=gate)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=60)))
    loop.executor.launched.acquire()
    loop.engine.abort(1)
    gate.release(1000)
    loop.until_finished(1)
    assert loop.finished[1].reason is FinishReason.ABORT
    assert (loop.stats.num_running, loop.stats.num_used_blocks) == (0, 0)
    assert loop.stats.max_abort_s > 0


def test_an_abort_of_a_request_that_ended_is_harmless(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.until_finished(1)
    loop.engine.abort(1)
    loop.engine.submit(submit(2, [1, 2, 3]))
    loop.until_finished(2)
    assert loop.tokens[1] == loop.tokens[2]


def test_a_full_ring_refuses_requests_but_loses_no_abort(serve: Callable[..., Loop]) -> None:
    gate = threading.Semaphore(0)
    loop = serve(gate=gate, max_queued=2, max_sequences=1)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=60)))
    loop.executor.launched.acquire()  # the engine holds the step and takes nothing
    accepted = [request_id for request_id in range(2, 20) if loop.engine.submit(submit(request_id, [1, 2]))]
    assert accepted == [2, 3, 4, 5]
    for request_id in (1, 2, 3):
        loop.engine.abort(request_id)
    assert loop.engine.num_queued_commands == 4 + 3
    assert not loop.engine.submit(submit(20, [1]))  # it may not overtake the aborts
    gate.release()
    loop.executor.launched.acquire()  # the engine made room, and holds the second step
    loop.drain()
    assert loop.engine.num_queued_commands == 3
    gate.release(1000)
    loop.until_finished(1, 2, 3, 4, 5)
    reasons = [loop.finished[request_id].reason for request_id in (1, 2, 3, 4, 5)]
    assert reasons == [FinishReason.ABORT] + [FinishReason.ABORT] * 2 + [FinishReason.LENGTH] * 2


def test_a_parked_engine_burns_no_cpu(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.until_finished(1)
    clock_id = time.pthread_getcpuclockid(loop.engine_thread_id)
    for _ in range(50):  # it may still be on its way to bed
        before_s = time.clock_gettime(clock_id)
        threading.Event().wait(0.1)
        if time.clock_gettime(clock_id) == before_s:  # not one instruction
            break
    else:
        pytest.fail("the engine thread never came to rest")
    loop.engine.submit(submit(2, [1, 2, 3]))
    loop.until_finished(2)


class BedtimeClock:
    """A clock that calls `action` at its first reading: between the engine's last look at the ring and its sleep."""

    def __init__(self) -> None:
        self.action: Callable[[], object] | None = None

    def __call__(self) -> float:
        action, self.action = self.action, None
        if action is not None:
            action()
        return time.monotonic()


@pytest.mark.parametrize("what", ["request", "stop"])
def test_what_arrives_while_the_engine_goes_to_sleep_is_not_slept_over(what: str) -> None:
    clock = BedtimeClock()
    engine = Engine(lambda report: FakeExecutor(small_capacity()), SchedulerConfig(), CacheConfig(), clock=clock)
    ended = threading.Event()

    def notify() -> None:
        output = engine.pop_output()
        if isinstance(output, StepOutput) and 1 in output.finished:
            ended.set()

    clock.action = engine.stop if what == "stop" else lambda: engine.submit(submit(1, [1, 2, 3]))
    engine.start(notify)
    assert what == "stop" or ended.wait(PATIENCE_S)
    engine.stop()
    assert engine.join(PATIENCE_S)


@pytest.mark.parametrize("fault", ["fail_launch_at", "fail_wait_at"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_failing_step_kills_the_engine_and_says_so_once(serve: Callable[..., Loop], fault: str, depth: int) -> None:
    loop = serve(depth, **{fault: 3})
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=30)))
    dead = loop.until_dead()
    assert (dead.message, dead.during_startup) == ("the engine stopped: RuntimeError", False)
    assert "Traceback" in dead.detail
    assert len(loop.tokens[1]) < 3
    assert 1 not in loop.finished
    assert loop.executor.closed


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_abandons_work_in_flight_and_closes_the_executor(serve: Callable[..., Loop], depth: int) -> None:
    gate = threading.Semaphore(0)
    loop = serve(depth, gate=gate)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=60)))
    loop.executor.launched.acquire()
    loop.engine.stop()
    assert not loop.engine.join(0.0)  # the step is held
    gate.release(1000)
    assert loop.engine.join(PATIENCE_S)
    assert loop.executor.closed
    assert not any(isinstance(output, EngineDead) for output in loop.outputs)


def test_stop_wakes_a_parked_engine_and_can_be_repeated(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.stop()
    loop.engine.stop()
    assert loop.engine.join(PATIENCE_S)
    assert loop.executor.closed and not loop.engine.is_alive


def test_a_loop_that_does_not_drain_makes_the_engine_wait_and_loses_nothing(serve: Callable[..., Loop]) -> None:
    loop = serve(max_context_length=2048, num_blocks=600)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=600)))
    while loop.engine.num_queued_outputs < 256:
        assert loop.wakeups.acquire(timeout=PATIENCE_S)
    loop.until_finished(1)
    assert loop.tokens[1] == expected_tokens([1, 2, 3], greedy(max_tokens=600), max_length=2048)[0]


def test_stop_ends_an_engine_that_waits_for_a_full_outputs_ring(serve: Callable[..., Loop]) -> None:
    loop = serve(max_context_length=2048, num_blocks=600)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=2000)))
    while loop.engine.num_queued_outputs < 256:
        assert loop.wakeups.acquire(timeout=PATIENCE_S)
    loop.engine.stop()
    assert loop.engine.join(PATIENCE_S)
    assert loop.executor.closed


def test_a_notify_that_fails_because_the_loop_is_gone_ends_the_thread_and_closes_the_executor() -> None:
    def notify() -> None:
        raise RuntimeError("Event loop is closed")

    executor = FakeExecutor(small_capacity())
    engine = Engine(lambda report: executor, SchedulerConfig(), CacheConfig())
    engine.start(notify)
    assert engine.join(PATIENCE_S)
    assert executor.closed


def test_in_debug_the_handle_belongs_to_one_thread(serve: Callable[..., Loop]) -> None:
    loop = serve()
    errors: list[str] = []

    def trespass() -> None:
        try:
            loop.engine.pop_output()
        except AssertionError as error:
            errors.append(str(error))

    thread = threading.Thread(target=trespass)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "belongs to thread" in errors[0]


def test_the_requests_ring_has_room_for_a_submit_and_an_abort_of_everyone_who_waits() -> None:
    engine = Engine(lambda report: FakeExecutor(small_capacity()), SchedulerConfig(max_queued=1000), CacheConfig())
    assert sum(engine.submit(submit(request_id, [1])) for request_id in range(1, 4000)) == 2048
