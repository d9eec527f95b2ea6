"""Where a sequence went as it goes now: the index against a search, and when a drafter holds its drafts back."""

import random
from array import array

import pytest

from asyncllm.config import SpeculativeConfig
from asyncllm.engine.prompt_lookup import MAX_COMPARED, MAX_INDEXED, Drafter, PromptLookup, count_right


def searched(tokens: list[int], shortest: int, longest: int, num_tokens: int) -> list[int]:
    """The same by looking at every place: the latest few that match, the longest of them, the latest of those."""
    end = len(tokens)
    places = [p for p in range(end - 1, shortest - 1, -1) if tokens[p - shortest : p] == tokens[end - shortest : end]]
    best, best_length = 0, 0
    for place in places[:MAX_COMPARED]:
        length = shortest
        while length < min(longest, place) and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        if length > best_length:
            best, best_length = place, length
    if not best:
        return []
    return [tokens[best + i % (end - best)] for i in range(num_tokens)]


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    vocab, shortest = rng.choice([2, 3, 8]), rng.choice([1, 2, 3])
    longest = shortest + rng.choice([0, 1, 4])
    tokens = array("I", [rng.randrange(vocab) for _ in range(rng.choice([1, 2, 5, 60]))])
    lookup = PromptLookup(tokens, shortest, longest)
    for _ in range(60):
        num_tokens = rng.randint(1, 6)
        assert lookup.find(num_tokens) == searched(tokens.tolist(), shortest, longest, num_tokens), f"{tokens}"
        tokens.extend(rng.randrange(vocab) for _ in range(rng.choice([1, 1, 1, 4])))


def test_the_longer_match_wins_over_the_later_one() -> None:
    tokens = array("I", [1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3])
    assert PromptLookup(tokens, 2, 3).find(1) == [40]
    assert PromptLookup(tokens, 2, 2).find(1) == [50]


def test_a_repetition_goes_on_in_circles() -> None:
    assert PromptLookup(array("I", [7, 8, 9, 7, 8, 9, 7, 8]), 2, 4).find(8) == [9, 7, 8, 9, 7, 8, 9, 7]


def test_a_long_prompt_is_indexed_in_parts() -> None:
    tokens = array("I", range(1, 3 * MAX_INDEXED))
    tokens.extend([5, 6])
    lookup = PromptLookup(tokens, 2, 4)
    assert lookup.find(2) == [7, 8], "its beginning is there at once"
    tokens.extend([2 * MAX_INDEXED + 10, 2 * MAX_INDEXED + 11])
    assert [lookup.find(1) for _ in range(3)] == [[], [2 * MAX_INDEXED + 12], [2 * MAX_INDEXED + 12]]


def test_drafts_are_right_up_to_the_first_difference() -> None:
    assert count_right([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_right([1, 2, 3], [1, 5, 3, 4]) == 1
    assert count_right([1, 2, 3], [4]) == 0
    assert count_right([1, 2, 3], [1]) == 1


CONFIG = SpeculativeConfig(prompt_lookup_min=1)


def failing(drafter: Drafter, num_running: int) -> int:
    """Wrong drafts of four tokens until it stops."""
    count = 0
    while drafter.pays and count < 100:
        drafter.observe(4, 0, num_running)
        count += 1
    return count


def test_wrong_drafts_are_forgiven_longer_where_a_token_more_costs_little() -> None:
    counts = [failing(Drafter(array("I", [1]), 4, CONFIG, balance, 1), 8) for balance in (1, 16, 256)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2] < 100


def test_a_row_misses_a_step_of_a_device_that_runs_ahead() -> None:
    beside, ahead = (Drafter(array("I", [1]), 4, CONFIG, 16, depth) for depth in (1, 2))
    assert failing(ahead, 1) < failing(beside, 1)


def test_one_that_is_told_not_to_turn_off_does_not() -> None:
    assert failing(Drafter(array("I", [1]), 4, SpeculativeConfig(auto_off=False), 1, 2), 8) == 100


def test_guesses_that_would_have_been_right_bring_drafts_back() -> None:
    tokens = array("I", [1, 2, 3, 4, 5] * 4)
    drafter = Drafter(tokens, 4, CONFIG, 16, 1)
    failing(drafter, 1)
    assert drafter.draft(1) == [], "it looks, and keeps what it finds to itself"
    num_tokens = len(tokens)
    while not drafter.draft(1):
        assert len(tokens) < num_tokens + 40
        tokens.append(tokens[-5])
    assert drafter.pays and len(tokens) > num_tokens
