"""What formats of tool calls share: ids and reading of calls, and grammars of texts that call. Any thread."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from asyncllm.router.output.collector import Collector
from asyncllm.router.output.grammar import Lark, loosened
from asyncllm.router.output.literals import Broken
from asyncllm.router.output.markers import ModelMarkers, openai_call_id
from asyncllm.router.output.reader import Markers, Parse, Reader
from asyncllm.router.output.tools import Tool, ToolChoice


class Opening(msgspec.Struct, frozen=True):
    """A character that begins a call where the text begins: some models put no marker in front."""

    character: str
    skipped: str  # characters that may stand in front of it
    is_repeated: bool = False  # behind a call, it begins another one


class FreeCalls(msgspec.Struct, frozen=True):
    """What has to follow where a call begins, in a text that may say anything beside its calls: Lark sources."""

    behind: dict[str, str]  # one of the format's starts -> the rest of the call
    opening: str | None  # a call from its opening on, with what is skipped in front


class ToolFormat(ABC):
    """How a model writes calls. One per model; keeps nothing between texts."""

    name: ClassVar[str]  # in the configuration
    markers: ClassVar[tuple[str, ...]]  # the strings it writes beside names and values
    starts: ClassVar[tuple[str, ...]]  # the markers behind which a call stands, wherever they are
    ends: ClassVar[tuple[str, ...]]  # those that end what is left of a broken call
    start: ClassVar[str]  # what a forced call begins with; may be empty
    separator: str | None = None  # between forced calls; None: the format has a list of them behind one start
    opening: ClassVar[Opening | None] = None  # what begins a call without a start
    stop_tokens: ClassVar[tuple[str, ...]] = ()  # special tokens that end a turn with calls, beside those of any turn

    def __init__(self, model: ModelMarkers) -> None:
        self._model = model
        self.visible_tokens = model.specials(self.markers)  # have to be shown in the text for calls to be found
        self._starts, self._ends = Markers(*self.starts), Markers(*self.ends)

    def new_call_id(self) -> str:
        """An id for a call."""
        return openai_call_id()

    def history_id(self, call_id: str) -> str:
        """A client's id, as the chat template takes it."""
        return call_id

    @abstractmethod
    def parse(self, reader: Reader, out: Collector) -> Parse[None]:
        """Read the whole text behind the reasoning, and put what it is into `out`."""

    @abstractmethod
    def _rest(self, lark: Lark, tools: Sequence[Tool], *, start: str, is_one: bool) -> str:
        """What stands behind `start`: a call of one of the tools; one or more of them where the format has a list."""

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> str:
        """Lark source (llguidance) of a text that is nothing but the calls that `choice` forces.

        One or more of the allowed functions; exactly one where a function is named, or not `parallel`. Arguments obey
        the functions' schemas. Raises InvalidRequest for schemas that this format cannot be forced to obey.
        """
        lark = Lark(self._model)
        is_one = choice.is_named or not parallel
        call = self._rest(lark, choice.chosen(tools), start=self.start, is_one=is_one)
        if self.start:
            call = lark.rule("call", lark.token(self.start), call)
        return lark.source(call, separator=self.separator or "", is_one=is_one or self.separator is None)

    def free_calls(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True) -> FreeCalls:
        """What binds the calls of a text that may say anything beside them.

        Arguments of strict functions obey their schemas, those of others are any. A start of a call is a call; so is an
        opening, which keeps a text from beginning with that character for another reason. Raises as `grammar` does.
        """
        chosen = [tool if tool.strict else loosened(tool) for tool in choice.chosen(tools)]

        def source(start: str, skipped: str = "") -> str:
            lark = Lark(self._model)
            call = self._rest(lark, chosen, start=start, is_one=not parallel)
            front = "".join(f"\\x{ord(character):02x}" for character in skipped)
            return lark.source(f"/[{front}]*/ {call}" if front else call, is_one=True)

        opening = source("", self.opening.skipped) if self.opening is not None else None
        return FreeCalls({start: source(start) for start in self.starts}, opening)


def read_spelled(reader: Reader, out: Collector, name: str, arguments: Parse[None], ends: Markers) -> Parse[None]:
    """A call from its arguments on, which are not written as JSON: `arguments` makes it of them, or raises Broken.

    Broken ones go on, as written, up to one of `ends`.
    """
    reader.recorded()
    out.begin(name)
    is_whole = True
    try:
        yield from arguments
    except Broken as broken:
        is_whole = False
        out.arguments(broken.raw)
        yield from reader.until(ends, out.arguments)
    out.end(is_whole=is_whole)


def skip_end(reader: Reader, end: str) -> Parse[None]:
    """The marker behind a call, which may be missing: whatever stands there instead is recorded."""
    reader.record()
    yield from reader.space()
    if (yield from reader.literal(end)):
        reader.recorded()
