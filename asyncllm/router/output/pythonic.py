"""`[f(a=1), g(b="x")]` as the whole answer: Llama 3.2 and 4, and Gemma 3 with the template vLLM has for it.

Arguments become JSON while they come. Loop thread only.
"""

import json
import re
from collections.abc import Sequence

from asyncllm.router.output.base import Opening, ToolFormat, read_spelled, skip_end
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, keyword_arguments
from asyncllm.router.output.literals import KEY, Literals
from asyncllm.router.output.reader import SPACE, NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool

START, END = "<|python_start|>", "<|python_end|>"
NAME = re.compile(r"[\w.-]+")


class Pythonic(ToolFormat):
    """The list stands at the beginning of the text or behind the start marker; brackets elsewhere are content."""

    name = "pythonic"
    markers = (START, END)
    starts, ends = (START,), (END,)
    start, opening = "", Opening("[", SPACE)

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        yield from self._list(reader, out)
        while (yield from reader.until(self._starts, out.content)):
            yield from self._list(reader, out)

    def _list(self, reader: Reader, out: Collector) -> Parse[None]:
        reader.record()
        yield from reader.space()
        if (yield from reader.literal(START)):
            yield from reader.space()
        try:
            if not (yield from reader.literal("[")):
                raise NotACall
            while True:
                yield from reader.space()
                yield from self._call(reader, out)
                reader.record()
                yield from reader.space()
                if (yield from reader.literal(",")):
                    yield from reader.space()
                    if (yield from reader.peek()) != "]":
                        continue
                if (yield from reader.literal("]")):
                    yield from skip_end(reader, END)
                break
        except NotACall:
            pass
        out.content(reader.recorded())

    def _call(self, reader: Reader, out: Collector) -> Parse[None]:
        name = yield from reader.run(NAME, 64)
        yield from reader.space()
        if not out.knows(name) or not (yield from reader.literal("(")):
            raise NotACall
        yield from reader.space()
        if (yield from reader.literal(")")):
            reader.recorded()
            out.begin(name)
            out.arguments("{}")
            out.end(is_whole=True)
            return
        key = yield from reader.run(KEY, 256)
        yield from reader.space()
        if not key or (yield from reader.peek()) != "=":  # positional arguments have no names in JSON
            raise NotACall
        yield from read_spelled(reader, out, name, self._arguments(reader, out, key), self._ends)

    def _arguments(self, reader: Reader, out: Collector, key: str) -> Parse[None]:
        """All arguments, the first from its `=` on."""
        literals = Literals(reader, out.arguments)
        out.arguments("{")
        out.arguments(json.dumps(key, ensure_ascii=False) + ": ")
        reader.take(1)
        yield from reader.space()
        while True:
            yield from literals.value()
            yield from reader.space()
            if (yield from reader.literal(",")):
                yield from reader.space()
            if (yield from reader.literal(")")):
                break
            out.arguments(", ")
            yield from literals.key("=")
        out.arguments("}")

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        """Values are written as JSON."""
        calls = [
            lark.rule(
                "call", lark.text(tool.name + "("), keyword_arguments(lark, tool, assign="=", separator=", "), '")"'
            )
            for tool in tools
        ]
        return lark.rule("list", '"["', lark.sequence(lark.any_of(calls), separator=", ", is_one=is_one), '"]"')
