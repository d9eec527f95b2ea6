"""Token ids to text, one token at a time: never half a character, never a lost one.

Joined, the pieces are `tokenizer.decode` of all tokens. One exception, on purpose: where byte-fallback tokens spell
malformed UTF-8, `decode` replaces the whole run of bytes, which may be long and already shown; here what was shown
stays, and with a table only the malformed bytes become U+FFFD. Loop thread only; one detokenizer per choice.
"""

import codecs
from typing import Protocol

import tokenizers

from asyncllm.router.token_bytes import ByteTable

MAX_PENDING = 4  # tokens: a character has at most four bytes, and a token at least one


class Detokenizer(Protocol):
    """Makes text of one sequence's tokens."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What is left: an unfinished character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes: a table and an incremental UTF-8 decoder."""

    __slots__ = ("_num_stripped_spaces", "_pending", "_table")

    def __init__(self, table: ByteTable, num_stripped_spaces: int) -> None:
        self._table = table
        self._num_stripped_spaces = num_stripped_spaces
        self._pending = b""  # the beginning of a character, at most 3 bytes

    def push(self, token_id: int) -> str:  # hot
        """The text that this token completes; may be empty."""
        if not self._pending and not self._num_stripped_spaces:
            text = self._table.texts.get(token_id)
            if text is not None:
                return text
        raw = self._table[token_id]
        if self._pending:
            raw = self._pending + raw
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._pending = raw[used:]
        return self._strip(text) if self._num_stripped_spaces and text else text

    def finish(self) -> str:
        """What is left: an unfinished character becomes U+FFFD."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text

    def _strip(self, text: str) -> str:
        """Drop leading spaces of the whole text, as many as the decoder would."""
        kept = text.lstrip(" ")
        num_dropped = min(len(text) - len(kept), self._num_stripped_spaces)
        self._num_stripped_spaces = 0 if kept else self._num_stripped_spaces - num_dropped
        return text[num_dropped:]


class WindowDetokenizer:
    """For every other decoder: what the last tokens are with and without the new one; the difference is its text."""

    __slots__ = ("_backend", "_context", "_context_text", "_pending", "_skip_special_tokens")

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []  # tokens whose text was shown last: the decoder may look at them
        self._context_text = ""
        self._pending: list[int] = []  # tokens behind them, which may end within a character

    def push(self, token_id: int) -> str:  # hot
        """The text that this token completes; may be empty."""
        pending = self._pending
        pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            if self._is_skipped(token_id):
                pending.pop()
                return ""
            if not text:  # a leading space, which the decoder drops: those behind it are not leading any more
                self._context, self._pending = self._context + pending, []
                return ""
            # A model that writes U+FFFD on end must not be held back for ever, at a cost that grows with each token.
            if len(pending) < MAX_PENDING:
                return ""
        self._context, self._pending = pending, []
        self._context_text = self._decode(pending)
        return text

    def finish(self) -> str:
        """What is left: an unfinished character becomes U+FFFD."""
        text = self._new_text()
        self._pending = []
        return text

    def _new_text(self) -> str:
        """What the pending tokens add to the text that was shown."""
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # A malformed byte made its whole run malformed, also what was shown: the new part has to do without it.
        return self._decode(self._pending)

    def _is_skipped(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out wherever it stands: a special one, or an id without a token."""
        if self._backend.id_to_token(token_id) is None:
            return True
        twice = [token_id, token_id]  # decoders take a space from the first token of a text
        return self._skip_special_tokens and self._decode(twice) != self._backend.decode(twice, False)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text
