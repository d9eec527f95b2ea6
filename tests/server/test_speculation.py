"""`speculative_tokens` over HTTP, on a fake device that goes round and round in the alphabet."""

import pytest

from tests.server.harness import check_error, running

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BODY = {"prompt": LETTERS, "max_tokens": 100, "temperature": 0}


async def test_a_request_asks_for_drafts_and_the_text_is_the_same() -> None:
    async with running() as server:
        plain = await server.complete(**BODY)
        assert server.serving.metrics.stats.num_drafts == 0
        drafted = await server.complete(**BODY, speculative_tokens=7)
        assert drafted["choices"] == plain["choices"]
        assert drafted["usage"]["completion_tokens"] == 100
        await server.until_idle()
        stats = server.serving.metrics.stats
        assert stats.num_drafts > 5 and sum(stats.num_accepted_tokens) == stats.num_draft_tokens
        assert {len(draft) for plan in server.executor.plans for draft in plan.drafts.values()} >= {7}


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_stream_is_the_text_of_none(depth: int) -> None:
    async with running(depth=depth, speculative={"method": "ngram"}) as server:
        events = await server.stream("/v1/completions", BODY)
        texts = [event["choices"][0]["text"] for event in events if event["choices"]]
        assert "".join(texts) == (LETTERS * 4)[:100]
        await server.until_idle()
        assert sum(server.serving.metrics.stats.num_accepted_tokens) > 50


async def test_a_stop_string_that_drafts_run_over_ends_the_text_in_front_of_it() -> None:
    async with running(speculative={"method": "ngram"}) as server:
        answer = await server.complete(**BODY, stop=["wxy"])
        [choice] = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (LETTERS[: LETTERS.index("wxy")], "stop")
        assert answer["usage"]["completion_tokens"] == 25
        await server.until_idle()


async def test_a_request_does_without_where_others_have_drafts() -> None:
    async with running(speculative={"method": "ngram"}) as server:
        await server.complete(**BODY, speculative_tokens=0)
        assert server.serving.metrics.stats.num_drafts == 0


@pytest.mark.parametrize("value", [-1, 17, 2.5, "4"])
async def test_a_wrong_number_of_drafts_is_named(value: object) -> None:
    async with running() as server:
        check_error(
            *await server.post("/v1/completions", BODY | {"speculative_tokens": value}), 400, param="speculative_tokens"
        )


async def test_metrics_have_the_names_that_dashboards_know() -> None:
    async with running(speculative={"method": "ngram"}, metrics={"prefix": "vllm"}) as server:
        await server.complete(**BODY)
        await server.until_idle()
        _, text = await server.get("/metrics")
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            [line] = [line for line in text.splitlines() if line.startswith(f"vllm:spec_decode_{name}_total{{")]
            assert float(line.rsplit(" ", 1)[1]) > 0
        assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="fake",position="0"}' in text
