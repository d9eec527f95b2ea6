"""What runs on the engine thread of a grammar: its matchers.

A matcher is made on the loop, then belongs to its sequence. Knows token ids and llguidance; nothing of where a grammar
came from.
"""

import time
from collections.abc import Callable, Iterable

from llguidance import LLMatcher

from asyncllm.errors import show
from asyncllm.types import Constraint

# A lexer that is full is replaced by a fresh one, unless the last one lasted no longer: then the grammar is too large.
MIN_LIFE = 64  # tokens
LEXER_IS_FULL = "lexer error"
# CPU time for masks: most take 5 to 80 us, and the engine's other sequences wait for all of them.
MAX_FIRST_S, MAX_TOKEN_S = 0.3, 0.005
CANNOT_GO_ON = "the structured output cannot go on"
# What clients are told where llguidance speaks of itself.
_WORDS = {
    "oneOf constraints": (
        "oneOf is supported where its options exclude each other by their types, or by a required property that is a "
        "different const in each; write anyOf otherwise"
    ),
    "NoExtension": "no token fits",
    "lexer error": "the grammar is too large: too many states",
    "Too many items": "the grammar is too ambiguous, or forces too long a text",
    "row has": "the grammar leaves too many ways open at one place",
}


class Grammar:
    """A compiled grammar. Any number of constraints at once; made in the pool, used on the loop and the engine thread.

    Its matchers share one lexer, which grows with what they meet and is bounded: without renewal, a grammar in use for
    long would fail everybody at some point.
    """

    def __init__(self, compile_matcher: Callable[[], LLMatcher], num_tokens: int) -> None:
        """`num_tokens`: ids there may be in a mask."""
        self._compile = compile_matcher
        self._num_bytes = 4 * -(-num_tokens // 32)
        self._base = compile_matcher()

    @property
    def error(self) -> str:
        """Why it cannot be used; empty if it can."""
        return self._base.get_error()

    def constraint(self) -> Constraint:
        """A constraint for one sequence: 1 us. Loop thread."""
        return GrammarConstraint(self, self._base, self._num_bytes)

    def renew(self, worn: LLMatcher) -> LLMatcher:
        """A base with a fresh lexer, in place of `worn`, whose lexer is full. Engine thread; compiles: 1 ms or some."""
        if self._base is worn:
            self._base = self._compile()
        return self._base


class GrammarConstraint:
    """One sequence under a grammar; see `Constraint`."""

    __slots__ = ("_accepted", "_base", "_forced", "_grammar", "_matcher", "_num_bytes", "_renewed_at", "_spent_s",
                 "is_done")  # fmt: skip

    def __init__(self, grammar: Grammar, base: LLMatcher, num_bytes: int) -> None:
        self._grammar = grammar
        self._base = base
        self._matcher = base.deep_copy()
        self._num_bytes = num_bytes
        self._accepted: list[int] = []
        self._forced: list[int] = []  # tokens that must come next, the first one last
        self._renewed_at: int | None = None  # tokens accepted then
        self._spent_s = 0.0  # on masks
        self.is_done = False

    def mask(self) -> bytes:
        """See `Constraint`. Raises ValueError where the grammar turns out to be too large, or nothing fits."""
        if self._forced:
            return one_token(self._forced[-1])
        matcher = self._matcher
        begin_s = time.thread_time()
        # Asked for at once: masks alone would find out the whole forced text anew at each of its tokens.
        self._forced = matcher.compute_ff_tokens()[::-1]
        mask = one_token(self._forced[-1]) if self._forced else matcher.compute_bitmask()[: self._num_bytes]
        self._spent_s += time.thread_time() - begin_s
        if matcher.is_error():
            self._renew()
            return self.mask()
        if self._spent_s > MAX_FIRST_S + MAX_TOKEN_S * len(self._accepted):
            raise ValueError(f"{CANNOT_GO_ON}: the grammar is too large, its next tokens take too long to find.")
        return mask

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        if not self._matcher.consume_token(token_id):
            self._renew()
            if not self._matcher.consume_token(token_id):
                raise _failure(self._matcher)
        self._accepted.append(token_id)
        if self._forced and self._forced.pop() != token_id:
            self._forced = []
        self.is_done = self._matcher.is_stopped()

    def _renew(self) -> None:
        """Go on with a fresh lexer, if a full one is what the matcher failed by. Raises ValueError otherwise."""
        num_accepted = len(self._accepted)
        lived = MIN_LIFE if self._renewed_at is None else num_accepted - self._renewed_at
        if not self._matcher.get_error().startswith(LEXER_IS_FULL) or lived < MIN_LIFE:
            raise _failure(self._matcher)
        self._renewed_at = num_accepted
        self._base = self._grammar.renew(self._base)
        self._matcher = self._base.deep_copy()
        self._forced = []
        if self._accepted and not self._matcher.consume_tokens(self._accepted):
            raise _failure(self._matcher)


def one_token(token_id: int) -> bytes:
    """The mask that allows this token alone."""
    return (1 << token_id).to_bytes(4 * (token_id // 32 + 1), "little")


def all_but(token_ids: Iterable[int], vocab_size: int) -> bytes:
    """The mask that allows every token but these."""
    bits = (1 << vocab_size) - 1
    for token_id in token_ids:
        bits &= ~(1 << token_id)
    return bits.to_bytes(4 * -(-vocab_size // 32), "little")


def tidy(message: str) -> str:
    """An error of llguidance in one line: the reason, without its drawings."""
    for known, sentence in _WORDS.items():
        if known in message:
            return sentence
    lines = [line.strip() for line in message.split("\n") if line.strip() and not line.startswith("<")]
    for number, line in enumerate(lines):
        if line.startswith("error: "):  # behind it or above it stands the pattern
            return show(f"{line.removeprefix('error: ')} in {lines[1] if number > 1 else lines[0]}")
    return show(lines[0] if lines else "unknown error")


def _failure(matcher: LLMatcher) -> ValueError:
    reason = matcher.get_error()
    return ValueError(f"{CANNOT_GO_ON}: {tidy(reason) if reason else 'no token fits'}.")
