"""The handle by which the loop thread uses the engine thread: two rings, a bell, and nothing else in common.

Used by one thread at a time, in practice the event loop's; no method blocks but `join`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from asyncllm.config import ONLY_ON_REQUEST, CacheConfig, SchedulerConfig, SpeculativeConfig
from asyncllm.engine.worker import MakeExecutor, TimedCommand, Worker
from asyncllm.ring import Bell, SpscRing
from asyncllm.types import Abort, EngineCommand, EngineOutput, Submit

OUTPUTS_CAPACITY = 256  # steps the loop may be late before the engine waits for it


class Engine:
    """Starts the engine thread, gives it work, hands out what it publishes."""

    def __init__(
        self,
        make_executor: MakeExecutor,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        *,
        speculative: SpeculativeConfig = ONLY_ON_REQUEST,
        cores: Collection[int] = (),
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_executor` runs on the engine thread, so that every tensor is born there; it reports its phases.

        `cores`: CPU cores the engine thread may run on; none = those of the thread that starts it.
        `debug`: assert thread ownership, and every invariant of the scheduler after each step.
        """
        self._make_executor = make_executor
        self._scheduler_config = scheduler_config
        self._cache_config = cache_config
        self._speculative = speculative
        self._cores = cores
        self._debug = debug
        self._clock = clock
        # Twice the queue: room for a Submit and an Abort of everyone the server lets wait.
        self._requests: SpscRing[TimedCommand] = SpscRing(1 << (2 * scheduler_config.max_queued - 1).bit_length())
        self._outputs: SpscRing[EngineOutput] = SpscRing(OUTPUTS_CAPACITY)
        self._bell = Bell()
        self._late_aborts: deque[TimedCommand] = deque()  # that found the ring full
        self._owner: int | None = None  # in debug, the thread that may use this handle
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None

    def start(self, notify: Callable[[], None]) -> None:
        """Start the engine thread; it calls `notify`, there, after each output it pushed."""
        assert self._thread is None, "an engine starts once"
        self._worker = Worker(
            self._make_executor,
            self._scheduler_config,
            self._cache_config,
            self._requests,
            self._outputs,
            self._bell,
            notify,
            speculative=self._speculative,
            cores=self._cores,
            debug=self._debug,
            clock=self._clock,
        )
        # A daemon, so that a device that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, command: Submit) -> bool:
        """Give a request to the engine; False when the ring is full, and nothing happened."""
        return self._send(command)

    def abort(self, request_id: int) -> None:
        """End a request. Never lost: where the ring is full, the abort follows as soon as there is room."""
        abort = Abort(request_id, self._clock())
        if not self._send(abort):
            self._late_aborts.append((abort.sent_s, abort))

    def flush(self) -> None:
        """Push aborts that found the ring full; every other method does so too."""
        while self._late_aborts and self._requests.try_push(self._late_aborts[0]):
            self._late_aborts.popleft()
            self._bell.ring()

    def pop_output(self) -> EngineOutput | None:  # hot: once per step and once more
        """The oldest output, or None."""
        if self._debug:
            self._assert_owner()
        if self._late_aborts:
            self.flush()
        return self._outputs.try_pop()

    def stop(self) -> None:
        """Ask the thread to abandon everything, close the executor and end. Idempotent, from any thread."""
        if self._worker is not None:
            self._worker.request_stop()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end; False if it did not within the time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_queued_commands(self) -> int:
        """Commands the engine has not taken yet."""
        return len(self._requests) + len(self._late_aborts)

    @property
    def num_queued_outputs(self) -> int:
        """Outputs the loop has not taken yet."""
        return len(self._outputs)

    def _send(self, command: EngineCommand) -> bool:
        if self._debug:
            self._assert_owner()
        self.flush()
        # Nothing overtakes an abort that waits.
        if self._late_aborts or not self._requests.try_push((self._clock(), command)):
            return False
        self._bell.ring()
        return True

    def _assert_owner(self) -> None:
        current = threading.get_ident()
        if self._owner is None:
            self._owner = current
        assert self._owner == current, f"the engine handle belongs to thread {self._owner}, used on {current}"
