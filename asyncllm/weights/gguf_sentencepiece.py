"""SentencePiece vocabularies in GGUF metadata (`tokenizer.ggml.model = llama`): Llama 2, Mistral, Gemma, Phi 3.

Such a file has a score for each token instead of merges. SentencePiece joins whichever neighbours make the token of the
highest score, and that is BPE whose merges are ranked by the score of what they make. Any thread.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncllm.errors import StartupError, show

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
NORMAL = 1  # in tokenizer.ggml.token_type; others are never made by joining


def build_sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> "Tokenizer":
    """The tokenizer without its special tokens. Raises StartupError for scores that do not fit the tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise StartupError(f"{path}: GGUF key tokenizer.ggml.scores does not match {len(tokens)} tokens")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise StartupError(f"{path}: tokenizer.ggml.unknown_token_id = {show(unknown)} is no token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=ranked_merges(tokens, scores, types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prefix: list[Any] = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def ranked_merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the highest score first."""
    joinable = {token for token, kind in zip(tokens, types) if kind == NORMAL}
    ranked = []
    for token, score in zip(tokens, scores):
        if token in joinable:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in joinable and right in joinable:
                    ranked.append((-score, left, right))
    # Stable among equals: scores order tokens, and two ways to make the same token rank alike.
    ranked.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in ranked]
