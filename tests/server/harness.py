"""The whole server but the device: real sockets, real router, real engine thread, `FakeExecutor`, no torch.

The model is a byte-level tokenizer without merges (a token is a byte) and a fake that answers with the alphabet, so
that every test knows what must come back.
"""

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import tokenizers
from aiohttp import web

from asyncllm.config import (
    ApiConfig,
    CacheConfig,
    Config,
    LoggingConfig,
    LoRAConfig,
    MetricsConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculativeConfig,
)
from asyncllm.engine.engine import Engine
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.router import Router
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.app import create_app
from asyncllm.server.connections import GuardedRunner
from asyncllm.server.serving import Serving
from asyncllm.weights.base import TextFacts
from tests.fakes import FakeExecutor, small_capacity

MODEL = "fake"
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, then the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIALS])
    return backend


BACKEND = byte_tokenizer()
VOCAB_SIZE = BACKEND.get_vocab_size()
END = BACKEND.token_to_id("<|end|>")
FACTS = TextFacts(
    chat_template=TEMPLATE,
    bos_token=None,
    eos_token="<|end|>",
    bos_token_id=None,
    eos_token_ids=(END,),
    add_bos=False,
    special_tokens=SPECIALS,
)


def ids(text: str) -> list[int]:
    """Token ids of plain text."""
    return BACKEND.encode(text).ids


def alphabet(tokens: Sequence[int]) -> int:
    """The letter after the last one; `a` behind anything else, and around again behind `z`."""
    return _NEXT.get(tokens[-1], _A)


_A = ids("a")[0]
_NEXT = {ids(chr(c))[0]: ids(chr(c + 1))[0] for c in range(ord("a"), ord("z"))}


def says(text: str, end: bool = True) -> Callable[[Sequence[int]], int]:
    """A model that writes `text` behind the last special token or prompt mark, then stops."""
    answer = [*ids(text), *([END] if end else [])]

    def next_token(tokens: Sequence[int]) -> int:
        start = max((i for i, token in enumerate(tokens) if token in _MARKS), default=-1) + 1
        return answer[min(len(tokens) - start, len(answer) - 1)]

    return next_token


_MARKS = {BACKEND.token_to_id("<|assistant|>"), ids(">")[0]}


class Server:
    """A running server and a client session for it."""

    def __init__(self, base: str, session: aiohttp.ClientSession, serving: Serving, executor: FakeExecutor) -> None:
        self.base, self.session, self.serving, self.executor = base, session, serving, executor

    @property
    def port(self) -> int:
        return int(self.base.rsplit(":", 1)[1])

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
        """Status, decoded JSON (or text), headers."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        data = None if raw is None else io.BytesIO(raw)  # aiohttp warns of large plain bytes
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        async with self.session.request(method, self.base + path, data=data, headers=headers, **options) as response:
            text = await response.text()
            is_json = response.content_type == "application/json" and text
            return response.status, json.loads(text) if is_json else text, response.headers

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        status, answer, _ = await self.call("POST", path, body, **options)
        return status, answer

    async def get(self, path: str) -> tuple[int, Any]:
        status, answer, _ = await self.call("GET", path)
        return status, answer

    async def complete(self, **body: Any) -> Any:
        """A completion that must succeed."""
        status, answer = await self.post("/v1/completions", body)
        assert status == 200, answer
        return answer

    async def chat(self, content: str = "hi", **body: Any) -> Any:
        """A chat completion that must succeed."""
        messages = [{"role": "user", "content": content}]
        status, answer = await self.post("/v1/chat/completions", {"messages": messages} | body)
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: dict) -> list[Any]:
        """The decoded events of a stream; `[DONE]` must be the last and is left out."""
        events = []
        payload = json.dumps(body | {"stream": True}).encode()
        async with self.session.post(
            self.base + path, data=payload, headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            raw = (await response.read()).decode()
        lines = [line for line in raw.split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") and "\n" not in line for line in lines), raw
        assert lines.pop() == "data: [DONE]", raw
        for line in lines:
            events.append(json.loads(line.removeprefix("data: ")))
        return events

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop turn until something holds; the test's timeout is the limit."""
        while not condition():  # noqa: ASYNC110 (any state may be waited for; there is no event for most)
            await asyncio.sleep(0)

    async def until_idle(self) -> None:
        """Until the engine has nothing left, by its own count."""
        stats = lambda: self.serving.metrics.stats  # noqa: E731
        await self.until(lambda: not stats().num_running and not stats().num_waiting and not stats().num_used_blocks)


CAPACITY = small_capacity(num_blocks=257, block_size=4, max_sequences=8, max_context_length=512, vocab_size=VOCAB_SIZE)


def config(**tables: dict[str, Any]) -> Config:
    """A configuration for tests; each table's keys can be overridden."""
    kinds = {
        "server": ServerConfig, "model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig,
        "api": ApiConfig, "lora": LoRAConfig, "speculative": SpeculativeConfig, "logging": LoggingConfig,
        "metrics": MetricsConfig,
    }  # fmt: skip
    defaults: dict[str, dict[str, Any]] = {"model": {"path": MODEL}, "scheduler": {"max_sequences": 8}}
    made = {name: kind(**defaults.get(name, {}) | tables.get(name, {})) for name, kind in kinds.items()}
    return Config(**made)


@contextlib.asynccontextmanager
async def running(
    next_token: Callable[[Sequence[int]], int] = alphabet,
    *,
    capacity: Any = CAPACITY,
    depth: int = 1,
    gate: threading.Semaphore | None = None,
    fail_launch_at: int = 0,
    wait_ready: bool = True,
    make_executor: Callable[[Callable[[str], None]], Any] | None = None,
    facts: TextFacts = FACTS,
    backend: tokenizers.Tokenizer | None = None,
    **tables: dict[str, Any],
) -> AsyncIterator[Server]:
    """A server on a free port of the loopback."""
    settings = config(**tables)
    serving = Serving(settings)
    runner = GuardedRunner(create_app(serving), settings.server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    executor = FakeExecutor(capacity, depth, next_token, gate=gate, fail_launch_at=fail_launch_at)
    tokenizer = Tokenizer(backend or byte_tokenizer(), facts)
    engine = Engine(
        make_executor or (lambda report: executor),
        settings.scheduler,
        settings.cache,
        speculative=settings.speculative,
        debug=True,
    )
    router = Router(
        engine, tokenizer, ChatTemplate(facts, tokenizer), settings, serving.metrics, serving.startup.phases
    )
    serving.attach(router)
    router.start()
    try:
        if wait_ready:
            await router.wait_ready()
        async with aiohttp.ClientSession() as session:
            yield Server(base, session, serving, executor)
    finally:
        if gate is not None:
            gate.release(1_000_000)
        assert await router.close(10.0)
        await runner.cleanup()


def check_error(status: int, answer: Any, expected: int, *, param: str | None = "", code: str = "") -> dict[str, Any]:
    """An answer in API.md's error shape with this status; returns the error."""
    assert status == expected, answer
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if param != "":
        assert error["param"] == param, error
    if code:
        assert error["code"] == code, error
    return error


def with_facts(facts: TextFacts, **changes: Any) -> TextFacts:
    """The facts with some of them changed."""
    return msgspec.structs.replace(facts, **changes)


def speaks(text: str, end: bool = True, behind: str = "") -> Callable[[Sequence[int]], int]:
    """A model that writes `text` as the assistant's turn, whatever characters it holds, then stops.

    `behind`: what the template put at the beginning of the turn.
    """
    answer = [*ids(text), *([END] if end else [])]
    assistant = BACKEND.token_to_id("<|assistant|>")

    def next_token(tokens: Sequence[int]) -> int:
        start = max(i for i, token in enumerate(tokens) if token == assistant) + 1 + len(behind)
        return answer[min(len(tokens) - start, len(answer) - 1)]

    return next_token
