"""The server under clients that are slow, many and gone: nobody else waits for them, and nothing of them stays.

Server and clients share one loop and one process, so that tasks, file descriptors and live objects can be counted.
ASYNCLLM_CHURN names another number of connects than 2,000; `perf.churn` does the same to a server process.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from asyncllm.config import ExecutorConfig
from asyncllm.router.stream import ChoiceStream, Delta, RequestStream
from tests.fakes import small_capacity
from tests.server.harness import VOCAB_SIZE, Server, running

pytestmark = pytest.mark.alone
NUM_CHURNED = int(os.environ.get("ASYNCLLM_CHURN", "2000"))
NUM_CHURNING = 32  # at a time, four times what the fake device runs at once
SETTLE_S = 30.0  # for what the loop does behind a closed socket: milliseconds, and a machine may be busy
KERNEL_BYTES = 4096  # socket buffers of the slow client: without a limit the kernel holds megabytes for it
HIGH_WATER = 64 * 1024  # of asyncio's transports, and what aiohttp writes between two looks at it


def request(body: dict, path: str = "/v1/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def alive(kind: type) -> Iterator:
    """Objects of this class that the collector knows."""
    return (thing for thing in gc.get_objects() if issubclass(type(thing), kind))


async def until(condition: Callable[[], object], facts: Callable[[], object]) -> None:
    """Let the loop turn until something holds; `facts` says what held instead."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            while not condition():  # noqa: ASYNC110 (any state may be waited for)
                await asyncio.sleep(0.001)
    assert condition(), facts()


# --- slow ------------------------------------------------------------------------------------------------------------


class SlowClient:
    """A socket with small buffers on both of its ends, which reads when it is told to."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        self.socket.setblocking(False)
        self.transport: asyncio.Transport | None = None  # the server's end
        self.raw = b""

    def __enter__(self) -> "SlowClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, server: Server, body: dict) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", server.port))
        await until(lambda: self._find() is not None, lambda: "the server did not accept")
        self.transport = self._find()
        assert self.transport is not None
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        await loop.sock_sendall(self.socket, request(body))

    async def read(self, num_bytes: int) -> bool:
        """Take what there is, up to so many bytes; False at the end of the stream."""
        self.raw += await asyncio.get_running_loop().sock_recv(self.socket, num_bytes)
        return not self.raw.endswith(b"\r\n0\r\n\r\n")  # a header may end in a 0

    def events(self) -> list[dict]:
        """All events of the stream, from whole chunks."""
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            assert rest[int(size, 16) :][:2] == b"\r\n"
            rest = rest[int(size, 16) + 2 :]
        lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def _find(self) -> asyncio.Transport | None:
        name = self.socket.getsockname()
        return next((end for end in alive(asyncio.Transport) if end.get_extra_info("peername") == name), None)


def letters(count: int) -> str:
    """What the fake model writes behind an "a"."""
    return "".join(chr(ord("a") + (i + 1) % 26) for i in range(count))


class Held:
    """The most that the process held for a client: bytes its transport had not sent, characters still to be framed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._looks = 0
        self.most_bytes = 0
        self.most_characters = 0

    def look(self) -> None:
        """Looking for characters means looking at every object of the process: one look in 20."""
        self.most_bytes = max(self.most_bytes, self._transport.get_write_buffer_size())
        self._looks += 1
        if self._looks % 20 == 0:
            self.most_characters = max(self.most_characters, sum(len(delta.text) for delta in alive(Delta)))


async def step_until_done(server: Server, gate: threading.Semaphore, tasks: list[asyncio.Task], held: Held) -> None:
    """One step at a time, each sent before the next: a device that ran ahead would have its tokens merged for all."""
    stats = lambda: server.serving.metrics.stats  # noqa: E731
    while not all(task.done() for task in tasks):
        num_steps = stats().num_steps
        gate.release()
        await server.until(lambda: stats().num_steps != num_steps or all(task.done() for task in tasks))  # noqa: B023
        held.look()


async def test_a_client_that_reads_nothing_costs_its_own_text_and_nobody_else_waits() -> None:
    num_choices, num_tokens = 8, 480
    gate = threading.Semaphore(0)
    limits = {"max_sequences": 16, "max_context_length": 512}
    capacity = small_capacity(num_blocks=4097, block_size=4, vocab_size=VOCAB_SIZE, **limits)
    async with running(gate=gate, capacity=capacity, scheduler={"max_sequences": 16}) as server:
        with SlowClient() as slow:
            await slow.send(server, {"prompt": "a", "max_tokens": num_tokens, "n": num_choices, "stream": True})
            await server.until(lambda: server.serving.router.num_streams == 1)
            assert slow.transport is not None
            held = Held(slow.transport)
            body = {"prompt": "a", "max_tokens": num_tokens}
            others = [asyncio.create_task(server.stream("/v1/completions", body)) for _ in range(6)]
            await step_until_done(server, gate, others, held)
            for task in others:
                assert "".join(event["choices"][0]["text"] for event in task.result()) == letters(num_tokens)
            # The engine does not wait either: the slow client's tokens are made, its blocks are free.
            await server.until_idle()
            assert server.serving.router.num_streams == 0
            assert slow.raw == b"" and slow.transport.get_write_buffer_size() > 0
            assert held.most_bytes <= 2 * HIGH_WATER + num_choices * 1024
            assert 0 < held.most_characters <= num_choices * num_tokens

            for _ in range(1000):
                assert await slow.read(1)
            while await slow.read(1024):
                pass
            texts = [""] * num_choices
            events = slow.events()
            for choice in (choice for event in events for choice in event["choices"]):
                texts[choice["index"]] += choice["text"]
            assert texts == [letters(num_tokens)] * num_choices
            assert len(events) < num_choices * num_tokens / 2, "what it did not fetch was merged"


# --- many, and gone --------------------------------------------------------------------------------------------------


MOMENTS = ("connected", "part of the request", "all but a byte", "request", "headers", "middle", "middle", "end")


async def visit(server: Server, rng: random.Random) -> None:
    """One connection that ends at a random moment, with a goodbye or without."""
    moment = rng.choice(MOMENTS)
    is_streamed = rng.random() < 0.8
    body = {"prompt": "a" * rng.randint(1, 12), "stream": is_streamed, "n": rng.choice([1, 1, 1, 3])}
    body["max_tokens"] = rng.randint(1, 16) if moment == "end" else 200  # who leaves early leaves the engine at work
    raw = request(body)
    num_sent = {"connected": 0, "part of the request": rng.randrange(len(raw)), "all but a byte": len(raw) - 1}
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(raw[: num_sent.get(moment, len(raw))])
        if moment == "headers" and is_streamed:
            await reader.readuntil(b"\r\n\r\n")
        elif moment == "middle" and is_streamed:
            await reader.read(rng.randrange(1, 2000))
        elif moment == "end":
            await reader.readuntil(b"data: [DONE]\n\n" if is_streamed else b'"usage":')
        for _ in range(rng.choice([0, 0, 1, 3, 30])):
            await asyncio.sleep(0)
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # RST
        else:
            writer.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def left_behind(server: Server) -> dict[str, int]:
    """Everything that a request or a connection takes and has to give back."""
    stats = server.serving.metrics.stats
    return {
        "requests": server.serving.router.num_streams,
        "queued tokens": stats.num_waiting_tokens,
        "running sequences": stats.num_running,
        "waiting sequences": stats.num_waiting,
        "used blocks": stats.num_used_blocks,
        "open streams": len(server.serving.streams),
        "open streams, by the metric": server.serving.metrics.streams_open,
        "tasks": len(asyncio.all_tasks()),
        "open files": open_files(),
    }


def changed(before: dict[str, int], after: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (before[name], count) for name, count in after.items() if count != before[name]}


async def test_clients_that_come_and_go_at_random_moments_leave_nothing_behind() -> None:
    seed = 20261121
    capacity = small_capacity(
        num_blocks=257, block_size=4, max_sequences=8, max_context_length=256, vocab_size=VOCAB_SIZE
    )
    gate = threading.Semaphore(0)
    async with running(gate=gate, capacity=capacity, server={"max_connections_per_client": 4096}) as server:

        async def pace() -> None:
            """A step of the device per turn of the loop: on any machine, who leaves early leaves it at work."""
            while True:
                gate.release()
                await asyncio.sleep(0)

        pacer = asyncio.create_task(pace())
        before = left_behind(server)
        numbers = iter(range(NUM_CHURNED))

        async def churn() -> None:
            for number in numbers:
                await visit(server, random.Random(seed + number))

        await asyncio.gather(*(churn() for _ in range(NUM_CHURNING)))
        await until(lambda: left_behind(server) == before, lambda: (seed, changed(before, left_behind(server))))
        reasons = server.serving.metrics.finished.values
        assert min(reasons.get(("abort",), 0), reasons.get(("length",), 0)) > NUM_CHURNED / 20, (seed, reasons)
        gc.collect()
        live = {kind.__name__: sum(1 for _ in alive(kind)) for kind in (RequestStream, ChoiceStream)}
        assert live == {"RequestStream": 0, "ChoiceStream": 0}
        assert (await server.complete(prompt="a", max_tokens=3))["choices"][0]["text"] == "bcd"
        pacer.cancel()


# --- probes ----------------------------------------------------------------------------------------------------------


class LagProbe:
    """How late a timer of 1 ms fires at worst: the longest that anything held the loop."""

    def __init__(self) -> None:
        self.largest_s = 0.0

    async def measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + 0.001
            await asyncio.sleep(0.001)
            self.largest_s = max(self.largest_s, loop.time() - due_s)


@contextlib.asynccontextmanager
async def lag() -> AsyncIterator[LagProbe]:
    probe = LagProbe()
    task = asyncio.create_task(probe.measure())
    yield probe
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
def switch_interval() -> Iterator[None]:
    """The server's own: with Python's, each system call of the loop may cost 5 ms while the fake device computes."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(ExecutorConfig().switch_interval_us / 1e6)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("switch_interval")
async def test_probes_and_metrics_answer_while_streams_run_and_large_prompts_arrive() -> None:
    num_prompt_tokens, num_streams = 6000, 12
    capacity = small_capacity(
        num_blocks=2049, block_size=16, max_sequences=16, max_context_length=8192, vocab_size=VOCAB_SIZE
    )
    prompts: list[object] = ["a" * num_prompt_tokens, [7] * num_prompt_tokens, "a" * 100_000, [7] * 100_000]
    gate = threading.Semaphore(0)
    async with running(gate=gate, capacity=capacity, scheduler={"max_sequences": 16}) as server, lag() as probe:
        body = {"prompt": "a", "max_tokens": 400}
        streams = [asyncio.create_task(server.stream("/v1/completions", body)) for _ in range(num_streams)]
        large = [asyncio.create_task(server.post("/v1/completions", {"prompt": p, "max_tokens": 2})) for p in prompts]
        num_answers = 0
        while not all(task.done() for task in (*streams, *large)):
            gate.release(4)  # steps, so that a hundred rounds of probes meet running streams
            for path, sign in (("/livez", "alive"), ("/metrics", "asyncllm:")):
                status, answer = await server.get(path)
                assert status == 200 and sign in str(answer), (path, status, answer)
                num_answers += 1
        # The first two prompts fit, the others are refused; either way nobody waited long.
        assert [task.result()[0] for task in large] == [200, 200, 400, 400]
        for task in streams:
            assert "".join(event["choices"][0]["text"] for event in task.result()) == letters(400)
        facts = f"{num_answers} answers; the loop was held for {probe.largest_s * 1000:.1f} ms at most"
        assert num_answers >= 100, facts
        assert probe.largest_s < 1.0, facts
