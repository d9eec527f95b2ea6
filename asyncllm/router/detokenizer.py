"""Token ids to text, one token at a time: never half a character, never a lost one.

Joined, the pieces are `tokenizer.decode` of all tokens. One exception, on purpose: where byte-fallback tokens spell
malformed UTF-8, `decode` replaces the whole run of bytes, which may be long and already shown; here only the malformed
bytes become U+FFFD. Loop thread only; one detokenizer per choice.
"""

import codecs
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

from asyncllm.router.token_bytes import ByteTable


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
    """For every other decoder: the library's stream, and at the end whatever the stream still held."""

    __slots__ = ("_backend", "_num_shown", "_skip_special_tokens", "_stream", "_token_ids")

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._num_shown = 0  # characters

    def push(self, token_id: int) -> str:  # hot
        """The text that this token completes; may be empty."""
        self._token_ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        self._num_shown += len(text)
        return text

    def finish(self) -> str:
        """What is left: the stream keeps text that ends in U+FFFD for itself, so it is decoded once more."""
        whole: str = self._backend.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        return whole[self._num_shown :]
