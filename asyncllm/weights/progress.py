"""How far a long load or download is: a bar on a terminal, a log line now and then elsewhere.

Nothing at all for what is over within a second or so. Any thread.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Self

BAR_DELAY_S = 1.0  # before a bar shows
LOG_INTERVAL_S = 5.0  # between log lines, and before the first

log = logging.getLogger("asyncllm.weights")


class Progress:
    """`with Progress("loading model.gguf", num_bytes) as progress: progress.advance(done)`."""

    def __init__(
        self,
        what: str,
        num_bytes: int,
        *,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_terminal` None: whether standard error is one."""
        self.num_bytes = num_bytes
        self.done = 0
        self._what = what
        self._clock = clock
        self._started_s = self._said_s = clock()
        self._bar: Any = None
        if sys.stderr.isatty() if is_terminal is None else is_terminal:
            import tqdm  # type: ignore[import-untyped]  # a twentieth of a second, for terminals only

            self._bar = tqdm.tqdm(
                desc=what, total=num_bytes, unit="B", unit_scale=True, unit_divisor=1024, delay=BAR_DELAY_S, leave=False
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        self.done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
            return
        now_s = self._clock()
        if now_s - self._said_s >= LOG_INTERVAL_S:
            self._said_s = now_s
            log.info("%s", described(self._what, self.done, self.num_bytes, now_s - self._started_s))


def described(what: str, done: int, total: int, seconds: float) -> str:
    """`loading model.gguf: 1.2 of 4.1 GiB, 250 MiB/s`."""
    rate = done / seconds / 2**20 if seconds > 0 else 0.0
    return f"{what}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB, {rate:.0f} MiB/s"
