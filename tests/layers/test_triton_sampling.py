"""Draws by kernels against the torch sampler, and against the definition in plain Python where sums are close."""

import itertools
import math

import msgspec
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from asyncllm.executor.noise import CounterNoise, row_keys
from asyncllm.layers import sampling_columns as column
from asyncllm.layers.triton_noise import log_exponential, noise_bits, row_key
from asyncllm.layers.triton_sampling import make_sample_scratch, sample
from asyncllm.types import SamplingParams
from tests.executor.reference import Batch, allowed_tokens, chi_square
from tests.executor.reference import noise_bits as defined_bits

# Infinities and NaN go through kernels on purpose; interpreted, numpy remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

SPARE_ROWS = 2


def params(**fields):
    return SamplingParams(max_tokens=1, **fields)


def table_of(rows, device):
    """Parameter table of one slot per row and a slot for padding: floats and ints, [R + 1, 16]."""
    floats = torch.zeros(len(rows) + 1, column.NUM_COLUMNS)
    ints = floats.view(torch.int32)
    for slot, row in enumerate(rows):
        floats[slot, column.TEMPERATURE] = row.temperature
        floats[slot, column.TOP_P] = row.top_p if row.top_p < 1 else math.inf
        floats[slot, column.LOG_MIN_P] = float(np.log(np.float32(row.min_p))) if row.min_p > 0 else -math.inf
        ints[slot, column.TOP_K] = row.top_k
        words = np.array([row.seed], dtype=np.int64).view(np.int32)
        ints[slot, column.SEED_LOW], ints[slot, column.SEED_HIGH] = int(words[0]), int(words[1])
    floats = floats.to(device)
    return floats, floats.view(torch.int32)


def token_hash(vocab_size, device):
    return CounterNoise(vocab_size, device)._token_hash


def draw(logits, rows, positions, kind, device):
    """Token ids of rows i in slots i; checks that last_token got them too."""
    num_rows, vocab_size = logits.shape
    floats, ints = table_of(rows, device)
    last_token = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    out = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    sample(
        logits.to(device),
        torch.arange(num_rows, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        floats,
        ints,
        token_hash(vocab_size, device),
        kind,
        make_sample_scratch(num_rows + SPARE_ROWS, vocab_size, device),
        last_token,
        out,
    )
    assert last_token[:-1].tolist() == out.tolist()
    return out.tolist()


def expected_draws(logits, rows, positions):
    batch = Batch(logits.shape[1], [(row, [0], []) for row in rows])
    return batch.sample(logits.float(), positions)


def random_logits(num_rows, vocab_size, seed, step=None, scale=3.0):
    """Random logits; `step` rounds them, so that many are equal, as half-precision models make them."""
    z = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return z if step is None else (z / step).round() * step


@triton.jit
def _noise_kernel(token_hash, ints, positions, bits_out, noise_out, V, BLOCK: tl.constexpr):
    row, token_ids = tl.program_id(0), tl.arange(0, BLOCK)
    mask = token_ids < V
    key_low, key_high = row_key(ints, row, tl.load(positions + row))
    bits = noise_bits(tl.load(token_hash + token_ids, mask=mask, other=0), key_low, key_high)
    tl.store(bits_out + row * V + token_ids, bits.to(tl.int32, bitcast=True), mask=mask)
    tl.store(noise_out + row * V + token_ids, log_exponential(bits), mask=mask)


SEEDS = [0, 1, -1, 2**31, -(2**63), 2**63 - 1, 12345678901234567, -5]
POSITIONS = [0, 1, 2, 77, 4095, 2**20, 2**31 - 1, 11]


def noise_of(vocab_size, device):
    """Hash bits and log(E) of all seeds and tokens, each at its position, [8, V]."""
    _, ints = table_of([params(seed=seed) for seed in SEEDS], device)
    bits = torch.empty(len(SEEDS), vocab_size, dtype=torch.int32, device=device)
    noise = torch.empty(len(SEEDS), vocab_size, device=device)
    positions = torch.tensor(POSITIONS, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(vocab_size)
    hashes = token_hash(vocab_size, device)
    _noise_kernel[(len(SEEDS),)](hashes, ints, positions, bits, noise, vocab_size, BLOCK=block)
    return bits.cpu(), noise.cpu()


def test_noise_has_the_integers_of_the_definition(device):
    bits, _ = noise_of(300, device)
    for row, (seed, position) in enumerate(zip(SEEDS, POSITIONS)):
        for token_id in (0, 1, 2, 150, 299):
            assert int(bits[row, token_id]) % 2**32 == defined_bits(seed, position, token_id)


def test_noise_equals_that_of_the_torch_sampler_to_the_last_places(device):
    vocab_size = 30_000
    _, noise = noise_of(vocab_size, device)
    keys = row_keys(np.array(SEEDS, dtype=np.int64), np.array(POSITIONS, dtype=np.int64))
    expected = -CounterNoise(vocab_size, torch.device("cpu")).race(torch.zeros(len(SEEDS), vocab_size), keys)
    torch.testing.assert_close(noise, expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("bits", [0, 1, 2, 2**24 - 1, 2**24, 2**29, 2**30, 2**31 - 3, 2**31 - 2, 2**31 - 1])
def test_noise_is_precise_at_both_ends_of_its_range(bits, device):
    v = np.float32(2**31 - bits) * np.float32((1 - 2.0**-24) / 2**31)
    exact = -math.log1p(-float(v))
    source = torch.full((16,), bits, dtype=torch.int32, device=device)
    out = torch.empty(16, device=device)
    _log_exponential_kernel[(1,)](source, out)
    assert float(out[0]) == pytest.approx(math.log(exact), rel=3e-7, abs=3e-7)


@triton.jit
def _log_exponential_kernel(bits, out):
    offsets = tl.arange(0, 16)
    tl.store(out + offsets, log_exponential(tl.load(bits + offsets).to(tl.uint32, bitcast=True)))


@pytest.mark.parametrize("vocab_size", [1, 257, 2048, 5000])
@pytest.mark.parametrize("kind", ["greedy", "gumbel", "full"])
def test_temperature_zero_takes_the_lowest_of_the_largest(vocab_size, kind, device):
    logits = random_logits(4, vocab_size, 0, step=2.0)
    rows = [params(temperature=0.0, top_k=5, top_p=0.5, seed=i) for i in range(4)]
    assert draw(logits, rows, [3] * 4, kind, device) == logits.argmax(-1).tolist()


def test_greedy_needs_no_parameters(device):
    logits = random_logits(3, 300, 1)
    assert draw(logits, [params(temperature=1.3)] * 3, [1] * 3, "greedy", device) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["gumbel", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_limits_draw_what_the_torch_sampler_draws(kind, dtype, device):
    # Seeds and positions of all sizes; flat logits let any of the 5000 noises decide.
    rows = [params(temperature=t, seed=seed) for t, seed in zip(itertools.cycle([1.0, 0.7, 1.9]), SEEDS)]
    for scale in (0.0, 2.0):
        logits = random_logits(len(rows), 5000, 2, scale=scale).to(dtype)
        assert draw(logits, rows, POSITIONS, kind, device) == expected_draws(logits, rows, POSITIONS)


def test_greedy_rows_beside_drawn_ones_stay_greedy(device):
    logits = random_logits(6, 1031, 3, step=0.5)
    rows = [params(temperature=0.0 if i % 2 else 1.0, seed=i) for i in range(6)]
    assert draw(logits, rows, range(6), "gumbel", device) == expected_draws(logits, rows, range(6))


LIMITS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_k": 2999},
    {"top_k": 3000},
    {"top_k": 10_000},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 2000, "top_p": 0.95},
    {"top_k": 40, "min_p": 0.1},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {},
]


def agrees(drawn, logits, row, position):
    """Whether a draw is the torch sampler's; where rounded sums may end a nucleus one token apart, any of those two."""
    expected = expected_draws(logits, [row], [position])[0]
    if drawn == expected:
        return True
    nearby = [msgspec.structs.replace(row, top_p=row.top_p * factor) for factor in (1 - 2e-6, 1 + 2e-6)]
    return row.top_p < 1 and drawn in [expected_draws(logits, [other], [position])[0] for other in nearby]


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_every_mix_of_limits_draws_what_the_torch_sampler_draws(step, scale, device):
    rows = [params(seed=i, temperature=(1.0, 0.6, 1.5)[i % 3], **limits) for i, limits in enumerate(LIMITS)]
    logits = random_logits(len(rows), 3000, 4, step, scale)
    drawn = draw(logits, rows, [9] * len(rows), "full", device)
    for i, row in enumerate(rows):
        assert agrees(drawn[i], logits[i : i + 1], row, 9), row


def kept_tokens(logits, row, device):
    """What the cut leaves of logits [V]."""
    scratch = make_sample_scratch(1, len(logits), device)
    floats, ints = table_of([row], device)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    buffers = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    hashes = token_hash(len(logits), device)
    sample(logits[None].to(device), slot, slot, floats, ints, hashes, "full", scratch, *buffers)
    z = logits.float() / row.temperature
    threshold, last_equal = scratch.cut.threshold.cpu(), scratch.cut.last_equal.cpu()
    return ((z > threshold) | ((z == threshold) & (torch.arange(len(z)) <= last_equal))).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("limits", LIMITS[:-1], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_cut_keeps_exactly_the_tokens_of_the_definition(limits, seed, device):
    # Coarse logits: most cuts fall between equals. Probabilities are far enough from every top_p that sums are not.
    logits = random_logits(1, 700, seed, step=0.25, scale=2.0)[0]
    row = params(**limits)
    assert kept_tokens(logits, row, device) == sorted(allowed_tokens(logits.tolist(), row))


def test_equals_at_the_cut_stay_in_order_of_their_ids_across_blocks(device):
    logits = torch.zeros(9000)
    logits[4000:4200] = 1.0
    logits[8500:8600] = 1.0
    assert kept_tokens(logits, params(top_k=5), device) == list(range(4000, 4005))
    assert kept_tokens(logits, params(top_k=210), device) == [*range(4000, 4200), *range(8500, 8510)]
    assert kept_tokens(logits, params(top_k=301), device) == [0, *range(4000, 4200), *range(8500, 8600)]


def test_a_nucleus_as_wide_as_the_vocabulary_is_cut_exactly(device):
    logits = torch.zeros(9000)
    assert kept_tokens(logits, params(top_p=0.5), device) == list(range(4500))
    assert kept_tokens(logits, params(top_p=0.5, top_k=1000), device) == list(range(500))


def test_top_p_counts_within_top_k(device):
    # Of the two kept by top_k, 0.4 / 0.7 reaches 0.5 alone; over the whole vocabulary 0.4 would not.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept_tokens(logits, params(top_k=2, top_p=0.5), device) == [0]
    assert kept_tokens(logits, params(top_p=0.5), device) == [0, 1]


def test_top_p_counts_what_min_p_left(device):
    logits = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05]).log()
    assert kept_tokens(logits, params(min_p=0.5, top_p=0.8), device) == [0, 1, 2]
    assert kept_tokens(logits, params(min_p=0.5, top_p=0.75), device) == [0, 1]


@pytest.mark.parametrize("lowest", [-math.inf, -3.4e38, -1e4])
@pytest.mark.parametrize("limits", [{"top_k": 3}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5}], ids=str)
def test_banned_tokens_are_never_drawn_however_many_the_limits_would_let_in(lowest, limits, device):
    logits = torch.full((8, 3000), lowest)
    logits[:, [5, 2100, 2900]] = torch.tensor([1.0, 0.5, 0.0])
    rows = [params(seed=i, **limits) for i in range(8)]
    drawn = draw(logits, rows, range(8), "full", device)
    assert set(drawn) <= {5, 2100, 2900}
    assert drawn == expected_draws(logits, rows, range(8))


@pytest.mark.parametrize("kind", ["greedy", "gumbel", "full"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_rows_of_nothing_usable_yield_some_token_of_the_vocabulary(kind, value, device):
    logits = torch.full((3, 2100), value)
    rows = [params(), params(top_k=5, top_p=0.5), params(temperature=0.0)]
    assert all(0 <= token_id < 2100 for token_id in draw(logits, rows, [1] * 3, kind, device))


def test_nan_counts_as_banned(device):
    logits = torch.full((2, 300), math.nan)
    logits[:, 17] = -5.0
    rows = [params(temperature=0.0), params(top_p=0.5)]
    assert draw(logits, rows, [1, 1], "full", device) == [17, 17]


def test_padding_rows_disturb_nobody(device):
    logits = random_logits(4, 300, 6)
    rows = [params(seed=i, top_k=20) for i in range(4)]
    floats, ints = table_of(rows, device)
    floats[-1] = math.nan  # whatever the padding slot holds
    slots = torch.tensor([2, 0, 4, 4], dtype=torch.int32, device=device)
    positions = torch.tensor([8, 9, 0, 0], dtype=torch.int32, device=device)
    last_token = torch.full((5,), -1, dtype=torch.int32, device=device)
    out = torch.full((4,), -1, dtype=torch.int32, device=device)
    hashes, scratch = token_hash(300, device), make_sample_scratch(4, 300, device)
    sample(logits.to(device), slots, positions, floats, ints, hashes, "full", scratch, last_token, out)
    assert out[:2].tolist() == expected_draws(logits[:2], [rows[2], rows[0]], [8, 9])
    assert last_token[:4].tolist() == [out[1], -1, out[0], -1]


def test_a_row_draws_the_same_alone_and_in_another_order(device):
    rows = [params(seed=i, **limits) for i, limits in enumerate(LIMITS)]
    logits = random_logits(len(rows), 2500, 7, step=0.125)
    together = draw(logits, rows, range(len(rows)), "full", device)
    backwards = draw(logits.flip(0), rows[::-1], range(len(rows))[::-1], "full", device)
    assert backwards[::-1] == together
    for i in range(0, len(rows), 5):
        assert draw(logits[i : i + 1], [rows[i]], [i], "full", device) == [together[i]]


def test_draws_follow_the_softmax(device):
    logits = torch.linspace(-1, 1, 5)
    row = params(temperature=0.8, seed=11)
    drawn = draw(logits.expand(250, -1).contiguous(), [row] * 250, range(250), "gumbel", device)
    # 4 degrees of freedom: above 18.5 once in a thousand samples.
    assert chi_square(drawn, torch.softmax(logits.double() / 0.8, -1)) < 18.5


def test_draws_within_a_nucleus_follow_the_renormalised_probabilities(device):
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.15], dtype=torch.float64)
    logits = probabilities.log().float().expand(80, -1).contiguous()
    drawn = draw(logits, [params(top_p=0.75, seed=5)] * 80, range(80), "full", device)
    assert chi_square(drawn, torch.tensor([0.4, 0, 0.3, 0, 0.15], dtype=torch.float64) / 0.85) < 13.8
