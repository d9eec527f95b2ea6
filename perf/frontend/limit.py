"""Yardstick (a), the limit: a bare protocol that writes frames to sockets, and nothing else.

    python -m perf.frontend.limit PORT FRAME_FILE

Each connection that sends a POST gets one frame, the bytes of FRAME_FILE, every step time; all are written in one
callback, as one wake-up per step would do it. A GET is answered with 200 and nothing. The board holds the step time.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import cast

import uvloop

from perf.frontend import board as at
from perf.frontend.board import Board

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Client(asyncio.Protocol):
    """A connection."""

    def __init__(self, streams: set[asyncio.Transport]) -> None:
        self._streams = streams
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; uvloop's has the methods of `asyncio.Transport` without being one."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """A whole request in one piece: the bench's client sends it so."""
        if data.startswith(b"POST"):
            self._transport.write(HEAD)
            self._streams.add(self._transport)
        else:
            self._transport.write(EMPTY)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._streams.discard(self._transport)


async def serve(port: int, frame: bytes, board: Board) -> None:
    """Write a frame to every stream at each due time; times that were missed are not made up for."""
    loop, streams = asyncio.get_running_loop(), set[asyncio.Transport]()
    await loop.create_server(lambda: Client(streams), "127.0.0.1", port, backlog=1024)
    due_s = loop.time()
    ticked = asyncio.Event()

    def write_frames() -> None:  # hot
        for transport in streams:
            transport.write(frame)
        ticked.set()

    while True:
        due_s = max(due_s + board.cells[at.STEP_S], loop.time())
        loop.call_at(due_s, write_frames)
        await ticked.wait()
        ticked.clear()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), Board(os.environ[at.VARIABLE])))
