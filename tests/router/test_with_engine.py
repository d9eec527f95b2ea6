"""Router and engine thread together: the two rings, the wake-ups and the counts, with a fake device behind them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from asyncllm.config import CacheConfig, Config, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.errors import Unavailable
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.router import Router
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.types import Capacity
from tests.fakes import FakeExecutor
from tests.fakes_text import RecordingMetrics, byte_text, byte_tokenizer
from tests.router.harness import choice

SMALL = Capacity(num_blocks=41, block_size=4, max_sequences=8, max_context_length=128, vocab_size=256)
ALPHABET = b"abcdefghijklmnopqrstuvwxyz"


def next_letter(tokens: Sequence[int]) -> int:
    """The alphabet, by how much there is already: what a request generates depends on its prompt's length only."""
    return ALPHABET[len(tokens) % 26]


def text(num_prompt_tokens: int, num_tokens: int) -> str:
    return "".join(chr(ALPHABET[i % 26]) for i in range(num_prompt_tokens, num_prompt_tokens + num_tokens))


@dataclass
class House:
    """Everything below the server."""

    executor: FakeExecutor
    metrics: RecordingMetrics = field(default_factory=RecordingMetrics)

    async def __aenter__(self) -> Router:
        engine = Engine(lambda report: self.executor, SchedulerConfig(), CacheConfig(), debug=True)
        facts = byte_text()
        tokenizer = Tokenizer(byte_tokenizer(), facts)
        self.router = Router(engine, tokenizer, ChatTemplate(facts, tokenizer), Config(), self.metrics)
        self.router.start()
        await self.router.wait_ready()
        return self.router

    async def __aexit__(self, *error: object) -> None:
        assert await self.router.close(10.0)


@pytest.mark.parametrize("depth", [1, 2])
async def test_many_requests_at_once_each_get_their_own_text(depth: int) -> None:
    house = House(FakeExecutor(SMALL, depth, next_letter))
    async with house as router:
        streams = [
            router.submit(f"r{i}", [choice("p" * (1 + i % 7), max_tokens=1 + i % 30), choice("q" * 9, prompt_index=1)])
            for i in range(40)
        ]
        for i, stream in enumerate(streams):
            first, second = await stream.collect()
            assert (first.text, first.finish_reason) == (text(1 + i % 7, 1 + i % 30), "length")
            assert (second.text, second.finish_reason) == (text(9, 100), "length")
        assert (router.num_streams, router.queue.num_waiting, router.queue.num_waiting_tokens) == (0, 0, 0)
    assert len(house.metrics.finished) == 80


@pytest.mark.parametrize("depth", [1, 2])
async def test_stop_string_ends_the_sequence_in_the_engine_too(depth: int) -> None:
    house = House(FakeExecutor(SMALL, depth, next_letter))
    async with house as router:
        (delta,) = await router.submit("r", [choice("pp", stop=("xyz",))]).collect()
        assert (delta.text, delta.stop_reason) == (text(2, 21), "xyz")
        await router.submit("after", [choice(max_tokens=1)]).collect()
    assert house.metrics.steps[-1].num_used_blocks == 0


async def test_client_that_leaves_frees_its_blocks() -> None:
    house = House(FakeExecutor(SMALL, 2, next_letter))
    async with house as router:
        leaving = router.submit("leaves", [choice("p" * 40), choice("p" * 40)])
        await leaving.get()
        leaving.abort()
        assert await leaving.get() == []
        await router.submit("stays", [choice(max_tokens=3)]).collect()
        await router.wait_idle()
    assert house.metrics.steps[-1].num_used_blocks == 0


async def test_failing_step_ends_every_request_and_the_router_says_why() -> None:
    house = House(FakeExecutor(SMALL, 1, next_letter, fail_launch_at=5))
    async with house as router:
        streams = [router.submit(str(i), [choice()]) for i in range(3)]
        results = await asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True)
        assert all(isinstance(result, Unavailable) and result.code == "engine_dead" for result in results)
        assert "RuntimeError" in await router.wait_dead()
