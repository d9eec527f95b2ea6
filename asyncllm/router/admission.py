"""How much may wait for the engine, and how long a refused client should stay away.

Counts choices that were submitted and have not started; measures how many tokens a second the engine computes. Loop
thread only.
"""

import math

from asyncllm.config import SchedulerConfig
from asyncllm.errors import Overloaded
from asyncllm.types import StepStats

MIN_RETRY_S, MAX_RETRY_S = 1.0, 120.0
RATE_MEMORY_S = 10.0  # busy seconds after which a measurement weighs 1/e


class TokenRate:
    """Tokens per busy second, prompt and output alike; recent steps weigh more."""

    __slots__ = ("_busy_s", "_last_s", "_num_steps", "_num_tokens")

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._busy_s = 0.0
        self._num_steps = 0
        self._last_s: float | None = None  # commit of the step before, where that left work running

    def observe(self, stats: StepStats, committed_s: float) -> None:  # hot: once per step
        """Count a step. The time since the step before is its own, unless the engine was idle in between."""
        if stats.num_steps == self._num_steps:  # a report without a step, as after an abort
            return
        self._num_steps = stats.num_steps
        if self._last_s is not None:
            seconds = committed_s - self._last_s
        else:
            seconds = stats.schedule_s + stats.launch_s + stats.wait_s + stats.commit_s
        fade = math.exp(-seconds / RATE_MEMORY_S)
        self._num_tokens = self._num_tokens * fade + stats.num_scheduled_tokens
        self._busy_s = self._busy_s * fade + seconds
        self._last_s = committed_s if stats.num_running or stats.num_waiting else None

    def per_second(self) -> float:
        """0 until something was measured."""
        return self._num_tokens / self._busy_s if self._busy_s > 0 else 0.0


class Queue:
    """The limits of what waits, and the promise to those who are turned away."""

    __slots__ = ("_config", "_mean_output", "num_waiting", "num_waiting_tokens", "rate")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._mean_output = 0.0  # tokens of a finished choice; the last few dozen weigh most
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.rate = TokenRate()

    def refusal(self, num_choices: int, num_tokens: int) -> tuple[str, Overloaded] | None:
        """Why these may not join, as the metric's reason and the client's error; None when there is room."""
        limit = self._config.max_queued
        if self.num_waiting + num_choices > limit:
            what = f"{self.num_waiting} sequences wait and {num_choices} more came (scheduler.max_queued = {limit})"
            return "max_queued", self._overloaded(what)
        limit = self._config.max_queued_tokens
        if self.num_waiting_tokens + num_tokens > limit:
            what = (
                f"{self.num_waiting_tokens} prompt tokens wait and {num_tokens} more came "
                f"(scheduler.max_queued_tokens = {limit})"
            )
            return "max_queued_tokens", self._overloaded(what)
        return None

    def ring_full(self) -> Overloaded:
        """The engine does not keep up with picking up requests."""
        return self._overloaded("the engine's ring is full")

    def enter(self, num_tokens: int) -> None:
        """A choice waits."""
        self.num_waiting += 1
        self.num_waiting_tokens += num_tokens

    def leave(self, num_tokens: int) -> None:
        """It started, or went away before."""
        self.num_waiting -= 1
        self.num_waiting_tokens -= num_tokens

    def observe_output(self, num_tokens: int) -> None:
        """A choice ended after so many tokens."""
        self._mean_output += (num_tokens - self._mean_output) / 32

    def retry_after_s(self) -> float:
        """Seconds until what waits now is computed: its prompts, and as much output as choices had lately."""
        per_second = self.rate.per_second()
        if not per_second:
            return MIN_RETRY_S
        tokens = self.num_waiting_tokens + self.num_waiting * self._mean_output
        return min(max(tokens / per_second, MIN_RETRY_S), MAX_RETRY_S)

    def _overloaded(self, what: str) -> Overloaded:
        return Overloaded(f"The server is overloaded: {what}.", retry_after_s=self.retry_after_s())
