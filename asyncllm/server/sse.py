"""Server-Sent Events: what an API's frames must offer, and the way of their bytes to the socket.

One write per stream and wake-up, however many frames the wake-up brought, and straight to the transport while the
client keeps up.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from aiohttp import web

from asyncllm.errors import AsyncLLMError
from asyncllm.router.stream import ChoiceStream, Delta
from asyncllm.server.replies import Usage, encode_json

KEEP_ALIVE = b": keep-alive\n\n"
LOOKS_PER_INTERVAL = 4  # of the keep-alive task at every stream
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Frames(Protocol):
    """Turns what happened to a choice into frames of one API."""

    def opening(self) -> bytes:
        """What can be said before anything was generated."""
        ...

    def text(self, index: int, text: str) -> bytes:
        """The frame of the next text of a choice, of which nothing else is to be told."""
        ...

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """The frames of one delta; none where nothing can be shown yet."""
        ...

    def closing(self) -> bytes:
        """What stands behind the ends of all choices."""
        ...

    def failing(self, error: AsyncLLMError) -> bytes:
        """An error after the status line, and what stands behind it."""
        ...


def event(name: str, value: Any) -> bytes:
    """A frame that names its event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode_json(value))


class SseStream:
    """One open event stream."""

    __slots__ = ("_is_chunked", "_num_looks", "_protocol", "_response", "_transport", "_write_timeout_s")

    def __init__(self, request: web.Request, response: web.StreamResponse, write_timeout_s: float) -> None:
        """`write_timeout_s`: how long a client may leave everything unread; 0 = for ever."""
        self._response = response
        self._write_timeout_s = write_timeout_s or None
        self._protocol = request.protocol
        self._transport = request.transport
        self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"  # HTTP/1.0 has no chunks
        self._num_looks = 0  # of the keep-alive task since the last frame

    @property
    def has_room(self) -> bool:  # hot
        """Whether the socket takes more right now. Where it does not, `write` waits until it does."""
        protocol = self._protocol
        return protocol.transport is not None and not protocol.writing_paused

    def send(self, frames: bytes) -> None:  # hot: once per token
        """Write whole frames behind the first `write`, past `StreamResponse.write`, which costs three times as much.

        The body is framed here as aiohttp frames it: neither compressed nor of a declared length.
        """
        self._num_looks = 0
        assert self._transport is not None
        self._transport.write(b"%x\r\n%b\r\n" % (len(frames), frames) if self._is_chunked else frames)

    async def write(self, frames: bytes) -> None:
        """Send whole frames, and wait until the socket has room again.

        Raises ConnectionResetError when the client is gone, or has left everything unread for too long: its request may
        be over, but the connection, this task and the text would stay as long as it likes.
        """
        self._num_looks = 0
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._response.write(frames)
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()
            raise ConnectionResetError("the client does not read") from None

    def keep_alive(self) -> None:
        """A comment, which every SSE reader skips, where nothing was sent for an interval.

        Called `LOOKS_PER_INTERVAL` times per interval. A client that does not even read what it has gets none.
        """
        self._num_looks += 1
        if self._num_looks > LOOKS_PER_INTERVAL and self.has_room:
            self.send(KEEP_ALIVE)


class FrameSink:
    """From the router's news to the socket, while the client keeps up and the handler sleeps."""

    __slots__ = ("_frames", "_stream", "_usage")

    def __init__(self, stream: SseStream, frames: Frames, usage: Callable[[], Usage] | None) -> None:
        """`usage`: the tokens so far, for those who want them with every chunk."""
        self._stream = stream
        self._frames = frames
        self._usage = usage

    def text(self, index: int, text: str) -> bool:  # hot: once per token
        """See `Sink`."""
        stream = self._stream
        if self._usage is not None or not stream.has_room:
            return False
        if chunk := self._frames.text(index, text):  # an empty one would end the body
            stream.send(chunk)
        return True

    def news(self, choices: list[ChoiceStream]) -> bool:  # hot where the loop is late
        """See `Sink`."""
        if not self._stream.has_room:
            return False
        if chunk := self.framed([choice.take() for choice in choices if choice.has_news]):
            self._stream.send(chunk)
        return True

    def framed(self, deltas: list[Delta]) -> bytes:
        """The frames of all these deltas."""
        usage = self._usage() if self._usage is not None else None
        return b"".join([self._frames.delta(delta, usage) for delta in deltas])


class OpenStreams:
    """All streams of this process, and the task that keeps proxies from cutting silent ones."""

    def __init__(self, keep_alive_s: float, write_timeout_s: float) -> None:
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s
        self._streams: set[SseStream] = set()

    def __len__(self) -> int:
        return len(self._streams)

    @contextlib.contextmanager
    def opened(self, request: web.Request, response: web.StreamResponse) -> Iterator[SseStream]:
        """The response as a stream, known to the keep-alive task while the block runs."""
        stream = SseStream(request, response, self._write_timeout_s)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    async def keep_alive_forever(self) -> None:
        """Look at all streams a few times per interval; one timer for the process instead of one per wait."""
        if not self._keep_alive_s:
            return
        while True:
            await asyncio.sleep(self._keep_alive_s / LOOKS_PER_INTERVAL)
            for stream in self._streams:
                stream.keep_alive()
