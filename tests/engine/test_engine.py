"""The engine thread from outside: start-up, work, aborts, parking, stop. Its death is in test_death."""

import threading
import time
from collections.abc import Callable

import pytest

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.types import EngineDead, EngineReady, FinishReason, StartupPhase, StepOutput
from tests.engine.harness import DEPTHS, expected_tokens, submit
from tests.engine.loop import PATIENCE_S, Loop
from tests.fakes import FakeExecutor, greedy, small_capacity


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


@DEPTHS
def test_what_the_device_says_of_its_steps_is_handed_on_and_summed(serve: Callable[..., Loop], depth: int) -> None:
    loop = serve(depth)
    loop.executor.device_facts = (True, 0.25, 0.5)
    for request_id in (1, 2):
        loop.engine.submit(submit(request_id, [1, 2, 3]))
        loop.until_finished(request_id)
    stats = [output.stats for output in loop.outputs if isinstance(output, StepOutput)]
    assert {each.device_s for each in stats} == {0.25}
    # The device rested before either request, and that is nobody's gap.
    assert [each.gap_s for each in stats] == 2 * [None, *[0.5] * 7]
    assert (loop.stats.num_graph_steps, loop.stats.device_busy_s, loop.stats.device_gap_s) == (16, 4.0, 7.0)


def test_a_device_that_says_nothing_is_not_counted(serve: Callable[..., Loop]) -> None:
    loop = serve()
    loop.engine.submit(submit(1, [1, 2, 3]))
    loop.until_finished(1)
    assert (loop.stats.num_graph_steps, loop.stats.device_busy_s, loop.stats.device_gap_s) == (0, 0.0, 0.0)
    assert loop.stats.gap_s is None


def test_every_command_tells_how_long_it_waited_for_the_engine_and_most_outputs_tell_nothing(
    serve: Callable[..., Loop],
) -> None:
    gate = threading.Semaphore(0)
    loop = serve(gate=gate)
    loop.engine.submit(submit(1, [1, 2, 3], greedy(max_tokens=30)))
    loop.executor.launched.acquire()
    loop.engine.submit(submit(2, [1, 2, 3], greedy(max_tokens=30)))
    loop.engine.submit(submit(3, [1, 2, 3], greedy(max_tokens=30)))
    loop.engine.abort(3)
    gate.release(1000)
    loop.until_finished(1, 2, 3)
    told = [output.stats for output in loop.outputs if isinstance(output, StepOutput)]
    assert [len(stats.wakes_s) for stats in told if stats.wakes_s is not None] == [1, 3]
    assert [len(stats.aborts_s) for stats in told if stats.aborts_s is not None] == [1]
    assert min(loop.wakes_s + loop.aborts_s) > 0


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
