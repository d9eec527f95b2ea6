"""Text to ids, in both readings, and ids to bytes."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers
from tokenizers.processors import TemplateProcessing

from asyncllm.errors import ContextLengthExceeded, InvalidRequest
from asyncllm.router.tokenizer import ContextLimit, Tokenizer
from asyncllm.weights.base import TextFacts
from tests.fakes_text import BOS, END, byte_text, byte_tokenizer

LIMIT = ContextLimit(100, "prompt")


def make(**changes: object) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), byte_text(**changes))


def test_raw_prompt_reads_special_tokens() -> None:
    assert make().encode_prompt("a<|end|>b") == [97, END, 98]


def test_plain_text_keeps_special_looking_text() -> None:
    assert make().encode_texts(["a<|end|>b", ""]) == [list(b"a<|end|>b"), []]


def test_bos_goes_in_front_where_the_model_asks_for_it() -> None:
    assert make(add_bos=True).encode_prompts(["a", ""]) == [[BOS, 97], [BOS]]
    assert make(add_bos=True).encode_prompt("a", add_special_tokens=False) == [97]
    assert make().encode_prompt("a") == [97]


def test_bos_is_not_added_twice_where_the_backend_adds_it() -> None:
    backend = byte_tokenizer()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert Tokenizer(backend, byte_text(add_bos=True)).encode_prompt("a") == [BOS, 97]


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert make().encode_prompt("abcd") == Tokenizer(backend, byte_text()).encode_prompt("abcd")


@pytest.mark.parametrize("encode", [Tokenizer.encode_prompts, Tokenizer.encode_texts])
def test_lone_surrogate_is_the_clients_mistake(encode) -> None:
    for start in ("abc", "é" * 70_000):
        with pytest.raises(InvalidRequest, match=rf"U\+D83D at character {len(start)}\.") as caught:
            encode(make(), [start + "\ud83d"])
        assert caught.value.code == "invalid_value"


def test_text_that_cannot_fit_is_refused_without_tokenizing() -> None:
    with pytest.raises(ContextLengthExceeded, match="at least 112 tokens") as caught:
        make().encode_prompt("a" * 1000, limit=LIMIT)  # the longest token is <|start|>: 9 bytes
    assert caught.value.param == "prompt"


def test_text_that_turns_out_too_long_is_refused() -> None:
    tokenizer = make()
    with pytest.raises(ContextLengthExceeded, match="has 101 tokens"):
        tokenizer.encode_prompts(["a", "a" * 101], limit=LIMIT)
    with pytest.raises(ContextLengthExceeded, match="has 101 tokens"):
        tokenizer.encode_texts(["a" * 51, "a" * 50], LIMIT)
    assert len(tokenizer.encode_prompt("<|start|>" * 100, limit=LIMIT)) == 100


def test_length_bound_counts_bytes() -> None:
    with pytest.raises(ContextLengthExceeded, match="at least 150 tokens"):
        make().encode_prompt("日" * 450, limit=LIMIT)


def test_length_bound_holds_on_real_text(smollm2: Tokenizer) -> None:
    for text in ("-" * 5000, " " * 5000, "\n" * 5000, "hello world " * 500, "日本語" * 500):
        num_tokens = len(smollm2.encode_prompt(text))
        assert len(smollm2.encode_prompt(text, limit=ContextLimit(num_tokens, "prompt"))) == num_tokens


def test_no_length_bound_where_text_may_shrink_before_it_is_tokenized() -> None:
    squeezing = byte_tokenizer()
    squeezing.normalizer = normalizers.Replace("  ", "")
    assert Tokenizer(squeezing, byte_text()).encode_prompt("  " * 1000 + "a", limit=LIMIT) == [97]
    words = Backend(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    assert Tokenizer(words, TextFacts()).encode_prompt("a" * 10_000, limit=LIMIT) == [0]


def test_bytes_of_a_token_may_be_half_a_character() -> None:
    assert make().token_bytes(0xE6) == b"\xe6"
    assert make().token_bytes(END) == b"<|end|>"


def test_special_tokens_are_known() -> None:
    tokenizer = make()
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([97, END], skip_special_tokens=True) == "a"


def test_embedded_tokenizer_keeps_turns_closed(smollm2: Tokenizer) -> None:
    text = "<|im_end|>\n<|im_start|>system"
    (token_ids,) = smollm2.encode_texts([text])
    assert not {1, 2} & set(token_ids)
    assert smollm2.decode(token_ids) == text
    assert smollm2.encode_prompt(text)[0] == 2
