"""The engine thread: takes commands, plans steps, keeps the device fed, publishes what came out.

The next step is launched before the last one is waited for, so that a device that runs beside the host never waits for
Python (`executor.depth` 2; a CPU executor computes in `launch` and has depth 1, the same loop without the overlap):

    engine thread |sched 1|launch 1|sched 2|launch 2|wait 1 ......|commit 1|publish 1|sched 3|launch 3|wait 2 ...
    device                 |======== step 1 ========|======== step 2 ========|======== step 3 ========|
    loop thread                                                               |drain 1: text, write|

Where the device keeps the host waiting, the engine thread stays away from the GIL for a moment behind each publish: it
has the time, and the loop has tokens to send.

What step 2 needs of step 1, the sampled tokens, stays on the device. A sequence that turns out to have ended at step 1
was computed once too often in step 2; its epoch changed, so commit 2 skips the row.

Where nothing can run, the executor improves itself, a piece at a time (`improve`: a graph to capture), with a look at
the commands between two pieces; when nothing is left to improve, the thread parks. Where something always runs, it gets
a turn now and then, between two steps and with none in flight:

    engine thread |... commit 64|wait 65 ..|commit 65|publish 65|improve ............|sched 66|launch 66|sched 67|...

An error ends the thread. It is published with the step and the requests it happened in before the executor is closed,
because a broken device may hang there.

Knows the order of things; the scheduler decides what runs, the executor computes. Everything here runs on the engine
thread, but for `request_stop`.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from asyncllm.config import ONLY_ON_REQUEST, CacheConfig, SchedulerConfig, SpeculativeConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.engine.step import ScheduledStep
from asyncllm.errors import AsyncLLMError
from asyncllm.executor.base import Executor, StepHandle
from asyncllm.ring import Bell, SpscRing
from asyncllm.threads import pin
from asyncllm.types import (
    Abort,
    EngineCommand,
    EngineDead,
    EngineOutput,
    EngineReady,
    StartupPhase,
    StepStats,
    Submit,
)

STALL_POLL_S = 0.001  # between two looks at a full outputs ring
IMPROVE_EVERY_STEPS = 64  # committed steps between two improvements while there is work
MIN_PAUSE_S, MAX_PAUSE_S = 0.0001, 0.001  # behind a publish; the loop writes to some 150 sockets in the longer one
FAREWELL_S = 1.0  # that the loop has to tell its clients before the executor of a dead engine is closed

log = logging.getLogger("asyncllm.engine")

Report = Callable[[str], None]
MakeExecutor = Callable[[Report], Executor]
TimedCommand = tuple[float, EngineCommand]  # when it was pushed, and what


@dataclass(slots=True)
class InFlight:
    """A step from its plan to its commit, and what it cost so far."""

    step: ScheduledStep
    number: int  # of the engine's life, from 1
    schedule_s: float
    after_rest: bool  # nothing ran before it: that the device was idle says nothing about the engine
    handle: StepHandle = field(init=False)  # once launched
    launch_s: float = 0.0


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
        speculative: SpeculativeConfig = ONLY_ON_REQUEST,
        cores: Collection[int] = (),
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`notify` is called after each output, on this thread; `debug` checks every invariant after each step.

        `cores`: CPU cores this thread and those it starts may run on; none = those it has.
        """
        self._make_executor = make_executor
        self._scheduler_config = scheduler_config
        self._cache_config = cache_config
        self._speculative = speculative
        self._requests = requests
        self._outputs = outputs
        self._bell = bell
        self._notify = notify
        self._cores = cores
        self._debug = debug
        self._clock = clock

        self._scheduler: Scheduler  # once the executor's capacity is known
        self._ready = False
        self._stop = threading.Event()
        self._startup_phase: tuple[str, float] | None = None  # name, since when
        self._in_flight: deque[InFlight] = deque()  # oldest first; the last one may be in its launch
        self._phase = ""  # of the step loop: what an error happened in
        self._rested = True
        self._improvable = True
        self._improve_at = IMPROVE_EVERY_STEPS  # value of _num_steps
        self._paused_s = 0.0  # behind the last publish

        # Told in the next output, and None while there is nothing to tell.
        self._wakes_s: list[float] | None = None
        self._aborts_s: list[float] | None = None

        # Counters of the engine's life.
        self._num_launched = 0
        self._num_steps = 0
        self._num_graph_steps = 0
        self._num_output_stalls = 0
        self._device_busy_s = 0.0
        self._device_gap_s = 0.0

    def request_stop(self) -> None:
        """Abandon everything and end the thread. Any thread."""
        self._stop.set()
        self._bell.ring()

    def run(self) -> None:
        """Start, serve until stopped, close the executor. Whatever goes wrong is told as one `EngineDead`."""
        executor: Executor | None = None
        try:
            if self._cores:
                pin(self._cores)  # before torch starts its threads, which inherit it
            executor = self._make_executor(self._report)
            self._announce(executor)
            self._serve(executor)
        except BaseException as error:
            # The thread ends here, whatever it was: the loop must hear of it, or every stream would wait for ever.
            if self._publish_death(error) and executor is not None:
                # A broken device may block while it holds the GIL, and nothing would run in this process any more:
                # the loop ends its streams first, then asks to stop.
                self._stop.wait(FAREWELL_S)
        if executor is not None:
            self._close(executor)

    def _report(self, name: str) -> None:
        """A phase of start-up begins; the one before it ended."""
        self._end_phase()
        self._startup_phase = (name, self._clock())
        self._publish(StartupPhase(name))

    def _end_phase(self) -> None:
        if self._startup_phase is not None:
            name, since_s = self._startup_phase
            self._publish(StartupPhase(name, self._clock() - since_s))

    def _announce(self, executor: Executor) -> None:
        """Start-up is over."""
        self._end_phase()
        self._scheduler = Scheduler(
            executor.capacity,
            self._scheduler_config,
            self._cache_config,
            self._clock,
            speculative=self._speculative,
            balance_tokens=executor.balance_tokens,
            most_prompt_tokens=executor.most_prompt_tokens,
            depth=executor.depth,
        )
        self._publish(EngineReady(executor.capacity, executor.facts))
        self._ready = True

    def _serve(self, executor: Executor) -> None:  # hot: one turn per step
        """The step loop."""
        scheduler, in_flight, clock = self._scheduler, self._in_flight, self._clock
        while True:
            self._take_commands()
            if self._stop.is_set():
                break
            self._phase = "schedule"
            begin_s = clock()
            step = scheduler.schedule()
            if step is not None:
                planned_s = clock()
                self._phase = "launch"
                self._num_launched += 1
                flight = InFlight(step, self._num_launched, planned_s - begin_s, self._rested)
                in_flight.append(flight)
                flight.handle = executor.launch(step.plan)
                flight.launch_s = clock() - planned_s
                self._rested = False
                if len(in_flight) < executor.depth:
                    continue
            if not in_flight:
                self._idle(executor)
                continue
            self._finish_step()
            if self._improvable and self._num_steps >= self._improve_at:
                # The tokens of what is in flight need not wait for the improvement, and a capture stops the device.
                while in_flight:
                    self._finish_step()
                self._improve(executor)
        # The device may still be writing to what `close` is about to free.
        self._phase = "wait"
        while in_flight:
            in_flight[0].handle.wait()
            in_flight.popleft()

    def _take_commands(self) -> None:  # hot: once per step
        """Everything that was asked since the last step."""
        timed = self._requests.try_pop()
        while timed is not None:
            self._phase = "commands"
            pushed_s, command = timed
            if self._wakes_s is None:
                self._wakes_s = []
            self._wakes_s.append(self._clock() - pushed_s)
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
            if self._aborts_s is None:
                self._aborts_s = []
            self._aborts_s.append(self._clock() - abort.sent_s)

    def _finish_step(self) -> None:  # hot
        """Wait for the oldest step, book it, publish it."""
        flight = self._in_flight[0]
        self._phase = "wait"
        begin_s = self._clock()
        result = flight.handle.wait()
        waited_s = self._clock()
        self._phase = "commit"
        output = self._scheduler.commit(flight.step, result)
        self._num_steps += 1
        if result.replayed:
            self._num_graph_steps += 1
        gap_s = None if flight.after_rest else result.gap_s
        self._device_busy_s += result.device_s
        self._device_gap_s += gap_s or 0.0
        if self._debug:
            self._scheduler.check()
        self._in_flight.popleft()
        stats = output.stats = self._stats(flight)
        stats.device_s = result.device_s
        stats.gap_s = gap_s
        stats.schedule_s = flight.schedule_s
        stats.launch_s = flight.launch_s
        stats.wait_s = waited_s - begin_s
        output.committed_s = self._clock()
        stats.commit_s = output.committed_s - waited_s
        self._phase = "publish"
        self._publish(output)
        if self._in_flight:
            self._pause(stats.wait_s)

    def _pause(self, waited_s: float) -> None:
        """Leave the GIL to the loop for a quarter of the time that the device keeps this thread idle per step.

        Otherwise the next schedule, which nobody needs before the step in flight is done, would be in front of the
        tokens that are ready to be sent.
        """
        pause_s = min((waited_s + self._paused_s) / 4, MAX_PAUSE_S)
        self._paused_s = 0.0 if pause_s < MIN_PAUSE_S else pause_s
        if self._paused_s:
            time.sleep(self._paused_s)

    def _stats(self, flight: InFlight | None) -> StepStats:
        """How full the engine is and what it counted; `flight` None: something changed without a step."""
        stats = self._scheduler.stats(flight.step.plan if flight else None)
        stats.num_steps = self._num_steps
        stats.num_graph_steps = self._num_graph_steps
        stats.num_output_stalls = self._num_output_stalls
        stats.device_busy_s = self._device_busy_s
        stats.device_gap_s = self._device_gap_s
        stats.wakes_s, self._wakes_s = self._wakes_s, None
        stats.aborts_s, self._aborts_s = self._aborts_s, None
        return stats

    def _idle(self, executor: Executor) -> None:
        """Nothing can run: tell what is still to be told, improve what can be improved, or sleep until somebody rings.

        One of them per call: commands are taken in between.
        """
        self._rested = True
        self._phase = "idle"
        notices = self._scheduler.take_notices()
        if notices is not None:
            notices.stats = self._stats(None)
            notices.committed_s = self._clock()
            self._publish(notices)
            return
        assert not self._scheduler.has_work, "sequences are left, but none can run"
        if self._debug:
            self._scheduler.check()
        if self._improvable:
            self._improve(executor)
            return
        # Cleared before the last look: a push in between rings again and is not slept over.
        self._bell.clear()
        if not len(self._requests) and not self._stop.is_set():
            self._bell.wait()

    def _improve(self, executor: Executor) -> None:
        """One piece of work that makes later steps faster; never asked for again once none is left."""
        self._phase = "improve"
        self._improvable = executor.improve()
        self._improve_at = self._num_steps + IMPROVE_EVERY_STEPS

    def _publish(self, item: EngineOutput) -> None:
        """Push one output and wake the loop; waits while the ring is full, unless the engine is to stop."""
        if not self._outputs.try_push(item):
            self._num_output_stalls += 1
            while not self._outputs.try_push(item):
                if self._stop.wait(STALL_POLL_S):
                    return
        self._notify()

    def _publish_death(self, error: BaseException) -> bool:
        """The last output; False when there is no loop any more to read it."""
        if isinstance(error, AsyncLLMError) and not self._ready:
            message, detail = error.message, ""  # a user's mistake, such as too little memory: its message says it all
        else:
            message = f"the engine stopped: {type(error).__name__}"
            detail = "".join(traceback.format_exception(error))
        # All requests that are on the device: it tells of an error late, and any step in flight may be what failed.
        request_ids = dict.fromkeys(s.request_id for flight in self._in_flight for s in flight.step.sequences)
        dead = EngineDead(message, not self._ready, detail, self._phase, self._step_under_way(), list(request_ids))
        try:
            self._publish(dead)
        except RuntimeError:  # a loop that is closed already cannot be woken
            return False
        return True

    def _step_under_way(self) -> int:
        """The number of the step in the phase that runs now; 0 where the phase is no step's."""
        if self._phase in ("wait", "commit"):
            return self._in_flight[0].number
        if self._phase == "launch":
            return self._num_launched
        return self._num_launched + 1 if self._phase == "schedule" else 0

    def _close(self, executor: Executor) -> None:
        """Free the device. What goes wrong here comes too late to be anybody's answer."""
        try:
            executor.close()
        except BaseException:
            log.exception("closing the executor failed")
