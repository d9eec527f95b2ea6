"""The loop thread's side of a real engine thread over a fake executor."""

import threading
from collections.abc import Callable

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.types import EngineDead, EngineOutput, EngineReady, Finished, StepOutput, StepStats
from tests.fakes import FakeExecutor

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
        self.wakes_s: list[float] = []
        self.aborts_s: list[float] = []
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
                    self.tokens.setdefault(request_id, []).extend((output.runs or {}).get(request_id, ()))
                    self.tokens[request_id].append(token_id)
                assert not self.finished.keys() & output.finished.keys(), "finished twice"
                self.finished |= output.finished
                assert output.stats is not None
                self.stats = output.stats
                self.wakes_s += output.stats.wakes_s or ()
                self.aborts_s += output.stats.aborts_s or ()

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
        self.engine.stop()
        assert self.engine.join(PATIENCE_S)
        self.drain()
        [dead] = [output for output in self.outputs if isinstance(output, EngineDead)]
        assert self.outputs[-1] is dead, "nothing comes after it"
        return dead

    def until_finished(self, *request_ids: int) -> None:
        self.drain_until(lambda: self.finished.keys() >= set(request_ids))
