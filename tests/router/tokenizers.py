"""Real tokenizers of every family the server meets, each with the text that its tokens must have.

The reference texts come from `tokenizers` where its decoding is defined, and from the bytes of the token strings where
it is not; none of them uses the router's tables or streams.
"""

import codecs
import re
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from asyncllm.router.tokenizer import Tokenizer as RouterTokenizer
from asyncllm.weights.base import TextFacts

END = "</s>"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# Enough words for merges of all lengths; emoji and most of Unicode are left to the byte tokens.
WORDS = [
    "▁the",
    "▁Hello",
    "▁world",
    "▁don't",
    "▁日本",
    "▁été",
    "ing",
    "ers",
    "語",
    "שלום",
    "مر",
    "e\u0301",
    "�",
    "▁▁",
    ".",
]


class Family:
    """One tokenizer and what its tokens mean."""

    def __init__(self, name: str, backend: Tokenizer, end: str, byte_tokens: Sequence[str] = ()) -> None:
        """`byte_tokens`: the spelling of each of the 256 bytes; a vocabulary may lack some that UTF-8 never has."""
        end_id = backend.token_to_id(end)
        facts = TextFacts(chat_template="", eos_token=end, eos_token_ids=(end_id,), special_tokens=(end,))
        self.name = name
        self.tokenizer = RouterTokenizer(backend, facts)
        self.end_id = end_id
        ids = {byte: backend.token_to_id(token) for byte, token in enumerate(byte_tokens)}
        self.byte_ids = {byte: token_id for byte, token_id in ids.items() if token_id is not None}
        self._backend = backend

    def __repr__(self) -> str:
        return self.name

    def whole(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """The text of the whole sequence; None where its tokenizer leaves it open."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def complete(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """The text of the characters that are complete in a sequence which goes on; None where that is not defined."""
        return None

    def _tokens(self, token_ids: list[int], skip_special_tokens: bool) -> list[str]:
        special = self.tokenizer.special_tokens if skip_special_tokens else ()
        tokens = [self._backend.id_to_token(token_id) for token_id in token_ids]
        return [token for token in tokens if token is not None and token not in special]


class ByteLevelFamily(Family):
    """GPT-2's scheme: the decoding is the lossy UTF-8 of all bytes."""

    def complete(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """Decoded in one piece; what the end adds to it is its unfinished character."""
        raw = b"".join(map(self._bytes, self._tokens(token_ids, skip_special_tokens)))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)

    def _bytes(self, token: str) -> bytes:
        alphabet = _gpt2_alphabet()
        return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()


class SentencePieceFamily(Family):
    """Byte fallback: where bytes are malformed `decode` gives up their whole run, a stream only the malformed ones."""

    def __init__(self, name: str, backend: Tokenizer, strips: bool) -> None:
        super().__init__(name, backend, END, BYTE_TOKENS)
        self._strips = strips

    def whole(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """The lossy UTF-8 of all bytes, which is the decoding where nothing is lost."""
        raw = self._raw(token_ids, skip_special_tokens)
        text = self._stripped(raw.decode("utf-8", "replace"))
        if "\ufffd" not in text:
            assert text == self.tokenizer.decode(token_ids, skip_special_tokens), "the reference itself is wrong"
        return text

    def complete(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """As `whole`, without an unfinished character."""
        raw = self._raw(token_ids, skip_special_tokens)
        return self._stripped(codecs.getincrementaldecoder("utf-8")("replace").decode(raw))

    def _raw(self, token_ids: list[int], skip_special_tokens: bool) -> bytes:
        tokens = self._tokens(token_ids, skip_special_tokens)
        return b"".join(
            bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()
            for token in tokens
        )

    def _stripped(self, text: str) -> str:
        return text.removeprefix(" ") if self._strips else text


class FallbackFamily(Family):
    """Byte fallback behind a decoder that looks at neighbours: only well-formed text has one right decoding."""

    def whole(self, token_ids: list[int], skip_special_tokens: bool) -> str | None:
        """The decoding, unless bytes in it are malformed."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens)
        return None if "\ufffd" in text else text


def _gpt2_alphabet() -> dict[str, int]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_level(backend: Tokenizer, end: str) -> Family:
    """A byte-level BPE that exists, such as the embedded model's."""
    spelling = {byte: character for character, byte in _gpt2_alphabet().items()}
    return ByteLevelFamily("byte_level", backend, end, [spelling[byte] for byte in range(256)])


def llama2() -> Family:
    """SentencePiece BPE with byte fallback, a space in front of the text, and its decoder that takes it away again."""
    backend = _sentencepiece_bpe()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return SentencePieceFamily("llama2", backend, strips=True)


def gemma() -> Family:
    """The same without the space."""
    backend = _sentencepiece_bpe()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return SentencePieceFamily("gemma", backend, strips=False)


def unigram() -> Family:
    """T5's kind: pieces with scores, whatever is no piece is unknown."""
    vocab = [("<unk>", 0.0), *((piece, -float(len(_pieces()) - i)) for i, piece in enumerate(_pieces()))]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Family("unigram", _with_end(backend), END)


def unigram_bytes() -> Family:
    """The same with byte tokens instead of the unknown."""
    vocab = [("<unk>", 0.0), *((token, -99.0) for token in BYTE_TOKENS), *((piece, -1.0) for piece in _pieces())]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return FallbackFamily("unigram_bytes", _with_end(backend), END, BYTE_TOKENS)


def wordpiece() -> Family:
    """BERT's kind, with a decoder that tidies up the spaces before punctuation."""
    words = ["[UNK]", "hello", "world", "do", "n't", "play", ".", ",", "'", "s", "日", "語", "é", "�"]
    vocab = words + [f"##{part}" for part in ("ing", "ed", "s", ".", "本", "e\u0301")]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return Family("wordpiece", _with_end(backend), END)


def _pieces() -> list[str]:
    """Every beginning of every word, so that merges can build it from the left, and every character."""
    beginnings = [word[:k] for word in WORDS for k in range(1, len(word) + 1)]
    return list(dict.fromkeys([*(character for word in WORDS for character in word), *beginnings]))


def _sentencepiece_bpe() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTE_TOKENS, *_pieces()])}
    merges = dict.fromkeys((word[:k], word[k]) for word in WORDS for k in range(1, len(word)))
    backend = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _with_end(backend)


def _with_end(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return backend
