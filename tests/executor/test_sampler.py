import itertools
import random

import pytest
import torch

from asyncllm.types import SamplingParams
from tests.executor.reference import Batch, allowed_tokens, chi_square, draws, processed, random_params, sample
from tests.fakes import mask_of


def logits_of(rows, vocab_size, seed, step=None):
    """Random logits; `step` rounds them, so that many are equal, as half-precision models make them."""
    z = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return z if step is None else (z / step).round() * step


def random_row(rng, vocab_size):
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))]
    output = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 12))]
    return random_params(rng, vocab_size), prompt, output


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("vocab_size", [40, 300])
def test_batches_of_mixed_parameters_sample_what_the_definition_says_row_by_row(seed, vocab_size):
    rng = random.Random(f"{seed} {vocab_size}")
    rows = [random_row(rng, vocab_size) for _ in range(24)]
    logits = logits_of(24, vocab_size, seed, step=rng.choice([None, 0.5]))
    positions = [rng.randrange(10_000) for _ in rows]
    banned = {row: rng.sample(range(vocab_size), 5) for row in range(0, 24, 3)}
    expected = [
        sample(logits[row].tolist(), params, prompt, output, positions[row], banned.get(row, ()))
        for row, (params, prompt, output) in enumerate(rows)
    ]
    assert Batch(vocab_size, rows).sample(logits, positions, banned=banned) == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vocab_size", [40, 300])
def test_masked_rows_sample_as_if_everything_else_was_banned(seed, vocab_size):
    rng = random.Random(f"{seed} {vocab_size}")
    rows = [random_row(rng, vocab_size) for _ in range(24)]
    logits = logits_of(24, vocab_size, seed, step=rng.choice([None, 0.5]))
    positions = [rng.randrange(10_000) for _ in rows]
    # One token, a few, most; a mask may end before the vocabulary does, or go on behind it.
    allowed = {row: rng.sample(range(vocab_size), rng.choice([1, 2, 30, vocab_size - 1])) for row in range(0, 24, 2)}
    masks = {row: mask_of(token_ids) + b"\xff" * rng.choice([0, 400]) for row, token_ids in allowed.items()}
    banned = {}
    for row, mask in masks.items():
        bits = int.from_bytes(mask, "little")
        banned[row] = [token_id for token_id in range(vocab_size) if not bits >> token_id & 1]
    expected = [
        sample(logits[row].tolist(), params, prompt, output, positions[row], banned.get(row, ()))
        for row, (params, prompt, output) in enumerate(rows)
    ]
    assert Batch(vocab_size, rows).sample(logits, positions, masks=masks) == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_row_samples_the_same_token_alone_in_another_order_and_in_another_slot(seed):
    # 20,000 tokens are enough for every two-level search and for candidates beyond the first 64.
    vocab_size, rng = 20_000, random.Random(seed)
    rows = [random_row(rng, vocab_size) for _ in range(12)]
    logits = logits_of(12, vocab_size, seed, step=rng.choice([None, 0.0625]))
    positions = [rng.randrange(1000) for _ in rows]
    together = Batch(vocab_size, rows).sample(logits, positions)
    order = rng.sample(range(12), 12)
    shuffled = Batch(vocab_size, [rows[i] for i in order]).sample(logits[order], [positions[i] for i in order])
    assert shuffled == [together[i] for i in order]
    alone = [Batch(vocab_size, [rows[i]]).sample(logits[i : i + 1], [positions[i]])[0] for i in range(12)]
    assert alone == together


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("step", [None, 0.125])
def test_top_p_is_exact_however_many_candidates_it_needs(scale, step):
    # Flat logits push the cut past 64, 1024 and 8192 candidates, up to the whole vocabulary.
    vocab_size = 20_000
    logits = logits_of(1, vocab_size, 5, step)[0] * scale
    for top_p, top_k in ((0.1, 0), (0.5, 0), (0.9, 0), (0.999, 0), (0.9, 100), (0.5, 5000), (1.0, 1500)):
        params = SamplingParams(max_tokens=1, top_p=top_p, top_k=top_k, seed=3)
        allowed = set(allowed_tokens(logits.tolist(), params))
        drawn = draws(logits, params, 40)
        assert set(drawn) <= allowed, (top_p, top_k)
        unlimited = draws(logits, SamplingParams(max_tokens=1, seed=3), 40)
        # The noise is the same with and without limits, so a draw that was allowed anyway does not move.
        assert all(a == b for a, b in zip(drawn, unlimited) if b in allowed), (top_p, top_k)


def test_equal_logits_at_the_cut_keep_the_lower_ids():
    logits = torch.zeros(20_000)
    logits[100:200] = 1.0
    drawn = draws(logits, SamplingParams(max_tokens=1, top_k=10), 400)
    assert set(drawn) == set(range(100, 110))
    assert draws(logits, SamplingParams(max_tokens=1, top_k=1), 5) == [100] * 5


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.zeros(20_000)
    logits[[7000, 300, 15_000]] = 2.0
    assert draws(logits, SamplingParams(max_tokens=1, temperature=0.0), 3) == [300] * 3


def test_tiny_temperatures_are_greedy_instead_of_overflowing():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert draws(logits, SamplingParams(max_tokens=1, temperature=1e-40), 4) == [1] * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_any_temperature(temperature):
    logits = torch.linspace(-2, 2, 10)
    drawn = draws(logits, SamplingParams(max_tokens=1, temperature=temperature, seed=11), 20_000)
    # 9 degrees of freedom: above 27.9 once in a thousand samples; likewise below.
    assert chi_square(drawn, torch.softmax(logits.double() / temperature, -1)) < 27.9


def test_draws_under_top_p_follow_the_renormalised_probabilities():
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.15], dtype=torch.float64)
    drawn = draws(probabilities.log().float(), SamplingParams(max_tokens=1, top_p=0.75, seed=5), 20_000)
    assert chi_square(drawn, torch.tensor([0.4, 0, 0.3, 0, 0.15], dtype=torch.float64) / 0.85) < 13.8


def test_top_p_counts_within_top_k():
    # Of the two kept by top_k, 0.4 / 0.7 reaches 0.5 alone; over the whole vocabulary 0.4 would not.
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert set(draws(probabilities.log(), SamplingParams(max_tokens=1, top_k=2, top_p=0.5), 200)) == {0}
    assert set(draws(probabilities.log(), SamplingParams(max_tokens=1, top_p=0.5), 200)) == {0, 1}


def test_min_p_is_relative_to_the_most_probable_token():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert set(draws(probabilities.log(), SamplingParams(max_tokens=1, min_p=0.29), 400)) == {0, 1, 2}
    assert set(draws(probabilities.log(), SamplingParams(max_tokens=1, min_p=1.0), 50)) == {0}


def test_draws_of_neighbouring_seeds_are_independent():
    logits = torch.zeros(4)
    rows = [(SamplingParams(max_tokens=1, seed=seed), [0], []) for seed in range(20_001)]
    drawn = Batch(4, rows).sample(logits.expand(len(rows), -1), [9] * len(rows))
    pairs = [a * 4 + b for a, b in itertools.pairwise(drawn)]
    # 15 degrees of freedom: above 37.7 once in a thousand samples.
    assert chi_square(pairs, torch.full((16,), 1 / 16, dtype=torch.float64)) < 37.7


def test_banned_tokens_are_never_drawn_even_when_nothing_else_is_likely():
    logits = torch.full((3, 300), -50.0)
    logits[:, 7] = 50.0
    rows = [(SamplingParams(max_tokens=1, temperature=t, top_p=p), [0], []) for t, p in ((0, 1), (1, 1), (1, 0.9))]
    batch = Batch(300, rows)
    assert batch.sample(logits, [1, 1, 1]) == [7, 7, 7]
    assert 7 not in batch.sample(logits, [1, 1, 1], banned={0: [7], 1: [7], 2: [7]})


def test_a_ban_holds_against_a_bias():
    logits = torch.zeros(1, 10)
    params = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=((4, 100.0), (5, 50.0)))
    assert Batch(10, [(params, [0], [])]).sample(logits, [1], banned={0: [4]}) == [5]


def test_penalties_follow_the_published_formulas():
    logits = [2.0, -1.0, 3.0, 0.5]
    params = SamplingParams(max_tokens=1, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    # 0 in the prompt: halved. 1 in the output twice: doubled, -0.5 * 2 - 0.25. 2 in both, once in the output.
    assert processed(logits, params, [0, 2], [1, 1, 2]) == [1.0, -3.25, 0.75, 0.5]
    rows = [(SamplingParams(max_tokens=1, temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25), [0, 2], [2])]
    assert Batch(4, rows).sample(torch.tensor([[2.6, 1.2, 3.0, 1.29]]), [3]) == [0]


def test_sampled_tokens_count_for_the_next_step():
    params = SamplingParams(max_tokens=9, temperature=0.0, frequency_penalty=1.0)
    batch = Batch(4, [(params, [0], [])])
    logits = torch.tensor([[0.0, 2.6, 2.0, 0.9]])
    assert [batch.sample(logits, [position])[0] for position in range(1, 7)] == [1, 2, 1, 2, 3, 1]


def test_rows_without_penalties_leave_the_counts_unallocated():
    batch = Batch(50, [(SamplingParams(max_tokens=1), [0], [])])
    batch.sample(torch.zeros(1, 50), [1])
    assert batch.state.output_counts is None
