"""`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and the newer `[TOOL_CALLS]name[ARGS]{…}`, once per call.

Between name and arguments there may be `[CALL_ID]` and an id (Mistral Small 3.2), or nothing. Loop thread only.
"""

import hashlib
import re
import secrets
import string
from collections.abc import Sequence

from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, arguments, json_call
from asyncllm.router.output.json_call import read_call, stream_call
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.reader import NotACall, Parse, Reader
from asyncllm.router.output.tools import Tool

START, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID = re.compile(r"[a-zA-Z0-9]{9}")
WORD = re.compile(r"[a-zA-Z0-9_.-]+")


class Mistral(ToolFormat):
    """Reads both forms; forces the one that the model was trained on."""

    name = "mistral"
    markers = (START, ARGS, CALL_ID)
    starts = ends = (START,)
    start = START

    def __init__(self, model: ModelMarkers) -> None:
        super().__init__(model)
        self._is_named = ARGS in model.special_ids
        self.separator = "" if self._is_named else None

    def new_call_id(self) -> str:
        """Nine letters and digits: the models' templates refuse everything else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def history_id(self, call_id: str) -> str:
        """A client's id, as the chat template takes it; equal ones stay equal."""
        return call_id if ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text."""
        while (yield from reader.until(self._starts, out.content)):
            reader.record()
            reader.take(len(START))
            try:
                yield from reader.space()
                first = yield from reader.peek()
                if first == "[":
                    yield from self._list(reader, out)
                elif first == "{":
                    yield from read_call(reader, out, self._ends)
                else:
                    yield from self._named(reader, out)
            except NotACall:
                pass
            out.content(reader.recorded())

    def _list(self, reader: Reader, out: Collector) -> Parse[None]:
        reader.take(1)
        while True:
            yield from reader.space()
            yield from read_call(reader, out, self._ends)
            reader.record()
            yield from reader.space()
            if (yield from reader.literal(",")):
                continue
            if (yield from reader.literal("]")):
                reader.recorded()
            return

    def _named(self, reader: Reader, out: Collector) -> Parse[None]:
        name = yield from reader.run(WORD, 64)
        if (yield from reader.literal(CALL_ID)):
            yield from reader.run(WORD, 64)
        yield from reader.literal(ARGS)
        yield from reader.space()
        yield from stream_call(reader, out, name, self._ends)

    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        if self._is_named:
            calls = [lark.rule("call", lark.text(t.name), lark.token(ARGS), arguments(lark, t)) for t in tools]
            return lark.any_of(calls)
        call = lark.any_of([json_call(lark, tool, "arguments") for tool in tools])
        return lark.rule("list", '"["', lark.sequence(call, separator=", ", is_one=is_one), '"]"')
