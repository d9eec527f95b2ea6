"""Tool calls and thinking in chat completions, with the official client, streamed and whole."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import openai
import pytest
import tokenizers

from tests.fakes import small_capacity
from tests.server.harness import (
    BACKEND,
    END,
    FACTS,
    TEMPLATE,
    VOCAB_SIZE,
    Server,
    byte_tokenizer,
    check_error,
    ids,
    running,
    speaks,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
HERMES = (
    "{% if tools %}{{ '<|system|>tools: ' + (tools | tojson) + ' answer with <tool_call>{json}</tool_call><|end|>' }}"
    "{% endif %}{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' }}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson)'
    " + '}</tool_call>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKS = TEMPLATE.replace("'<|assistant|>' }}{% endif %}", "'<|assistant|><think>\\n' }}{% endif %}{# </think> #}")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LARGE = small_capacity(num_blocks=1025, block_size=4, max_sequences=8, max_context_length=4096, vocab_size=VOCAB_SIZE)
MESSAGES: list[Any] = [{"role": "user", "content": "How is it?"}]


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0) as client:
        yield client


def facts(template: str) -> Any:
    return msgspec.structs.replace(FACTS, chat_template=template)


async def answer(client: openai.AsyncOpenAI, streamed: bool, **options: Any) -> Any:
    """The whole choice; a stream's deltas put together as the client library does."""
    body = {"model": "fake", "messages": MESSAGES, "tools": [WEATHER, TIME]} | options
    if not streamed:
        return (await client.chat.completions.create(**body)).choices[0]
    async with client.chat.completions.stream(**body) as stream:
        async for _ in stream:
            pass
        return (await stream.get_final_completion()).choices[0]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, HERMES])
async def test_a_call_is_found_in_the_text(template: str, streamed: bool) -> None:
    async with (
        running(speaks(f"Let me see.\n{CALL}"), facts=facts(template), capacity=LARGE) as server,
        client_of(server) as client,
    ):
        choice = await answer(client, streamed)
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.type, call.function.name) == ("tool_calls", "function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert call.id.startswith("call_")
    assert choice.message.content.strip() == "Let me see."


@pytest.mark.parametrize("streamed", [False, True])
async def test_several_calls_have_their_own_ids_unless_only_one_is_wanted(streamed: bool) -> None:
    text = CALL + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    async with running(speaks(text), facts=facts(HERMES)) as server, client_of(server) as client:
        choice = await answer(client, streamed)
        alone = await answer(client, streamed, parallel_tool_calls=False)
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "time"]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert not choice.message.content
    assert [call.function.name for call in alone.message.tool_calls] == ["weather"]


async def test_length_wins_over_tool_calls() -> None:
    async with running(speaks(CALL), facts=facts(HERMES)) as server, client_of(server) as client:
        choice = await answer(client, False, max_tokens=len(CALL) - 20)
        events = await server.stream(
            "/v1/chat/completions", {"messages": MESSAGES, "tools": [WEATHER], "max_tokens": len(CALL) - 20}
        )
    assert choice.finish_reason == "length"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("streamed", [False, True])
async def test_text_stays_text_where_no_tool_may_be_called(streamed: bool) -> None:
    async with running(speaks(CALL), facts=facts(HERMES)) as server, client_of(server) as client:
        none = await answer(client, streamed, tool_choice="none")
        other = await answer(
            client,
            streamed,
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]},
            },
        )
    for choice in (none, other):
        assert choice.finish_reason == "stop" and not choice.message.tool_calls
        assert choice.message.content.strip() == CALL


async def test_calls_and_results_of_the_history_reach_the_template() -> None:
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    async with running(speaks("ok"), facts=facts(HERMES)) as server, client_of(server) as client:
        choice = await answer(client, False, messages=history)
        status, prompt = await server.post("/apply-template", {"messages": history})
    assert choice.message.content == "ok"
    assert status == 200 and '{"name": "weather", "arguments": {"city": "Rome"}}' in prompt["prompt"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_thinking_is_told_from_the_answer(streamed: bool) -> None:
    body = {"messages": MESSAGES}
    async with running(speaks("Well...\n</think>\n\nYes.", behind="<think>\n"), facts=facts(THINKS)) as server:
        if streamed:
            deltas = [event["choices"][0]["delta"] for event in await server.stream("/v1/chat/completions", body)]
            found = {
                name: "".join(delta.get(name) or "" for delta in deltas)
                for name in ("content", "reasoning", "reasoning_content")
            }
        else:
            status, whole = await server.post("/v1/chat/completions", body)
            assert status == 200
            found = whole["choices"][0]["message"]
        hidden = await server.chat(include_reasoning=False)
    assert (found["content"], found["reasoning"]) == ("Yes.", "Well...")
    assert found["reasoning_content"] == found["reasoning"]
    assert "reasoning" not in hidden["choices"][0]["message"]


STRICT = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
async def test_calls_of_strict_functions_obey_their_schemas_and_text_is_free(streamed: bool, thinks: bool) -> None:
    wrong = 'I {"see"} <t. <tool_call>\n{"name": "weather", "arguments": {"town": "Oslo", "days": 99}}\n</tool_call>'
    template = THINKS.replace("{# </think> #}", "{# </think> <tool_call> #}") if thinks else HERMES
    thoughts, behind = ("I want <tool_call>{}</tool_call>.\n</think>\n", "<think>\n") if thinks else ("", "")
    async with (
        running(speaks(thoughts + wrong, behind=behind), facts=facts(template), capacity=LARGE) as server,
        client_of(server) as client,
    ):
        choice = await answer(client, streamed, tools=[STRICT, TIME], max_tokens=200)
        loose = await answer(client, streamed, max_tokens=200)
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and choice.message.content.startswith('I {"see"} <t.')
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] == "Rome" and 1 <= arguments["days"] <= 7 and len(arguments) == 2
    assert json.loads(loose.message.tool_calls[0].function.arguments) == {"town": "Oslo", "days": 99}


async def test_a_strict_function_whose_schema_cannot_be_obeyed_is_refused() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "color"}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    async with running(speaks("ok"), facts=facts(HERMES)) as server:
        status, body = await server.post("/v1/chat/completions", {"messages": MESSAGES, "tools": [tool]})
        loose = {"type": "function", "function": {"name": "f", "parameters": schema}}
        free, _ = await server.post("/v1/chat/completions", {"messages": MESSAGES, "tools": [loose]})
    assert check_error(status, body, 400)["param"] == "tools"
    assert free == 200


CALLED, RESPONDED = "<start_function_call>call:time{}<end_function_call>", "response:time{}"
RESPONDS = facts(HERMES + "{# <start_function_call> #}")
LARGER = msgspec.structs.replace(LARGE, vocab_size=VOCAB_SIZE + 1)


def responding_tokenizer() -> tokenizers.Tokenizer:
    """With the token behind which, in this format, a tool answers."""
    backend = byte_tokenizer()
    backend.add_special_tokens(["<start_function_response>"])
    return backend


def responds(tokens: Sequence[int]) -> int:
    """A model that calls, then answers in place of the tool unless it is stopped."""
    written = [*ids(CALLED), VOCAB_SIZE, *ids(RESPONDED), END]
    assistant = BACKEND.token_to_id("<|assistant|>")
    return written[len(tokens) - 1 - max(i for i, token in enumerate(tokens) if token == assistant)]


@pytest.mark.parametrize("with_tools", [False, True])
async def test_where_tools_may_answer_next_the_turn_ends(with_tools: bool) -> None:
    async with running(responds, facts=RESPONDS, capacity=LARGER, backend=responding_tokenizer()) as server:
        tools = {"tools": [TIME]} if with_tools else {}
        status, body = await server.post("/v1/chat/completions", {"messages": MESSAGES} | tools)
    assert status == 200
    (choice,) = body["choices"]
    assert choice["stop_reason"] is None
    if with_tools:
        assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
        assert body["usage"]["completion_tokens"] == len(CALLED) + 1
    else:
        assert choice["message"]["content"] == CALLED + RESPONDED


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [WEATHER], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"guided_json": {}}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens"),
    ],
)
async def test_what_contradicts_itself_is_refused(wrong: dict[str, Any], param: str) -> None:
    async with running(facts=facts(HERMES)) as server:
        status, body = await server.post("/v1/chat/completions", {"messages": MESSAGES} | wrong)
    error = check_error(status, body, 400)
    assert error["param"].startswith(param), error
