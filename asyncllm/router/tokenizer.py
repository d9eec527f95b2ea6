"""Text to token ids and back, around one `tokenizers.Tokenizer`.

Two encoders of the same vocabulary: one reads special tokens out of the text (raw completions, rendered templates), the
other takes special-looking text as text. Both go through `encode_batch_fast`, which releases the GIL; the router calls
them in its pool. Everything else is cheap and stays on the loop thread.
"""

from collections.abc import Sequence

import msgspec
import tokenizers

from asyncllm.errors import ContextLengthExceeded, InvalidRequest
from asyncllm.router.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from asyncllm.router.token_bytes import ByteScheme, ByteTable, byte_scheme
from asyncllm.weights.base import TextFacts

SLICE_CHARS = 64 * 1024  # encoded at once: 0.2 ms with the GIL held, where 8 MB of them would be 27


class ContextLimit(msgspec.Struct, frozen=True):
    """How many tokens a text may have, and which field of the request it came from."""

    num_tokens: int
    param: str

    def exceeded(self, what: str, index: int = 0) -> ContextLengthExceeded:
        """The error; `what` says how long the text is, `index` which of several it is."""
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.num_tokens} tokens. However, {what}. Please shorten it.",
            param=self.param,
        )


class Tokenizer:
    """The model's tokenizer as the router needs it."""

    def __init__(self, backend: tokenizers.Tokenizer, text: TextFacts) -> None:
        # A tokenizer.json may carry the settings of its training run, which would cut or pad prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self.text = text
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = text.eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: token for token in added.values() if token.special}
        self.added_token_ids = {token.content: token_id for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._scheme = byte_scheme(backend)
        self._tables: dict[frozenset[int], ByteTable] = {}  # by the ids that show nothing
        self._max_token_bytes = self._longest_token()

    # --- text to ids: in the pool ------------------------------------------------------------------------------------

    def encode_prompt(self, text: str, add_special_tokens: bool = True, limit: ContextLimit | None = None) -> list[int]:
        """Ids of one raw prompt; see `encode_prompts`."""
        return self.encode_prompts([text], add_special_tokens, limit)[0]

    def encode_prompts(
        self, texts: list[str], add_special_tokens: bool = True, limit: ContextLimit | None = None
    ) -> list[list[int]]:
        """Ids of raw prompts: special tokens in them are read as such, bos goes in front where the model asks.

        Raises InvalidRequest for text that is not valid Unicode, ContextLengthExceeded for one longer than `limit`.
        """
        for index, text in enumerate(texts):
            self.check_bytes(count_bytes(text), limit, index)
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        if limit is not None:
            _check_counts([len(encoding) for encoding in batch], limit)
        rows: list[list[int]] = [encoding.ids for encoding in batch]
        bos = self.text.bos_token_id
        if add_special_tokens and self.text.add_bos and bos is not None:
            rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
        return rows

    def encode_texts(self, texts: list[str], limit: ContextLimit | None = None) -> list[list[int]]:
        """Ids of plain text: nothing is added, and what looks like a special token stays text.

        Raises as `encode_prompts` does; here the limit is for all texts together.
        """
        for text in texts:
            self.check_bytes(count_bytes(text), limit)
        batch = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        if limit is not None:
            _check_counts([sum(len(encoding) for encoding in batch)], limit)
        return [encoding.ids for encoding in batch]

    def check_bytes(self, num_bytes: int, limit: ContextLimit | None, index: int = 0) -> None:
        """Refuse text that cannot fit whatever its tokens are, before anybody spends time on it.

        A token stands for at most `_max_token_bytes` bytes, so there are at least so many tokens. Raises
        ContextLengthExceeded.
        """
        if limit is None or self._max_token_bytes is None:
            return
        at_least = -(-num_bytes // self._max_token_bytes)
        if at_least > limit.num_tokens:
            raise limit.exceeded(f"your prompt of {num_bytes} bytes has at least {at_least} tokens", index)

    def _longest_token(self) -> int | None:
        """Bytes of the longest token; None where a token may stand for more text than it shows.

        A normalizer may shorten the text (whitespace, accents) and an unknown-word token may swallow any amount.
        """
        if self._scheme is None or self._backend.normalizer is not None:
            return None
        if not isinstance(self._backend.model, tokenizers.models.BPE):
            return None
        # Byte-level strings have one character per byte; in others a character has up to four.
        factor = 1 if self._scheme.byte_level else 4
        longest = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        return max(longest * factor, 1)

    # --- ids to text: on the loop ------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special ones too; empty for an id without a token."""
        if self._scheme is not None:
            return self._table(self._scheme, frozenset())[token_id]
        return self.decode([token_id]).encode()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    @property
    def has_fixed_bytes(self) -> bool:
        """Whether a token stands for the same bytes wherever it is."""
        return self._scheme is not None

    def to_json(self) -> str:
        """The whole tokenizer in the format of `tokenizers`: 20 ms."""
        text: str = self._backend.to_str()
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token's string."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def detokenizer(self, skip_special_tokens: bool, visible: tuple[str, ...] = ()) -> Detokenizer:
        """A fresh incremental detokenizer. `visible`: special tokens that are shown though the others are skipped."""
        if self._scheme is None:
            return WindowDetokenizer(self._backend, skip_special_tokens and not visible)
        skipped = self._special_ids if skip_special_tokens else frozenset()
        if skipped and visible:
            skipped = skipped - {token_id for token in visible if (token_id := self.token_id(token)) is not None}
        return ByteDetokenizer(self._table(self._scheme, skipped), self._scheme.num_stripped_spaces)

    def _table(self, scheme: ByteScheme, skipped: frozenset[int]) -> ByteTable:
        table = self._tables.get(skipped)
        if table is None:
            table = self._tables[skipped] = ByteTable(self._backend, scheme, skipped)
        return table


def _check_counts(counts: list[int], limit: ContextLimit) -> None:
    """Refuse what is too long before its ids become a list: that of a million tokens would hold the GIL for 20 ms."""
    longest = max(counts, default=0)
    if longest > limit.num_tokens:
        raise limit.exceeded(f"your prompt has {longest} tokens", counts.index(longest))


def count_bytes(text: str) -> int:
    """Bytes of the text in UTF-8.

    Raises InvalidRequest for a lone surrogate: it has no UTF-8, and the tokenizer would fail with a TypeError.
    """
    if text.isascii():
        return len(text)
    num_bytes = 0
    for start in range(0, len(text), SLICE_CHARS):
        try:
            num_bytes += len(text[start : start + SLICE_CHARS].encode())
        except UnicodeEncodeError as error:
            place = start + error.start
            raise InvalidRequest(
                f"The text is not valid Unicode: a lone surrogate U+{ord(text[place]):04X} at character {place}.",
            ) from None
    return num_bytes
