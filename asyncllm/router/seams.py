"""What the router asks of its neighbours: the engine's handle below, the metrics beside.

Protocols, so that tests can script an engine without a thread. Loop thread only.
"""

from collections.abc import Callable
from typing import Protocol

from asyncllm.types import EngineOutput, StepStats, Submit


class EngineHandle(Protocol):
    """The engine thread as the loop sees it."""

    def start(self, notify: Callable[[], None]) -> None:
        """Start the thread; it calls `notify` after every push to its outputs."""
        ...

    def submit(self, submit: Submit, /) -> bool:
        """Hand over a sequence; False when the ring is full."""
        ...

    def abort(self, request_id: int) -> None:
        """Free a sequence; never lost, harmless if it already ended."""
        ...

    def flush(self) -> None:
        """Hand over the aborts that found the ring full."""
        ...

    def pop_output(self) -> EngineOutput | None:
        """The oldest output, or None."""
        ...

    @property
    def num_queued_commands(self) -> int:
        """Commands the engine has not taken yet."""
        ...

    @property
    def num_queued_outputs(self) -> int:
        """Outputs the loop has not taken yet."""
        ...

    def stop(self) -> None:
        """Ask the thread to abandon its work and end."""
        ...

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; False when it did not come in time."""
        ...


class RouterMetrics(Protocol):
    """The observations that the router makes; `asyncllm.metrics.Metrics` takes them."""

    def observe_step(self, stats: StepStats) -> None:
        """Take over a step's figures."""
        ...

    def observe_queue(self, seconds: float) -> None:
        """A choice left the queue."""
        ...

    def observe_first_token(self, seconds: float) -> None:
        """A choice's first token arrived."""
        ...

    def observe_inter_token(self, seconds: float, count: int = 1) -> None:
        """`count` tokens came, each `seconds` after the one before."""
        ...

    def observe_finished(
        self,
        reason: str,
        e2e_s: float,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        prefill_s: float,
        decode_s: float,
    ) -> None:
        """A choice ended."""
        ...

    def count_rejected(self, reason: str) -> None:
        """A request was refused."""
        ...

    def observe_wakeup(self, seconds: float) -> None:
        """Time from the engine's commit to the loop's drain."""
        ...

    def set_ring_depth(self, requests: int, outputs: int) -> None:
        """Items in the two rings at the last drain."""
        ...
