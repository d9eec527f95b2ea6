"""Server-Sent Events and the few fields of a completion chunk that a measurement needs.

Knows the wire of `/v1/completions` and `/v1/chat/completions`; knows no sockets and no clocks. The client shares the
cores with the server it measures, so an event costs one `split` and one typed decode that skips all other fields.
"""

from typing import Any

import msgspec


class SseReader:
    """Cuts a byte stream, in whatever pieces it arrives, into the data of its events."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:  # hot: once per socket read
        """The data of every event that `piece` completes; comments and other fields are skipped.

        An event's data is one line here, as all servers of this API write it. CRLF line ends are accepted.
        """
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Delta(msgspec.Struct, gc=False):
    """The chat form of new text; reasoning counts as text, since it was generated too."""

    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct, gc=False):
    """One choice of a chunk, of either endpoint."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """Whether this chunk carries generated text: the role chunk and the finishing one do not."""
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content)))


class Usage(msgspec.Struct, gc=False):
    """Token counts by the server's own tokenizer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None  # an object by OpenAI's shape; some servers send a string


decode_chunk = msgspec.json.Decoder(Chunk).decode
