"""Grammars of forced calls, compiled and matched by llguidance with the embedded model's tokenizer."""

import json
import random
from collections.abc import Sequence

import jsonschema
import llguidance
import pytest
import tokenizers

from asyncllm.errors import InvalidRequest
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import PartKind
from asyncllm.router.output.tool_format import TOOL_FORMATS, tool_format
from asyncllm.router.output.tools import Tool, ToolChoice, check_tools
from asyncllm.router.tokenizer import Tokenizer
from tests.router.output.harness import tool

WEATHER = {
    "type": "object",
    "properties": {
        "days": {"type": "integer", "minimum": 1, "maximum": 3},
        "city": {"type": "string", "maxLength": 8},
        "unit": {"$ref": "#/$defs/Unit"},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
NOTHING = {"type": "object", "additionalProperties": False}
TOOLS = check_tools(
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
        {"type": "function", "function": {"name": "now"}},
        tool("maybe", a={"type": "boolean"}, b={"type": "null"}),
    ]
)
REQUIRED = ToolChoice("required")
NOW = ToolChoice("required", ("now",), is_named=True)

# For each format: calls of now(), get_weather(city="é"), and maybe(b=null); and what joins two.
EXAMPLES = {
    "hermes": (
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "é"}}\n</tool_call>',
        '<tool_call>\n{"name": "maybe", "arguments": {"b": null}}\n</tool_call>',
        "\n",
    ),
    "llama3_json": (
        '{"name": "now", "parameters": {}}',
        '{"name": "get_weather", "parameters": {"city": "é"}}',
        '{"name": "maybe", "parameters": {"b": null}}',
        "; ",
    ),
    "pythonic": ("now()", 'get_weather(city="é")', "maybe(b=null)", ", "),
    "mistral": (
        '{"name": "now", "arguments": {}}',
        '{"name": "get_weather", "arguments": {"city": "é"}}',
        '{"name": "maybe", "arguments": {"b": null}}',
        ", ",
    ),
    "gemma": (
        "<start_function_call>call:now{}<end_function_call>",
        '<start_function_call>call:get_weather{city:"é"}<end_function_call>',
        "<start_function_call>call:maybe{b:null}<end_function_call>",
        "",
    ),
    "gemma4": (
        "<|tool_call>call:now{}<tool_call|>",
        '<|tool_call>call:get_weather{city:"é"}<tool_call|>',
        "<|tool_call>call:maybe{b:null}<tool_call|>",
        "",
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\né\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=maybe>\n<parameter=b>\nnull\n</parameter>\n</function>\n</tool_call>",
        "\n",
    ),
}
FRAMES = {"pythonic": ("[", "]"), "mistral": ("[TOOL_CALLS][", "]")}


class Matcher:
    """Says what a grammar accepts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tokens = llguidance.LLTokenizer(
            tokenizer._backend.to_str(), eos_token=list(tokenizer.eos_token_ids), slices=[]
        )

    def start(self, source: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokens, llguidance.LLMatcher.grammar_from_lark(source))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def accepts(self, source: str, text: str) -> bool:
        """Whether the text is whole under the grammar."""
        matcher = self.start(source)
        token_ids = self._tokens.tokenize_str(text, parse_special=True)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    def sample(self, source: str, random_: random.Random) -> str | None:
        """A random text that the grammar allows, which prefers to end; None where it does not."""
        matcher, token_ids = self.start(source), []
        eos = set(self.tokenizer.eos_token_ids)
        while len(token_ids) < 400:
            if matcher.is_stopped() or (matcher.is_accepting() and random_.random() < 0.5):
                return self.tokenizer.decode(token_ids)
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(self.tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1 and i not in eos]
            # Quotes and brackets close what is open; otherwise a random string goes on for ever.
            closing = [i for i in allowed if self.tokenizer.token_bytes(i) in (b'"', b"}", b"]", b")", b'"}')]
            token_id = random_.choice(closing if closing and random_.random() < 0.6 else allowed)
            assert matcher.consume_token(token_id)
            token_ids.append(token_id)
        return None


@pytest.fixture(scope="module")
def matcher(smollm2: Tokenizer) -> Matcher:
    return Matcher(smollm2)


def with_markers(tokenizer: Tokenizer, *, special: bool) -> Matcher:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    markers = sorted({marker for name in TOOL_FORMATS for marker in tool_format(name, tokenizer).markers})
    backend.add_tokens([tokenizers.AddedToken(marker, special=special) for marker in markers])
    return Matcher(Tokenizer(backend, tokenizer.text))


@pytest.fixture(scope="module")
def token_matcher(smollm2: Tokenizer) -> Matcher:
    """A tokenizer in which every format's markers are tokens, though no special ones: Qwen's is so."""
    return with_markers(smollm2, special=False)


@pytest.fixture(scope="module")
def special_matcher(smollm2: Tokenizer) -> Matcher:
    """A tokenizer in which every format's markers are special tokens."""
    return with_markers(smollm2, special=True)


def framed(name: str, *calls: str) -> str:
    before, behind = FRAMES.get(name, ("", ""))
    return before + EXAMPLES[name][3].join(calls) + behind


def calls_in(form: ToolFormat, text: str, tools: Sequence[Tool] = TOOLS) -> list[tuple[str, object]]:
    """What the parser makes of a forced answer; nothing else may be in it."""
    parser = OutputParser(form, None, False, tools)
    parts = parser.push(text) + parser.finish()
    assert parser.has_calls, text
    assert all(part.kind in (PartKind.CALL_BEGIN, PartKind.CALL_ARGUMENTS) for part in parts), text
    names = [part.name for part in parts if part.kind is PartKind.CALL_BEGIN]
    texts = [
        "".join(p.text for p in parts if p.kind is PartKind.CALL_ARGUMENTS and p.index == i) for i in range(len(names))
    ]
    return list(zip(names, map(json.loads, texts)))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_required_takes_one_call_or_more_and_nothing_else(name: str, matcher: Matcher) -> None:
    form = tool_format(name, matcher.tokenizer)
    now, weather, maybe, _ = EXAMPLES[name]
    source = form.grammar(TOOLS, REQUIRED)
    for calls in ([now], [weather], [maybe], [now, weather], [maybe, maybe, now]):
        assert matcher.accepts(source, framed(name, *calls))
    assert not matcher.accepts(source, "")
    assert not matcher.accepts(source, "Hello")
    assert not matcher.accepts(source, framed(name, now.replace("now", "never")))
    assert not matcher.accepts(source, framed(name, weather.replace("é", "é" * 9)))
    assert not matcher.accepts(source, framed(name, weather.replace("city", "town")))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_the_parser_reads_what_the_grammar_forces(name: str, matcher: Matcher) -> None:
    form = tool_format(name, matcher.tokenizer)
    now, weather, maybe, _ = EXAMPLES[name]
    assert calls_in(form, framed(name, now, weather, maybe)) == [
        ("now", {}),
        ("get_weather", {"city": "é"}),
        ("maybe", {"b": None}),
    ]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_named_function_is_called_exactly_once(name: str, matcher: Matcher) -> None:
    now, weather, _, _ = EXAMPLES[name]
    source = tool_format(name, matcher.tokenizer).grammar(TOOLS, NOW)
    assert matcher.accepts(source, framed(name, now))
    assert not matcher.accepts(source, framed(name, weather))
    assert not matcher.accepts(source, framed(name, now, now))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_without_parallel_calls_there_is_one_of_any_allowed_function(name: str, matcher: Matcher) -> None:
    now, weather, maybe, _ = EXAMPLES[name]
    choice = ToolChoice("required", ("now", "get_weather"))
    source = tool_format(name, matcher.tokenizer).grammar(TOOLS, choice, parallel=False)
    assert matcher.accepts(source, framed(name, now))
    assert matcher.accepts(source, framed(name, weather))
    assert not matcher.accepts(source, framed(name, maybe))
    assert not matcher.accepts(source, framed(name, now, weather))


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("kind", ["matcher", "token_matcher", "special_matcher"])
def test_whatever_the_grammar_allows_is_calls_to_the_parser(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    used: Matcher = request.getfixturevalue(kind)
    form = tool_format(name, used.tokenizer)
    source = form.grammar(TOOLS, REQUIRED)
    texts = [text for text in (used.sample(source, random_) for _ in range(5)) if text is not None]
    assert texts, seed
    for text in texts:
        for called, arguments in calls_in(form, text):
            (schema,) = [used_tool.parameters or NOTHING for used_tool in TOOLS if used_tool.name == called]
            assert jsonschema.Draft202012Validator(schema).is_valid(arguments), (seed, text)


def test_markers_that_are_special_tokens_are_tokens_in_the_grammar(special_matcher: Matcher) -> None:
    form = tool_format("mistral", special_matcher.tokenizer)
    source = form.grammar(TOOLS, REQUIRED)
    assert special_matcher.accepts(source, "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}")
    assert not special_matcher.accepts(source, '[TOOL_CALLS][{"name": "now", "arguments": {}}]')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "properties": {"a b": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "object", "required": ["a"]},
    ],
)
@pytest.mark.parametrize("name", ["pythonic", "gemma", "qwen3_coder"])
def test_what_keyword_arguments_cannot_be_forced_to_obey_is_refused(
    name: str, schema: dict[str, object], smollm2: Tokenizer
) -> None:
    tools = check_tools([{"type": "function", "function": {"name": "odd", "parameters": schema}}])
    with pytest.raises(InvalidRequest, match="odd") as caught:
        tool_format(name, smollm2).grammar(tools, REQUIRED)
    assert caught.value.param == "tools"


def test_keyword_arguments_that_may_be_left_out_may_be_left_out_in_any_way(matcher: Matcher) -> None:
    tools = check_tools([tool("f", a={"type": "integer"}, b={"type": "integer"}, c={"type": "integer"})])
    source = tool_format("pythonic", matcher.tokenizer).grammar(tools, REQUIRED)
    for text in ("", "a=1", "b=1", "c=1", "a=1, b=1", "a=1, c=1", "b=1, c=1", "a=1, b=1, c=1"):
        assert matcher.accepts(source, f"[f({text})]")
    for text in ("a=1,", ", b=1", "b=1, a=1", "a=1b=1", "a"):
        assert not matcher.accepts(source, f"[f({text})]")


def parameter(text: str) -> str:
    return f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({}, ["", "x", "two\nlines < 3", '"quoted"'], []),
        ({"type": "string", "description": "any"}, ["x"], []),
        ({"enum": ["red", "light\nred"]}, ["red", "light\nred"], ["green", '"red"', "redred"]),
        ({"const": "red"}, ["red"], ["blue"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é\né"], ["a", "abcd"]),
        ({"type": "string", "pattern": "^[a-c/]+$"}, ["a/c"], ["d", "a b"]),
        ({"type": "string", "pattern": "[0-9]{2}"}, ["in 12 days", "12"], ["1 day"]),
        ({"type": "string", "pattern": "[0-9]\\$"}, ["5$ a"], ["5"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "tomorrow"]),
        ({"$ref": "#/$defs/Color"}, ["red"], ["blue"]),
        ({"type": "integer", "maximum": 5}, ["5"], ["6", "five", ""]),
        ({"type": ["string", "null"]}, ["null", '"x"'], ["x"]),
        ({"type": "array", "items": {"type": "boolean"}}, ["[true, false]"], ["[1]", "true"]),
    ],
)
def test_qwen3_coder_arguments_are_bare_text_that_obeys_its_schema(
    schema: dict[str, object], right: list[str], wrong: list[str], matcher: Matcher
) -> None:
    defs = {"Color": {"enum": ["red"]}}
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": defs}
    tools = check_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    form = tool_format("qwen3_coder", matcher.tokenizer)
    source = form.grammar(tools, REQUIRED)
    for text in right:
        assert matcher.accepts(source, parameter(text)), text
        ((_, arguments),) = calls_in(form, parameter(text), tools)
        assert jsonschema.Draft202012Validator(parameters).is_valid(arguments), arguments
    for text in [*wrong, "</parameter>" * 2]:
        assert not matcher.accepts(source, parameter(text)), text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", "[f(x=3, y_2=9)]"),
        ("gemma", "<start_function_call>call:f{x:3,y_2:9}<end_function_call>"),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=x>\n3\n</parameter>\n<parameter=y_2>\n9\n</parameter>\n</function>"
            "\n</tool_call>",
        ),
    ],
)
def test_functions_that_take_any_names_are_called_with_any(name: str, text: str, matcher: Matcher) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}}
    tools = check_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    form = tool_format(name, matcher.tokenizer)
    source = form.grammar(tools, REQUIRED)
    assert matcher.accepts(source, text)
    assert not matcher.accepts(source, text.replace("9", "10"))
    assert calls_in(form, text, tools) == [("f", {"x": 3, "y_2": 9})]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "uri"},
        {"type": "string", "allOf": [{"minLength": 1}]},
        {"enum": ["</parameter>"]},
        {"$ref": "#/$defs/A"},
    ],
)
def test_what_bare_text_cannot_be_forced_to_obey_is_refused(schema: dict[str, object], smollm2: Tokenizer) -> None:
    defs = {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": defs}
    tools = check_tools([{"type": "function", "function": {"name": "odd", "parameters": parameters}}])
    with pytest.raises(InvalidRequest, match=r"parameters of odd use (format|allOf|enum|\$ref) = ") as caught:
        tool_format("qwen3_coder", smollm2).grammar(tools, REQUIRED)
    assert caught.value.param == "tools"
