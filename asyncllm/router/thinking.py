"""Thinking in front of an answer that has to follow a grammar, or that may only take so long. Engine thread."""

from asyncllm.router.constraint import one_token
from asyncllm.types import Constraint


class ThinkingBudget:
    """Thinks up to its end, then obeys `inner`; see `Constraint`."""

    __slots__ = ("_end", "_inner", "_max_tokens", "_num_matched", "_num_tokens", "_thoughts")

    def __init__(
        self,
        inner: Constraint | None,
        end_token_ids: tuple[int, ...],
        max_tokens: int | None = None,
        thoughts: bytes | None = None,
    ) -> None:
        """`inner`: of what comes behind the end, None = anything. `max_tokens`: then it is forced, None = never.

        `thoughts`: the mask while it thinks, None = anything. Where an answer is owed, an end of sequence is not in it.
        """
        assert end_token_ids, "thinking without an end"
        self._inner = inner
        self._end = end_token_ids
        self._max_tokens = max_tokens
        self._thoughts = thoughts
        self._num_tokens = 0  # of thinking
        self._num_matched = 0  # tokens of the end that stand at the end of the text; all of them: it is over

    def mask(self) -> bytes | None:
        """See `Constraint`."""
        if self._num_matched == len(self._end):
            return None if self._inner is None else self._inner.mask()
        if self._max_tokens is not None and self._num_tokens >= self._max_tokens:
            return one_token(self._end[self._num_matched])
        return self._thoughts

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        end = self._end
        if self._num_matched == len(end):
            if self._inner is not None:
                self._inner.accept(token_id)
            return
        self._num_tokens += 1
        text = (*end[: self._num_matched], token_id)
        # The longest beginning of the end that the text ends with: all that has to be remembered of it.
        self._num_matched = next(n for n in range(len(text), -1, -1) if text[len(text) - n :] == end[:n])

    @property
    def is_done(self) -> bool:
        """See `Constraint`."""
        return self._num_matched == len(self._end) and self._inner is not None and self._inner.is_done


class MaybeThinking:
    """Obeys `inner` unless the first token opens a thinking part, which `thinking` follows; see `Constraint`."""

    __slots__ = ("_chosen", "_inner", "_start", "_thinking")

    def __init__(self, inner: Constraint | None, start_token_id: int, thinking: ThinkingBudget) -> None:
        """`thinking` leads to the same `inner`, of which the first token asks only one."""
        self._inner = inner
        self._start = start_token_id
        self._thinking = thinking
        self._chosen: Constraint | None = None  # once the first token has told; stays None where anything may follow

    def mask(self) -> bytes | None:
        """See `Constraint`."""
        if self._chosen is not None:
            return self._chosen.mask()
        mask = None if self._inner is None else self._inner.mask()
        if mask is None:
            return None
        allowed = int.from_bytes(mask, "little") | 1 << self._start
        return allowed.to_bytes(max(len(mask), 4 * (self._start // 32 + 1)), "little")

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        if self._chosen is None and token_id == self._start:
            self._chosen = self._thinking
            return
        if self._chosen is None:
            self._chosen = self._inner or ANYTHING
        self._chosen.accept(token_id)

    @property
    def is_done(self) -> bool:
        """See `Constraint`."""
        return self._chosen is not None and self._chosen.is_done


class Anything:
    """The constraint that constrains nothing."""

    is_done = False

    def mask(self) -> bytes | None:
        """See `Constraint`."""
        return None

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""


ANYTHING = Anything()
