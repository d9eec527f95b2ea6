"""A real engine in this process, given a set of requests at once and drained by the calling thread.

Knows the engine's handle and its outputs; computes nothing itself.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from asyncllm.config import Config
from asyncllm.engine.engine import Engine
from asyncllm.executor.base import Executor, StepHandle, StepPlan
from asyncllm.executor.build import build_executor
from asyncllm.types import (
    EngineDead,
    EngineReady,
    Finished,
    SamplingParams,
    Started,
    StepOutput,
    StepStats,
    Submit,
    TokenLogprobs,
)
from asyncllm.weights.base import Checkpoint
from perf.gpu_check.requests import Request
from perf.gpu_check.setup import Box
from perf.stats import Summary, ratio

READY_TIMEOUT_S = 90.0
CLOSE_TIMEOUT_S = 15.0
POLL_S = 0.05
PHASES = ("schedule", "launch", "wait", "commit")


class EngineDied(Exception):
    """The engine thread ended by an error; the message is its traceback."""


class Answer(msgspec.Struct):
    """What became of it."""

    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    started: Started | None = None
    finished: Finished | None = None


class Run(msgspec.Struct):
    """A set of requests, done."""

    answers: list[Answer]  # in the order of the requests
    wall_s: float
    steps: list[StepStats]  # of every step, in order
    rows: list[int]  # tokens that each of these steps made
    is_complete: bool  # False: its time was over, and what still ran was aborted

    @property
    def tokens(self) -> list[list[int]]:
        """Output tokens of all requests."""
        return [answer.tokens for answer in self.answers]

    def figures(self) -> dict[str, Any]:
        """Speed, and how well the device was fed."""
        num_tokens = sum(map(len, self.tokens))
        gaps = [step.gap_s for step in self.steps if step.gap_s is not None]
        busy_s = sum(step.device_s for step in self.steps)
        num_graph_steps = self.steps[-1].num_graph_steps - self.steps[0].num_graph_steps if self.steps else 0
        phases = {phase: [getattr(step, f"{phase}_s") for step in self.steps] for phase in PHASES}
        return {
            "tokens_per_s": round(num_tokens / self.wall_s, 1),
            "wall_s": round(self.wall_s, 3),
            "output_tokens": num_tokens,
            "is_complete": self.is_complete,
            "num_steps": len(self.steps),
            "mean_rows": ratio(sum(self.rows), len(self.steps)),
            "graph_share": ratio(num_graph_steps, len(self.steps) - 1),
            "device_busy_fraction": ratio(busy_s, self.wall_s) if busy_s else None,
            "gap_s": msgspec.to_builtins(Summary.of(gaps)),
            "phases_s": {phase: msgspec.to_builtins(Summary.of(seconds)) for phase, seconds in phases.items()},
            "num_preemptions": self.stats.num_preemptions,
        }

    @property
    def stats(self) -> StepStats:
        """How full the engine was at the end."""
        return self.steps[-1] if self.steps else StepStats()


class GatedExecutor:
    """An executor whose next launch can be held back. Engine thread, but for the two events."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.capacity = executor.capacity
        self.depth = executor.depth
        self.facts = executor.facts
        self.balance_tokens = executor.balance_tokens
        self.most_prompt_tokens = executor.most_prompt_tokens
        self.at_gate = threading.Event()
        self.gate: threading.Event | None = None

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step, once the gate is open."""
        if self.gate is not None:
            self.at_gate.set()
            self.gate.wait()
        return self._executor.launch(plan)

    def improve(self) -> bool:
        """What the executor does."""
        return self._executor.improve()

    def close(self) -> None:
        """Free what the executor holds."""
        self._executor.close()


class EngineSession:
    """An engine that is ready; a context manager. Every method belongs to one thread."""

    def __init__(self, config: Config, checkpoint: Checkpoint, *, debug: bool = False) -> None:
        """`debug`: every invariant of scheduler and block pool is asserted after each step."""
        self._output_came = threading.Event()
        self._last_id = 0
        self._executor: GatedExecutor
        self._steps: list[StepStats] = []  # of the current run
        self._rows: list[int] = []
        self.is_dead = False

        def make_executor(report: Callable[[str], None]) -> Executor:
            self._executor = GatedExecutor(build_executor(config, checkpoint, report))
            return self._executor

        started_s = time.monotonic()
        self._engine = Engine(make_executor, config.scheduler, config.cache, debug=debug)
        self._engine.start(self._output_came.set)
        self.facts = self._wait_ready()
        self.ready_s = round(time.monotonic() - started_s, 2)

    def __enter__(self) -> "EngineSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine thread and free the device."""
        self._engine.stop()
        self._engine.join(CLOSE_TIMEOUT_S)

    def run(
        self,
        requests: Sequence[Request],
        box: Box,
        *,
        at_once: bool = False,
        abort_after: Mapping[int, int] | None = None,
    ) -> Run:
        """Send the requests and collect their answers until all ended or the box is over.

        `at_once`: all of them are seen by the same scheduling step, so that two runs make the same batches.
        `abort_after`: index of a request -> output tokens after which it is aborted; 0 aborts it right behind its
        submission. Raises EngineDied.
        """
        self._steps, self._rows = [], []
        ids = range(self._last_id + 1, self._last_id + 1 + len(requests))
        self._last_id = ids.stop
        answers = {request_id: Answer() for request_id in ids}
        limits = {ids[index]: limit for index, limit in (abort_after or {}).items()}
        gate = self._close_gate() if at_once else None
        started_s = time.monotonic()
        for request_id, request in zip(ids, requests, strict=True):
            submit = Submit(request_id, request.prompt, request.params, time.monotonic(), cache_salt=request.cache_salt)
            assert self._engine.submit(submit), "the requests ring is full: raise scheduler.max_queued"
            if limits.get(request_id) == 0:
                self._engine.abort(request_id)
        if gate is not None:
            started_s = time.monotonic()
            gate.set()
        is_complete = self._collect(answers, limits, box)
        wall_s = time.monotonic() - started_s
        return Run(list(answers.values()), wall_s, self._steps, self._rows, is_complete)

    def _close_gate(self) -> threading.Event:
        """Occupy the engine with a step of one token that waits at the gate, until everything is submitted."""
        executor = self._executor
        gate = threading.Event()
        executor.at_gate.clear()
        executor.gate = gate
        opener = SamplingParams(max_tokens=1, temperature=0.0)
        self._engine.submit(Submit(self._last_id, [1], opener, time.monotonic()))
        self._last_id += 1
        executor.at_gate.wait(READY_TIMEOUT_S)
        executor.gate = None
        return gate

    def _collect(self, answers: dict[int, Answer], limits: dict[int, int], box: Box) -> bool:
        """Book outputs until every answer is finished; False where the box was over first."""
        is_complete = True
        num_open = len(answers)
        while num_open:
            self._output_came.wait(POLL_S)
            self._output_came.clear()
            while (output := self._pop()) is not None:
                num_open -= self._book(output, answers, limits)
            if box.is_over and is_complete:
                is_complete = False
                for request_id, answer in answers.items():
                    if answer.finished is None:
                        self._engine.abort(request_id)
        return is_complete

    def _book(self, output: StepOutput, answers: dict[int, Answer], limits: dict[int, int]) -> int:
        """One step's tokens to their answers; how many of them ended with it."""
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            answer = answers.get(request_id)
            if answer is None:  # the request at the gate
                continue
            answer.tokens += [*(output.runs or {}).get(request_id, ()), token_id]
            if request_id in limits and len(answer.tokens) >= limits[request_id]:
                self._engine.abort(request_id)
        for request_id, entry in (output.logprobs or {}).items():
            answers[request_id].logprobs.append(entry)
        for request_id, started in (output.started or {}).items():
            if request_id in answers:
                answers[request_id].started = started
        num_ended = 0
        for request_id, finished in output.finished.items():
            if request_id in answers:
                answers[request_id].finished = finished
                num_ended += 1
        if output.stats is not None:
            self._steps.append(output.stats)
            self._rows.append(len(output.token_ids))
        return num_ended

    def _pop(self) -> StepOutput | None:
        """The next step's output; raises EngineDied at the engine's last word."""
        output = self._engine.pop_output()
        if isinstance(output, EngineDead):
            self.is_dead = True
            raise EngineDied(f"{output.message}\n{output.detail}")
        return output if isinstance(output, StepOutput) else None

    def _wait_ready(self) -> dict[str, str]:
        end_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < end_s:
            self._output_came.wait(POLL_S)
            self._output_came.clear()
            while (output := self._engine.pop_output()) is not None:
                if isinstance(output, EngineReady):
                    return output.facts
                if isinstance(output, EngineDead):
                    self.is_dead = True
                    raise EngineDied(f"{output.message}\n{output.detail}")
        raise EngineDied(f"the engine was not ready within {READY_TIMEOUT_S:g} s")
