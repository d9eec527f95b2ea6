"""The embedded model's tokenizer, opened once."""

from collections.abc import AsyncIterator

import pytest

from asyncllm.router.tokenizer import Tokenizer
from asyncllm.weights.checkpoint import open_checkpoint
from tests.router.harness import Bench


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    return Tokenizer(checkpoint.tokenizer(), checkpoint.text)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A router that is ready, over an engine that the test scripts."""
    made = await Bench().ready()
    yield made
    await made.close()
