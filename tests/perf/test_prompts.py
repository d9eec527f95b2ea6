"""Prompts: deterministic, distinct, of the asked length."""

import pytest

from perf.prompts import WORDS, make_prompt


def test_the_same_seed_and_index_give_the_same_prompt() -> None:
    assert make_prompt(7, 64, seed=3) == make_prompt(7, 64, seed=3)


def test_prompts_of_a_family_differ_within_their_first_words() -> None:
    heads = {tuple(make_prompt(index, 16).split()[:3]) for index in range(10_000)}

    assert len(heads) == 10_000


def test_families_with_other_seeds_share_no_first_block() -> None:
    heads = {tuple(make_prompt(0, 64, seed=seed).split()[:16]) for seed in range(1000)}

    assert len(heads) == 1000


@pytest.mark.parametrize("num_tokens", [3, 16, 1000])
def test_a_prompt_has_as_many_words_as_tokens_were_asked(num_tokens: int) -> None:
    assert len(make_prompt(1, num_tokens).split()) == num_tokens


def test_a_shared_prefix_is_equal_in_all_prompts_and_nothing_behind_it_is() -> None:
    prompts = [make_prompt(index, 48, shared_prefix_tokens=32).split() for index in range(50)]

    assert len({tuple(prompt[:32]) for prompt in prompts}) == 1
    assert len({tuple(prompt[32:]) for prompt in prompts}) == 50
    assert {len(prompt) for prompt in prompts} == {48}


def test_a_prompt_without_room_for_words_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 tokens of its own behind the 62 shared"):
        make_prompt(0, 64, shared_prefix_tokens=62)


def test_no_word_is_listed_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)
