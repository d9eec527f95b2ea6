"""Calls of strict functions in free text: what begins as a call has to be one, everything else is free.

Free text is watched, not forced: there is no mask to compute, and sampling stays on its fast path. A grammar begins
behind the start of a call, and ends with the call.
"""

import re
from collections.abc import Mapping

from asyncllm.router.constraint import Grammar, all_but
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.types import Constraint


class CallStarts:
    """How a model's tokens lead into calls: tables of all tokens. Made in the pool, 0.4 s for 150,000; any thread."""

    def __init__(self, tokenizer: Tokenizer, tool_format: ToolFormat, vocab_size: int) -> None:
        starts = [start.encode() for start in tool_format.starts]
        self.opening = tool_format.opening
        self._tokenizer = tokenizer
        self._pattern = re.compile(b"|".join(map(re.escape, starts)))
        self._beginnings = frozenset(start[:n] for start in starts for n in range(1, len(start)))
        self._longest = max(map(len, self._beginnings))
        self._first_bytes = frozenset(start[0] for start in starts)
        # Most special tokens are left out of the text, so that what stands around them is one marker.
        self._silent_ids = frozenset(
            token_id
            for token, token_id in ModelMarkers.of(tokenizer).special_ids.items()
            if token not in tool_format.starts
        )
        texts = {token_id: text for token_id in range(vocab_size) if (text := self.text_of(token_id))}
        last_bytes = re.escape(bytes({start[-1] for start in starts}))
        may_go_on = re.compile(b"[%b]." % last_bytes, re.DOTALL)
        far = {token_id: text for token_id, text in texts.items() if may_go_on.search(text)}
        too_far = {held: self._too_far(held, far) for held in (b"", *self._beginnings)}
        # What may follow `held` in free text: a token that leads into a call leads no further. None: any token.
        self.masks = {held: all_but(ids, vocab_size) if ids else None for held, ids in too_far.items()}
        opens = {token_id for token_id, text in texts.items() if self.may_open(text)}
        # What may stand where a call may open, and does not open one.
        self.closed = all_but(opens | too_far[b""], vocab_size)

    def text_of(self, token_id: int) -> bytes:
        """What a token adds to the text that calls are found in."""
        return b"" if token_id in self._silent_ids else self._tokenizer.token_bytes(token_id)

    def find(self, text: bytes) -> str | None:
        """The start of a call in the text."""
        found = self._pattern.search(text)
        return None if found is None else found[0].decode()

    def held(self, text: bytes) -> bytes:
        """The longest end of the text that a start may begin with."""
        tail = text[-self._longest :]
        if self._first_bytes.isdisjoint(tail):
            return b""
        return next((tail[i:] for i in range(len(tail)) if tail[i:] in self._beginnings), b"")

    def may_open(self, text: bytes) -> bool:
        """Whether a text that stands where a call may open does so, or leaves that to what follows."""
        if self.opening is None:
            return False
        rest = self.behind_skipped(text)
        return not rest or rest.startswith(self.opening.character.encode())

    def behind_skipped(self, text: bytes) -> bytes:
        """The text without what may stand in front of an opening."""
        return text if self.opening is None else text.lstrip(self.opening.skipped.encode())

    def _too_far(self, held: bytes, far: Mapping[int, bytes]) -> set[int]:
        """Tokens that behind `held` lead into a call, and say how it goes on."""
        found = {token_id: self._pattern.search(held + text) for token_id, text in far.items()}
        return {i for i, match in found.items() if match is not None and match.end() < len(match.string)}


class StrictCalls:
    """One sequence whose calls have to obey their grammars; see `Constraint`. Engine thread."""

    __slots__ = ("_call", "_calls", "_held", "_lead", "_opening", "_starts")

    is_done = False  # behind a call, free text goes on

    def __init__(self, starts: CallStarts, calls: Mapping[str, Grammar], opening: Grammar | None) -> None:
        """`calls`: start -> what follows it. `opening`: a call from its opening on; None where the format has none."""
        self._starts = starts
        self._calls = calls
        self._opening = opening
        self._call: Constraint | None = None  # what is being written
        self._lead = None if opening is None else opening.constraint()  # as long as a call may open
        self._held = b""  # end of the text that a start may begin with

    def mask(self) -> bytes | None:
        """See `Constraint`."""
        if self._call is not None:
            return self._call.mask()
        if self._lead is None:
            return self._starts.masks[self._held]
        return either(self._starts.closed, self._lead.mask() or b"")

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        if self._call is not None:
            self._call.accept(token_id)
            if self._call.is_done:
                self._end_call()
            return
        starts = self._starts
        text = starts.text_of(token_id)
        if not text:
            return
        if self._lead is not None and starts.may_open(text):
            self._lead.accept(token_id)
            if starts.behind_skipped(text):
                self._call, self._lead = self._lead, None
            return
        self._lead = None
        text = self._held + text
        start = starts.find(text)
        if start is None:
            self._held = starts.held(text)
        else:
            self._call, self._held = self._calls[start].constraint(), b""

    def _end_call(self) -> None:
        self._call = None
        if self._opening is not None and self._starts.opening is not None and self._starts.opening.is_repeated:
            self._lead = self._opening.constraint()


def either(one: bytes, other: bytes) -> bytes:
    """The mask that allows what one of both allows."""
    allowed = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return allowed.to_bytes(max(len(one), len(other)), "little")
