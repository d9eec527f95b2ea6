"""`python -m perf.frontend.stages`: where the loop thread's time goes, token by token.

The real router, detokenizers, frames and sinks in front of real sockets on uvloop, in one process without an engine or
an HTTP parser: stages are added one after another, and each is worth the difference to the one before. In a serving
process the same code also finds colder caches and another thread at the GIL: `perf.frontend` says what that adds.
Prints a table, ends in one JSON line.
"""

import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvloop

from asyncllm.config import SchedulerConfig
from asyncllm.metrics import Metrics
from asyncllm.router.admission import Queue
from asyncllm.router.running import Running
from asyncllm.router.stream import ChoiceInput, ChoiceStream, RequestStream
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.completions import CompletionAnswer
from asyncllm.server.job import Job
from asyncllm.server.sse import FrameSink, SseStream
from asyncllm.server.wire import CompletionRequest
from asyncllm.types import SamplingParams, StepOutput
from asyncllm.weights.checkpoint import EMBEDDED_MODEL, open_checkpoint
from perf.frontend.sleeping_executor import ordinary_token_ids

NUM_STREAMS = 256
NUM_STEPS = 200  # of a round
ROUNDS = 7


Step = Callable[[StepOutput], None]


class NoEngine:
    """What `Running` asks of an engine: nothing, while nobody stops."""

    def abort(self, request_id: int) -> None:
        """Nobody does."""


class Stopping:
    """Stands for the last stages: takes a text, or a frame, and goes no further."""

    def __init__(self, frames: CompletionAnswer | None) -> None:
        self._frames = frames

    def text(self, index: int, text: str) -> bool:
        """Frame it, where there are frames."""
        if self._frames is not None:
            self._frames.text(index, text)
        return True

    def news(self, choices: list[ChoiceStream]) -> bool:
        """There is always room."""
        return True


class Streams:
    """As many running requests, each with a socket whose other end throws away what it gets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.metrics = Metrics("asyncllm", EMBEDDED_MODEL)
        queue = Queue(SchedulerConfig())
        self.running = Running(NoEngine(), queue, self.metrics, (), 1, time.monotonic)  # type: ignore[arg-type]
        self.detokenizers = [tokenizer.detokenizer(skip_special_tokens=True) for _ in range(NUM_STREAMS)]
        self.transports: list[asyncio.Transport] = []
        self.readers: list[socket.socket] = []
        self.frames: list[CompletionAnswer] = []
        self.streams: list[RequestStream] = []
        for number, detokenizer in enumerate(self.detokenizers, 1):
            choice = ChoiceInput([1], SamplingParams(max_tokens=1 << 30))
            stream = RequestStream(f"cmpl-{number}", 0.0, self.running.abandon, self.running.wake_list)
            self.running.add_stream(stream)
            self.running.add_choice(ChoiceStream(stream, 0, number, choice, detokenizer, 0))
            self.streams.append(stream)
            self.frames.append(CompletionAnswer(job_of(stream, choice), CompletionRequest(prompt="x"), 1, 1))

    async def connect(self) -> None:
        """Open the sockets, and wait for every stream as its handler would."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), backlog=NUM_STREAMS) as server:
            for stream in self.streams:
                reader = socket.create_connection(server.getsockname())
                connection, _ = server.accept()
                transport, _ = await loop.create_connection(asyncio.Protocol, sock=connection)
                self.readers.append(reader)
                self.transports.append(transport)
                stream._waiter = loop.create_future()

    def drain_sockets(self) -> None:
        """Read what was written."""
        for reader in self.readers:
            while len(reader.recv(1 << 16, socket.MSG_DONTWAIT)) == 1 << 16:
                pass

    def sink(self, make: Callable[[int], Any]) -> None:
        """Attach one to each stream."""
        for index, stream in enumerate(self.streams):
            stream.attach(make(index))


class _Protocol:
    """What `SseStream` asks of aiohttp's protocol."""

    writing_paused = False

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport


class _Request:
    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport, self.protocol = transport, _Protocol(transport)


class _Response:
    def __init__(self) -> None:
        self.headers = {"Transfer-Encoding": "chunked"}


def job_of(stream: RequestStream, choice: ChoiceInput) -> Job:
    """A request as its handler holds it."""
    return Job(
        id=stream.public_id,
        created=1_700_000_000,
        model=EMBEDDED_MODEL,
        fingerprint="fp_0123456789",
        stream=stream,
        choices=[choice],
        num_choices_per_prompt=1,
        streamed=True,
        include_usage=False,
        continuous_usage=False,
        headers={},
        token_text=None,  # type: ignore[arg-type]
        decode_prompt=str,
    )


def cases(streams: Streams) -> Iterator[tuple[str, Step]]:
    """Name of the stage that is added, and what a step costs with it."""

    def feed(output: StepOutput) -> None:
        streams.running.feed(output, True)

    def bare(output: StepOutput) -> None:
        for transport in streams.transports:
            transport.write(frame)

    frame = b"%x\r\n%b\r\n" % (253, b"x" * 253)
    yield "a bare writer (yardstick a)", bare

    pushes = [detokenizer.push for detokenizer in streams.detokenizers]

    def detokenize(output: StepOutput) -> None:
        for push, token_id in zip(pushes, output.token_ids):
            push(token_id)

    yield "token to text", detokenize
    streams.sink(lambda index: Stopping(None))
    yield "books: who, counters, times, metrics", feed
    streams.sink(lambda index: Stopping(streams.frames[index]))
    yield "text to frame", feed
    streams.sink(
        lambda index: FrameSink(
            SseStream(_Request(streams.transports[index]), _Response(), 0.0),  # type: ignore[arg-type]
            streams.frames[index],
            None,
        )
    )
    yield "frame to socket", feed


async def measure() -> dict[str, float]:
    """CPU microseconds per token with each stage, medians over interleaved rounds."""
    checkpoint = open_checkpoint(EMBEDDED_MODEL)
    tokenizer = Tokenizer(checkpoint.tokenizer(), checkpoint.text)
    streams = Streams(tokenizer)
    await streams.connect()
    ids = ordinary_token_ids(checkpoint.tokenizer())
    outputs = [
        StepOutput(
            request_ids=list(range(1, NUM_STREAMS + 1)),
            token_ids=[ids[(step * 7919 + row * 104729) % len(ids)] for row in range(NUM_STREAMS)],
            finished={},
        )
        for step in range(50)
    ]
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, step in cases(streams):
            spent_s = 0.0
            for number in range(NUM_STEPS):
                output = outputs[number % len(outputs)]
                output.committed_s = time.monotonic()
                begin_s = time.thread_time()
                step(output)
                await asyncio.sleep(0)  # uvloop writes behind the callbacks of a turn
                spent_s += time.thread_time() - begin_s
                if "writer" in name or "socket" in name:
                    streams.drain_sockets()
            found.setdefault(name, []).append(spent_s / NUM_STEPS / NUM_STREAMS * 1e6)
    for transport, reader in zip(streams.transports, streams.readers):
        transport.abort()
        reader.close()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """The command."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        totals = runner.run(measure())
    before = 0.0
    for name, total in totals.items():
        stage = total - before
        sys.stdout.write(f"{name:40} {stage:6.2f} us/token   together {total:6.2f}\n")
        before = 0.0 if "yardstick" in name else total
    print(json.dumps({"bench": "frontend-stages", "streams": NUM_STREAMS, "us_per_token": totals}))


if __name__ == "__main__":
    main()
