"""Prefill attention over pages against the oracle and against decode attention, and its list of tiles."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from asyncllm.attention.triton_decode import decode_attention, make_decode_scratch, plan_splits
from asyncllm.attention.triton_prefill import PREFILL_CONFIGS, prefill_attention, prefill_tiles, queries_per_tile
from tests.attention.oracle import PagedRows, check_close, paged_rows

# bfloat16 products are wrong in the interpreter.
HALF_DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


def prefill(
    rows: PagedRows, query_lens: list[int], window: int = 0, soft_cap: float = 0.0, num_padding_tiles: int = 0
) -> Tensor:
    """Tile and attend; outputs that no tile writes stay NaN."""
    device = rows.query.device
    _, num_heads, head_dim = rows.query.shape
    tiles = prefill_tiles(
        query_lens, 0, num_heads, rows.kv_cache.shape[2], head_dim, rows.query.dtype, rows.seq_lens.tolist()
    )
    padding = np.full((num_padding_tiles, 2), -1, dtype=np.int32)
    starts = np.cumsum([0, *query_lens[:-1]])
    out = torch.full(rows.query.shape, torch.nan, dtype=rows.query.dtype, device=device)
    prefill_attention(
        rows.query,
        rows.kv_cache,
        rows.block_table,
        rows.slots,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(query_lens, dtype=torch.int32, device=device),
        rows.seq_lens,
        torch.from_numpy(np.concatenate((tiles, padding))).to(device),
        out,
        rows.scale,
        window=window,
        soft_cap=soft_cap,
    )
    return out


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 2), (3, 1), (8, 2), (7, 1), (8, 1), (16, 1)])
def test_query_heads_share_the_keys_of_their_group(device: torch.device, num_heads: int, num_kv_heads: int) -> None:
    rows = paged_rows([41, 70], [41, 9], device, num_heads, num_kv_heads)
    check_close(prefill(rows, [41, 9]), rows.expect([41, 9]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_every_head_dim_and_dtype(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    rows = paged_rows([150, 80], [150, 20], device, 4, 2, head_dim, dtype=dtype)
    check_close(prefill(rows, [150, 20]), rows.expect([150, 20]))


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, 256])
def test_every_page_size(device: torch.device, block_size: int) -> None:
    rows = paged_rows([90, 270], [90, 40], device, block_size=block_size)
    check_close(prefill(rows, [90, 40]), rows.expect([90, 40]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_prompts_of_lengths_around_tiles(device: torch.device, dtype: torch.dtype) -> None:
    config = PREFILL_CONFIGS[64, dtype.itemsize]
    edges = {config.tile_keys, queries_per_tile(2, 1, 64, dtype)}
    lengths = [1, *(edge + step for edge in sorted(edges) for step in (-1, 0, 1))]
    rows = paged_rows(lengths, lengths, device, dtype=dtype)
    check_close(prefill(rows, lengths), rows.expect(lengths))


@pytest.mark.parametrize("prefix", [1, 15, 16, 31, 32, 33, 64, 200])
def test_chunk_sees_its_prefix_whole_and_itself_causally(device: torch.device, prefix: int) -> None:
    rows = paged_rows([prefix + 37], [37], device)
    check_close(prefill(rows, [37]), rows.expect([37]))


def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives(device: torch.device) -> None:
    rows = paged_rows([100], [100], device)
    whole = prefill(rows, [100])
    query = rows.query
    for start, end in ((0, 33), (33, 34), (34, 100)):
        rows.query = query[start:end]
        rows.seq_lens.fill_(end)
        check_close(prefill(rows, [end - start]), whole[start:end])


@pytest.mark.parametrize("window", [1, 5, 32, 33, 64, 70, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_window_smaller_and_larger_than_tiles(device: torch.device, window: int, dtype: torch.dtype) -> None:
    rows = paged_rows([130, 200, 3], [130, 45, 1], device, dtype=dtype)
    check_close(prefill(rows, [130, 45, 1], window=window), rows.expect([130, 45, 1], window=window))


def test_pages_before_the_window_are_not_read(device: torch.device) -> None:
    rows = paged_rows([500], [20], device)
    expected = rows.expect([20], window=64)
    rows.block_table[rows.slots[0], : (500 - 20 - 64 - 64) // 16] = 2**30
    check_close(prefill(rows, [20], window=64), expected)


@pytest.mark.parametrize("window", [0, 20])
def test_soft_cap_bounds_scores(device: torch.device, window: int) -> None:
    rows = paged_rows([60, 90], [60, 30], device)
    rows.query.mul_(30.0)
    check_close(prefill(rows, [60, 30], window, 5.0), rows.expect([60, 30], window, 5.0))


def test_prompts_chunks_and_decode_rows_share_a_step(device: torch.device) -> None:
    query_lens, seq_lens = [1, 1, 50, 17, 1], [1, 77, 50, 120, 33]
    rows = paged_rows(seq_lens, query_lens, device, 6, 2)
    check_close(prefill(rows, query_lens), rows.expect(query_lens))


def test_padding_tiles_write_nothing(device: torch.device) -> None:
    rows = paged_rows([20, 0], [20, 0], device)
    check_close(prefill(rows, [20, 0], num_padding_tiles=5), rows.expect([20, 0]))


def test_rows_in_no_tile_are_left_alone(device: torch.device) -> None:
    rows = paged_rows([20, 30], [20, 1], device)
    tiles = torch.from_numpy(prefill_tiles([20], 0, 2, 1, 64, torch.float32)).to(device)
    numbers = [torch.tensor(pair, dtype=torch.int32, device=device) for pair in ([0, 20], [20, 1])]
    out = torch.full(rows.query.shape, 7.0, device=device)
    prefill_attention(
        rows.query, rows.kv_cache, rows.block_table, rows.slots, *numbers, rows.seq_lens, tiles, out, rows.scale
    )
    check_close(out[:20], rows.expect([20, 1])[:20])
    assert (out[20] == 7.0).all()


@pytest.mark.parametrize("window, soft_cap", [(0, 0.0), (50, 0.0), (0, 3.0)])
def test_decode_gives_what_prefill_gives_for_the_last_token(device: torch.device, window: int, soft_cap: float) -> None:
    rows = paged_rows([64, 230, 1], [64, 230, 1], device, 6, 2)
    last = torch.tensor([63, 293, 294], device=device)
    expected = prefill(rows, [64, 230, 1], window, soft_cap)[last]
    rows.query = rows.query[last]
    scratch = make_decode_scratch(3, 6, 2, 64, 4, device)
    plan_splits(rows.seq_lens, scratch, 2)
    out = torch.empty_like(expected)
    decode_attention(
        rows.query,
        rows.kv_cache,
        rows.block_table,
        rows.slots,
        rows.seq_lens,
        scratch,
        out,
        rows.scale,
        window,
        soft_cap,
    )
    check_close(out, expected)


@pytest.mark.parametrize("seed", range(10))
def test_tiles_cover_every_query_once_longest_first(seed: int) -> None:
    rng = random.Random(seed)
    query_lens = [rng.choice([0, 1, rng.randint(1, 600)]) for _ in range(rng.randint(0, 12))]
    seq_lens = [length + rng.choice([0, rng.randint(0, 3000)]) for length in query_lens]
    first_row = rng.randint(0, 5)
    tiles = prefill_tiles(query_lens, first_row, 14, 2, 128, torch.float16, seq_lens)
    size = queries_per_tile(14, 2, 128, torch.float16)
    assert tiles.dtype == np.int32 and tiles.shape == (sum(-(-length // size) for length in query_lens), 2)
    covered: set[tuple[int, int]] = set()
    work = []
    for row, start in tiles.tolist():
        end = min(start + size, query_lens[row - first_row])
        queries = {(row, query) for query in range(start, end)}
        assert queries and not queries & covered
        covered |= queries
        work.append(seq_lens[row - first_row] - query_lens[row - first_row] + end)
    assert len(covered) == sum(query_lens)
    assert work == sorted(work, reverse=True)
