"""Builds a tokenizer, and the facts about its tokens, from GGUF metadata.

Byte-level BPE here (`tokenizer.ggml.model = gpt2`), SentencePiece in `gguf_sentencepiece.py`. How text is cut before
merging is not in the file: it is named by `tokenizer.ggml.pre`, and this module knows what each name stands for. Any
thread.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.weights import chat_templates
from asyncllm.weights.base import TextFacts
from asyncllm.weights.gguf_sentencepiece import SPACE, build_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Values of tokenizer.ggml.token_type that are not ordinary vocabulary.
CONTROL, USER_DEFINED = 3, 4
SENTENCEPIECE = "llama"  # of tokenizer.ggml.model

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizer(msgspec.Struct, frozen=True):
    """What one name of `tokenizer.ggml.pre` means."""

    split: str | None = None  # regular expression; None = GPT-2's own
    individual_digits: bool = False  # every digit stands alone
    ignore_merges: bool = False  # a piece that is a token as a whole is not merged up
    nfc: bool = False  # text is composed (Unicode NFC) first
    add_bos: bool = False  # where the file does not say


GPT2 = PreTokenizer()
PRE_TOKENIZERS = {
    "default": GPT2,  # also where the key is absent, in files older than it
    "gpt-2": GPT2,
    "smollm": PreTokenizer(individual_digits=True),
    "llama-bpe": PreTokenizer(split=LLAMA3_SPLIT, ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer(split=QWEN2_SPLIT, nfc=True),
}


def text_facts(path: Path, metadata: dict[str, Any]) -> TextFacts:
    """Read chat template, bos, eos and control tokens. Raises StartupError for an unknown tokenizer."""
    pre = _pre_tokenizer(path, metadata)
    tokens = _tokens(path, metadata)
    types = _token_types(path, metadata, len(tokens))
    bos = _token_id(path, metadata, "bos", len(tokens))
    # eot and eom end a turn as well, where the vocabulary tells them from eos.
    ends = [_token_id(path, metadata, kind, len(tokens)) for kind in ("eos", "eot", "eom")]
    eos = ends[0]
    templates = chat_templates.of_gguf(path, metadata)
    return TextFacts(
        chat_template=templates.default,
        named_templates=templates.others,
        template_origin=templates.origin,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        add_bos=bos is not None and bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)),
        special_tokens=tuple(token for token, kind in zip(tokens, types) if kind == CONTROL),
    )


def build_tokenizer(path: Path, metadata: dict[str, Any]) -> "Tokenizer":
    """A tokenizer whose control tokens are special and whose ids are the file's."""
    from tokenizers import AddedToken, processors

    pre = _pre_tokenizer(path, metadata)
    tokens = _tokens(path, metadata)
    types = _token_types(path, metadata, len(tokens))
    if metadata.get("tokenizer.ggml.model") == SENTENCEPIECE:
        tokenizer = build_sentencepiece(path, metadata, tokens, types)
    else:
        tokenizer = _build_byte_level(path, metadata, tokens, pre)
    named = [(token, kind == CONTROL) for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
    # A run of spaces that is a token by decree is there only once spaces have become what the vocabulary writes.
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=not special and SPACE in token) for token, special in named]
    )
    facts = text_facts(path, metadata)
    if facts.add_bos:
        bos = str(facts.bos_token)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, facts.bos_token_id)]
        )
    return tokenizer


def _build_byte_level(path: Path, metadata: dict[str, Any], tokens: list[str], pre: PreTokenizer) -> "Tokenizer":
    """The tokenizer without its special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise StartupError(f"{path}: GGUF key tokenizer.ggml.merges is missing")
    # No part of a merge contains a space: byte-level BPE writes it as Ġ. A part may be empty in a damaged file only.
    pairs = [(left, right) for left, _, right in (str(merge).partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the Rust side raises plain Exception: a merge names a token that is not there
        raise StartupError(f"{path}: the tokenizer cannot be built: {show(str(error))}") from None
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitter(pre: PreTokenizer) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    if pre.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    return pre_tokenizers.Sequence(steps)


def _pre_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model == SENTENCEPIECE:
        return PreTokenizer(add_bos=True)  # text is not cut
    if model != "gpt2":
        raise StartupError(
            f"{path}: tokenizer model {show(str(model))} is not served; served: gpt2 (byte-level BPE), "
            f"{SENTENCEPIECE} (SentencePiece BPE)"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        served = ", ".join(PRE_TOKENIZERS)
        raise StartupError(f"{path}: pre-tokenizer {show(str(name))} is not served; served: {served}")
    return PRE_TOKENIZERS[name]


def _tokens(path: Path, metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise StartupError(f"{path}: GGUF key tokenizer.ggml.tokens is missing")
    return tokens


def _token_types(path: Path, metadata: dict[str, Any], num_tokens: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type", [1] * num_tokens)
    if not isinstance(types, list) or len(types) != num_tokens:
        raise StartupError(f"{path}: GGUF key tokenizer.ggml.token_type does not match {num_tokens} tokens")
    return types


def _token_id(path: Path, metadata: dict[str, Any], kind: str, num_tokens: int) -> int | None:
    """The id of bos, eos, …, or None where the file names none."""
    token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
        raise StartupError(f"{path}: tokenizer.ggml.{kind}_token_id = {show(token_id)} is no token")
    return token_id
