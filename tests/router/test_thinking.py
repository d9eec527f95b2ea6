"""Thinking in front of a grammar: free up to its end, which may be forced, and not to be mistaken for the answer."""

import pytest

from asyncllm.router.constraint import all_but, one_token
from asyncllm.router.thinking import MaybeThinking, ThinkingBudget
from asyncllm.types import Constraint
from tests.fakes import allows
from tests.router.grammars import compiled, follow

END = (7, 7, 8)


def forced(constraint: Constraint, num_tokens: int) -> list[int]:
    """Tokens that come where only one may."""
    tokens = []
    for _ in range(num_tokens):
        mask = constraint.mask() or b""
        [token_id] = [i for i in range(8 * len(mask)) if allows(mask, i)]
        constraint.accept(token_id)
        tokens.append(token_id)
    return tokens


@pytest.mark.parametrize("thoughts", [(), (1, 2), (7,), (7, 8), (7, 7), (8, 7, 1, 7, 7, 7), (7, 7, 1)])
def test_a_grammar_that_waits_begins_behind_the_last_token_of_the_end(thoughts: tuple[int, ...]) -> None:
    constraint = ThinkingBudget(compiled("regex", "ab").constraint(), END)
    text = (*thoughts, *END) if thoughts[-2:] != (7, 7) else (*thoughts, 8)
    for token_id in text:
        assert constraint.mask() is None
        assert not constraint.is_done
        constraint.accept(token_id)
    assert constraint.mask() == compiled("regex", "ab").constraint().mask()
    assert follow(constraint, "ab") == 2
    assert constraint.is_done


def test_the_end_is_forced_when_the_budget_is_spent() -> None:
    constraint = ThinkingBudget(compiled("regex", "[ab]").constraint(), END, 3)
    for token_id in (1, 2, 3):
        assert constraint.mask() is None
        constraint.accept(token_id)
    assert forced(constraint, 3) == list(END)
    assert follow(constraint, "a") == 1
    assert constraint.is_done


def test_what_stands_of_the_end_already_is_not_forced_again() -> None:
    constraint = ThinkingBudget(None, END, 3)
    for token_id in (1, 7, 7):
        constraint.accept(token_id)
    assert forced(constraint, 1) == [8]
    assert constraint.mask() is None


def test_an_end_before_the_budget_is_spent_is_the_end() -> None:
    constraint = ThinkingBudget(None, END, 5)
    for token_id in (1, *END, 1, 2, 3, 4, 5, 6):
        assert constraint.mask() is None
        constraint.accept(token_id)
    assert not constraint.is_done, "nothing ends what is free"


def test_no_budget_at_all_forces_the_end_at_once() -> None:
    constraint = ThinkingBudget(None, END, 0)
    assert forced(constraint, 3) == list(END)


def test_an_answer_that_is_owed_forbids_the_end_of_sequence_while_thinking() -> None:
    thoughts = all_but([3, 40], 70)
    constraint = ThinkingBudget(compiled("regex", "ab").constraint(), END, thoughts=thoughts)
    mask = constraint.mask() or b""
    assert [i for i in range(8 * len(mask)) if not allows(mask, i)] == [3, 40, *range(70, 96)]
    for token_id in END:
        constraint.accept(token_id)
    assert follow(constraint, "ab") == 2


def test_tokens_behind_the_end_are_the_grammars_to_refuse() -> None:
    constraint = ThinkingBudget(compiled("regex", "ab").constraint(), (7,))
    constraint.accept(7)
    with pytest.raises(ValueError, match="cannot go on"):
        constraint.accept(ord("x"))


START = 400


def maybe(inner: Constraint | None, max_tokens: int | None = None) -> MaybeThinking:
    return MaybeThinking(inner, START, ThinkingBudget(inner, END, max_tokens))


def test_the_first_token_may_open_a_thinking_part_or_begin_the_answer() -> None:
    for opens in (True, False):
        constraint = maybe(compiled("regex", "ab").constraint())
        mask = constraint.mask() or b""
        assert [i for i in range(8 * len(mask)) if allows(mask, i)] == [ord("a"), START]
        if opens:
            constraint.accept(START)
            assert constraint.mask() is None
            for token_id in (1, *END):
                assert not constraint.is_done
                constraint.accept(token_id)
        assert follow(constraint, "ab") == 2
        assert constraint.is_done


def test_an_answer_that_began_cannot_turn_into_thinking() -> None:
    constraint = maybe(compiled("regex", "ab").constraint())
    assert follow(constraint, "a") == 1
    assert not allows(constraint.mask() or b"", START)
    with pytest.raises(ValueError, match="cannot go on"):
        constraint.accept(START)


def test_a_budget_alone_counts_only_what_is_thought() -> None:
    constraint = maybe(None, 2)
    for token_id in (1, START, 2, 3, 4):
        assert constraint.mask() is None
        constraint.accept(token_id)
    constraint = maybe(None, 2)
    for token_id in (START, 1, 2):
        assert constraint.mask() is None
        constraint.accept(token_id)
    assert forced(constraint, 3) == list(END)


@pytest.mark.parametrize("token_id", [0, 31, 32, 48000])
def test_a_mask_of_one_token_is_whole_words(token_id: int) -> None:
    mask = one_token(token_id)
    assert len(mask) % 4 == 0
    assert [i for i in range(8 * len(mask)) if allows(mask, i)] == [token_id]
