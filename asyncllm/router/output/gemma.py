"""`<start_function_call>call:f{a:1,b:<escape>x<escape>}<end_function_call>`: FunctionGemma; Gemma 4 has other markers.

Google documents the first under "FunctionGemma formatting and best practices"; the second is in Gemma 4's own chat
template. Gemma 3 was not trained on a format; with the usual template it is `pythonic`. Loop thread only.
"""

import contextlib
import re
from collections.abc import Sequence

from asyncllm.router.output.base import ToolFormat, read_spelled, skip_end
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, keyword_arguments
from asyncllm.router.output.literals import Literals
from asyncllm.router.output.reader import NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool

NAME = re.compile(r"[\w.-]+")


class Gemma(ToolFormat):
    """FunctionGemma."""

    name = "gemma"
    start, end, delimiter = "<start_function_call>", "<end_function_call>", "<escape>"
    markers, starts, ends = (start, end, delimiter), (start,), (end,)
    separator = ""
    stop_tokens = ("<start_function_response>",)

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        while (yield from reader.until(self._starts, out.content)):
            reader.record()
            reader.take(len(self.start))
            with contextlib.suppress(NotACall):
                yield from self._call(reader, out)
            out.content(reader.recorded())

    def _call(self, reader: Reader, out: Collector) -> Parse[None]:
        yield from reader.space()
        if not (yield from reader.literal("call:")):
            raise NotACall
        name = yield from reader.run(NAME, 64)
        if not out.knows(name) or (yield from reader.peek()) != "{":
            raise NotACall
        arguments = Literals(reader, out.arguments, self.delimiter).value()
        yield from read_spelled(reader, out, name, arguments, self._ends)
        yield from skip_end(reader, self.end)

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        """Values are written as JSON."""
        calls = [
            lark.rule(
                "call",
                lark.text(f"call:{tool.name}{{"),
                keyword_arguments(lark, tool, assign=":", separator=","),
                '"}"',
            )
            for tool in tools
        ]
        return f"{lark.any_of(calls)} {lark.token(self.end)}"


class Gemma4(Gemma):
    """Gemma 4."""

    name = "gemma4"
    start, end, delimiter = "<|tool_call>", "<tool_call|>", '<|"|>'
    markers, starts, ends = (start, end, delimiter), (start,), (end,)
    stop_tokens = ("<|tool_response>",)
