"""What a tool format has to know of the model's tokenizer, and ids of calls. Any thread."""

import secrets
from collections.abc import Mapping

import msgspec

from asyncllm.router.tokenizer import Tokenizer


class ModelMarkers(msgspec.Struct, frozen=True):
    """Which strings are tokens of their own."""

    special_ids: Mapping[str, int] = {}  # left out of shown text
    token_ids: Mapping[str, int] = {}  # no text in a grammar: llguidance sees a token there, and only that

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ModelMarkers":
        """Those of this model."""
        ids = tokenizer.added_token_ids
        special_ids = {token: token_id for token, token_id in ids.items() if token in tokenizer.special_tokens}
        # Qwen's <tool_call> is no special token. To llguidance it is: every added token in angle brackets.
        tagged_ids = {token: token_id for token, token_id in ids.items() if token[:1] + token[-1:] == "<>"}
        return cls(special_ids, special_ids | tagged_ids)

    def specials(self, markers: tuple[str, ...]) -> tuple[str, ...]:
        """The special ones among these."""
        return tuple(marker for marker in markers if marker in self.special_ids)


def openai_call_id() -> str:
    """An id as OpenAI's look."""
    return "call_" + secrets.token_hex(12)
