"""Keeps special-looking text inside a conversation from becoming special tokens.

Every place in a client's strings where a special token starts gets a marker behind its first character: a Unicode
noncharacter that occurs nowhere in the conversation. Then the template runs. In what it rendered, an unbroken special
token can only come from the template; the rest is encoded as plain text, without the markers. Any thread.
"""

import re
from collections.abc import Iterator
from typing import Any

from asyncllm.errors import InvalidRequest
from asyncllm.router.tokenizer import Tokenizer

# Code points that Unicode will never assign to characters; templates and tokenizers treat them as letters.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class SpecialText:
    """Marks special-looking text before rendering, and encodes what was rendered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._ids = {token: tokenizer.token_id(token) for token in longest_first}
        anything = "|".join(map(re.escape, longest_first)) or r"(?!)"  # (?!) never matches
        # A lookahead, so that special tokens that overlap are all found.
        self._starts = re.compile(rf"(?=(?:{anything}))(.)", re.DOTALL)
        self._split = re.compile("|".join(f"({self._pattern(token)})" for token in longest_first) or r"(?!)")
        # Two strings that a template puts side by side must not become a special token together.
        self._beginnings = tuple({token[:k] for token in longest_first for k in range(1, len(token))})

    def _pattern(self, token: str) -> str:
        """The token with the white space that it swallows (`AddedToken.lstrip`, `.rstrip`)."""
        added = self._tokenizer.special_tokens[token]
        return (r"\s*" if added.lstrip else "") + re.escape(token) + (r"\s*" if added.rstrip else "")

    def looks_special(self, text: str) -> bool:
        """Whether a special token stands in this text, or begins at its end."""
        return text.endswith(self._beginnings) or self._starts.search(text) is not None

    def mark(self, value: Any, marker: str) -> Any:
        """A copy of JSON-like data, keys included, with special-looking text broken by the marker."""
        if isinstance(value, str):
            marked = self._starts.sub(rf"\g<1>{marker}", value)
            return marked + marker if value.endswith(self._beginnings) else marked
        if isinstance(value, dict):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marker) for item in value]
        return value

    def encode(self, rendered: str, marker: str | None) -> list[int]:
        """Token ids of a rendered conversation; `marker` None where nothing had to be marked."""
        if marker is None:
            return self._tokenizer.encode_prompt(rendered, add_special_tokens=False)
        texts, specials, position = [], [], 0
        for match in self._split.finditer(rendered):
            texts.append(rendered[position : match.start()].replace(marker, ""))
            specials.append(self._id(match[0]))
            position = match.end()
        texts.append(rendered[position:].replace(marker, ""))
        pieces = self._tokenizer.encode_texts(texts)
        token_ids = pieces[0]
        for special, piece in zip(specials, pieces[1:]):
            token_ids.append(special)
            token_ids += piece
        return token_ids

    def _id(self, matched: str) -> int:
        token_id = self._ids[matched] if matched in self._ids else self._ids[matched.strip()]
        assert token_id is not None, f"special token {matched!r} has no id"
        return token_id


def strings_in(value: Any) -> Iterator[str]:
    """All strings in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
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
