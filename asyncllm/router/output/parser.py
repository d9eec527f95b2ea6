"""From a model's text to its parts: reasoning, content, calls. One parser for streamed and for whole answers.

For any way to cut the text the parts are the same once merged. Text is handed on at once, except for the shortest end
that may still belong to a marker (or be whitespace in front of a call), and for a call's head until its function is
known. Nothing is lost: what is no call is content, as written. A call that began stays one; arguments that break off
or break go on, as written, to the call's end marker, and `is_broken` says so. Loop thread only; one parser per choice.
"""

from collections.abc import Sequence

from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.markers import openai_call_id
from asyncllm.router.output.parts import Part
from asyncllm.router.output.reader import Parse, Reader
from asyncllm.router.output.reasoning import ReasoningFormat
from asyncllm.router.output.tools import Tool


class OutputParser:
    """Makes parts of one choice's text."""

    __slots__ = ("_out", "_parse", "_reader")

    def __init__(
        self,
        tool_format: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        in_reasoning: bool,
        tools: Sequence[Tool] = (),
        max_calls: int | None = None,
    ) -> None:
        """`tools`: those that may be called. `in_reasoning`: the prompt ends inside the thinking part.

        `max_calls`: whatever follows so many calls is dropped, as behind a stop string.
        """
        self._reader = Reader()
        new_call_id = openai_call_id if tool_format is None else tool_format.new_call_id
        self._out = Collector(tools, max_calls, new_call_id)
        tool_format = tool_format if tools else None
        self._parse: Parse[None] | None = _parse(self._reader, self._out, tool_format, reasoning, in_reasoning)

    @property
    def held(self) -> str:
        """Text that waits for what follows."""
        return self._reader.text[self._reader.position :]

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside the thinking part."""
        return self._out.is_thinking

    @property
    def has_thought(self) -> bool:
        """Whether the thinking part's end was read."""
        return self._out.has_thought

    @property
    def num_calls(self) -> int:
        """Calls that began."""
        return self._out.num_calls

    @property
    def is_full(self) -> bool:
        """`max_calls` are complete: generating more would be in vain."""
        return self._out.is_full

    @property
    def is_broken(self) -> bool:
        """Whether the arguments of some call are no JSON object, because they break or because the text ended."""
        return self._out.is_broken

    @property
    def has_calls(self) -> bool:
        """Whether there are calls, all of them whole: only then `finish_reason` may be `tool_calls`."""
        return self._out.num_calls > 0 and not self._out.is_broken

    def push(self, text: str) -> list[Part]:  # hot: once per token
        """Take the next text; returns what it completes."""
        if self._out.is_full:
            return []
        self._reader.push(text)
        self._resume()
        return self._out.take()

    def finish(self) -> list[Part]:
        """The text is over: what was held back."""
        self._reader.ended = True
        self._resume()
        self._out.finish()
        return self._out.take()

    def _resume(self) -> None:
        if self._parse is None:
            return
        try:
            next(self._parse)
        except StopIteration:
            self._parse = None


def _parse(
    reader: Reader,
    out: Collector,
    tool_format: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    in_reasoning: bool,
) -> Parse[None]:
    """Read the whole text."""
    space = ""
    if reasoning is not None:
        space = yield from reasoning.parse(reader, out, in_reasoning)
    if tool_format is not None:
        out.content(space)
        yield from tool_format.parse(reader, out)
        return
    out.plain(space)
    while True:
        out.plain(reader.take(len(reader.text) - reader.position))
        if reader.ended:
            return
        yield
