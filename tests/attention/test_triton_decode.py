"""Split-KV decode attention against the oracle, and the plan of its work items."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from asyncllm.attention.triton_decode import (
    DECODE_CONFIGS,
    MIN_SPLIT_KEYS,
    SPLIT_GRANULE,
    DecodeScratch,
    decode_attention,
    make_decode_scratch,
    max_work_items,
    plan_splits,
    target_splits,
)
from tests.attention.oracle import PagedRows, check_close, paged_rows

# bfloat16 products are wrong in the interpreter.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
# Few SMs make few splits, so that small rows have several.
NUM_SMS = 2


def decode(rows: PagedRows, scratch: DecodeScratch | None = None, window: int = 0, soft_cap: float = 0.0) -> Tensor:
    """Plan and attend, one query token per row."""
    num_kv_heads = rows.kv_cache.shape[2]
    num_rows, num_heads, head_dim = rows.query.shape
    if scratch is None:
        scratch = make_decode_scratch(num_rows, num_heads, num_kv_heads, head_dim, NUM_SMS, rows.query.device)
    # Whatever an earlier step or layer left must not show.
    scratch.partial_out.fill_(torch.nan)
    scratch.partial_lse.fill_(torch.nan)
    plan_splits(rows.seq_lens, scratch, num_kv_heads)
    out = torch.full(rows.query.shape, torch.nan, dtype=rows.query.dtype, device=rows.query.device)
    decode_attention(
        rows.query,
        rows.kv_cache,
        rows.block_table,
        rows.slots,
        rows.seq_lens,
        scratch,
        out,
        rows.scale,
        window=window,
        soft_cap=soft_cap,
    )
    return out


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 2), (3, 1), (8, 2), (7, 1), (8, 1), (16, 1)])
def test_query_heads_share_the_keys_of_their_group(device: torch.device, num_heads: int, num_kv_heads: int) -> None:
    rows = paged_rows([5, 150, 33], [1] * 3, device, num_heads, num_kv_heads)
    check_close(decode(rows), rows.expect([1] * 3))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_every_head_dim_and_dtype(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    rows = paged_rows([70, 300], [1] * 2, device, 4, 2, head_dim, dtype=dtype)
    check_close(decode(rows), rows.expect([1] * 2))


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, 256])
def test_every_page_size(device: torch.device, block_size: int) -> None:
    lengths = [1, 17, 140, 260]
    rows = paged_rows(lengths, [1] * 4, device, block_size=block_size)
    check_close(decode(rows), rows.expect([1] * 4))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_lengths_around_tiles_and_splits(device: torch.device, dtype: torch.dtype) -> None:
    tile = DECODE_CONFIGS[64, dtype.itemsize].tile_keys
    edges = (tile, SPLIT_GRANULE, MIN_SPLIT_KEYS, 2 * MIN_SPLIT_KEYS)
    lengths = [1, *(edge + step for edge in edges for step in (-1, 0, 1))]
    rows = paged_rows(lengths, [1] * len(lengths), device, dtype=dtype)
    check_close(decode(rows), rows.expect([1] * len(lengths)))


def test_a_long_row_among_short_ones_is_split_and_they_are_not(device: torch.device) -> None:
    lengths = [3, 1100, 20, 1]
    rows = paged_rows(lengths, [1] * 4, device)
    scratch = make_decode_scratch(4, 2, 1, 64, NUM_SMS, device)
    check_close(decode(rows, scratch), rows.expect([1] * 4))
    counts = scratch.cu_splits.diff().tolist()
    assert counts[1] > 4 and counts[0] == counts[2] == counts[3] == 1


def test_padding_rows_give_zeros(device: torch.device) -> None:
    rows = paged_rows([0, 40, 0, 300, 0], [1] * 5, device)
    out = decode(rows)
    check_close(out, rows.expect([1] * 5))
    assert not out[[0, 2, 4]].any()


def test_a_step_of_padding_alone_gives_zeros(device: torch.device) -> None:
    rows = paged_rows([0, 0], [1] * 2, device)
    assert not decode(rows).any()


@pytest.mark.parametrize("window", [1, 5, 64, 65, 130, 200, 1000])
def test_window_hides_older_keys_whatever_the_splits(device: torch.device, window: int) -> None:
    lengths = [1, 4, 64, 129, 390, 0]
    rows = paged_rows(lengths, [1] * 6, device)
    check_close(decode(rows, window=window), rows.expect([1] * 6, window=window))


def test_window_in_the_last_of_many_splits(device: torch.device) -> None:
    rows = paged_rows([500], [1], device)
    scratch = make_decode_scratch(1, 2, 1, 64, NUM_SMS, device)
    check_close(decode(rows, scratch, window=7), rows.expect([1], window=7))
    assert scratch.cu_splits.tolist()[1] == 4


def test_splits_before_the_window_read_no_key(device: torch.device) -> None:
    rows = paged_rows([520], [1], device)
    expected = rows.expect([1], window=40)
    rows.block_table[rows.slots[0], : (520 - 40 - SPLIT_GRANULE) // 16] = 2**30
    check_close(decode(rows, window=40), expected)


@pytest.mark.parametrize("window", [0, 50])
def test_soft_cap_bounds_scores(device: torch.device, window: int) -> None:
    rows = paged_rows([9, 300], [1] * 2, device)
    rows.query.mul_(30.0)
    check_close(decode(rows, window=window, soft_cap=5.0), rows.expect([1] * 2, window, 5.0))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # soft-capped, its limit is right
def test_large_scores_do_not_overflow(device: torch.device) -> None:
    rows = paged_rows([40, 300], [1] * 2, device)
    rows.query.mul_(1000.0)
    check_close(decode(rows), rows.expect([1] * 2))
    check_close(decode(rows, soft_cap=50.0), rows.expect([1] * 2, soft_cap=50.0))


def test_scratch_of_a_larger_step_serves_smaller_ones(device: torch.device) -> None:
    scratch = make_decode_scratch(20, 2, 1, 64, NUM_SMS, device)
    for lengths in ([900, 3] * 5, [2, 170, 0], [400]):
        rows = paged_rows(lengths, [1] * len(lengths), device, seed=len(lengths))
        check_close(decode(rows, scratch), rows.expect([1] * len(lengths)))


def test_one_plan_serves_layers_with_and_without_a_window(device: torch.device) -> None:
    rows = paged_rows([300, 20], [1] * 2, device)
    scratch = make_decode_scratch(2, 2, 1, 64, NUM_SMS, device)
    check_close(decode(rows, scratch), rows.expect([1] * 2))
    out = torch.empty_like(rows.query, memory_format=torch.contiguous_format)
    decode_attention(
        rows.query, rows.kv_cache, rows.block_table, rows.slots, rows.seq_lens, scratch, out, rows.scale, window=30
    )
    check_close(out, rows.expect([1] * 2, window=30))


@pytest.mark.parametrize("seed", range(20))
def test_plan_covers_every_key_once_within_its_bound(device: torch.device, seed: int) -> None:
    rng = random.Random(seed)
    num_rows, num_sms, num_kv_heads = rng.randint(1, 40), rng.randint(1, 132), rng.choice([1, 2, 8, 32])
    longest = rng.choice([1, 100, 5000, 1_000_000])
    lengths = [0 if rng.random() < 0.2 else rng.randint(1, longest) for _ in range(num_rows)]
    scratch = make_decode_scratch(num_rows + rng.randint(0, 20), 1, num_kv_heads, 64, num_sms, device)
    scratch.work_rows.fill_(-7)
    plan_splits(torch.tensor(lengths, dtype=torch.int32, device=device), scratch, num_kv_heads)

    split_keys = int(scratch.split_keys)
    cu_splits = scratch.cu_splits[: num_rows + 1].tolist()
    assert split_keys % SPLIT_GRANULE == 0 and split_keys >= MIN_SPLIT_KEYS
    assert cu_splits[0] == 0
    # Split j of a row is keys j * split_keys up to the next split or the row's end: exactly the row's keys.
    assert [end - start for start, end in itertools.pairwise(cu_splits)] == [-(-n // split_keys) for n in lengths]
    num_items = max_work_items(num_rows, num_sms, num_kv_heads)
    owners = [row for row, length in enumerate(lengths) for _ in range(-(-length // split_keys))]
    assert scratch.work_rows[:num_items].tolist() == owners + [-1] * (num_items - len(owners))
    assert (scratch.work_rows[num_items:] == -7).all()


def test_plan_splits_no_finer_than_its_target(device: torch.device) -> None:
    scratch = make_decode_scratch(8, 1, 8, 64, 132, device)
    plan_splits(torch.full((8,), 100_000, dtype=torch.int32, device=device), scratch, 8)
    target = target_splits(8, 132, 8)
    assert target <= int(scratch.cu_splits[8]) < target + 8


def test_bound_on_work_items_grows_with_the_rows() -> None:
    for num_kv_heads in (1, 2, 8, 32):
        bounds = [max_work_items(rows, 132, num_kv_heads) for rows in range(1, 300)]
        assert bounds == sorted(bounds)


def test_tiles_divide_the_granule_of_splits() -> None:
    assert all(SPLIT_GRANULE % config.tile_keys == 0 for config in DECODE_CONFIGS.values())
