"""`<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`: Qwen3-Coder, and Qwen and Nemotron since.

Values are plain text on lines of their own, without any escapes: what a value is, only the function's schema says. A
string becomes JSON while it comes; everything else once it is whole. Loop thread only.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from asyncllm.router.output.base import ToolFormat, read_spelled, skip_end
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import ANY_NAME, Lark, each_argument, text_value
from asyncllm.router.output.literals import KEY, Broken, Literals
from asyncllm.router.output.reader import Markers, NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool
from asyncllm.router.output.value_types import fits, types_of

START, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
PARAMETER_ENDS = Markers(PARAMETER_END)
BREAK = "\n"
NAME = re.compile(r"[\w.-]+")
MAX_LITERAL = 8192  # characters of a value in Python's notation, 5 ms on the loop; JSON may be longer


class Qwen3Coder(ToolFormat):
    """One function per block; a block's marker may be missing, which these models tend to forget."""

    name = "qwen3_coder"
    markers = (START, END)
    starts, ends = (START, FUNCTION), (END, START)
    start, separator = START, "\n"

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        while (yield from reader.until(self._starts, out.content)):
            reader.record()
            with contextlib.suppress(NotACall):
                yield from self._call(reader, out)
            out.content(reader.recorded())

    def _call(self, reader: Reader, out: Collector) -> Parse[None]:
        if (yield from reader.literal(START)):
            yield from reader.space()
        if not (yield from reader.literal(FUNCTION)):
            raise NotACall
        name = yield from reader.run(NAME, 64)
        if not out.knows(name) or not (yield from reader.literal(">")):
            raise NotACall
        yield from reader.space()
        has_parameter = yield from reader.literal(PARAMETER)
        if not has_parameter and not (yield from reader.literal(FUNCTION_END)):
            raise NotACall
        arguments = self._parameters(reader, out.arguments, out.parameters(name), has_parameter)
        yield from read_spelled(reader, out, name, arguments, self._ends)
        yield from skip_end(reader, END)

    def _parameters(
        self, reader: Reader, emit: Callable[[str], None], schema: dict[str, Any], has_any: bool
    ) -> Parse[None]:
        """From the first one's key to the end of the function; not `has_any`: that end was read already."""
        emit("{")
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties")
        while has_any:
            try:
                key = yield from reader.run(KEY, 256)
            except NotACall as error:
                raise Broken(str(error)) from None
            if not key or not (yield from reader.literal(">")):
                raise Broken(key)
            emit(json.dumps(key, ensure_ascii=False) + ": ")
            yield from reader.literal(BREAK)
            yield from _value(reader, emit, types_of(properties.get(key, others), schema))
            yield from reader.space()
            if (yield from reader.literal(FUNCTION_END)):
                break
            if not (yield from reader.literal(PARAMETER)):
                raise Broken
            emit(", ")
        emit("}")

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        calls = []
        for tool in tools:
            write = functools.partial(_argument, lark, f"tools: the parameters of {tool.name}")
            head = lark.text(tool.name + ">\n")
            calls.append(lark.rule("call", head, each_argument(lark, tool, write), lark.text(FUNCTION_END)))
        if start == FUNCTION:
            return lark.any_of(calls)
        return lark.rule("rest", lark.text("\n" + FUNCTION), lark.any_of(calls), '"\\n"', lark.token(END))


def _argument(lark: Lark, where: str, name: str | None, schema: dict[str, Any]) -> str:
    """The rule of an argument: strings are free text, everything else is JSON."""
    key = lark.text(f"{PARAMETER}{name}>\n") if name is not None else f'"{PARAMETER}" /{ANY_NAME}/ ">\\n"'
    if types_of(schema, schema) == {"string"}:
        return f'{key} {text_value(lark, schema, BREAK, PARAMETER_END, where)} "\\n"'
    return f"{key} {lark.json(schema)} {lark.text(f'{BREAK}{PARAMETER_END}{BREAK}')}"


def _value(reader: Reader, emit: Callable[[str], None], types: set[str]) -> Parse[None]:
    """A value up to its end, without the line break in front of that. Raises Broken where the end is missing."""
    is_string = types == {"string"}
    pieces: list[str] = []
    held = ""

    def take(text: str) -> None:
        nonlocal held
        text = held + text
        held = BREAK if text.endswith(BREAK) else ""
        text = text.removesuffix(BREAK)
        if is_string:
            emit(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            pieces.append(text)

    if is_string:
        emit('"')
    if not (yield from reader.until(PARAMETER_ENDS, take)):
        raise Broken("".join([*pieces, held]))
    reader.take(len(PARAMETER_END))
    emit('"' if is_string else _as_json("".join(pieces), types))


def _as_json(text: str, types: set[str]) -> str:
    """A value as JSON of one of these types; a string where it is none of them."""
    bare = text.strip()
    with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        if fits(msgspec.json.decode(bare), types):
            return bare
    if len(bare) <= MAX_LITERAL:
        with contextlib.suppress(Broken):
            python = _python_as_json(bare)
            if fits(json.loads(python), types):
                return python
    return json.dumps(text, ensure_ascii=False)


def _python_as_json(text: str) -> str:
    """A value in Python's notation. Raises Broken where it is none, or something stands behind it."""
    reader, pieces = Reader(), list[str]()
    reader.push(text)
    reader.ended = True
    for _ in Literals(reader, pieces.append).value():
        raise AssertionError("a whole text needs no more of it")
    if reader.position < len(reader.text):
        raise Broken
    return "".join(pieces)
