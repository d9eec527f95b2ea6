import math

import numpy as np
import pytest
import torch

from asyncllm.executor.noise import CounterNoise, row_keys
from tests.executor.reference import CPU, gumbel

V = 49152


def exponentials(seeds, positions, vocab_size=V):
    """E of every row and token, [R, V] float64; uniform once mapped by 1 - exp(-E)."""
    keys = row_keys(np.array(seeds, dtype=np.int64), np.array(positions, dtype=np.int64))
    scores = CounterNoise(vocab_size, CPU).race(torch.zeros(len(seeds), vocab_size), keys)
    return torch.exp(-scores.double())


def uniforms(seeds, positions, vocab_size=V):
    return -torch.expm1(-exponentials(seeds, positions, vocab_size))


def kolmogorov_distance(values):
    """Largest distance from the uniform distribution, times sqrt(n): above 1.95 once in a thousand samples."""
    values = values.flatten().sort().values
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return float(torch.maximum(steps - values, values - (steps - 1 / len(values))).max()) * math.sqrt(len(values))


def test_noise_equals_the_definition_in_plain_integers():
    seeds, positions = [0, 1, -1, 2**62, -(2**63)], [0, 1, 7, 100_000, 2**31]
    keys = row_keys(np.array(seeds, dtype=np.int64), np.array(positions, dtype=np.int64))
    scores = CounterNoise(1000, CPU).race(torch.zeros(5, 1000), keys)
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        for token_id in (0, 1, 2, 500, 999):
            assert float(scores[row, token_id]) == pytest.approx(gumbel(seed, position, token_id), abs=2e-6)


def test_noise_never_changes_between_releases():
    # A client's seed is a promise: whoever edits the hash must mean to break it.
    assert [round(gumbel(42, 10, token_id), 6) for token_id in (0, 1, 49151)] == [0.943929, 0.396512, -0.92779]


def test_candidates_meet_the_noise_they_have_in_the_whole_vocabulary():
    keys = row_keys(np.array([3, 4]), np.array([5, 5]))
    noise = CounterNoise(V, CPU)
    z = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, V, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = noise.race(z.clone(), keys).gather(1, ids)
    assert torch.equal(noise.race_among(z.gather(1, ids), ids, keys), expected)


def test_noise_of_a_row_does_not_depend_on_the_rows_beside_it():
    # 200 rows are more than are scored at once.
    seeds, positions = list(range(200)), list(range(1000, 1200))
    together = exponentials(seeds, positions)
    for row in (0, 84, 85, 199):
        assert torch.equal(exponentials([seeds[row]], [positions[row]])[0], together[row])


@pytest.mark.parametrize("seed", [0, 1, -5, 123456789, 2**63 - 1])
def test_noise_is_uniform_over_tokens(seed):
    assert kolmogorov_distance(uniforms([seed], [17])) < 1.95


@pytest.mark.parametrize("token_id", [0, 1, 255, 31])
def test_noise_of_a_token_is_uniform_over_positions_and_over_seeds(token_id):
    n = 20_000
    over_positions = uniforms([7] * n, range(n), 256)[:, token_id]
    over_seeds = uniforms(range(n), [7] * n, 256)[:, token_id]
    assert kolmogorov_distance(over_positions) < 1.95
    assert kolmogorov_distance(over_seeds) < 1.95


def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated():
    u = uniforms([0, 1, 2, 0, 0], [0, 0, 0, 1, 2]) - 0.5  # variance 1/12
    limit = 4 / math.sqrt(V)
    for row in range(5):
        for other in range(row):
            assert abs(float((u[row] * u[other]).mean()) * 12) < limit, (row, other)
        for lag in (1, 2, 64):
            assert abs(float((u[row, lag:] * u[row, :-lag]).mean()) * 12) < limit, (row, lag)


def test_pairs_of_neighbours_fill_the_square_evenly():
    u = uniforms(range(20), [3] * 20)
    for pair in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        cells = ((pair[0] * 16).long() * 16 + (pair[1] * 16).long()).flatten()
        counts = torch.bincount(cells, minlength=256).double()
        expected = len(cells) / 256
        # 255 degrees of freedom: above 330.5 once in a thousand samples.
        assert float(((counts - expected) ** 2 / expected).sum()) < 330.5


def test_every_exponential_is_finite_and_positive_even_at_the_ends_of_its_range():
    e = exponentials(range(64), [0] * 64)
    assert bool(torch.isfinite(e).all()) and float(e.min()) > 0
    # Of three million, the smallest is near 3e-7, where -log(u) in float32 would be coarse: all must be distinct there.
    smallest = e.flatten().sort().values[:200]
    assert len(smallest.unique()) == 200
