"""Split-KV decode attention over pages, balanced over uneven lengths inside a fixed grid.

One query token per row attends to all its cached keys. A row's keys are cut into splits of equal length, so that one
long row keeps many SMs busy and a launch that a CUDA graph recorded still fits any lengths: `plan_splits` lays out the
splits of a step as a list of work items on the device, once for all layers; `decode_attention` computes each item and
merges the items of a row by their log-sum-exp. Knows pages and rows; nothing of the scheduler. Engine thread.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.attention.triton_softmax import fold_tile, scaled_scores

# Splits are cut at multiples of this many keys: a multiple of every tile below, so that only a row's end is ragged.
SPLIT_GRANULE = 64
# Shorter splits than this cost more in start-up and in partials (16 bytes per key, head and element) than they save.
MIN_SPLIT_KEYS = 128
# How many programs a step aims at, per SM. Two streaming programs saturate an SM's share of memory bandwidth, so a
# small batch, where every further program is mostly launch latency, aims at that. A large one aims at about four waves
# of the programs that fit: with equal items the last wave may be nearly empty, which then costs a part of 1/4
# wave, as the few programs left in it get more bandwidth each. In between the aim grows with the batch.
MIN_PROGRAMS_PER_SM = 2
MAX_PROGRAMS_PER_SM = 16
SPLITS_PER_ROW = 4
# Splits merged at once.
COMBINE_SPLITS = 16


class DecodeConfig(NamedTuple):
    """How one shape of head is computed."""

    tile_keys: int  # keys per step of the loop; divides SPLIT_GRANULE
    num_warps: int
    num_stages: int


# (padded head_dim, bytes per element). Page ids are loaded before the keys they lead to, so that the pipeliner splits
# its stages between both loads: 5 keep two tiles of keys and values in flight, 3 or 4 keep one and then nothing
# overlaps within a program, and with 2 every tile waits for its page ids (read off the code for sm_90). Two tiles take
# up to 72 KiB of shared memory, so that three programs share an SM of an H200.
DECODE_CONFIGS = {
    (64, 2): DecodeConfig(64, 4, 5),
    (128, 2): DecodeConfig(64, 4, 5),
    (256, 2): DecodeConfig(32, 4, 5),
    (64, 4): DecodeConfig(32, 4, 5),
    (128, 4): DecodeConfig(32, 4, 5),
    (256, 4): DecodeConfig(16, 4, 5),
}


@dataclass(slots=True)
class DecodeScratch:
    """Buffers for steps of up to S rows, shared by all layers and overwritten by each step. W: see `max_work_items`."""

    cu_splits: Tensor  # [S + 1] int32: row i owns work items cu_splits[i] .. cu_splits[i + 1]
    work_rows: Tensor  # [W] int32: row of each work item, -1 behind the last
    split_keys: Tensor  # [1] int32: keys per split of this step, a multiple of SPLIT_GRANULE
    partial_out: Tensor  # [W, H, D] float32: softmax-weighted values of an item, normalised within it
    partial_lse: Tensor  # [W, H] float32: log2 of the sum of 2 ** score, -inf where an item has no visible key
    num_sms: int


def target_splits(num_rows: int, num_sms: int, num_kv_heads: int) -> int:
    """How many splits a step of `num_rows` rows aims at in all; each is `num_kv_heads` programs."""
    fewest = -(-num_sms * MIN_PROGRAMS_PER_SM // num_kv_heads)
    most = -(-num_sms * MAX_PROGRAMS_PER_SM // num_kv_heads)
    return min(max(fewest, num_rows * SPLITS_PER_ROW), most)


def max_work_items(num_rows: int, num_sms: int, num_kv_heads: int) -> int:
    """W, the work items that any lengths of `num_rows` rows need at most; grows with `num_rows`.

    With g_i granules in row i and splits of s >= sum(g) / target granules, row i has ceil(g_i / s) < g_i / s + 1 items,
    hence all rows together fewer than sum(g) / s + rows <= target + rows.
    """
    return target_splits(num_rows, num_sms, num_kv_heads) + num_rows


def make_decode_scratch(
    num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, device: torch.device
) -> DecodeScratch:
    """Allocate for steps of up to `num_rows` rows. The work list starts empty."""
    num_items = max_work_items(num_rows, num_sms, num_kv_heads)
    return DecodeScratch(
        cu_splits=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
        work_rows=torch.full((num_items,), -1, dtype=torch.int32, device=device),
        split_keys=torch.full((1,), MIN_SPLIT_KEYS, dtype=torch.int32, device=device),
        partial_out=torch.zeros(num_items, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.full((num_items, num_heads), -torch.inf, dtype=torch.float32, device=device),
        num_sms=num_sms,
    )


def plan_splits(seq_lens: Tensor, scratch: DecodeScratch, num_kv_heads: int) -> None:
    """Lay out the work items of a step: seq_lens [S] int32, 0 for padding rows. Once per step, for all layers.

    One program: a few microseconds at most, against one kernel's worth of searching in every layer.
    """
    num_rows = seq_lens.shape[0]
    _plan_kernel[(1,)](
        seq_lens,
        scratch.cu_splits,
        scratch.work_rows,
        scratch.split_keys,
        num_rows,
        target_splits(num_rows, scratch.num_sms, num_kv_heads),
        max_work_items(num_rows, scratch.num_sms, num_kv_heads),
        GRANULE=SPLIT_GRANULE,
        MIN_GRANULES=MIN_SPLIT_KEYS // SPLIT_GRANULE,
        # Of the buffers rather than of the step, so that all steps share one compiled kernel.
        BLOCK_S=triton.next_power_of_2(scratch.cu_splits.shape[0] - 1),
        BLOCK_W=triton.next_power_of_2(scratch.work_rows.shape[0]),
        num_warps=4,
    )


def decode_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    scratch: DecodeScratch,
    out: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    pdl: bool = False,
) -> None:
    """Attend from one query token per row to all keys of its pages, the token's own included, into `out`.

    query [S, H, D], rows may be strided; kv_cache [2, num_blocks, K, B, D]; block_table [L, C] int32; slots [S] int32,
    the row of `block_table` that a row uses; seq_lens [S] int32, those `plan_splits` saw; out [S, H, D] contiguous,
    zeros for rows of length 0. With `pdl`, kernels right before must not be those that wrote the plan, slots, lengths
    or block table: these are read before the wait.
    """
    num_rows, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    block_d = triton.next_power_of_2(head_dim)
    config = DECODE_CONFIGS[block_d, kv_cache.element_size()]
    # KV heads vary fastest: programs that run together read one row's table entries and neighbouring bytes of pages.
    _attend_kernel[(num_kv_heads, max_work_items(num_rows, scratch.num_sms, num_kv_heads))](
        query,
        kv_cache,
        block_table,
        slots,
        seq_lens,
        scratch.cu_splits,
        scratch.work_rows,
        scratch.split_keys,
        scratch.partial_out,
        scratch.partial_lse,
        out,
        query.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        block_table.stride(0),
        scale,
        K=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        D=head_dim,
        B=block_size,
        BLOCK_D=block_d,
        TILE=config.tile_keys,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _combine_kernel[(num_heads, num_rows)](
        scratch.cu_splits,
        scratch.partial_out,
        scratch.partial_lse,
        out,
        H=num_heads,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=COMBINE_SPLITS,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows", "target", "num_items"])
def _plan_kernel(
    seq_lens_ptr: tl.tensor,
    cu_splits_ptr: tl.tensor,
    work_rows_ptr: tl.tensor,
    split_keys_ptr: tl.tensor,
    num_rows: tl.tensor,
    target: tl.tensor,
    num_items: tl.tensor,
    GRANULE: tl.constexpr,
    MIN_GRANULES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    rows = tl.arange(0, BLOCK_S)
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0)
    granules = (seq_lens + GRANULE - 1) // GRANULE
    split = tl.maximum((tl.sum(granules, 0) + target - 1) // target, MIN_GRANULES)
    tl.store(split_keys_ptr, split * GRANULE)
    counts = (granules + split - 1) // split
    ends = tl.cumsum(counts, 0)
    tl.store(cu_splits_ptr, 0)
    tl.store(cu_splits_ptr + 1 + rows, ends, mask=rows < num_rows)
    # All rows write their j-th item at once; the rounds are as many as the longest row has splits.
    for j in range(0, tl.max(counts, 0)):
        tl.store(work_rows_ptr + ends - counts + j, rows, mask=j < counts)
    items = tl.arange(0, BLOCK_W)
    tl.store(work_rows_ptr + items, -1, mask=(items >= tl.sum(counts, 0)) & (items < num_items))


@triton.jit
def _attend_kernel(
    query_ptr: tl.tensor,  # [S, H, D]
    kv_ptr: tl.tensor,  # [2, num_blocks, K, B, D]
    block_table_ptr: tl.tensor,  # [L, C]
    slots_ptr: tl.tensor,  # [S]
    seq_lens_ptr: tl.tensor,  # [S]
    cu_splits_ptr: tl.tensor,  # [S + 1]
    work_rows_ptr: tl.tensor,  # [W]
    split_keys_ptr: tl.tensor,  # [1]
    partial_out_ptr: tl.tensor,  # [W, H, D]
    partial_lse_ptr: tl.tensor,  # [W, H]
    out_ptr: tl.tensor,  # [S, H, D]
    query_stride: tl.tensor,
    value_offset: tl.tensor,  # from a page's keys to its values
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row = tl.load(work_rows_ptr + item)
    if row < 0:
        # Even here: were no program of this grid to wait, it could end before the one it depends on.
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    first_item = tl.load(cu_splits_ptr + row)
    num_splits = tl.load(cu_splits_ptr + row + 1) - first_item
    seq_len = tl.load(seq_lens_ptr + row)
    split_keys = tl.load(split_keys_ptr)
    table_ptr = block_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride
    begin = (item - first_item) * split_keys
    end = tl.minimum(begin + split_keys, seq_len)
    if WINDOW > 0:
        begin = tl.maximum(begin, tl.maximum(seq_len - WINDOW, 0) // TILE * TILE)

    # The query heads of a KV head are the rows of one matrix, padded to the 16 of a tensor core's operand.
    M: tl.constexpr = 16
    heads = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    in_head = (heads[:, None] < GROUP) & (dims[None, :] < D)
    head_offsets = (kv_head * GROUP + heads[:, None]) * D + dims[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = tl.load(query_ptr + row.to(tl.int64) * query_stride + head_offsets, mask=in_head, other=0.0)  # [M, D]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    keys_ptr = kv_ptr + kv_head * (B * D)
    values_ptr = keys_ptr + value_offset
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    for tile in range(begin, end, TILE):
        positions = tile + tl.arange(0, TILE)
        stored = positions < end
        pages = tl.load(table_ptr + positions // B, mask=stored, other=0).to(tl.int64)
        offsets = (pages * page_stride + (positions % B) * D)[:, None] + dims[None, :]
        # By position: the tail of a page that nobody wrote may hold NaN, which no later mask would take back.
        in_tile = stored[:, None]
        if BLOCK_D != D:
            in_tile = in_tile & (dims[None, :] < D)
        keys = tl.load(keys_ptr + offsets, mask=in_tile, other=0.0)  # [TILE, D]
        values = tl.load(values_ptr + offsets, mask=in_tile, other=0.0)
        scores = scaled_scores(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, SOFT_CAP)  # [M, TILE]
        visible = stored
        if WINDOW > 0:
            visible = visible & (positions >= seq_len - WINDOW)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        # Every tile has a visible key, as the first is the one in which the window begins.
        acc, total, top = fold_tile(acc, total, top, scores, values, MAY_SEE_NOTHING=False)

    # A split that lies before the window saw nothing: 0 / 1, and a log-sum-exp of -inf + 0.
    total = tl.where(total > 0.0, total, 1.0)
    result = acc / total[:, None]
    if num_splits == 1:
        tl.store(
            out_ptr + row.to(tl.int64) * (K * GROUP * D) + head_offsets, result.to(out_ptr.dtype.element_ty), in_head
        )
    else:
        tl.store(partial_out_ptr + item.to(tl.int64) * (K * GROUP * D) + head_offsets, result, mask=in_head)
        lse_ptrs = partial_lse_ptr + item * (K * GROUP) + kv_head * GROUP + heads
        tl.store(lse_ptrs, top + tl.log2(total), mask=heads < GROUP)


@triton.jit
def _combine_kernel(
    cu_splits_ptr: tl.tensor,  # [S + 1]
    partial_out_ptr: tl.tensor,  # [W, H, D]
    partial_lse_ptr: tl.tensor,  # [W, H]
    out_ptr: tl.tensor,  # [S, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    head = tl.program_id(0)
    row = tl.program_id(1)
    first = tl.load(cu_splits_ptr + row)
    end = tl.load(cu_splits_ptr + row + 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if end - first == 1:  # the row's only program wrote the result
        return
    dims = tl.arange(0, BLOCK_D)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        items = start + tl.arange(0, BLOCK_N)
        lse = tl.load(partial_lse_ptr + items * H + head, mask=items < end, other=float("-inf"))
        seen = lse > float("-inf")
        partials = tl.load(
            partial_out_ptr + (items.to(tl.int64) * H + head)[:, None] * D + dims[None, :],
            mask=seen[:, None] & (dims[None, :] < D),
            other=0.0,
        )  # [BLOCK_N, D]
        new_top = tl.maximum(top, tl.max(lse, 0))
        # Until a split inside the window comes, the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(partials * weights[:, None], 0)
        top = new_top
    # Padding rows have no split: zeros, which stay finite in whatever the model does with them.
    result = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + (row.to(tl.int64) * H + head) * D + dims, result.to(out_ptr.dtype.element_ty), mask=dims < D)
