"""Text that comes token by token is the text of all tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from asyncllm.router.detokenizer import ByteDetokenizer, WindowDetokenizer
from asyncllm.router.tokenizer import Tokenizer as RouterTokenizer
from asyncllm.weights.base import TextFacts
from tests.fakes_text import END, byte_text, byte_tokenizer

BYTES = RouterTokenizer(byte_tokenizer(), byte_text())
PIECES = ["▁", "▁▁", "▁Hello", "lo", "é", "▁wor", "ld", "�", "日本", "▁日"]


def sentencepiece(*strips: decoders.Decoder) -> RouterTokenizer:
    """Like Llama 2 (with a Strip) or Gemma (without): 256 byte tokens, then pieces, then a special token."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strips])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return RouterTokenizer(backend, TextFacts())


LLAMA2 = sentencepiece(decoders.Strip(" ", 1, 0))
GEMMA = sentencepiece()


def stream(tokenizer: RouterTokenizer, token_ids: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.finish()]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=40), st.booleans())
def test_any_tokens_of_a_byte_level_tokenizer_join_to_their_decoding(token_ids: list[int], skip: bool) -> None:
    assert "".join(stream(BYTES, token_ids, skip)) == BYTES.decode(token_ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_no_piece_holds_a_broken_character(text: str) -> None:
    pieces = stream(BYTES, list(text.encode()), False)
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)
    assert sum(map(bool, pieces)) == len(text)  # each character comes with its own last byte


@pytest.mark.parametrize("tokenizer", [LLAMA2, GEMMA], ids=["llama2", "gemma"])
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(256, 256 + len(PIECES)) | st.text("é€😀a", min_size=1, max_size=3), max_size=20),
    st.booleans(),
)
def test_pieces_and_whole_characters_in_bytes_join_to_their_decoding(
    tokenizer: RouterTokenizer, parts: list[int | str], skip: bool
) -> None:
    token_ids = [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]
    assert isinstance(tokenizer.detokenizer(skip), ByteDetokenizer)
    assert "".join(stream(tokenizer, token_ids, skip)) == tokenizer.decode(token_ids, skip)


def test_malformed_bytes_cost_only_themselves() -> None:
    assert "".join(stream(GEMMA, [0xC3, 0xA9, 0xFF, 0x61], False)) == "é\ufffda"


def test_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    assert stream(BYTES, [0x61, 0xF0, 0x9F, 0x98], False) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_skipped_or_shown() -> None:
    assert "".join(stream(BYTES, [0x61, END, 0x62], True)) == "ab"
    assert "".join(stream(BYTES, [0x61, END, 0x62], False)) == "a<|end|>b"


def test_ids_beyond_the_vocabulary_show_nothing() -> None:
    assert stream(BYTES, [0x61, 299], False) == ["a", "", ""]


def test_added_token_that_is_no_byte_spelling_is_shown_as_it_stands() -> None:
    backend = byte_tokenizer()
    backend.add_tokens([AddedToken("日 本", normalized=False)])
    tokenizer = RouterTokenizer(backend, byte_text())
    token_ids = [0x61, tokenizer.token_id("日 本") or 0, 0x62]
    assert "".join(stream(tokenizer, token_ids, False)) == tokenizer.decode(token_ids) == "a日 本b"


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece(cleanup=False)], ids=str)
def test_other_decoders_join_to_their_decoding(decoder: decoders.Decoder) -> None:
    pieces = [*PIECES, "##ing", "play"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="▁"))
    backend.decoder = decoder
    tokenizer = RouterTokenizer(backend, TextFacts())
    seed = 20250611
    rng = random.Random(seed)
    for _ in range(300):
        token_ids = [rng.randrange(len(pieces)) for _ in range(rng.randrange(12))]
        assert isinstance(tokenizer.detokenizer(False), WindowDetokenizer)
        assert "".join(stream(tokenizer, token_ids, False)) == tokenizer.decode(token_ids), (seed, token_ids)
