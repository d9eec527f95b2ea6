"""Thinking over HTTP: in front of an answer that has to follow a grammar, within a budget, and in the usage.

The grammars are real; the fake device obeys their masks, so a model can be scripted to do what it may not.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers

from tests.fakes import small_capacity
from tests.server.harness import END, TEMPLATE, VOCAB_SIZE, Server, byte_tokenizer, running
from tests.server.test_tools import MESSAGES, THINKS, facts

POSSIBLE = TEMPLATE + "{# <think> </think> #}"  # the model opens the part itself, or does not
MARKERS = ("<think>", "</think>")
CAPACITY = small_capacity(
    num_blocks=513, block_size=4, max_sequences=8, max_context_length=512, vocab_size=VOCAB_SIZE + len(MARKERS)
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
ANSWER = '{"city":"Rome"}'
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"

Model = Callable[[Sequence[int]], int]


def with_markers() -> tokenizers.Tokenizer:
    """Bytes, and a token for each end of the thinking part, as most models have them."""
    backend = byte_tokenizer()
    backend.add_tokens([tokenizers.AddedToken(marker, special=False) for marker in MARKERS])
    return backend


BACKENDS = {"tokens": with_markers(), "spelled": byte_tokenizer()}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return BACKENDS[request.param]


def writes(backend: tokenizers.Tokenizer, *texts: str | int, behind: str = "") -> Model:
    """A model that wants to write these texts and tokens behind what the template put at the turn's beginning."""
    answer = [t for text in texts for t in ([text] if isinstance(text, int) else backend.encode(text).ids)] + [END]
    assistant, num_given = backend.token_to_id("<|assistant|>"), len(backend.encode(behind).ids)

    def next_token(tokens: Sequence[int]) -> int:
        start = max(i for i, token in enumerate(tokens) if token == assistant) + 1 + num_given
        return answer[min(len(tokens) - start, len(answer) - 1)]

    return next_token


async def ask(server: Server, streamed: bool, path: str = CHAT, **body: Any) -> tuple[list[dict[str, str]], Any]:
    """Content and reasoning of every choice, with its finish_reason, and the usage."""
    body = {"messages": MESSAGES, "max_tokens": 200} | body
    if not streamed:
        status, answer = await server.post(path, body)
        assert status == 200, answer
        rows = [choice["message"] | {"finish_reason": choice["finish_reason"]} for choice in answer["choices"]]
        return rows, answer["usage"]
    events = await server.stream(path, body | {"stream_options": {"include_usage": True}})
    rows = [{"content": "", "reasoning": ""} for _ in range(body.get("n", 1))]
    for choice in (choice for event in events for choice in event["choices"]):
        row = rows[choice["index"]]
        row["content"] += choice["delta"].get("content") or ""
        row["reasoning"] += choice["delta"].get("reasoning") or ""
        row["finish_reason"] = choice["finish_reason"]
    return rows, events[-1]["usage"]


# --- grammars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_thoughts_are_free_and_the_answer_behind_them_follows_the_schema(
    backend: tokenizers.Tokenizer, streamed: bool
) -> None:
    model = writes(backend, "Rome {or} not?</think>", ANSWER, "!", behind="<think>\n")
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY) as server:
        [row], _ = await ask(server, streamed, response_format=FORMAT)
    assert (row["reasoning"], row["content"], row["finish_reason"]) == ("Rome {or} not?", ANSWER, "stop")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_model_that_may_think_chooses_between_thoughts_and_the_answer(streamed: bool) -> None:
    backend = BACKENDS["tokens"]
    for text, thoughts in (("<think>Rome!</think>", "Rome!"), ("", "")):
        model = writes(backend, text, ANSWER)
        async with running(model, facts=facts(POSSIBLE), backend=backend, capacity=CAPACITY) as server:
            [row], _ = await ask(server, streamed, response_format=FORMAT)
        assert (row.get("reasoning", ""), row["content"]) == (thoughts, ANSWER)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_end_of_sequence_ends_no_thoughts_where_an_answer_is_owed(
    backend: tokenizers.Tokenizer, streamed: bool
) -> None:
    model = writes(backend, "Hm", END, "...</think>", ANSWER, behind="<think>\n")
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY) as server:
        [row], _ = await ask(server, streamed, response_format=FORMAT)
        [free], _ = await ask(server, streamed)
    assert (row["reasoning"], row["content"], row["finish_reason"]) == ("Hm...", ANSWER, "stop")
    assert (free["reasoning"], free["content"] or "") == ("Hm", ""), "without a schema nothing is owed"


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_answer_is_cut_like_any_other_and_so_are_thoughts(
    backend: tokenizers.Tokenizer, streamed: bool
) -> None:
    model = writes(backend, "Rome?</think>", ANSWER, behind="<think>\n")
    num_thoughts = len(backend.encode("Rome?</think>").ids)
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY) as server:
        [row], _ = await ask(server, streamed, response_format=FORMAT, max_tokens=num_thoughts + 4)
        [thoughts], _ = await ask(server, streamed, response_format=FORMAT, max_tokens=3)
    assert (row["content"], row["finish_reason"]) == (ANSWER[:4], "length")
    assert (thoughts["reasoning"], thoughts["content"] or "", thoughts["finish_reason"]) == ("Rom", "", "length")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_spent_budget_ends_the_thoughts_with_and_without_a_grammar(
    backend: tokenizers.Tokenizer, streamed: bool
) -> None:
    model = writes(backend, "x" * 150, behind="<think>\n")
    num_end = len(backend.encode("</think>").ids)
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY) as server:
        [row], usage = await ask(server, streamed, response_format=FORMAT, thinking_token_budget=5)
        [free], free_usage = await ask(server, streamed, thinking_token_budget=5, max_tokens=5 + num_end + 3)
        [none], _ = await ask(server, streamed, thinking_token_budget=0, max_tokens=num_end + 3)
        [endless], _ = await ask(server, streamed, thinking_token_budget=-1, max_tokens=20)
    assert row["reasoning"] == "x" * 5 and json.loads(row["content"])["city"] in ("Paris", "Rome")
    assert (free["reasoning"], free["content"]) == ("x" * 5, "x" * 3)
    assert (none.get("reasoning", ""), none["content"]) == ("", "x" * 3)
    assert (endless["reasoning"], endless["content"] or "") == ("x" * 20, "")
    for counted in (usage, free_usage):
        assert counted["completion_tokens_details"] == {"reasoning_tokens": 5 + num_end}


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("template", "behind", "thoughts", "answer"),
    [
        (THINKS, "<think>\n", "Well...\n</think>", "\n\nYes."),
        (THINKS, "<think>\n", "</think>", "Yes."),
        (THINKS, "<think>\n", "Well", ""),
        (POSSIBLE, "", "<think>\nWell...\n</think>", "\n\nYes."),
        (POSSIBLE, "", "<think></think>", "Yes."),
        (POSSIBLE, "", "<think>Well", ""),
        (POSSIBLE, "", "", "No </think> of <think>ing."),
        (TEMPLATE, "", "", "Yes."),
    ],
)
async def test_reasoning_tokens_are_those_of_the_thinking_part_with_its_markers(
    backend: tokenizers.Tokenizer, template: str, behind: str, thoughts: str, answer: str, streamed: bool
) -> None:
    if template is TEMPLATE:
        backend = BACKENDS["spelled"]  # the tokens alone would make it a thinking model
    model = writes(backend, thoughts, answer, behind=behind)
    num_thoughts = len(backend.encode(thoughts).ids)
    num_tokens = num_thoughts + len(backend.encode(answer).ids)
    async with running(model, facts=facts(template), backend=backend, capacity=CAPACITY) as server:
        for n in (1, 3):
            _, usage = await ask(server, streamed, max_tokens=num_tokens, n=n)
            assert usage["completion_tokens"] == n * num_tokens
            assert usage["completion_tokens_details"] == {"reasoning_tokens": n * num_thoughts}


async def test_reasoning_tokens_are_exact_wherever_merged_text_is_cut(backend: tokenizers.Tokenizer) -> None:
    for length in range(5):
        thoughts = "x" * length + "</think>"
        model = writes(backend, thoughts, "\n\nYes, of course.", behind="<think>\n")
        async with running(
            model, facts=facts(THINKS), backend=backend, capacity=CAPACITY, api={"stream_interval": 5}
        ) as server:
            _, usage = await ask(server, True)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": len(backend.encode(thoughts).ids)}


@pytest.mark.parametrize("stream_interval", [1, 2])
async def test_continuous_usage_counts_thoughts_as_they_come(stream_interval: int) -> None:
    backend, api = BACKENDS["tokens"], {"stream_interval": stream_interval}
    model = writes(backend, "abc</think>", "Yes", behind="<think>\n")
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY, api=api) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = await server.stream(CHAT, {"messages": MESSAGES, "stream_options": options})
    counts = [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in events if event["usage"]]
    assert counts == sorted(counts) and counts[-1] == 4


@pytest.mark.parametrize("streamed", [False, True])
async def test_responses_tell_them_too(backend: tokenizers.Tokenizer, streamed: bool) -> None:
    model = writes(backend, "Well...</think>", "Yes.", behind="<think>\n")
    async with running(model, facts=facts(THINKS), backend=backend, capacity=CAPACITY) as server:
        body = {"input": "Is it?", "stream": streamed}
        status, answer = await server.post(RESPONSES, body)
    assert status == 200, answer
    if streamed:
        answer = json.loads(answer.strip().rsplit("data: ", 1)[1])["response"]
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    num_thoughts = len(backend.encode("Well...</think>").ids)
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": num_thoughts}
    assert answer["usage"]["output_tokens"] == num_thoughts + len("Yes.") + 1
