"""One streamed request to an OpenAI-compatible server, timed from the client's side.

Knows aiohttp and the two endpoints; knows nothing of load patterns or statistics. Any asyncio loop. A request never
raises for what the server or the network did: it comes back as a `Completion` with its failure in words, so that a
run can count it.
"""

import time
from typing import Any, Literal

import aiohttp
import msgspec

from perf.sse import Chunk, SseReader, decode_chunk

Endpoint = Literal["completions", "chat"]
Prompt = str | list[int]  # token ids: /v1/completions only
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_FAILURE_CHARS = 160


class RequestOptions(msgspec.Struct, frozen=True):
    """What all requests of a run have in common."""

    endpoint: Endpoint = "completions"
    model: str = ""  # empty: the field is left out, and the server takes the model it serves
    output_tokens: int = 64
    fixed_length: bool = True  # ask for ignore_eos and min_tokens, so that every answer has output_tokens
    temperature: float = 0.0
    extra_body: dict[str, Any] = {}  # laid over the body last

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {"max_tokens": self.output_tokens, "temperature": self.temperature, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.model:
            body["model"] = self.model
        if self.fixed_length:
            body |= {"ignore_eos": True, "min_tokens": self.output_tokens}
        return body | self.extra_body


class Completion:
    """One request's fate. Times are `time.perf_counter()` seconds."""

    __slots__ = (
        "_last_s",
        "end_s",
        "failure",
        "finish_reason",
        "num_chunks",
        "start_s",
        "text_gaps_s",
        "ttft_s",
        "usage",
    )

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.end_s = start_s
        self.ttft_s: float | None = None  # None: no text came
        self.text_gaps_s: list[float] = []  # between two chunks with text; 0 for two that arrived in one read
        self.num_chunks = 0  # with text
        self.finish_reason: str | None = None
        self.usage: tuple[int, int] | None = None  # prompt and completion tokens, where the server said
        self.failure: str | None = None  # None: it went well
        self._last_s = start_s

    @property
    def output_tokens(self) -> int:
        """Tokens by the server's count, or the chunks with text where it gave none."""
        return self.usage[1] if self.usage else self.num_chunks

    @property
    def e2e_s(self) -> float:
        """From the moment it was due to the end of the stream."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token behind the first: blind to how a server cuts its chunks."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self._last_s - self.start_s - self.ttft_s) / (self.output_tokens - 1)

    def add(self, chunk: Chunk, now_s: float) -> None:  # hot: once per event
        """Account for one event that arrived at `now_s`."""
        if chunk.error is not None:
            message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            self.failure = cut(f"error in the stream: {message}")
        if chunk.usage is not None:
            self.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            if not choice.has_text:
                continue
            if self.num_chunks:
                self.text_gaps_s.append(now_s - self._last_s)
            else:
                self.ttft_s = now_s - self.start_s
            self.num_chunks += 1
            self._last_s = now_s

    def close(self, now_s: float, failure: str | None = None) -> None:
        """The stream is over; one that never said why it finished was cut short and is a failure."""
        self.end_s = now_s
        if failure is None and self.finish_reason is None:
            failure = "stream ended without a finish_reason"
        if self.failure is None:
            self.failure = failure


def cut(text: str) -> str:
    """A failure on one line of bounded length, so that equal ones can be counted."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_FAILURE_CHARS else line[:MAX_FAILURE_CHARS] + "…"


def open_session(timeout_s: float, new_connections: bool = False) -> aiohttp.ClientSession:
    """A session without a limit of its own on connections; `timeout_s` bounds one whole request.

    `new_connections`: one for each request, for servers that close them behind a stream without a word.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=new_connections)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


async def complete(
    session: aiohttp.ClientSession, url: str, options: RequestOptions, prompt: Prompt, due_s: float | None = None
) -> Completion:
    """Send one request to the server at `url` and read its stream to the end.

    `due_s` is when it should have been sent (open loop): a client that is late must not make the server look fast.
    """
    completion = Completion(time.perf_counter() if due_s is None else due_s)
    body = msgspec.json.encode(options.body(prompt))
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    try:
        async with session.post(url + PATHS[options.endpoint], data=body, headers=headers) as response:
            if response.status != 200:
                failure = cut(f"HTTP {response.status}: {(await response.content.read(1000)).decode(errors='replace')}")
                completion.close(time.perf_counter(), failure)
                return completion
            await _read_stream(response.content, completion)
    except TimeoutError:
        completion.close(time.perf_counter(), "timed out")
    except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
        completion.close(time.perf_counter(), cut(f"{type(error).__name__}: {error}"))
    else:
        completion.close(time.perf_counter())
    return completion


async def _read_stream(stream: aiohttp.StreamReader, completion: Completion) -> None:
    """Account for every event until the server closes the stream."""
    reader = SseReader()
    async for piece in stream.iter_any():
        now_s = time.perf_counter()
        for data in reader.feed(piece):
            if data != b"[DONE]":
                completion.add(decode_chunk(data), now_s)
