import random
import re
from typing import Any

import msgspec
import pytest

from asyncllm.errors import InvalidRequest
from asyncllm.router.output.tools import ToolChoice, check_tool_choice, check_tools
from tests.router.output.harness import TOOLS, tool


def with_schema(schema: Any) -> list[Any]:
    return [tool("a"), {"type": "function", "function": {"name": "f", "parameters": schema}}]


def in_property(schema: Any) -> list[Any]:
    return with_schema({"type": "object", "properties": {"x": schema}})


P = "tools[1].function.parameters"
X = f"{P}.properties.x"
WRONG: list[tuple[Any, str]] = [
    (None, "tools"),
    ({}, "tools"),
    ([], "tools"),
    ([tool(f"f{i}") for i in range(129)], "tools"),
    (["f"], "tools[0]"),
    ([{}], "tools[0].type"),
    ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ([{"type": "function"}], "tools[0].function"),
    ([{"type": "function", "function": {}}], "tools[0].function.name"),
    ([tool("")], "tools[0].function.name"),
    ([tool("a b")], "tools[0].function.name"),
    ([tool("a\n")], "tools[0].function.name"),
    ([tool("a" * 65)], "tools[0].function.name"),
    ([tool("f"), tool("f")], "tools[1].function.name"),
    ([{"type": "function", "function": {"name": "f", "description": 1}}], "tools[0].function.description"),
    ([{"type": "function", "function": {"name": "f", "strict": 1}}], "tools[0].function.strict"),
    (with_schema([]), P),
    (with_schema(True), P),
    (with_schema({"type": "array"}), f"{P}.type"),
    (with_schema({"type": ["object", "null"]}), f"{P}.type"),
    (with_schema({"properties": []}), f"{P}.properties"),
    (with_schema({"required": "x"}), f"{P}.required"),
    (with_schema({"required": ["x", "x"]}), f"{P}.required"),
    (with_schema({"required": [1]}), f"{P}.required"),
    (with_schema({"required": None}), f"{P}.required"),
    (in_property(None), X),
    (in_property("string"), X),
    (in_property({"type": "str"}), f"{X}.type"),
    (in_property({"type": []}), f"{X}.type"),
    (in_property({"type": ["string", "string"]}), f"{X}.type"),
    (in_property({"type": [["string"]]}), f"{X}.type"),
    (in_property({"enum": []}), f"{X}.enum"),
    (in_property({"enum": "a"}), f"{X}.enum"),
    (in_property({"pattern": "("}), f"{X}.pattern"),
    (in_property({"pattern": 1}), f"{X}.pattern"),
    (in_property({"pattern": "a" * 5000}), f"{X}.pattern"),
    (in_property({"patternProperties": {"[": {}}}), f"{X}.patternProperties"),
    (in_property({"$ref": "https://example.com/x.json"}), f"{X}.$ref"),
    (in_property({"$ref": "#/$defs/nothing"}), f"{X}.$ref"),
    (in_property({"$ref": "#name"}), f"{X}.$ref"),
    (in_property({"$ref": 1}), f"{X}.$ref"),
    (in_property({"minLength": -1}), f"{X}.minLength"),
    (in_property({"maxItems": True}), f"{X}.maxItems"),
    (in_property({"minimum": "1"}), f"{X}.minimum"),
    (in_property({"multipleOf": 0}), f"{X}.multipleOf"),
    (in_property({"format": 1}), f"{X}.format"),
    (in_property({"uniqueItems": "yes"}), f"{X}.uniqueItems"),
    (in_property({"anyOf": []}), f"{X}.anyOf"),
    (in_property({"anyOf": [{}, {"type": 1}]}), f"{X}.anyOf[1].type"),
    (in_property({"items": {"items": {"type": "x"}}}), f"{X}.items.items.type"),
    (in_property({"not": 1}), f"{X}.not"),
    (in_property({"additionalProperties": 1}), f"{X}.additionalProperties"),
    (in_property({"dependentRequired": {"a": "b"}}), f"{X}.dependentRequired.a"),
    (with_schema({"$defs": {"A": 1}}), f"{P}.$defs.A"),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "param"), WRONG)
def test_a_wrong_tool_is_refused_at_its_exact_place(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(param)) as caught:
        check_tools(tools)
    assert caught.value.param == param


def test_a_property_may_have_any_name() -> None:
    names = ("required", "type", "properties", "enum", "pattern", "patternProperties", "multipleOf", "$ref", "é")
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    (_, checked) = check_tools(with_schema(schema))
    assert checked.parameters == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"]},
        {"enum": [1, None, "a"]},
        {"const": None},
        {"pattern": r"^\p{Lu}[[a-z]--b]\u{1F600}(?<year>\d{4})(?<!x)$"},
        {"anyOf": [{"$ref": "#/$defs/A"}, True, False]},
        {"$ref": "#"},
        {"items": [{"type": "string"}, {}], "prefixItems": [{}]},
        {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5},
        {"x-vendor": {"type": 1}, "default": {"type": 1}, "examples": [{"required": 1}]},
    ],
)  # fmt: skip
def test_right_schemas_pass(schema: dict[str, Any]) -> None:
    check_tools(with_schema({"properties": {"x": schema}, "$defs": {"A": {"type": "null"}}}))


def test_nesting_and_size_are_limited() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(63):
        deep = {"type": "array", "items": deep}
    check_tools(in_property(deep))
    with pytest.raises(InvalidRequest, match="more than 64 deep"):
        check_tools(in_property({"items": deep}))
    hollow: Any = {}
    for _ in range(2000):
        hollow = {"default": hollow}
    with pytest.raises(InvalidRequest, match="more than 192 deep"):
        check_tools(in_property(hollow))
    with pytest.raises(InvalidRequest, match="too large"):
        check_tools([tool(f"f{i}", **{f"p{k}": {} for k in range(100)}) for i in range(128)])


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{k}": {"type": "string", "title": "x"} for k in range(4000)}},
        {"properties": {f"p{k}": {"pattern": f"{k}" * 1000} for k in range(60)}},
        {"properties": {f"p{k}": {"pattern": f"a{k}"} for k in range(500)}},
        {"required": [str(k) for k in range(40_000)]},
        {"enum": list(range(40_000))},
        {"default": [[]] * 40_000},
        {"dependentRequired": {str(k): [] for k in range(20_000)}},
        {str(k): k for k in range(20_000)},
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_whatever_a_schema_is_large_by_is_bounded(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="too large"):
        check_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}])


def test_templates_get_the_tool_as_it_came_with_parameters_always_there() -> None:
    given = {"type": "function", "function": {"name": "f", "description": "d", "strict": None, "parameters": None}}
    (checked,) = check_tools([given])
    assert checked.source == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    assert (checked.parameters, checked.strict) == (None, False)


def test_whatever_a_client_sends_is_taken_or_refused_and_nothing_else() -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    words = [
        "type",
        "object",
        "properties",
        "required",
        "enum",
        "pattern",
        "$ref",
        "#/x",
        "items",
        "anyOf",
        "f",
        "name",
    ]

    def value(depth: int) -> Any:
        kind = random_.randrange(8 if depth else 6)
        if kind >= 6:
            return {random_.choice(words): value(depth - 1) for _ in range(3)}
        if kind == 5:
            return [value(depth - 1) for _ in range(2)] if depth else []
        return [None, True, -1, 1.5, random_.choice(words)][kind]

    for _ in range(2000):
        try:
            check_tools(with_schema({"type": "object", "properties": value(4)}))
            check_tool_choice(value(3), TOOLS)
        except InvalidRequest as error:
            assert error.param, seed


def test_choices_are_understood() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named, named]}}
    assert check_tool_choice(None, TOOLS) == check_tool_choice("auto", TOOLS) == ToolChoice("auto")
    assert check_tool_choice(None, []) == check_tool_choice("none", []) == ToolChoice("none")
    assert check_tool_choice("required", TOOLS).is_forced
    assert check_tool_choice(named, TOOLS) == ToolChoice("required", ("f",), is_named=True)
    assert check_tool_choice(allowed, TOOLS) == ToolChoice("required", ("f",))
    assert [ToolChoice("auto", ("f",)).allows(name) for name in ("f", "g")] == [True, False]
    assert not ToolChoice("none").allows("f")


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        (1, "tool_choice"),
        ({}, "tool_choice"),
        ({"type": "custom"}, "tool_choice"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "function", "function": {"name": "h"}}, "tool_choice.function.name"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "none"}}, "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tool_choice.allowed_tools.tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "x"}]}},
            "tool_choice.allowed_tools.tools[0].type",
        ),
    ],
)
def test_a_wrong_choice_is_refused_at_its_exact_place(choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tool_choice(choice, TOOLS)
    assert caught.value.param == param


def test_a_choice_needs_tools() -> None:
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(InvalidRequest, match="needs tools"):
            check_tool_choice(choice, [])


def test_messages_never_show_more_than_a_bit_of_what_was_sent() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tools([{"type": "function", "function": {"name": "x" * 100_000}}])
    assert len(caught.value.message) < 500
    assert msgspec.json.encode(caught.value.message)
