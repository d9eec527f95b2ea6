"""Log-probabilities in OpenAI's two shapes. Tokens become text here and nowhere else."""

from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.replies import ChatLogprob, CompletionLogprobs, TopLogprob, finite
from asyncllm.types import TokenLogprobs


class TokenText:
    """Single tokens as bytes and as text; half a character shows as U+FFFD, its bytes tell the rest."""

    __slots__ = ("_tokenizer",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes(self, token_id: int) -> bytes:
        """The token's bytes."""
        return self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """The token as text."""
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(entries: list[TokenLogprobs], token_text: TokenText) -> list[ChatLogprob]:
    """One entry per generated token, its alternatives most probable first."""
    rows = []
    for entry in entries:
        alternatives = [
            TopLogprob(token_text.text(token), finite(logprob), list(token_text.bytes(token)))
            for token, logprob in zip(entry.top_token_ids, entry.top_logprobs)
        ]
        raw = token_text.bytes(entry.token_id)
        rows.append(ChatLogprob(raw.decode("utf-8", "replace"), finite(entry.logprob), list(raw), alternatives))
    return rows


def append_completion_logprobs(
    into: CompletionLogprobs, entries: list[TokenLogprobs], token_text: TokenText, offset: int
) -> int:
    """Add columns for these tokens, the first standing at character `offset`; returns the offset behind the last."""
    for entry in entries:
        text = token_text.text(entry.token_id)
        top: dict[str, float] = {}
        # The sampled token is always among them. Halves of characters look alike: the most probable one counts.
        for token, logprob in zip([*entry.top_token_ids, entry.token_id], [*entry.top_logprobs, entry.logprob]):
            top.setdefault(token_text.text(token), finite(logprob))
        offset = append_token(into, text, finite(entry.logprob), top, offset)
    return offset


def append_token(
    into: CompletionLogprobs, text: str, logprob: float | None, top: dict[str, float] | None, offset: int
) -> int:
    """Add one column; `logprob` None for a prompt's first token, which nothing predicts."""
    into.tokens.append(text)
    into.token_logprobs.append(logprob)
    if into.top_logprobs is not None:
        into.top_logprobs.append(top)
    into.text_offset.append(offset)
    return offset + len(text)
