"""`{"name": …, "parameters": {…}}` as the whole answer, maybe behind a tag: Llama 3.1 to 3.3, Llama 4.

Several calls follow each other, with `;` or line breaks between them. Loop thread only.
"""

from collections.abc import Sequence

from asyncllm.router.output.base import Opening, ToolFormat
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, json_call
from asyncllm.router.output.json_call import read_call
from asyncllm.router.output.reader import SPACE, NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool

TAGS, END = ("<|python_tag|>", "<|python_start|>"), "<|python_end|>"


class Llama3Json(ToolFormat):
    """Calls stand at the beginning of the text or behind the tag; JSON elsewhere is content."""

    name = "llama3_json"
    markers = (*TAGS, END)
    starts, ends = TAGS, (*TAGS, END)
    start, separator = "", "; "
    opening = Opening("{", SPACE + ";", is_repeated=True)

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        yield from self._calls(reader, out)
        while (yield from reader.until(self._starts, out.content)):
            yield from self._calls(reader, out)

    def _calls(self, reader: Reader, out: Collector) -> Parse[None]:
        reader.record()
        yield from reader.space()
        for tag in TAGS:
            if (yield from reader.literal(tag)):
                yield from reader.space()
                break
        try:
            while True:
                yield from read_call(reader, out, self._ends)
                reader.record()
                yield from reader.space()
                if (yield from reader.literal(";")):
                    yield from reader.space()
                if (yield from reader.peek()) != "{":
                    if (yield from reader.literal(END)):
                        reader.recorded()
                    break
        except NotACall:
            pass
        out.content(reader.recorded())

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        return lark.any_of([json_call(lark, tool, "parameters") for tool in tools])
