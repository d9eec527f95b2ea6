"""docs/api.md, and whether what it says of each parameter's state is true."""

from pathlib import Path
from typing import Any

import pytest

from asyncllm.server import openapi
from asyncllm.server.reference import markdown
from asyncllm.server.routes import ROUTES
from asyncllm.server.states import HONOURED, IGNORED, REFUSED, STATES, key, state
from tests.fakes import small_capacity
from tests.server.harness import VOCAB_SIZE, Server, running

DOCS = Path(__file__).parent.parent.parent / "docs"
HI = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 4},
    "/v1/completions": {"prompt": "abc", "max_tokens": 4},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/embeddings": {"input": "hi"},
    "/generate": {"prompt": "abc", "max_tokens": 4},
    "/generate_stream": {"prompt": "abc", "max_tokens": 4},
    "/basic_generate": {"prompt": "abc", "max_tokens": 4},
    "/chat": {"messages": HI, "max_tokens": 4},
}
# A value of each that would have an effect where somebody gave it one.
VALUES: dict[str, Any] = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"a": 1},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "verbosity": "low",
    "cache_control": {"type": "ephemeral"},
    "inference_geo": "eu",
    "add_special_tokens": False,
    "audio": {"voice": "v"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "c"},
    "web_search_options": {},
    "suffix": "s",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'start: "a"',
    "reasoning": {"effort": "high"},
    "stream_options": {"include_usage": True},
    "include": ["message.output_text.logprobs"],
    "max_tool_calls": 1,
    "top_logprobs": 2,
    "truncation": "auto",
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "prompt": {"id": "p"},
    "background": True,
    "n": 2,
    "prompt_logprobs": 1,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
}
# What a refused parameter may nevertheless say.
ALLOWED: dict[str, Any] = {"modalities": ["text"], "background": False, "n": 1}


def stated() -> list[Any]:
    """Route, parameter and state of all that is not simply honoured."""
    return [
        pytest.param(route.path, name, state(route.body, name), id=f"{route.path} {name}")
        for route in ROUTES
        if route.path in BASES and route.body is not None
        for name in route.body.__struct_fields__
        if state(route.body, name) != HONOURED
    ]


def comparable(answer: Any) -> Any:
    """An answer without what differs from call to call."""
    if isinstance(answer, list):
        return [comparable(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    passing = ("id", "created", "created_at", "completed_at", "request_id", "timings", "generation_time",
               "tokens_per_second", "usage")  # fmt: skip
    return {name: comparable(value) for name, value in answer.items() if name not in passing}


async def ask(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    greedy = {} if path.endswith(("count_tokens", "embeddings")) else {"temperature": 0}
    status, made, headers = await server.call("POST", path, greedy | body)
    assert "x-ignored-params" not in headers
    return status, made


async def check_ignored(server: Server, path: str, body: dict[str, Any], plain: dict[str, Any]) -> None:
    """The same answer with and without."""
    (status, made), (plain_status, plainly) = await ask(server, path, body), await ask(server, path, plain)
    assert status == plain_status == 200, made
    if path == "/generate_stream":
        made, plainly = (text.count("data: ") > 0 and '"final":true' in text for text in (made, plainly))
    assert comparable(made) == comparable(plainly)


def check_refused(status: int, answer: Any, name: str) -> None:
    assert status == 400, answer
    assert name in answer["error"]["message"]
    assert answer["error"].get("code", "unsupported_parameter") == "unsupported_parameter"


def test_the_page_is_current() -> None:
    assert (DOCS / "api.md").read_text() == markdown()


def test_every_state_is_about_a_field() -> None:
    asked = openapi.structs({route.body for route in ROUTES if route.body is not None})
    used = {key(STATES, struct, name) for struct in asked.values() for name in struct.__struct_fields__}
    assert set(STATES) <= used


@pytest.mark.parametrize(("path", "name", "became"), stated())
async def test_the_state_of_a_parameter_is_true(path: str, name: str, became: str) -> None:
    base = BASES[path]
    async with running() as server:
        if became == IGNORED:
            await check_ignored(server, path, base | {name: VALUES[name]}, base)
            return
        assert became.startswith(REFUSED)
        check_refused(*await ask(server, path, base | {name: VALUES[name]}), name)
        assert (name in ALLOWED) == (became != REFUSED)
        if name in ALLOWED:
            status, made = await ask(server, path, base | {name: ALLOWED[name]})
            assert status == 200, made


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}
TOOL = {"name": "f", "input_schema": SCHEMA}
# Where a field of an inner struct is tried: the route, and the body with a hole for it.
INNER: dict[str, tuple[str, Any]] = {
    "Message": ("/v1/chat/completions", lambda x: {"messages": [{"role": "assistant", "content": "hi", **x}, *HI]}),
    "JsonSchemaFormat": (
        "/v1/chat/completions",
        lambda x: {
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **x}},
            "max_tokens": 40,
        },
    ),
    "TextFormat": (
        "/v1/responses",
        lambda x: {
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA} | x},
            "max_output_tokens": 40,
        },
    ),
    "ReasoningConfig": ("/v1/responses", lambda x: {"reasoning": x}),
    "MessagesTool": ("/v1/messages", lambda x: {"tools": [TOOL | x]}),
    "ThinkingConfig": ("/v1/messages", lambda x: {"thinking": {"type": "disabled", **x}}),
}
INNER_VALUES: dict[str, Any] = {
    "Message.audio": {"id": "a"},
    "Message.refusal": "no",
    "Message.annotations": [{"a": 1}],
    "Message.function_call": {"name": "f", "arguments": "{}"},
    "JsonSchemaFormat.description": "d",
    "JsonSchemaFormat.strict": False,
    "TextFormat.name": "m",
    "TextFormat.description": "d",
    "TextFormat.strict": False,
    "ReasoningConfig.summary": "auto",
    "ReasoningConfig.generate_summary": "auto",
    "MessagesTool.cache_control": {"type": "ephemeral"},
    "ThinkingConfig.display": "omitted",
}
ECHOED = ("text", "reasoning")  # /v1/responses repeats them as they came


def inner() -> list[str]:
    """Fields of inner structs that are not simply honoured. Two have tests of their own kind."""
    asked = openapi.structs({route.body for route in ROUTES if route.body is not None})
    bodies = {route.body for route in ROUTES}
    elsewhere = {"StreamOptions.include_obfuscation", "TextConfig.verbosity"}
    return sorted(
        f"{name}.{field}"
        for name, struct in asked.items()
        if struct not in bodies
        for field in struct.__struct_fields__
        if state(struct, field) != HONOURED and f"{name}.{field}" not in elsewhere
    )


@pytest.mark.parametrize("field", inner())
async def test_the_state_of_a_field_further_in_is_true(field: str) -> None:
    struct, name = field.split(".")
    path, body = INNER[struct]
    value, base = INNER_VALUES[field], BASES[path]
    capacity = small_capacity(num_blocks=1025, max_sequences=8, max_context_length=2048, vocab_size=VOCAB_SIZE)
    async with running(capacity=capacity) as server:
        if state(openapi.structs({route.body for route in ROUTES if route.body})[struct], name) == REFUSED:
            check_refused(*await ask(server, path, base | body({name: value})), name)
            return
        answers = [await ask(server, path, base | body(given)) for given in ({name: value}, {})]
        for status, made in answers:
            assert status == 200, made
            for echoed in ECHOED:
                made.pop(echoed, None)
        assert comparable(answers[0][1]) == comparable(answers[1][1])


async def test_frames_are_not_padded() -> None:
    async with running() as server:
        body = BASES["/v1/chat/completions"] | {"stream_options": {"include_obfuscation": True}}
        events = await server.stream("/v1/chat/completions", body)
        assert events and not any("obfuscation" in event for event in events)


async def test_verbosity_changes_nothing_in_responses() -> None:
    async with running() as server:
        for verbosity in ("low", "high"):
            body = BASES["/v1/responses"] | {"text": {"verbosity": verbosity}}
            status, made = await ask(server, "/v1/responses", body)
            assert status == 200 and made["output"][0]["content"][0]["text"] == "abcd"
