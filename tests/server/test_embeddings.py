"""POST /v1/embeddings over real sockets: a token is a byte, and its hidden state depends on all before it."""

import asyncio
import base64
import math
import struct
import threading
from typing import Any

import msgspec
import openai
import pytest

from asyncllm.client import AsyncClient
from asyncllm.server import embeddings
from asyncllm.server.embeddings_wire import Embeddings
from asyncllm.types import Pooling
from tests.fakes import expected_sums
from tests.server.harness import CAPACITY, VOCAB_SIZE, Server, check_error, ids, running
from tests.server.test_ends import let_the_loop_see_it, send

PATH = "/v1/embeddings"
SIZE = CAPACITY.hidden_size


def scaled(values: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def raw(text: str, pooling: Pooling = Pooling.LAST) -> list[float]:
    """The vector of a text before it is cut or scaled."""
    sums = expected_sums(ids(text), pooling, SIZE)
    return sums if pooling is Pooling.LAST else [value / len(ids(text)) for value in sums]


def near(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-6)


async def ask(server: Server, input: Any, **options: Any) -> Any:
    """An answer that must succeed."""
    status, answer = await server.post(PATH, {"input": input} | options)
    assert status == 200, answer
    return answer


def vectors(answer: Any) -> list[list[float]]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return [entry["embedding"] for entry in answer["data"]]


# --- vectors ---------------------------------------------------------------------------------------------------------


async def test_a_text_becomes_the_scaled_state_of_its_last_token() -> None:
    async with running() as server:
        answer = await ask(server, "some text")
        assert vectors(answer) == [near(scaled(raw("some text")))]
        del answer["data"]
        assert answer == {
            "object": "list",
            "model": "fake",
            "usage": {"prompt_tokens": 9, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}},
            "pooling": "last",
        }


async def test_the_mean_is_of_all_tokens_however_they_came_through_the_engine() -> None:
    async with running(scheduler={"max_sequences": 8, "max_batched_tokens": 11}) as server:
        text = "a text of several chunks"
        for _ in range(2):  # the second time over a prefix that is cached
            answer = await ask(server, text, pooling="mean")
            assert vectors(answer) == [near(scaled(raw(text, Pooling.MEAN)))]
            assert answer["pooling"] == "mean"


async def test_the_configuration_says_how_to_pool_where_a_request_does_not() -> None:
    async with running(model={"path": "fake", "pooling": "mean"}) as server:
        assert (await ask(server, "abc"))["pooling"] == "mean"
        assert vectors(await ask(server, "abc")) == [near(scaled(raw("abc", Pooling.MEAN)))]
        assert vectors(await ask(server, "abc", pooling="last")) == [near(scaled(raw("abc")))]


@pytest.mark.parametrize("pooling", Pooling)
async def test_vectors_are_left_as_they_are_where_asked_for(pooling: Pooling) -> None:
    async with running() as server:
        answer = await ask(server, "abc", pooling=pooling.value, normalize=False)
        assert vectors(answer) == [near(raw("abc", pooling))]


async def test_a_cut_vector_is_scaled_behind_the_cut() -> None:
    async with running() as server:
        for size in range(1, SIZE + 1):
            assert vectors(await ask(server, "abc", dimensions=size)) == [near(scaled(raw("abc")[:size]))]
        assert vectors(await ask(server, "abc", dimensions=2, normalize=False)) == [near(raw("abc")[:2])]


async def test_base64_holds_the_same_numbers_in_little_endian_float32() -> None:
    async with running() as server:
        plain = vectors(await ask(server, ["a", "bc"], encoding_format="float"))
        packed = vectors(await ask(server, ["a", "bc"], encoding_format="base64"))
        assert [list(struct.unpack(f"<{SIZE}f", base64.b64decode(text))) for text in packed] == plain


async def test_token_ids_and_texts_give_the_same_vectors() -> None:
    async with running() as server:
        texts = ["abc", "d", "a longer one"]
        batch = vectors(await ask(server, texts))
        assert batch == [near(scaled(raw(text))) for text in texts]
        assert vectors(await ask(server, [ids(text) for text in texts])) == batch
        assert vectors(await ask(server, ids(texts[0]))) == batch[:1]


async def test_cached_tokens_are_told() -> None:
    async with running() as server:
        await ask(server, "0123456789")
        answer = await ask(server, ["0123456789", "other"])
        assert answer["usage"] == {
            "prompt_tokens": 15, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 8},
        }  # fmt: skip
        salted = await ask(server, "0123456789", cache_salt="s")
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_the_answer_is_written_as_its_struct_would_be() -> None:
    async with running() as server:
        for encoding in ("float", "base64"):
            body = {"input": ["a", "bc", "d"], "encoding_format": encoding}
            async with server.session.post(server.base + PATH, json=body) as response:
                text = await response.read()
                assert int(response.headers["Content-Length"]) == len(text)
            assert msgspec.json.encode(msgspec.json.decode(text, type=Embeddings)) == text


# --- clients ---------------------------------------------------------------------------------------------------------


async def test_the_official_client_gets_numbers_in_every_encoding() -> None:
    async with (
        running() as server,
        openai.AsyncOpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client,
    ):
        texts = ["first", "second text"]
        expected = [near(scaled(raw(text))) for text in texts]
        answer = await client.embeddings.create(model="fake", input=texts)  # base64 underneath
        assert [entry.embedding for entry in answer.data] == expected
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 16
        answer = await client.embeddings.create(model="fake", input=texts, encoding_format="float")
        assert [entry.embedding for entry in answer.data] == expected
        answer = await client.embeddings.create(model="fake", input=ids("first"), dimensions=3, user="u")
        assert answer.data[0].embedding == near(scaled(raw("first")[:3]))
        answer = await client.embeddings.create(model="fake", input="first", extra_body={"pooling": "mean"})
        assert answer.data[0].embedding == near(scaled(raw("first", Pooling.MEAN)))
        with pytest.raises(openai.BadRequestError) as raised:
            await client.embeddings.create(model="fake", input="first", dimensions=SIZE + 1)
        assert raised.value.param == "dimensions"


async def test_our_client_gets_numbers_in_every_encoding() -> None:
    async with running() as server, AsyncClient(server.base) as client:
        for options in ({}, {"encoding_format": "base64"}):
            answer = await client.embeddings(["first", "second"], **options)
            assert answer.vectors == [near(scaled(raw("first"))), near(scaled(raw("second")))]
            assert answer.pooling == "last"
            assert answer.usage is not None and answer.usage.total_tokens == 11


async def test_headers_are_those_of_every_answer() -> None:
    async with running() as server:
        body = {"input": "abc", "truncate": True}
        status, _, headers = await server.call("POST", PATH, body, headers={"x-request-id": "mine"})
        assert status == 200
        assert headers["x-request-id"] == "mine"
        assert headers["x-ignored-params"] == "truncate"
        assert headers["Server-Timing"].startswith("queue;dur=") and "prefill;dur=" in headers["Server-Timing"]
    async with running(api={"strict": True}) as server:
        check_error(*await server.post(PATH, body), 400, param="truncate", code="unknown_parameter")


# --- refusals --------------------------------------------------------------------------------------------------------

LONG = "a" * 513


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [""]}, "input[0]", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": [[1], []]}, "input[1]", "invalid_value"),
        ({"input": ["a", 1]}, "input", "invalid_type"),
        ({"input": [1, "a"]}, "input", "invalid_type"),
        ({"input": [[1], 1]}, "input", "invalid_type"),
        ({"input": [1, True]}, "input[1]", "invalid_type"),
        ({"input": [VOCAB_SIZE]}, "input", "invalid_value"),
        ({"input": [[1], [2, -1]]}, "input[1]", "invalid_value"),
        ({"input": [[1], [2**70]]}, "input[1]", "invalid_value"),
        ({"input": LONG}, "input", "context_length_exceeded"),
        ({"input": ["a", LONG, "b"]}, "input[1]", "context_length_exceeded"),
        ({"input": [1] * 513}, "input", "context_length_exceeded"),
        ({"input": [[1], [1] * 513]}, "input[1]", "context_length_exceeded"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": SIZE + 1}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 1.5}, "dimensions", "invalid_type"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "pooling": "cls"}, "pooling", "invalid_value"),
        ({"input": "a", "normalize": 1}, "normalize", "invalid_type"),
        ({"input": "a", "timeout": 0}, "timeout", "invalid_value"),
        ({"input": "a", "timeout": 4000}, "timeout", "invalid_value"),
    ],
)
async def test_a_wrong_request_is_a_400_that_names_the_field(body: dict, param: str, code: str) -> None:
    async with running() as server:
        check_error(*await server.post(PATH, body), 400, param=param, code=code)
        check_error(*await server.post(PATH, {"input": "a", "model": "other"}), 404, param="model")
        assert server.executor.num_steps == 0


async def test_a_batch_has_a_limit_that_the_error_names() -> None:
    async with running() as server:
        error = check_error(*await server.post(PATH, {"input": ["a"] * 2049}), 400, param="input")
        assert "2049" in error["message"] and "2048" in error["message"]


async def test_an_input_may_fill_the_context() -> None:
    async with running() as server:
        assert vectors(await ask(server, LONG[:512])) == [near(scaled(raw(LONG[:512])))]


# --- the way through the engine --------------------------------------------------------------------------------------


async def test_a_batch_larger_than_the_queue_waits_for_room() -> None:
    async with running(scheduler={"max_sequences": 2, "max_queued": 3}) as server:
        texts = [f"text {number}" for number in range(20)]
        assert vectors(await ask(server, texts)) == [near(scaled(raw(text))) for text in texts]
        await server.until_idle()


async def test_slices_hold_no_more_inputs_and_tokens_than_they_may() -> None:
    form = embeddings.VectorForm(Pooling.LAST, SIZE, True)
    choices = [embeddings.pooled_choice([1] * length, form) for length in (1, 2, 3, 9, 1, 1, 1, 1)]
    cut = embeddings.slices_of(choices, 3, 6)
    assert [[len(choice.prompt_token_ids) for choice in part] for part in cut] == [[1, 2, 3], [9], [1, 1, 1], [1]]


async def test_inputs_share_steps_with_requests_that_generate() -> None:
    async with running() as server:
        made, answer = await asyncio.gather(
            server.complete(prompt="abc", max_tokens=20), ask(server, ["one", "two", "three"], pooling="mean")
        )
        assert made["choices"][0]["text"] == "defghijklmnopqrstuvw"
        assert vectors(answer) == [near(scaled(raw(text, Pooling.MEAN))) for text in ("one", "two", "three")]


async def test_a_client_that_leaves_frees_all_its_inputs() -> None:
    gate = threading.Semaphore(1)
    async with running(gate=gate) as server:
        stats = lambda: server.serving.metrics.stats  # noqa: E731
        _, writer = await send(server, {"input": ["a" * 500] * 300}, PATH)
        await server.until(lambda: stats().num_steps == 1)
        assert server.serving.router.num_streams == 2  # two slices of three
        writer.transport.abort()
        await let_the_loop_see_it(server, 0)
        gate.release(1)
        await server.until(lambda: not stats().num_used_blocks and not stats().num_waiting)
        assert server.serving.router.queue.num_waiting == 0


async def test_a_deadline_is_a_504_whatever_was_computed() -> None:
    gate = threading.Semaphore(2)
    async with running(gate=gate, scheduler={"max_sequences": 8, "max_batched_tokens": 8}) as server:
        headers = {"X-Request-Timeout": "0.2"}
        status, answer = await server.post(PATH, {"input": ["ab", "c" * 30]}, headers=headers)
        check_error(status, answer, 504, param="timeout", code="timeout")
        gate.release(100)
        await server.until_idle()


async def test_a_deadline_also_ends_the_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SLICE_INPUTS", 1)
    gate = threading.Semaphore(0)
    async with running(gate=gate, scheduler={"max_sequences": 1, "max_queued": 1}) as server:
        pending = asyncio.create_task(server.post(PATH, {"input": ["a", "b"], "timeout": 0.3}))
        await let_the_loop_see_it(server, 1)
        queue = server.serving.router.queue
        queue.enter(1)  # somebody else, who is in the way of the second input once the first one is done
        gate.release()
        check_error(*await pending, 504, code="timeout")
        queue.leave(1)
        gate.release(100)
        await server.until_idle()


async def test_an_aborted_request_is_a_503() -> None:
    gate = threading.Semaphore(1)
    async with running(gate=gate) as server:
        options = {"headers": {"x-request-id": "mine"}}
        pending = asyncio.create_task(server.post(PATH, {"input": ["a" * 500] * 9}, **options))
        await server.until(lambda: server.serving.metrics.stats.num_steps == 1)
        status, answer = await server.post("/abort", {"request_id": "mine"})
        assert (status, answer) == (200, {"aborted": ["embd-mine"]})
        check_error(*await pending, 503, code="aborted")


async def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate, scheduler={"max_sequences": 1, "max_queued": 2}) as server:
        pending = [asyncio.create_task(server.post(PATH, {"input": "abc"})) for _ in range(2)]
        await let_the_loop_see_it(server, 2)
        status, answer, headers = await server.call("POST", PATH, {"input": ["a", "b"]})
        check_error(status, answer, 429, code="server_overloaded")
        assert int(headers["Retry-After"]) >= 1
        gate.release(100)
        for status, answer in await asyncio.gather(*pending):
            assert status == 200, answer


async def test_an_engine_that_dies_is_a_503() -> None:
    async with running(fail_launch_at=1) as server:
        check_error(*await server.post(PATH, {"input": ["a", "b"]}), 503, code="engine_dead")


async def test_an_embedding_counts_as_prompt_and_has_no_first_token() -> None:
    async with running() as server:
        await ask(server, ["abc", "defg"])
        metrics = server.serving.metrics
        assert sum(metrics.time_to_first_token.counts) == 0 and metrics.generation_tokens == 0
        assert (metrics.prompt_tokens, metrics.finished.values) == (7, {("length",): 2})
        assert sum(metrics.prefill.counts) == 2 and metrics.prefill.total > 0
        assert metrics.decode.total == 0
        status, stats = await server.get("/stats")
        assert status == 200 and (stats["request_count"], stats["avg_tokens_per_second"]) == (2, 0.0)


async def test_hidden_states_that_are_no_numbers_are_an_error_of_the_server() -> None:
    async with running() as server:
        sample = server.executor._sample

        def broken(plan: Any) -> Any:
            result = sample(plan)
            result.pooled = result.pooled and {row: sums * float("inf") for row, sums in result.pooled.items()}
            return result

        server.executor._sample = broken
        check_error(*await server.post(PATH, {"input": "abc"}), 500)
