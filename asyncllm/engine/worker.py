"""The engine thread: takes commands, plans steps, keeps the device fed, publishes what came out.

The next step is launched before the last one is waited for, so that a device that runs beside the host never waits for
Python (`executor.depth` 2; a CPU executor computes in `launch` and has depth 1, the same loop without the overlap):

    engine thread |sched 1|launch 1|sched 2|launch 2|wait 1 ......|commit 1|publish 1|sched 3|launch 3|wait 2 ...
    device                 |======== step 1 ========|======== step 2 ========|======== step 3 ========|
    loop thread                                                               |drain 1: text, write|

What step 2 needs of step 1, the sampled tokens, stays on the device. A sequence that turns out to have ended at step 1
was computed once too often in step 2; its epoch changed, so commit 2 skips the row.

Knows the order of things; the scheduler decides what runs, the executor computes. Everything here runs on the engine
thread, but for `request_stop`.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.engine.step import ScheduledStep
from asyncllm.errors import AsyncLLMError
from asyncllm.executor.base import Executor, StepHandle
from asyncllm.ring import Bell, SpscRing
from asyncllm.types import (
    Abort,
    EngineCommand,
    EngineDead,
    EngineOutput,
    EngineReady,
    StartupPhase,
    StepOutput,
    Submit,
)

STALL_POLL_S = 0.001  # between two looks at a full outputs ring

Report = Callable[[str], None]
MakeExecutor = Callable[[Report], Executor]
TimedCommand = tuple[float, EngineCommand]  # when it was pushed, and what


@dataclass(slots=True)
class InFlight:
    """A launched step, and what it cost so far."""

    step: ScheduledStep
    handle: StepHandle
    schedule_s: float
    launch_s: float


class Worker:
    """The body of the engine thread; `run` is its target."""

    def __init__(
        self,
        make_executor: MakeExecutor,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        requests: SpscRing[TimedCommand],
        outputs: SpscRing[EngineOutput],
        bell: Bell,
        notify: Callable[[], None],
        *,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`notify` is called after each output, on this thread; `debug` checks every invariant after each step."""
        self._make_executor = make_executor
        self._scheduler_config = scheduler_config
        self._cache_config = cache_config
        self._requests = requests
        self._outputs = outputs
        self._bell = bell
        self._notify = notify
        self._debug = debug
        self._clock = clock

        self._scheduler: Scheduler  # once the executor's capacity is known
        self._ready = False
        self._stopping = False  # written by other threads, once
        self._phase: tuple[str, float] | None = None  # of start-up: name, since when
        self._in_flight: deque[InFlight] = deque()
        self._num_steps = 0
        self._num_output_stalls = 0
        self._max_wake_s = 0.0
        self._max_abort_s = 0.0

    def request_stop(self) -> None:
        """Abandon everything and end the thread. Any thread."""
        self._stopping = True
        self._bell.ring()

    def run(self) -> None:
        """Start, serve until stopped, close the executor. Whatever goes wrong is told as one `EngineDead`."""
        try:
            with closing(self._make_executor(self._report)) as executor:
                self._announce(executor)
                self._serve(executor)
        except BaseException as error:
            # The thread ends here, whatever it was: the loop must hear of it, or every stream would wait for ever.
            self._publish_death(error)

    def _report(self, name: str) -> None:
        """A phase of start-up begins; the one before it ended."""
        self._end_phase()
        self._phase = (name, self._clock())
        self._publish(StartupPhase(name))

    def _end_phase(self) -> None:
        if self._phase is not None:
            name, since_s = self._phase
            self._publish(StartupPhase(name, self._clock() - since_s))

    def _announce(self, executor: Executor) -> None:
        """Start-up is over."""
        self._end_phase()
        self._scheduler = Scheduler(executor.capacity, self._scheduler_config, self._cache_config, self._clock)
        self._publish(EngineReady(executor.capacity, executor.facts))
        self._ready = True

    def _serve(self, executor: Executor) -> None:  # hot: one turn per step
        """The step loop."""
        scheduler, in_flight, clock = self._scheduler, self._in_flight, self._clock
        while True:
            self._take_commands()
            if self._stopping:
                break
            begin_s = clock()
            step = scheduler.schedule()
            if step is not None:
                planned_s = clock()
                handle = executor.launch(step.plan)
                in_flight.append(InFlight(step, handle, planned_s - begin_s, clock() - planned_s))
            if step is not None and len(in_flight) < executor.depth:
                continue
            if in_flight:
                self._finish_step(in_flight.popleft())
            else:
                self._idle()
        # The device may still be writing to what `close` is about to free.
        while in_flight:
            in_flight.popleft().handle.wait()

    def _take_commands(self) -> None:  # hot: once per step
        """Everything that was asked since the last step."""
        timed = self._requests.try_pop()
        while timed is not None:
            pushed_s, command = timed
            self._max_wake_s = max(self._max_wake_s, self._clock() - pushed_s)
            if isinstance(command, Submit):
                self._add(command)
            else:
                self._abort(command)
            timed = self._requests.try_pop()

    def _add(self, submit: Submit) -> None:
        try:
            self._scheduler.add(submit)
        except AsyncLLMError as error:  # this request's mistake, not the engine's
            self._scheduler.refuse(submit.request_id, error.message)

    def _abort(self, abort: Abort) -> None:
        self._scheduler.abort(abort.request_id)
        if abort.sent_s:
            self._max_abort_s = max(self._max_abort_s, self._clock() - abort.sent_s)

    def _finish_step(self, flight: InFlight) -> None:  # hot
        """Wait for the oldest step, book it, publish it."""
        begin_s = self._clock()
        result = flight.handle.wait()
        waited_s = self._clock()
        output = self._scheduler.commit(flight.step, result)
        self._num_steps += 1
        if self._debug:
            self._scheduler.check()
        self._publish_step(output, flight, waited_s - begin_s, waited_s)

    def _publish_step(self, output: StepOutput, flight: InFlight | None, wait_s: float, waited_s: float) -> None:
        """Hand an output over with fresh statistics; `flight` None: something changed without a step."""
        stats = self._scheduler.stats(flight.step.plan if flight else None)
        stats.num_steps = self._num_steps
        stats.num_output_stalls = self._num_output_stalls
        stats.max_wake_s = self._max_wake_s
        stats.max_abort_s = self._max_abort_s
        output.stats = stats
        output.committed_s = self._clock()
        if flight is not None:
            stats.schedule_s = flight.schedule_s
            stats.launch_s = flight.launch_s
            stats.wait_s = wait_s
            stats.commit_s = output.committed_s - waited_s
        self._publish(output)

    def _idle(self) -> None:
        """Nothing can run: tell what is still to be told, then sleep until somebody rings."""
        notices = self._scheduler.take_notices()
        if notices is not None:
            self._publish_step(notices, None, 0.0, 0.0)
            return
        assert not self._scheduler.has_work, "sequences are left, but none can run"
        if self._debug:
            self._scheduler.check()
        # Cleared before the last look: a push in between rings again and is not slept over.
        self._bell.clear()
        if not len(self._requests) and not self._stopping:
            self._bell.wait()

    def _publish(self, item: EngineOutput) -> None:
        """Push one output and wake the loop; waits while the ring is full, unless the engine is to stop."""
        if not self._outputs.try_push(item):
            self._num_output_stalls += 1
            while not self._outputs.try_push(item):
                if self._stopping:
                    return
                time.sleep(STALL_POLL_S)
        self._notify()

    def _publish_death(self, error: BaseException) -> None:
        if isinstance(error, AsyncLLMError) and not self._ready:
            message, detail = error.message, ""  # a user's mistake, such as too little memory: its message says it all
        else:
            message = f"the engine stopped: {type(error).__name__}"
            detail = "".join(traceback.format_exception(error))
        # A loop that is closed already cannot be woken, and has nobody left to tell.
        with suppress(RuntimeError):
            self._publish(EngineDead(message, during_startup=not self._ready, detail=detail))
