"""What is rendered is what `transformers.apply_chat_template` renders, for templates with every construct in use."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from asyncllm.errors import InvalidRequest
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.tokenizer import Tokenizer
from tests.fakes_text import byte_text, byte_tokenizer

TEMPLATES = {file.stem: file.read_text() for file in sorted(Path(__file__).parent.glob("templates/*.jinja"))}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where? <é> & 'x'"},
        "days": {"type": "array", "items": {"enum": ["today", "later"]}},
        "at": {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Tells the {name}.\nAll of it.", "parameters": p}}
    for name, p in (("weather", PARAMETERS), ("time", {"type": "object"}))
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "a": 1}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": " Hi\n"}],
    "system": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "What is 1+1? "},
        {"role": "assistant", "content": " 2\n"},
        {"role": "user", "content": "日本 ü <b> {{ x }}"},
    ],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sun": true}', "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghj", "name": "weather"},
        {"role": "assistant", "content": "Sun and rain."},
    ],
    "two calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Well:", "tool_calls": [CALL, CALL]},
    ],
    "thoughts": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "\nHm.\n"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "<think>\nOnce more.\n</think>\n\nBecause."},
    ],
    "thoughts by another name": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning": "Hm."},
    ],
}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
]
DOCUMENTS = [{"title": "b side", "text": "  A longer text than fits.  "}, {"title": "a side", "text": "Short."}]
OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "enable_thinking": False, "documents": DOCUMENTS},
]
NAMED = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|end|>"}


def ours(source: str, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str | None:
    text = byte_text(chat_template=source, named_tokens={"pad_token": "<|end|>"})
    template = ChatTemplate(text, Tokenizer(byte_tokenizer(), text))
    flags = {name: options[name] for name in ("add_generation_prompt", "continue_final_message") if name in options}
    kwargs = {name: value for name, value in options.items() if name not in flags}
    try:
        return template.render(messages, tools=tools, template_kwargs=kwargs, **flags)
    except InvalidRequest:
        return None


def theirs(source: Any, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str | None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=source, **NAMED)
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except Exception:  # a template's objection, or what it could not digest
        return None
    return rendered


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, options: dict[str, Any], tools: Any) -> None:
    rendered = 0
    for messages in CONVERSATIONS.values():
        expected = theirs(TEMPLATES[name], messages, tools, options)
        assert ours(TEMPLATES[name], messages, tools, options) == expected
        rendered += expected is not None
    assert rendered >= 3


@pytest.mark.parametrize("name", ["documents", "turns"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_parts_are_shown_as_in_transformers(name: str, options: dict[str, Any]) -> None:
    expected = theirs(TEMPLATES[name], PARTS, None, options)
    assert expected is not None
    assert ours(TEMPLATES[name], PARTS, None, options) == expected


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    sources = {"default": "plain", "tool_use": "tools: {{ tools | length }}", "rag": "other"}
    text = byte_text(chat_template=sources["default"], named_templates={k: sources[k] for k in ("tool_use", "rag")})
    template = ChatTemplate(text, Tokenizer(byte_tokenizer(), text))
    messages = CONVERSATIONS["one turn"]
    for tools in (None, [], TOOLS):
        assert template.render(messages, tools=tools) == theirs(sources, messages, tools, {})


def test_an_attribute_of_a_namespace_may_not_begin_with_an_underscore() -> None:
    source = "{% set ns = namespace() %}{% set ns._x = 1 %}"
    for render in (ours, theirs):
        assert render(source, CONVERSATIONS["one turn"], None, {}) is None
