"""The official clients against a real server with the embedded model: what a grammar forces, it gets from 135M too."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.processes import Process, ready_process

MODEL = "smollm2-135m-instruct"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
MESSAGES: Any = [{"role": "user", "content": "How is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with ready_process(tmp_path_factory.mktemp("clients")) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_valid(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=60
    )
    (found,) = answer.choices
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_forced_call_streams_valid_arguments(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
    ) as stream:
        kinds = {event.type for event in stream}
        (found,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds and found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or []
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_schema_beside_tools_gives_one_or_the_other(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=[WEATHER],
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        max_tokens=60,
    )
    message = answer.choices[0].message
    if message.tool_calls:
        jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), PARAMETERS)  # type: ignore[union-attr]
    else:
        jsonschema.validate(json.loads(message.content or ""), schema)


@pytest.mark.parametrize(
    ("wanted", "texts"),
    [
        ({"choice": ["sunny", "rainy"]}, {"sunny", "rainy"}),
        ({"regex": "(yes|no)!"}, {"yes!", "no!"}),
        ({"grammar": 'start: "a" ("b" | "c")'}, {"ab", "ac"}),
    ],
)
def test_structured_outputs(client: openai.OpenAI, wanted: dict[str, Any], texts: set[str]) -> None:
    body = {"structured_outputs": wanted}
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=body, max_tokens=20)
    text = client.completions.create(model=MODEL, prompt="It is", extra_body=body, max_tokens=20)
    assert chat.choices[0].message.content in texts and chat.choices[0].finish_reason == "stop"
    assert text.choices[0].text in texts and text.choices[0].finish_reason == "stop"


def test_responses_follow_a_schema(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input="Name a city.",
        text={"format": {"type": "json_schema", "name": "city", "schema": PARAMETERS}},
        max_output_tokens=60,
    )
    jsonschema.validate(json.loads(response.output_text), PARAMETERS)


def test_anthropics_client_gets_a_forced_call(server: Process) -> None:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="none", max_retries=0) as client:
        message = client.messages.create(
            model=MODEL,
            max_tokens=60,
            messages=MESSAGES,
            tools=[{"name": "weather", "input_schema": PARAMETERS}],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        )
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert call.type == "tool_use"
    jsonschema.validate(call.input, PARAMETERS)


def test_a_bad_grammar_is_refused_before_the_status_line(client: openai.OpenAI) -> None:
    for wanted in ({"regex": "("}, {"grammar": "start: nothing"}, {"json": {"type": "thing"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, extra_body={"structured_outputs": wanted}
            )
        assert str(caught.value.param).startswith("structured_outputs")
