"""What starts a step, against the same gathers in plain Python."""

import random

import pytest
import torch
from torch import Tensor

from asyncllm.layers.triton_step import apply_block_writes, gather_decode_inputs, gather_tokens

NUM_SLOTS, NUM_COLUMNS = 6, 5


def int32(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_state(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A block table [L, C] of distinct blocks and last tokens [L]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(NUM_SLOTS * NUM_COLUMNS, generator=generator).view(NUM_SLOTS, NUM_COLUMNS) + 1
    last_token = torch.randint(0, 1000, (NUM_SLOTS,), generator=generator)
    return blocks.to(device, torch.int32), last_token.to(device, torch.int32)


@pytest.mark.parametrize("num_writes", [1, 7, 300])
def test_block_writes_land_and_leave_every_other_entry(device: torch.device, num_writes: int) -> None:
    chosen = random.Random(num_writes)
    block_table = torch.zeros(NUM_SLOTS, 100, dtype=torch.int32, device=device)
    cells = chosen.sample([(slot, column) for slot in range(NUM_SLOTS) for column in range(100)], num_writes)
    skipped = {cell for cell in cells if chosen.random() < 0.3}
    writes = [[-1 if (slot, column) in skipped else slot, column, 1000 + i] for i, (slot, column) in enumerate(cells)]
    expected = block_table.clone()
    for slot, column, block_id in writes:
        if slot >= 0:
            expected[slot, column] = block_id
    apply_block_writes(block_table, int32(writes, device).T.contiguous())
    assert torch.equal(block_table, expected)


@pytest.mark.parametrize("num_rows", [1, 6, 131])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_decode_rows_continue_behind_their_last_token(device: torch.device, num_rows: int, block_size: int) -> None:
    chosen = random.Random(num_rows)
    block_table, last_token = random_state(0, device)
    slots = [chosen.randrange(NUM_SLOTS) for _ in range(num_rows)]
    lengths = [chosen.randint(1, NUM_COLUMNS * block_size) for _ in range(num_rows)]
    out = torch.full((3, num_rows), -7, dtype=torch.int32, device=device)
    gather_decode_inputs(int32(slots, device), int32(lengths, device), last_token, block_table, block_size, *out)
    pages, tokens = block_table.tolist(), last_token.tolist()
    places = [(slot, length - 1) for slot, length in zip(slots, lengths)]
    assert out[0].tolist() == [tokens[slot] for slot in slots]
    assert out[1].tolist() == [position for _, position in places]
    assert out[2].tolist() == [pages[s][p // block_size] * block_size + p % block_size for s, p in places]


def test_padding_rows_are_zeros_whatever_their_slot_says(device: torch.device) -> None:
    block_table, last_token = random_state(1, device)
    out = torch.full((3, 4), -7, dtype=torch.int32, device=device)
    gather_decode_inputs(
        int32([2, -1, NUM_SLOTS, 10**9], device), int32([1, 0, 0, 0], device), last_token, block_table, 4, *out
    )
    assert out[:, 1:].eq(0).all()
    assert out[:, 0].tolist() == [last_token[2].item(), 0, block_table[2, 0].item() * 4]


@pytest.mark.parametrize("num_tokens", [1, 9, 140])
def test_mixed_steps_take_unknown_tokens_from_the_slot(device: torch.device, num_tokens: int) -> None:
    chosen = random.Random(num_tokens)
    block_size = 4
    block_table, last_token = random_state(2, device)
    slots = [chosen.randrange(-1, NUM_SLOTS) for _ in range(num_tokens)]
    positions = [chosen.randrange(NUM_COLUMNS * block_size) for _ in range(num_tokens)]
    ids = [chosen.choice([-1, chosen.randrange(500)]) for _ in range(num_tokens)]
    out = torch.full((2, num_tokens), -7, dtype=torch.int32, device=device)
    columns = (int32(values, device) for values in (slots, positions, ids))
    gather_tokens(*columns, last_token, block_table, block_size, *out)
    pages, tokens = block_table.tolist(), last_token.tolist()
    for index, (slot, position, token_id) in enumerate(zip(slots, positions, ids)):
        if slot < 0:
            assert out[:, index].tolist() == [0, 0]
            continue
        assert out[0, index] == (tokens[slot] if token_id < 0 else token_id)
        assert out[1, index] == pages[slot][position // block_size] * block_size + position % block_size
