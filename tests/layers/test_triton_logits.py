"""Kernels that change logits, count tokens and score them, against the formulas in torch."""

import math

import pytest
import torch

from asyncllm.executor import logprobs
from asyncllm.layers import sampling_columns as column
from asyncllm.layers.triton_logits import (
    add_to_logits,
    apply_bitmask,
    count_tokens,
    penalize,
    rebuild_counts,
    score,
)

V = 2100  # no multiple of a block or of 32
WORDS = -(-V // 32)


def random_logits(num_rows, vocab_size=V, seed=0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


def ids(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def packed(allowed, device):
    """Bit masks [r, ceil(V / 32)] int32 of allowed [r, V] bool."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).view(len(allowed), -1, 32)
    words = (padded.long() << torch.arange(32)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).to(device)


def unpacked(words, vocab_size=V):
    return ((words.cpu()[..., None] >> torch.arange(32)) & 1).bool().flatten(-2)[..., :vocab_size]


def table(device, *rows):
    """floats [L, 16] of (repetition, frequency, presence) per slot."""
    floats = torch.zeros(len(rows), column.NUM_COLUMNS, device=device)
    floats[:, column.REPETITION : column.PRESENCE + 1] = torch.tensor(rows)
    return floats


def token_state(num_slots, device):
    """Counts and prompt mask that a predecessor left dirty."""
    counts = torch.full((num_slots, V), 7, dtype=torch.int32, device=device)
    return counts, torch.full((num_slots, WORDS), -1, dtype=torch.int32, device=device)


def test_rebuilding_counts_the_output_and_marks_the_prompt_of_one_slot(device):
    counts, prompt_mask = token_state(3, device)
    prompt, output = [0, 31, 32, 63, 2099, 31], [5, 5, 31, 2099] * 100
    rebuild_counts(counts, prompt_mask, 1, ids(prompt + output, device), len(prompt))
    expected = torch.bincount(torch.tensor(output), minlength=V)
    assert counts[1].tolist() == expected.tolist()
    assert unpacked(prompt_mask[1]).nonzero().squeeze(1).tolist() == sorted(set(prompt))
    for other in (0, 2):
        assert counts[other].unique().tolist() == [7]
        assert prompt_mask[other].unique().tolist() == [-1]


def test_rebuilding_an_empty_sequence_clears_the_slot(device):
    counts, prompt_mask = token_state(2, device)
    rebuild_counts(counts, prompt_mask, 0, ids([], device), 0)
    assert not counts[0].any() and not prompt_mask[0].any()


def test_sampled_tokens_are_counted_where_they_belong(device):
    counts = torch.zeros(5, V, dtype=torch.int32, device=device)
    slots = ids([4, 0, 3], device)
    for _ in range(2):
        count_tokens(counts, slots, ids([2099, 0, 17], device))
    count_tokens(counts, slots[:0], slots[:0])
    assert counts.nonzero().tolist() == [[0, 0], [3, 17], [4, 2099]]
    assert counts.sum() == 6


@pytest.mark.parametrize("seed", range(3))
def test_penalties_follow_the_formulas_for_the_rows_that_ask(seed, device):
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(5, seed=seed)
    logits[2, 40:50] = -math.inf
    counts = torch.randint(-4, 4, (4, V), generator=generator).clamp_(min=0).to(torch.int32)
    in_prompt = torch.rand(4, V, generator=generator) < 0.3
    floats = table("cpu", (1.0, 0.0, 0.0), (1.3, 0.4, -0.7), (0.8, -1.1, 0.25), (1.0, 0.5, 0.0))
    rows, slots = [3, 0, 2], [1, 3, 2]
    expected = logits.clone()
    for row, slot in zip(rows, slots):
        repetition, frequency, presence = floats[slot, column.REPETITION : column.PRESENCE + 1]
        z, count = logits[row], counts[slot]
        penalized = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where(in_prompt[slot] | (count > 0), penalized, z)
        expected[row] = z - count * frequency - (count > 0) * presence
    actual = logits.to(device)
    prompt_mask = packed(in_prompt, device)
    penalize(actual, ids(rows, device), ids(slots, device), floats.to(device), counts.to(device), prompt_mask)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(actual[[1, 4]].cpu(), logits[[1, 4]])


def test_biases_and_bans_of_one_token_add_up_to_a_ban(device):
    logits = torch.zeros(3, V, device=device)
    entries = [(0, 5, 1.5), (2, 2099, -2.0), (0, 5, 0.25), (1, 7, -math.inf), (1, 7, 100.0), (1, 7, -math.inf)]
    rows, token_ids, values = zip(*entries)
    add_to_logits(logits, ids(rows, device), ids(token_ids, device), torch.tensor(values, device=device))
    assert logits.nonzero().tolist() == [[0, 5], [1, 7], [2, 2099]]
    assert [float(logits[0, 5]), float(logits[1, 7]), float(logits[2, 2099])] == [1.75, -math.inf, -2.0]


def test_more_biases_than_a_program_takes_all_arrive(device):
    logits = torch.zeros(4, V, device=device)
    rows, token_ids = torch.arange(600, dtype=torch.int32) % 4, torch.arange(600, dtype=torch.int32) * 3
    values = torch.arange(1, 601, dtype=torch.float32)
    add_to_logits(logits, rows.to(device), token_ids.to(device), values.to(device))
    assert torch.equal(logits[rows.long(), token_ids.long()].cpu(), values)
    assert float(logits.sum()) == 600 * 601 / 2


def test_a_bit_mask_bans_what_it_clears_and_nothing_else(device):
    logits = random_logits(4)
    allowed = torch.rand(2, V, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[:, [31, 32, 2099]] = torch.tensor([True, False, True])
    actual = logits.to(device)
    apply_bitmask(actual, ids([3, 1], device), packed(allowed, device))
    expected = logits.clone()
    expected[3] = logits[3].masked_fill(~allowed[0], -math.inf)
    expected[1] = logits[1].masked_fill(~allowed[1], -math.inf)
    assert torch.equal(actual.cpu(), expected)


def test_nothing_happens_for_no_rows(device):
    logits = random_logits(2).to(device)
    before = logits.clone()
    none, floats = ids([], device), table(device, (2.0, 1.0, 1.0))
    counts, prompt_mask = token_state(1, device)
    penalize(logits, none, none, floats, counts, prompt_mask)
    add_to_logits(logits, none, none, none.float())
    apply_bitmask(logits, none, prompt_mask[:0])
    assert torch.equal(logits, before)
    assert [len(part) for part in score(logits[:0], none)] == [0, 0]


@pytest.mark.parametrize("vocab_size", [5, 257, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scores_are_the_log_softmax_and_the_rank(vocab_size, dtype, index_dtype, device):
    logits = random_logits(6, vocab_size, seed=2).to(dtype)
    token_ids = torch.tensor([0, 4, vocab_size - 1, vocab_size // 2, 1, 3])
    token_ids[4] = logits[4].argmax()
    expected = logprobs.score(logits.float(), token_ids, 0)
    values, ranks = score(logits.to(device), token_ids.to(index_dtype).to(device))
    torch.testing.assert_close(values.cpu(), expected.logprobs, rtol=2e-6, atol=2e-6)
    assert ranks.tolist() == expected.ranks.tolist()
    assert ranks[4] == 1


def test_scores_survive_bans_and_equals_and_depths(device):
    logits = torch.full((3, 5000), -math.inf)
    logits[:, 4500:4600] = -200.0  # the blocks before are banned as a whole, and nothing is near 0
    logits[1, 4500] = 300.0
    values, ranks = score(logits.to(device), torch.tensor([4501, 4501, 9], device=device))
    torch.testing.assert_close(values.cpu(), torch.tensor([-math.log(100), -500.0, -math.inf]))
    assert ranks.tolist() == [1, 2, 101]
