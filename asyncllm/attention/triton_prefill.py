"""Prefill attention over pages: rows of any number of query tokens, each causal behind its cached prefix.

The keys and values of the query tokens are stored in the pages before, so prefix and chunk are read alike. A program
takes some query tokens of a row with all query heads of one KV head; which tokens is in a list of tiles from the host,
so that rows of any lengths share one launch. Knows pages and rows; nothing of the scheduler. Engine thread.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from asyncllm.attention.triton_softmax import fold_tile, scaled_scores


class PrefillConfig(NamedTuple):
    """How one shape of head is computed."""

    block_rows: int  # query tokens x padded group of a program
    tile_keys: int  # keys per step of the loop
    num_warps: int
    num_stages: int


# (padded head_dim, bytes per element). Large enough for wgmma and for re-using keys, small enough that accumulators
# and scores stay in registers (D = 256 with 3 stages spills on sm_100) and a program below the 99 KiB of shared memory
# of small GPUs. The third stage loads page ids ahead of the keys they lead to.
PREFILL_CONFIGS = {
    (64, 2): PrefillConfig(128, 64, 8, 3),
    (128, 2): PrefillConfig(128, 64, 8, 3),
    (256, 2): PrefillConfig(64, 32, 8, 2),
    (64, 4): PrefillConfig(32, 32, 8, 2),
    (128, 4): PrefillConfig(16, 16, 4, 1),
    (256, 4): PrefillConfig(16, 16, 4, 2),
}


def queries_per_tile(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many query tokens one program takes."""
    config = PREFILL_CONFIGS[triton.next_power_of_2(head_dim), dtype.itemsize]
    return config.block_rows // triton.next_power_of_2(num_heads // num_kv_heads)


def prefill_tiles(
    query_lens: Sequence[int] | NDArray[np.integer],
    first_row: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seq_lens: Sequence[int] | NDArray[np.integer] | None = None,
) -> NDArray[np.int32]:
    """Cut rows into tiles: [T, 2] int32, (row, first query of the tile within the row).

    `query_lens` are those of the rows from `first_row` on; `seq_lens` likewise, prefixes counted, where known. Tiles
    with most keys come first, so that the last programs to start are short ones.
    """
    lengths = np.asarray(query_lens, dtype=np.int32)
    size = queries_per_tile(num_heads, num_kv_heads, head_dim, dtype)
    counts = -(-lengths // size)  # [rows]
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)  # [T]
    first_tile = np.cumsum(counts) - counts
    starts = (np.arange(len(rows), dtype=np.int32) - first_tile[rows]) * size
    keys = np.minimum(starts + size, lengths[rows])
    if seq_lens is not None:
        keys = keys + (np.asarray(seq_lens, dtype=np.int32) - lengths)[rows]
    order = np.argsort(-keys, kind="stable")
    return np.stack((rows[order] + first_row, starts[order]), axis=1).astype(np.int32)


def prefill_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    query_lens: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    out: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    pdl: bool = False,
) -> None:
    """Attend from the query tokens of the rows in `tiles` to the keys up to each token, into `out`.

    query [N, H, D], tokens may be strided; kv_cache [2, num_blocks, K, B, D]; block_table [L, C] int32; slots,
    query_starts (first token of a row in `query`), query_lens and seq_lens (prefix and query tokens) [S] int32; tiles
    [T, 2] int32 from `prefill_tiles`, row -1 for none; out [N, H, D] contiguous. Tokens in no tile are left as they
    are. With `pdl`, all of these but query and kv_cache must be older than the kernel right before.
    """
    _, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    block_d = triton.next_power_of_2(head_dim)
    config = PREFILL_CONFIGS[block_d, kv_cache.element_size()]
    # KV heads vary fastest, so that the longest tiles of all heads start first.
    _prefill_kernel[(num_kv_heads, tiles.shape[0])](
        query,
        kv_cache,
        block_table,
        slots,
        query_starts,
        query_lens,
        seq_lens,
        tiles,
        out,
        query.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        block_table.stride(0),
        scale,
        K=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        PADDED_GROUP=triton.next_power_of_2(num_heads // num_kv_heads),
        D=head_dim,
        B=block_size,
        BLOCK_D=block_d,
        M=config.block_rows,
        TILE=config.tile_keys,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def _attend_tiles(
    acc: tl.tensor,  # [M, BLOCK_D]
    total: tl.tensor,  # [M], sum of 2 ** (score - top)
    top: tl.tensor,  # [M], greatest score so far
    query: tl.tensor,  # [M, BLOCK_D]
    query_positions: tl.tensor,  # [M]
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    table_ptr: tl.tensor,
    page_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over keys begin .. end; unmasked, these are whole tiles that every query sees."""
    dims = tl.arange(0, BLOCK_D)
    for tile in range(begin, end, TILE):
        positions = tile + tl.arange(0, TILE)
        in_tile = (dims[None, :] < D) if BLOCK_D != D else None
        if MASKED:
            # By position: the tail of a page that nobody wrote may hold NaN, which no later mask would take back.
            stored = positions < end
            pages = tl.load(table_ptr + positions // B, mask=stored, other=0).to(tl.int64)
            in_tile = stored[:, None] & (dims[None, :] < D)
        else:
            pages = tl.load(table_ptr + positions // B).to(tl.int64)
        offsets = (pages * page_stride + (positions % B) * D)[:, None] + dims[None, :]
        other = None if in_tile is None else 0.0
        keys = tl.load(keys_ptr + offsets, mask=in_tile, other=other)  # [TILE, D]
        values = tl.load(values_ptr + offsets, mask=in_tile, other=other)
        scores = scaled_scores(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, SOFT_CAP)  # [M, TILE]
        if MASKED:
            age = query_positions[:, None] - positions[None, :]
            if WINDOW > 0:
                # Keys after the query wrap to more than any window: one comparison for both ends.
                visible = age.to(tl.uint32, bitcast=True) < WINDOW
            else:
                visible = age >= 0
            scores = tl.where(visible, scores, float("-inf"))
        # The first tiles may lie before the windows of later queries.
        acc, total, top = fold_tile(acc, total, top, scores, values, MAY_SEE_NOTHING=WINDOW > 0)
    return acc, total, top


@triton.jit
def _prefill_kernel(
    query_ptr: tl.tensor,  # [N, H, D]
    kv_ptr: tl.tensor,  # [2, num_blocks, K, B, D]
    block_table_ptr: tl.tensor,  # [L, C]
    slots_ptr: tl.tensor,  # [S]
    query_starts_ptr: tl.tensor,  # [S]
    query_lens_ptr: tl.tensor,  # [S]
    seq_lens_ptr: tl.tensor,  # [S]
    tiles_ptr: tl.tensor,  # [T, 2]
    out_ptr: tl.tensor,  # [N, H, D]
    query_stride: tl.tensor,
    value_offset: tl.tensor,  # from a page's keys to its values
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    kv_head = tl.program_id(0)
    row = tl.load(tiles_ptr + 2 * tl.program_id(1))
    if row < 0:
        # Even here: were no program of this grid to wait, it could end before the one it depends on.
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    first_query = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    query_len = tl.load(query_lens_ptr + row)
    prefix = tl.load(seq_lens_ptr + row) - query_len
    table_ptr = block_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride

    # Query tokens x the heads of a group are the rows of one matrix, so that a tile of keys serves all of them.
    QUERIES: tl.constexpr = M // PADDED_GROUP
    matrix_rows = tl.arange(0, M)
    queries = first_query + matrix_rows // PADDED_GROUP  # [M], within the row
    heads = matrix_rows % PADDED_GROUP
    dims = tl.arange(0, BLOCK_D)
    in_row = (queries < query_len) & (heads < GROUP)
    in_head = in_row[:, None] & (dims[None, :] < D)
    tokens = (tl.load(query_starts_ptr + row) + queries).to(tl.int64)
    head_offsets = ((kv_head * GROUP + heads) * D)[:, None] + dims[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = tl.load(query_ptr + (tokens * query_stride)[:, None] + head_offsets, mask=in_head, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    keys_ptr = kv_ptr + kv_head * (B * D)
    values_ptr = keys_ptr + value_offset
    positions = prefix + queries
    first_position = prefix + first_query
    end = prefix + tl.minimum(first_query + QUERIES, query_len)  # behind the last query's own key
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    if WINDOW > 0:
        # Masked throughout: a window is few tiles, and a third loop for those that every query sees costs registers.
        masked = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
    else:
        masked = (first_position + 1) // TILE * TILE  # tiles below this end no later than the first query's own key
        acc, total, top = _attend_tiles(
            acc, total, top, query, positions, keys_ptr, values_ptr, table_ptr, page_stride, 0, masked, scale,
            D, B, BLOCK_D, TILE, WINDOW, SOFT_CAP, MASKED=False,
        )  # fmt: skip
    acc, total, top = _attend_tiles(
        acc, total, top, query, positions, keys_ptr, values_ptr, table_ptr, page_stride, masked, end, scale,
        D, B, BLOCK_D, TILE, WINDOW, SOFT_CAP, MASKED=True,
    )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out_ptr + (tokens * (K * GROUP * D))[:, None] + head_offsets, result.to(out_ptr.dtype.element_ty), mask=in_head
    )
