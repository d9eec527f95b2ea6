"""Which bytes a token stands for, for the tokenizers where every token is a fixed run of bytes.

That holds for byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and for SentencePiece BPE with byte fallback (Llama 2,
Mistral, Gemma): text is then the concatenation of bytes, and decoding needs a table and an incremental UTF-8 decoder.
Other decoders (WordPiece, Metaspace, CTC) look at neighbours and have no table. Loop thread only.
"""

import contextlib
import json
import re
from typing import Any

import msgspec
import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class ByteScheme(msgspec.Struct, frozen=True):
    """How token strings spell bytes."""

    byte_level: bool  # GPT-2's alphabet; otherwise plain text with `replaced` standing for `replacement`, and <0xNN>
    replaced: str = ""
    replacement: str = ""
    num_stripped_spaces: int = 0  # leading spaces of the whole text that the decoder drops

    def bytes_of(self, token: str) -> bytes:
        """The bytes of one token string."""
        if self.byte_level:
            try:
                return bytes([_ALPHABET[character] for character in token])
            except KeyError:  # an added token with a space or a foreign letter: its text, as it stands
                return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return (token.replace(self.replaced, self.replacement) if self.replaced else token).encode()


def byte_scheme(backend: tokenizers.Tokenizer) -> ByteScheme | None:
    """The scheme of this tokenizer's decoder, or None where tokens have no bytes of their own."""
    if backend.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return ByteScheme(byte_level=True)
    if decoder["type"] != "Sequence":
        return None
    parts = decoder["decoders"]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return ByteScheme(byte_level=True)
    if [part["type"] for part in parts[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    replaced = parts[0]["pattern"].get("String")
    strips = parts[3:]
    if replaced is None or any(s["type"] != "Strip" or s["content"] != " " or s["stop"] for s in strips):
        return None
    return ByteScheme(
        byte_level=False,
        replaced=replaced,
        replacement=parts[0]["content"],
        num_stripped_spaces=sum(s["start"] for s in strips),
    )


class ByteTable(dict[int, bytes]):
    """Token id -> bytes, filled when a token is first seen: a table of 150,000 tokens would delay the start."""

    def __init__(self, backend: tokenizers.Tokenizer, scheme: ByteScheme, skipped: frozenset[int]) -> None:
        """`skipped`: ids that show nothing."""
        super().__init__()
        self._backend = backend
        self._scheme = scheme
        self._skipped = skipped
        self.texts: dict[int, str] = {}  # of tokens that are whole characters: nearly all, and these need no decoding

    def __missing__(self, token_id: int) -> bytes:
        # The model's vocabulary may be padded beyond the tokenizer's: such ids have no text.
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        self[token_id] = raw = b"" if token is None else self._scheme.bytes_of(token)
        with contextlib.suppress(UnicodeDecodeError):
            self.texts[token_id] = raw.decode()
        return raw
