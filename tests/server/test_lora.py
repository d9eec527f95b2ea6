"""Adapters by their names, in every API; and answers of the official client that are those of PEFT's merged models."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from asyncllm.executor.build import build_executor
from asyncllm.weights.base import TextFacts
from asyncllm.weights.checkpoint import open_checkpoint
from tests.executor.adapted import AdaptedModel
from tests.server.harness import Server, check_error, running
from tests.weights.tiny import tiny_tokenizer

LORA = {"adapters": {"sql": "nowhere/sql", "org/chat": "nowhere/chat"}}
TURNS = [{"role": "user", "content": "hi"}]
# Each API with a body for it, and whether its answer names the model.
CALLS: dict[str, tuple[dict[str, Any], bool]] = {
    "/v1/completions": ({"prompt": "a", "max_tokens": 2}, True),
    "/v1/chat/completions": ({"messages": TURNS, "max_tokens": 2}, True),
    "/v1/responses": ({"input": "a", "max_output_tokens": 2}, True),
    "/v1/messages": ({"messages": TURNS, "max_tokens": 2}, True),
    "/v1/embeddings": ({"input": "a"}, True),
    "/generate": ({"prompt": "a", "max_tokens": 2}, False),
    "/chat": ({"messages": TURNS, "max_tokens": 2}, False),
}
WITHOUT_ENGINE: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": TURNS},
}


@pytest.mark.parametrize("path", CALLS)
async def test_the_model_of_a_request_chooses_the_adapter_in_every_api(path: str) -> None:
    body, is_named = CALLS[path]
    async with running(lora=LORA) as server:
        for adapter, name in enumerate([None, "sql", "org/chat", "fake"]):
            status, answer = await server.post(path, body | ({} if name is None else {"model": name}))
            assert status == 200, answer
            assert not is_named or answer["model"] == (name or "fake")
            (entered,) = server.executor.plans[-1 if path == "/v1/embeddings" else -2].new_slots
            assert entered.adapter == adapter % 3
        status, answer = await server.post(path, body | {"model": "sq"})
        assert status == 404, answer
        assert "Served here: fake, org/chat, sql." in str(answer)


@pytest.mark.parametrize("path", WITHOUT_ENGINE)
async def test_what_generates_nothing_takes_the_names_as_well(path: str) -> None:
    async with running(lora=LORA) as server:
        for name, expected in (("sql", 200), ("fake", 200), ("sq", 404)):
            assert (await server.post(path, WITHOUT_ENGINE[path] | {"model": name}))[0] == expected


async def test_a_stream_names_the_adapter() -> None:
    async with running(lora=LORA) as server:
        events = await server.stream("/v1/completions", {"prompt": "a", "max_tokens": 3, "model": "sql"})
        assert {event["model"] for event in events} == {"sql"}


async def test_models_are_listed_with_their_adapters_behind_them() -> None:
    async with running(model={"aliases": ("gpt-4",)}, lora=LORA) as server:
        listed = (await server.get("/v1/models"))[1]["data"]
        assert [(card["id"], card["root"], card["parent"]) for card in listed] == [
            ("fake", "fake", None), ("gpt-4", "fake", None), ("sql", "sql", "fake"), ("org/chat", "org/chat", "fake"),
        ]  # fmt: skip
        assert (await server.get("/v1/models/org/chat"))[1] == listed[3]
        check_error(*await server.get("/v1/models/chat"), 404, code="model_not_found")
        native = (await server.get("/models"))[1]
        assert [(model["name"], model["parent"]) for model in native["models"]] == [
            ("fake", None), ("gpt-4", None), ("sql", "fake"), ("org/chat", "fake"),
        ]  # fmt: skip
        assert native["default_model"] == "fake"


async def test_fingerprints_tell_servers_with_other_adapters_apart() -> None:
    seen = set()
    for lora in ({}, LORA, {"adapters": {"sql": "elsewhere"}}):
        async with running(lora=lora) as server:
            seen.add((await server.complete(prompt="a", max_tokens=1))["system_fingerprint"])
    assert len(seen) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return AdaptedModel(tmp_path_factory.mktemp("adapted"), vocab_size=259)


@pytest.fixture
async def served(model: AdaptedModel) -> AsyncIterator[Server]:
    config, checkpoint = model.config(), open_checkpoint(str(model.directory))
    facts = TextFacts(chat_template="{% for message in messages %}{{ message.content }}{% endfor %}")
    async with running(
        make_executor=lambda report: build_executor(config, checkpoint, report),
        facts=facts,
        backend=tiny_tokenizer(),
        lora={"adapters": model.lora.adapters},
    ) as server:
        yield server


async def test_the_official_client_gets_the_merged_models_answers(served: Server, model: AdaptedModel) -> None:
    tokenizer, prompt = tiny_tokenizer(), "SELECT the capital"
    async with openai.AsyncOpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0) as client:
        names = [card.id async for card in client.models.list()]
        assert names == ["fake", "sql", "chat"]
        texts = set()
        for adapter, name in enumerate(names):
            text = await client.completions.create(model=name, prompt=prompt, max_tokens=32, temperature=0, logprobs=0)
            assert text.model == name
            check(tokenizer, model, adapter, prompt, text.choices[0].text)
            texts.add(text.choices[0].text)
            chat = await client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": prompt}], max_tokens=32, temperature=0, stream=True
            )
            chunks = [chunk async for chunk in chat]
            assert {chunk.model for chunk in chunks} == {name}
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.choices[0].text
        assert len(texts) == 3
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="sq", prompt=prompt)


def check(tokenizer: Tokenizer, model: AdaptedModel, adapter: int, prompt: str, text: str) -> None:
    """The text is that of the merged model's 32 greedy tokens."""
    tokens = tokenizer.encode(prompt).ids
    output: list[int] = []
    for _ in range(32):
        output.append(model.chosen(adapter, tokens, [*output, 0])[-1])
    assert text == tokenizer.decode(output)
