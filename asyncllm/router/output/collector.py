"""Where a format's parser puts what it finds: numbers the calls, and keeps whitespace around calls out of the content.

Knows no format. Loop thread only.
"""

from collections.abc import Callable, Sequence
from typing import Any

from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.output.reader import SPACE
from asyncllm.router.output.tools import Tool


class Collector:
    """The parts of one choice's text."""

    __slots__ = (
        "_gap",
        "_has_content",
        "_is_behind_call",
        "_max_calls",
        "_new_call_id",
        "_num_ended",
        "_parts",
        "_space",
        "_tools",
        "has_thought",
        "is_broken",
        "is_full",
        "is_thinking",
        "num_calls",
    )  # fmt: skip

    def __init__(self, tools: Sequence[Tool], max_calls: int | None, new_call_id: Callable[[], str]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._max_calls = max_calls
        self._new_call_id = new_call_id
        self._parts: list[Part] = []
        self._space = ""  # at the end of the content: maybe in front of a call
        self._gap = ""  # whitespace in front of a call that has content in front of it
        self._has_content = False
        self._is_behind_call = False
        self.is_full = False  # all calls that are wanted are complete: what follows is dropped
        self.num_calls = 0
        self.is_thinking = False
        self.has_thought = False
        self._num_ended = 0
        self.is_broken = False

    def take(self) -> list[Part]:
        """The parts since the last call."""
        parts, self._parts = self._parts, []
        return parts

    def knows(self, name: str) -> bool:
        """Whether a function of this name may be called."""
        return name in self._tools

    def parameters(self, name: str) -> dict[str, Any]:
        """The schema of a function's arguments."""
        return self._tools[name].parameters or {}

    def begin_reasoning(self) -> None:
        """The model thinks from here on."""
        self.is_thinking = True

    def end_reasoning(self) -> None:
        """It has, and said so."""
        self.is_thinking, self.has_thought = False, True

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks."""
        if text:
            self._parts.append(Part(PartKind.REASONING, text))

    def plain(self, text: str) -> None:  # hot: once per token where no tools are given
        """Content where there are no calls."""
        if text:
            self._parts.append(Part(PartKind.CONTENT, text))

    def content(self, text: str) -> None:  # hot: once per token
        """Content that may stand beside calls. Whitespace at its end waits for what follows."""
        if not text or self.is_full:
            return
        text = self._space + text
        kept = text.rstrip(SPACE)
        self._space = text[len(kept) :]
        if not kept:
            return
        if self._is_behind_call:
            bare = kept.lstrip(SPACE)
            # Two texts with calls between them stay apart as they were.
            gap = (self._gap or kept[: len(kept) - len(bare)]) if self._has_content else ""
            kept = gap + bare
            self._gap, self._is_behind_call = "", False
        self._has_content = True
        self._parts.append(Part(PartKind.CONTENT, kept))

    def begin(self, name: str) -> None:
        """A call of this function."""
        if self.is_full:
            return
        if self._has_content:
            self._gap = self._gap or self._space
        self._space, self._is_behind_call = "", True
        self._parts.append(Part(PartKind.CALL_BEGIN, "", self.num_calls, self._new_call_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """A piece of the arguments of the call that began last."""
        if text and not self.is_full:
            self._parts.append(Part(PartKind.CALL_ARGUMENTS, text, self.num_calls - 1))

    def end(self, *, is_whole: bool) -> None:
        """The call is over; `is_whole`: its arguments are a JSON object."""
        if self.is_full:
            return
        self._num_ended += 1
        self.is_full = self._num_ended == self._max_calls
        self.is_broken = self.is_broken or not is_whole

    def finish(self) -> None:
        """The text is over: whitespace at the end of plain content was content."""
        if self._space and not self._is_behind_call and not self.is_full:
            self._parts.append(Part(PartKind.CONTENT, self._space))
        self._space = ""
