"""POST /v1/completions over real sockets, on a fake device that writes the alphabet."""

import pytest

from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.logprobs import TokenText, append_completion_logprobs
from asyncllm.server.replies import CompletionLogprobs
from asyncllm.types import TokenLogprobs
from tests.server.harness import END, FACTS, byte_tokenizer, check_error, ids, running, says


async def test_a_prompt_is_continued() -> None:
    async with running() as server:
        answer = await server.complete(prompt="xyza", max_tokens=5)
        choice = answer["choices"][0]
        assert choice == {
            "index": 0,
            "text": "bcdef",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": None,
        }
        assert answer["object"] == "text_completion"
        assert answer["id"].startswith("cmpl-")
        assert answer["model"] == "fake"
        assert answer["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 5,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


async def test_sixteen_tokens_are_generated_where_nobody_asks_for_a_number() -> None:
    async with running() as server:
        answer = await server.complete(prompt="a")
        assert answer["choices"][0]["text"] == "bcdefghijklmnopq"


async def test_all_kinds_of_prompts_are_taken() -> None:
    async with running() as server:
        for prompt, texts in [
            ("abc", ["de"]),
            (["abc", "k"], ["de", "lm"]),
            (ids("abc"), ["de"]),
            ([ids("abc"), ids("k")], ["de", "lm"]),
        ]:
            answer = await server.complete(prompt=prompt, max_tokens=2)
            assert [choice["text"] for choice in answer["choices"]] == texts
            assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


async def test_a_batch_with_several_choices_counts_each_prompt_once() -> None:
    async with running() as server:
        answer = await server.complete(prompt=["abc", "k"], n=3, max_tokens=2)
        assert [choice["text"] for choice in answer["choices"]] == ["de"] * 3 + ["lm"] * 3
        assert answer["usage"]["prompt_tokens"] == 4
        assert answer["usage"]["completion_tokens"] == 12


async def test_a_prompt_seen_before_is_found_in_the_cache() -> None:
    async with running() as server:
        cold = await server.complete(prompt="abcdefghijkl", max_tokens=3)
        warm = await server.complete(prompt="abcdefghijkl", max_tokens=3)
        salted = await server.complete(prompt="abcdefghijkl", max_tokens=3, cache_salt="other")
        assert cold["choices"] == warm["choices"] == salted["choices"]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (cold, warm, salted)]
        assert cached == [0, 8, 0]


async def test_a_prompts_choices_have_the_same_seeds_in_a_batch_as_alone() -> None:
    async with running() as server:
        await server.complete(prompt=["abc", "xyz"], n=2, seed=2**63 - 1, max_tokens=1)
        seeds = [new.params.seed for plan in server.executor.plans for new in plan.new_slots]
        assert sorted(seeds) == [-(2**63), -(2**63), 2**63 - 1, 2**63 - 1]


async def test_echo_puts_the_prompt_in_front() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", echo=True, max_tokens=2)
        assert answer["choices"][0]["text"] == "abcde"


async def test_echo_alone_scores_the_prompt_and_generates_nothing() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", echo=True, max_tokens=0, logprobs=1)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(isinstance(value, float) for value in choice["logprobs"]["token_logprobs"][1:])
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["prompt_logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 0


async def test_logprobs_have_a_column_per_token_with_its_place_in_the_text() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", echo=True, max_tokens=2, logprobs=2)
        columns = answer["choices"][0]["logprobs"]
        assert columns["tokens"] == ["a", "b", "c", "d", "e"]
        assert columns["text_offset"] == [0, 1, 2, 3, 4]
        assert len(columns["token_logprobs"]) == len(columns["top_logprobs"]) == 5
        assert "d" in columns["top_logprobs"][3]


def test_alternatives_that_look_alike_are_one_as_probable_as_the_best_of_them() -> None:
    first, second = ids("é")
    entry = TokenLogprobs(second, -3.0, 3, [first, *ids("a")], [-0.5, -1.0])
    columns = CompletionLogprobs()
    append_completion_logprobs(columns, [entry], TokenText(Tokenizer(byte_tokenizer(), FACTS)), 0)
    assert columns.tokens == ["\ufffd"] and columns.token_logprobs == [-3.0]
    assert columns.top_logprobs == [{"\ufffd": -0.5, "a": -1.0}]


async def test_prompt_logprobs_come_in_vllms_shape() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", max_tokens=1, prompt_logprobs=1)
        rows = answer["choices"][0]["prompt_logprobs"]
        assert rows[0] is None and len(rows) == 3
        b = str(ids("b")[0])
        assert rows[1][b]["decoded_token"] == "b"
        assert set(rows[1][b]) == {"logprob", "rank", "decoded_token"}


async def test_best_of_keeps_the_most_probable_choices() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", n=2, best_of=4, max_tokens=3)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 12


async def test_stop_strings_end_the_text_before_them() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", max_tokens=20, stop=["hij", "zzz"])
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("defg", "stop", "hij")
        kept = await server.complete(prompt="abc", max_tokens=20, stop="hij", include_stop_str_in_output=True)
        assert kept["choices"][0]["text"] == "defghij"


async def test_stop_token_ids_end_the_text() -> None:
    async with running() as server:
        answer = await server.complete(prompt="abc", max_tokens=20, stop_token_ids=ids("f"))
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("de", "stop", ids("f")[0])


async def test_the_models_own_end_stops_unless_ignored() -> None:
    async with running(says("ab")) as server:
        answer = await server.complete(prompt=">", max_tokens=6)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("ab", "stop")
        assert answer["usage"]["completion_tokens"] == 3
        ignored = await server.complete(prompt=">", max_tokens=6, ignore_eos=True)
        assert (ignored["choices"][0]["text"], ignored["choices"][0]["finish_reason"]) == ("ab", "length")
        shown = await server.complete(prompt=">", max_tokens=4, ignore_eos=True, skip_special_tokens=False)
        assert shown["choices"][0]["text"] == "ab<|end|><|end|>"


async def test_min_tokens_keeps_the_end_away() -> None:
    async with running(says("ab")) as server:
        answer = await server.complete(prompt=">", max_tokens=8, min_tokens=5)
        assert answer["usage"]["completion_tokens"] >= 5


async def test_bad_words_are_not_completed() -> None:
    async with running() as server:
        answer = await server.complete(prompt="ab", max_tokens=4, bad_words=["de"])
        assert "de" not in answer["choices"][0]["text"]


async def test_logit_bias_and_stop_ids_must_be_in_the_vocabulary() -> None:
    async with running() as server:
        for body in ({"logit_bias": {"99999": 1}}, {"stop_token_ids": [99999]}):
            status, answer = await server.post("/v1/completions", {"prompt": "a"} | body)
            check_error(status, answer, 400, param=next(iter(body)))


async def test_streamed_text_is_the_whole_text() -> None:
    async with running() as server:
        body = {"prompt": ["abc", "k"], "n": 2, "max_tokens": 9, "stop": ["opq"], "echo": True}
        whole = await server.complete(**body)
        events = await server.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
        usage = events.pop()
        assert usage["choices"] == [] and usage["usage"] == whole["usage"] | {
            "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]
        }
        texts, finishes = [""] * 4, [None] * 4
        for event in events:
            assert event["usage"] is None and event["object"] == "text_completion"
            (choice,) = event["choices"]
            assert finishes[choice["index"]] is None, "nothing comes behind the finish"
            texts[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert (
            finishes == [choice["finish_reason"] for choice in whole["choices"]] == ["length", "length", "stop", "stop"]
        )
        assert len({event["id"] for event in events}) == 1


async def test_streamed_echo_with_logprobs_is_the_whole_answer() -> None:
    async with running() as server:
        body = {"prompt": "abc", "max_tokens": 3, "echo": True, "logprobs": 1}
        whole = (await server.complete(**body))["choices"][0]
        events = await server.stream("/v1/completions", body)
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            for name, values in (event["choices"][0]["logprobs"] or {}).items():
                columns[name] += values
        assert columns == whole["logprobs"]
        assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


async def test_continuous_usage_counts_up() -> None:
    async with running() as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = await server.stream("/v1/completions", {"prompt": "a", "max_tokens": 4, "stream_options": options})
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == 4


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": ["a", ""]}, "prompt", ""),
        ({"prompt": [[]]}, "prompt", ""),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [[1], "a"]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": [1.5]}, "prompt[0]", "invalid_type"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": [[99999]]}, "prompt", ""),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": "a", "model": "gpt-5"}, "model", "model_not_found"),
        ({"prompt": "a", "model": 5}, "model", "invalid_type"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", ""),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", ""),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "invalid_type"),
        ({"prompt": "a", "max_tokens": 3, "max_new_tokens": 4}, "max_tokens", ""),
        ({"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", ""),
        ({"prompt": "a", "min_tokens": 30}, "min_tokens", ""),
        ({"prompt": "a", "max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "a" * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 7_000_000}, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", ""),
        ({"prompt": "a", "temperature": -0.1}, "temperature", ""),
        ({"prompt": "a", "top_p": 0}, "top_p", ""),
        ({"prompt": "a", "top_p": 1.1}, "top_p", ""),
        ({"prompt": "a", "top_k": -2}, "top_k", ""),
        ({"prompt": "a", "min_p": 1.1}, "min_p", ""),
        ({"prompt": "a", "presence_penalty": 2.1}, "presence_penalty", ""),
        ({"prompt": "a", "frequency_penalty": -2.1}, "frequency_penalty", ""),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", ""),
        ({"prompt": "a", "seed": 2**63}, "seed", ""),
        ({"prompt": "a", "seed": 1.5}, "seed", "invalid_type"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", ""),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ""),
        ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", ""),
        ({"prompt": "a", "logprobs": 6}, "logprobs", ""),
        ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", ""),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ""),
        ({"prompt": "a", "n": 0}, "n", ""),
        ({"prompt": "a", "n": 129}, "n", ""),
        ({"prompt": ["a"] * 100, "n": 2}, "n", ""),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", ""),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", ""),
        ({"prompt": "a", "stop": ""}, "stop", ""),
        ({"prompt": "a", "stop": ["a", ""]}, "stop[1]", ""),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop", ""),
        ({"prompt": "a", "stop": "a" * 257}, "stop", ""),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", ""),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "response_format": {"type": "json"}}, "response_format.type", "invalid_value"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"prompt": "a", "timeout": 0}, "timeout", ""),
        ({"prompt": "a", "timeout": 4000}, "timeout", ""),
        ({"prompt": "a", "cache_salt": "a" * 129}, "cache_salt", ""),
        ({"prompt": "a", "priority": "high"}, "priority", "invalid_type"),
    ],
)
async def test_a_wrong_field_is_a_400_that_names_it_streamed_or_not(body: dict, param: str, code: str) -> None:
    async with running() as server:
        for stream in (False, True):
            if stream and "stream_options" in body:
                continue
            status, answer = await server.post("/v1/completions", {"stream": stream} | body)
            expected = 404 if code == "model_not_found" else 400
            error = check_error(status, answer, expected, param=param, code=code)
            assert len(error["message"]) < 700
        assert await server.complete(prompt="a", max_tokens=2), "the server goes on unharmed"


async def test_values_are_taken_at_the_ends_of_their_ranges() -> None:
    async with running() as server:
        for body in (
            {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_k": -1}, {"top_k": 0}, {"min_p": 1},
            {"presence_penalty": -2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}, {"seed": -(2**63)},
            {"seed": 2**63 - 1, "n": 2}, {"logit_bias": {"1": -100}}, {"stop": ["x"] * 16}, {"logprobs": 0},
            {"user": "u", "metadata": {"a": "b"}, "store": False}, {"response_format": {"type": "text"}},
            {"temperature": None, "stop": None, "n": None, "max_tokens": None, "seed": None},
        ):  # fmt: skip
            assert await server.complete(prompt="abc", **body)


async def test_a_special_token_in_a_raw_prompt_is_read_as_such() -> None:
    async with running() as server:
        answer = await server.complete(prompt="<|end|>ab", max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == 3
        assert END == 256
