"""Keeps special-looking text inside a conversation from becoming special tokens.

Every place in a client's strings where a special token starts gets a marker behind its first character: a Unicode
noncharacter that occurs nowhere in the conversation. Then the template runs. In what it rendered, an unbroken special
token can only come from the template; the rest is encoded as plain text, without the markers. Any thread.
"""

import re
from collections.abc import Iterator
from typing import Any

from asyncllm.errors import InvalidRequest
from asyncllm.router.tokenizer import ContextLimit, Tokenizer

# Code points that Unicode will never assign to characters; templates and tokenizers treat them as letters.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# A regular expression holds the GIL until it returns: 32k characters at a time are half a millisecond, 8 MiB are not.
WINDOW_CHARS = 32 * 1024


class SpecialText:
    """Marks special-looking text before rendering, and encodes what was rendered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.special_tokens
        self._ids = {token: tokenizer.token_id(token) for token in self._special_tokens}
        self._pattern = re.compile(_trie_pattern(list(self._special_tokens)) or r"(?!)")  # (?!) never matches
        self._longest = max(map(len, self._special_tokens), default=0)
        # Two strings that a template puts side by side must not become a special token together.
        self._beginnings = tuple({token[:k] for token in self._special_tokens for k in range(1, len(token))})

    def looks_special(self, text: str) -> bool:
        """Whether a special token stands in this text, or begins at its end."""
        return text.endswith(self._beginnings) or self._next(text, 0) is not None

    def mark(self, value: Any, marker: str) -> Any:
        """A copy of JSON-like data, keys included, with special-looking text broken by the marker."""
        if isinstance(value, str):
            return self._mark_text(value, marker)
        if isinstance(value, dict):
            return {self._mark_text(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marker) for item in value]
        return value

    def encode(self, rendered: str, marker: str | None, limit: ContextLimit | None = None) -> list[int]:
        """Token ids of a rendered conversation; `marker` None where nothing had to be marked.

        Raises ContextLengthExceeded.
        """
        if marker is None:
            return self._tokenizer.encode_prompt(rendered, add_special_tokens=False, limit=limit)
        texts, specials = self._split(rendered)
        pieces = self._tokenizer.encode_texts([text.replace(marker, "") for text in texts], limit)
        token_ids = pieces[0]
        for special, piece in zip(specials, pieces[1:]):
            token_ids.append(special)
            token_ids += piece
        return token_ids

    def _mark_text(self, text: str, marker: str) -> str:
        pieces, position = [], 0
        while (match := self._next(text, position)) is not None:
            behind_first = match.start() + 1  # special tokens may overlap: the next one may start right there
            pieces.append(text[position:behind_first])
            position = behind_first
        pieces.append(text[position:])
        if text.endswith(self._beginnings):
            pieces.append("")
        return marker.join(pieces)

    def _split(self, rendered: str) -> tuple[list[str], list[int]]:
        """The text between special tokens, one more than there are, and their ids."""
        texts, specials, position, swallows = [], [], 0, False
        while (match := self._next(rendered, position)) is not None:
            token = self._special_tokens[match[0]]
            token_id = self._ids[match[0]]
            assert token_id is not None, f"special token {match[0]!r} has no id"
            text = rendered[position : match.start()]
            text = text.lstrip() if swallows else text
            texts.append(text.rstrip() if token.lstrip else text)
            specials.append(token_id)
            position, swallows = match.end(), token.rstrip
        texts.append(rendered[position:].lstrip() if swallows else rendered[position:])
        return texts, specials

    def _next(self, text: str, position: int) -> re.Match[str] | None:
        """The first special token that starts at `position` or later."""
        while position < len(text):
            end = position + WINDOW_CHARS
            match = self._pattern.search(text, position, end + self._longest)
            if match is not None and match.start() < end:  # one that starts later may be cut short by the window
                return match
            position = end
        return None


def _trie_pattern(tokens: list[str]) -> str:
    """A regular expression for the longest of these strings, quick however many begin alike (Llama 3 has 256)."""
    children: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            children.setdefault(token[0], []).append(token[1:])
    if not children:
        return ""
    branches = [re.escape(first) + _trie_pattern(rests) for first, rests in children.items()]
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{pattern})?" if "" in tokens else pattern


def strings_in(value: Any) -> Iterator[str]:
    """All strings in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def unused_noncharacters(strings: list[str], count: int) -> list[str]:
    """So many noncharacters that occur in none of the strings."""
    unused = [c for c in NONCHARACTERS if not any(c in text for text in strings)]
    if len(unused) < count:
        raise InvalidRequest("The messages use up Unicode's noncharacters U+FDD0 to U+FDEF.", param="messages")
    return unused[:count]
