"""Work on the loop that takes long, in pieces. Loop thread."""

import asyncio
import time


class Pause:
    """Lets the loop look at everybody else now and then."""

    def __init__(self, piece_s: float) -> None:
        """`piece_s`: of work at a time. Every pause is a turn of the loop, 5 ms on a busy machine."""
        self._piece_s = piece_s
        self._begin_s = time.monotonic()

    async def when_due(self) -> None:
        """Pause if the last one was a while ago."""
        if time.monotonic() - self._begin_s > self._piece_s:
            await asyncio.sleep(0)
            self._begin_s = time.monotonic()
