"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2.5, Qwen3, SmolLM3. Loop thread only."""

from collections.abc import Sequence

from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, json_call
from asyncllm.router.output.json_call import read_call
from asyncllm.router.output.reader import NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool

START, END = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """One block per call; models that put several objects into a block are understood."""

    name = "hermes"
    markers = (START, END)
    starts, ends = (START,), (END,)
    start, separator = START, "\n"

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        while (yield from reader.until(self._starts, out.content)):
            yield from self._block(reader, out)

    def _block(self, reader: Reader, out: Collector) -> Parse[None]:
        reader.record()
        reader.take(len(START))
        yield from reader.space()
        try:
            while True:
                yield from read_call(reader, out, self._ends)
                reader.record()
                yield from reader.space()
                if (yield from reader.literal(END)):
                    reader.recorded()
                    return
                if (yield from reader.peek()) != "{":
                    break
        except NotACall:
            pass
        out.content(reader.recorded())

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        calls = [json_call(lark, tool, "arguments") for tool in tools]
        return lark.rule("rest", '"\\n"', lark.any_of(calls), '"\\n"', lark.token(END))
