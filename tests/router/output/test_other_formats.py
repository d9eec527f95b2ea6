"""What each format has of its own; what they share is tested with Hermes'."""

import json
import re

import pytest

from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import PartKind
from asyncllm.router.output.tools import check_tools
from tests.router.output.harness import FORMATS, read, tool


def arguments_of(text: str, form: str) -> object:
    """The arguments of the only call, decoded."""
    result = read(list(text), form)
    ((_, arguments),) = result.calls
    assert result.content == ""
    assert result.parser.has_calls
    return json.loads(arguments)


# --- llama3_json ------------------------------------------------------------------------------------------------------


def test_llama3_calls_may_stand_behind_the_tag_and_are_separated_by_semicolons_or_lines() -> None:
    calls = '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}\n{"name": "f", "parameters": {}}'
    framed = f"<|python_start|>{calls}<|python_end|>"
    for text in (calls, "<|python_tag|>" + calls, "\n" + calls + "\n", framed):
        result = read(text, "llama3_json")
        assert result.calls == [("f", '{"a": 1}'), ("g", "{}"), ("f", "{}")]
        assert result.content == ""


def test_llama3_json_that_is_no_call_is_content_at_once() -> None:
    text = '{"answer": [1, 2, 3]}'
    result = read(list(text), "llama3_json")
    assert result.content == text
    assert len(result.pieces) > 5
    for other in ('{"name": "Bob", "parameters": {"a": 1}}', '<|python_tag|>print("x")', 'See {"name": "f"}'):
        assert read(other, "llama3_json").content == other


# --- pythonic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("python", "value"),
    [
        ("1", 1),
        ("-2.5e3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("'it\\'s'", "it's"),
        ('"say \\"hi\\", \'you\'"', "say \"hi\", 'you'"),
        ("''", ""),
        ("'a\\n\\t\\\\ \\x41 \\u00e9 \\U0001F600 \\q'", "a\n\t\\ A é 😀 \\q"),
        ('"\\ud83d\\ude00"', "😀"),
        ('"""two\n"lines" \'\'\' """', "two\n\"lines\" ''' "),
        ("'日本'", "日本"),
        ("[1, (2, 'x'), [], ()]", [1, [2, "x"], [], []]),
        ("{'k': {'l': None}, \"m\": [1,],}", {"k": {"l": None}, "m": [1]}),
    ],
)
def test_python_values_become_json(python: str, value: object) -> None:
    assert arguments_of(f"[f(a={python}, b = 2)]", "pythonic") == {"a": value, "b": 2}
    assert arguments_of(f"<|python_start|>[f(b=2, a={python},)]<|python_end|>", "pythonic") == {"b": 2, "a": value}


def test_pythonic_strings_stream_as_they_come() -> None:
    result = read(['[f(a="', "first ", "second", '")]'], "pythonic")
    assert [part.text for part in result.pieces[2:5]] == ['"a": ', '"', "first "]
    assert result.calls == [("f", '{"a": "first second"}')]


def test_pythonic_calls_follow_each_other_in_one_list() -> None:
    result = read("[f(), g( a = 1 ) ,\nf()]\nDone.", "pythonic")
    assert result.calls == [("f", "{}"), ("g", '{"a": 1}'), ("f", "{}")]
    assert result.content == "Done."


def test_brackets_that_are_no_calls_are_content_as_written() -> None:
    for text in ("[1] says", "[f](http://x)", "[f(1)]", "[h(a=1)]", "[f, g]", "See [f(a=1)]", "[", "[]"):
        result = read(list(text), "pythonic")
        assert result.content == text
        assert not result.parser.num_calls


def test_what_python_does_not_calculate_breaks_the_call_and_is_kept() -> None:
    result = read("[f(a=1, b=today() + 1), g(c=2)]", "pythonic")
    assert result.calls == [("f", '{"a": 1, "b": today() + 1), g(c=2)]')]
    assert result.parser.is_broken


# --- mistral ----------------------------------------------------------------------------------------------------------


def test_mistral_ids_are_nine_letters_and_digits() -> None:
    result = read('[TOOL_CALLS][{"name": "f", "arguments": {}}]', "mistral")
    assert re.fullmatch("[a-zA-Z0-9]{9}", result.parts[0].id)
    form = FORMATS["mistral"]
    assert form.history_id("abcDEF123") == "abcDEF123"
    assert re.fullmatch("[a-zA-Z0-9]{9}", form.history_id("call_1"))
    assert form.history_id("call_1") == form.history_id("call_1") != form.history_id("call_2")


def test_both_mistral_forms_make_the_same_calls() -> None:
    calls = [("f", '{"a": "[TOOL_CALLS]"}'), ("g", "{}")]
    for text in (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "[TOOL_CALLS]"}}, {"name": "g", "arguments": {}, "id": "x"}]',
        '[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]"}[TOOL_CALLS]g[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": "[TOOL_CALLS]"}\n[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}',
        '[TOOL_CALLS]f{"a": "[TOOL_CALLS]"}[TOOL_CALLS]g{}',
    ):
        result = read(list(text), "mistral")
        assert result.calls == calls
        assert result.content == ""


def test_a_call_inside_the_arguments_of_an_unknown_function_is_not_made() -> None:
    text = '[TOOL_CALLS]nobody[ARGS]{"a": "[TOOL_CALLS]f[ARGS]{}"}'
    assert read(list(text), "mistral").content == text


# --- gemma ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "start", "end", "delimiter"),
    [
        ("gemma", "<start_function_call>", "<end_function_call>", "<escape>"),
        ("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
    ],
)
def test_gemma_strings_are_whatever_stands_between_their_delimiters(
    form: str, start: str, end: str, delimiter: str
) -> None:
    text = 'call:f{a:E"},\\x\nE,b:-1.5,c:[true,EE],d:{k:null}}'.replace("E", delimiter)
    value = {"a": '"},\\x\n', "b": -1.5, "c": [True, ""], "d": {"k": None}}
    assert arguments_of(start + text + end, form) == value


def test_gemma_takes_json_in_its_place() -> None:
    assert arguments_of('<start_function_call>call:f{"a": "x", b: "y"}', "gemma") == {"a": "x", "b": "y"}


def test_gemma_calls_that_break_go_on_to_their_end_marker() -> None:
    text = (
        "<start_function_call>call:f{a:London,b:2}<end_function_call><start_function_call>call:g{}<end_function_call>"
    )
    result = read(text, "gemma")
    assert result.calls == [("f", '{"a": London,b:2}'), ("g", "{}")]
    assert result.parser.is_broken


@pytest.mark.parametrize("form", ["gemma", "gemma4"])
def test_gemma_parts_come_in_order(form: str) -> None:
    start = "<start_function_call>" if form == "gemma" else "<|tool_call>"
    end = "<end_function_call>" if form == "gemma" else "<tool_call|>"
    result = read(f"One. {start}call:f{{}}{end}{start}call:nobody{{}}{end}", form)
    assert [part.kind for part in result.parts] == [
        PartKind.CONTENT,
        PartKind.CALL_BEGIN,
        PartKind.CALL_ARGUMENTS,
        PartKind.CONTENT,
    ]
    assert result.parts[-1].text == f" {start}call:nobody{{}}{end}"


# --- qwen3_coder ------------------------------------------------------------------------------------------------------


def coder_value(text: str, schema: object) -> object:
    """What becomes of a parameter's text."""
    tools = check_tools([tool("f", a=schema)])
    parser = OutputParser(FORMATS["qwen3_coder"], None, False, tools)
    call = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    parts = [part for character in call for part in parser.push(character)] + parser.finish()
    assert parser.has_calls and parts[0].kind is PartKind.CALL_BEGIN
    return json.loads("".join(part.text for part in parts))["a"]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {}, "5"),
        ('say "hi"\n\n\\n\ttrue ', {"type": "string"}, 'say "hi"\n\n\\n\ttrue '),
        ("\n x \n", {"type": "string"}, "\n x \n"),
        ("", {"type": "string"}, ""),
        ("5", {"type": "integer"}, 5),
        ("-2.5e3", {"type": "number"}, -2500.0),
        ("3.0", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("five", {"type": "integer"}, "five"),
        ("123456789012345678901234567890", {"type": "integer"}, 123456789012345678901234567890),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("Infinity", {"type": "number"}, "Infinity"),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ("None", {"type": ["integer", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("Paris", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "Paris"),
        ('{"k": [1]}', {"type": "object"}, {"k": [1]}),
        ("{'k': (True, None)}", {"type": "object"}, {"k": [True, None]}),
        ("[1, 2] and more", {"type": "array"}, "[1, 2] and more"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("2", {"enum": [1, 2, 3]}, 2),
        ("[1]", {"items": {"type": "integer"}}, [1]),
        ("1", {"oneOf": [{"$ref": "#/properties/a"}, {"type": "integer"}]}, 1),
        ("1", {"allOf": [{"description": "x"}, {"type": "integer"}]}, 1),
    ],
)
def test_qwen3_coder_values_are_what_the_schema_says(text: str, schema: object, value: object) -> None:
    assert coder_value(text, schema) == value


def test_qwen3_coder_strings_stream_as_they_come() -> None:
    result = read(["<tool_call>\n<function=f>\n<parameter=a>\nfirst ", "second\n", "</parameter>"], "qwen3_coder")
    assert [part.text for part in result.pieces[1:6]] == ["{", '"a": ', '"', "first ", "second"]


def test_qwen3_coder_calls_need_no_marker_but_a_function_that_is_there() -> None:
    result = read("Well.\n<function=g>\n</function>\n</tool_call>\n\n<function=g></function> Done.", "qwen3_coder")
    assert result.calls == [("g", "{}"), ("g", "{}")]
    assert result.content == "Well.\nDone." or result.content == "Well.\n Done."
    for text in ("<function=h>\n</function>", "<tool_call>\n{}\n</tool_call>", "def <function=f>: (x)", "<function=f>"):
        result = read(list(text), "qwen3_coder")
        assert result.content == text
        assert not result.parser.num_calls


def test_qwen3_coder_calls_that_break_go_on_to_their_end_marker() -> None:
    result = read(
        "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\nDone</tool_call><function=g></function>",
        "qwen3_coder",
    )
    assert result.calls == [("f", '{"n": 1Done'), ("g", "{}")]
    assert result.parser.is_broken
