"""Vocabularies with scores, against SentencePiece itself: trained here, written as GGUF metadata, read by us."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from asyncllm.router.tokenizer import Tokenizer as RouterTokenizer
from asyncllm.weights.gguf_tokenizer import build_tokenizer, text_facts

ROOT = Path(__file__).parents[2]
# Runs of white space are tokens by decree in Gemma, whose vocabulary puts no space in front.
USER_DEFINED = ["<tool>", "\n\n", "▁▁", "▁▁▁"]
TEXTS = [
    "Hello, world! It's 2024; we'll pay $1,234.56.",
    "  two spaces before,   three between and one behind ",
    "naïve façade — “quotes” … 日本語 🤖👩‍👩‍👧",
    "\ttabs\nand\r\n\n\nlines",
    "aaaaaaaaaa bbbbbb abababab",
    " ",
    "",
]


@pytest.fixture(scope="module", params=[True, False], ids=["with a space in front", "without"])
def theirs(request: pytest.FixtureRequest) -> Any:
    """Trained on this project's documents, bytes for what it has never seen."""
    model = io.BytesIO()
    sentences = (line for file in sorted((ROOT / "docs").glob("*.md")) for line in file.read_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in sentences if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=USER_DEFINED[: 1 if request.param else None],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    processor.has_prefix = request.param
    return processor


def metadata(theirs: Any, **changes: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes it."""
    kinds = []
    for index in range(theirs.get_piece_size()):
        if theirs.is_unknown(index):
            kinds.append(2)
        elif theirs.is_control(index):
            kinds.append(3)
        elif theirs.is_byte(index):
            kinds.append(6)
        else:
            kinds.append(4 if theirs.id_to_piece(index) in USER_DEFINED else 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(index) for index in range(theirs.get_piece_size())],
        "tokenizer.ggml.scores": [theirs.get_score(index) for index in range(theirs.get_piece_size())],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_space_prefix": theirs.has_prefix,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def built(theirs: Any, **changes: Any) -> Tokenizer:
    return build_tokenizer(Path("m.gguf"), metadata(theirs, **changes))


def test_text_is_cut_as_sentencepiece_cuts_it(theirs: Any) -> None:
    ours = built(theirs, add_bos_token=False)
    rng = random.Random(8)
    words = (ROOT / "docs" / "architecture.md").read_text().split(" ")
    texts = TEXTS + [" ".join(rng.choices(words, k=20)) for _ in range(200)]
    texts += ["".join(rng.choices("abcdefgh  \n.,'é日🤖", k=40)) for _ in range(200)]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text), repr(text)


def test_decoding_gives_the_text_back_whole_and_token_by_token(theirs: Any) -> None:
    backend = built(theirs)
    facts = text_facts(Path("m.gguf"), metadata(theirs))
    router = RouterTokenizer(backend, facts)
    for text in TEXTS:
        ids = backend.encode(text).ids
        assert ids[0] == theirs.bos_id()
        assert router.decode(ids[1:]) == text


def test_special_tokens_are_those_of_the_file_and_a_bos_goes_in_front(theirs: Any) -> None:
    tokens = built(theirs).encode("<s>a<tool></s>").tokens
    assert [token for token in tokens if token not in ("▁", "▁a", "a")] == ["<s>", "<s>", "<tool>", "</s>"]
    facts = text_facts(Path("m.gguf"), metadata(theirs))
    assert facts.add_bos and facts.special_tokens == ("<s>", "</s>") and facts.eos_token_ids == (theirs.eos_id(),)
    assert built(theirs, add_bos_token=False).encode("").ids == []
