"""From projected heads to attention's input in one kernel: norms of queries and keys, rotation, storing into pages.

Knows the layout of a layer's pages and nothing of sequences: a token comes with its position and its slot.
Engine thread.
"""

import triton
import triton.language as tl
from torch import Tensor

# Up to this many tokens a step waits for the latency of one program, not for throughput.
FEW_TOKENS = 64


@triton.jit
def _norm_rope_store(
    qkv: tl.tensor,  # [N, H + 2K, D]
    positions: tl.tensor,  # [N]
    slot_mapping: tl.tensor,  # [N]
    cos_sin: tl.tensor,  # [P, D] float32
    kv_cache: tl.tensor,  # [2, num_blocks, K, B, D]
    query_weight: tl.tensor,  # [D], or anything without HAS_NORM
    key_weight: tl.tensor,
    eps: tl.tensor,
    value_stride: tl.tensor,  # from a key to its value
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF_DIM: tl.constexpr,  # D / 2
    HALF_BLOCK: tl.constexpr,  # HALF_DIM, up to a power of two
    GROUP: tl.constexpr,  # heads per program
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (token, group): GROUP neighbouring heads, be they queries, keys or values, as two halves of D."""
    token = tl.program_id(0)
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]  # [G, 1]
    columns = tl.arange(0, HALF_BLOCK)[None, :]  # [1, D / 2]
    num_rotated: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    total_heads: tl.constexpr = num_rotated + NUM_KV_HEADS
    is_value = heads >= num_rotated
    in_row = columns < HALF_DIM
    present = (heads < total_heads) & in_row
    rotated = (heads < num_rotated) & in_row
    queries = (heads < NUM_HEADS) & in_row
    stored = present & (heads >= NUM_HEADS)

    # Before gdc_wait: weights never change, and what starts a step never lets its successors begin early, so that
    # positions and slots are complete whichever kernel runs right before this one.
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    # Every head reads the angles itself: one fetch serves a warp's equal addresses, while shared values would go
    # through shared memory.
    angles = cos_sin + position * (2 * HALF_DIM) + columns + tl.zeros_like(heads)  # [G, D / 2]
    cos = tl.load(angles, mask=rotated, other=0.0)
    sin = tl.load(angles + HALF_DIM, mask=rotated, other=0.0)
    if HAS_NORM:
        # Of each pair of loads one is masked off. A choice of pointers would hide their alignment from the compiler.
        keys = rotated & (heads >= NUM_HEADS)
        query_weights = query_weight + columns + tl.zeros_like(heads)
        key_weights = key_weight + columns + tl.zeros_like(heads)
        query_weight1 = tl.load(query_weights, mask=queries, other=0.0)
        query_weight2 = tl.load(query_weights + HALF_DIM, mask=queries, other=0.0)
        key_weight1 = tl.load(key_weights, mask=keys, other=0.0)
        key_weight2 = tl.load(key_weights + HALF_DIM, mask=keys, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = qkv + (token * total_heads + heads) * (2 * HALF_DIM) + columns
    raw1 = tl.load(row, mask=present, other=0.0)
    raw2 = tl.load(row + HALF_DIM, mask=present, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if HAS_NORM:
        weight1 = query_weight1.to(tl.float32) + key_weight1.to(tl.float32)
        weight2 = query_weight2.to(tl.float32) + key_weight2.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF_DIM) + eps)[:, None]
        # Rounded twice, as transformers rounds: the normalised head to the weight's dtype, then their product.
        x1 = ((x1 * scale).to(query_weight1.dtype).to(tl.float32) * weight1).to(raw1.dtype).to(tl.float32)
        x2 = ((x2 * scale).to(query_weight2.dtype).to(tl.float32) * weight2).to(raw2.dtype).to(tl.float32)
    out1 = tl.where(is_value, raw1, (x1 * cos - x2 * sin).to(raw1.dtype))
    out2 = tl.where(is_value, raw2, (x2 * cos + x1 * sin).to(raw2.dtype))

    tl.store(row, out1, mask=queries)
    tl.store(row + HALF_DIM, out2, mask=queries)
    # Pages may lie beyond 2^31 elements. The mask turns off queries, whose kv_head is negative.
    kv_head = (heads - NUM_HEADS - is_value.to(tl.int32) * NUM_KV_HEADS).to(tl.int64)
    page = kv_cache + (slot // BLOCK_SIZE).to(tl.int64) * block_stride + (slot % BLOCK_SIZE) * (2 * HALF_DIM)
    cell = page + is_value.to(tl.int64) * value_stride + kv_head * head_stride + columns
    tl.store(cell, out1, mask=stored)
    tl.store(cell + HALF_DIM, out2, mask=stored)


def norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    num_heads: int,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> None:  # hot
    """Norm (given weights) and rotate queries and keys; queries stay in `qkv`, keys and values go to their pages.

    qkv [N, H + 2K, D] contiguous: queries, keys, values. positions, slot_mapping [N] int32; a slot is block_id * B +
    offset, 0 for padding. cos_sin [P, D] float32: cosines of a position's D / 2 angles, then sines. kv_cache
    [2, num_blocks, K, B, D], rows of a page and head contiguous. Weights [D], both or none.
    """
    num_tokens, total_heads, head_dim = qkv.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    assert total_heads == num_heads + 2 * num_kv_heads and (query_weight is None) == (key_weight is None)
    value_stride, block_stride, head_stride, _, _ = kv_cache.stride()
    # Sixteen bytes of each half per thread either way: one warp turns 4 heads of 128 dimensions.
    num_warps = 1 if num_tokens <= FEW_TOKENS else 4
    half_block = triton.next_power_of_2(head_dim // 2)
    group = max(256 * num_warps // half_block, 1)
    _norm_rope_store[(num_tokens, triton.cdiv(total_heads, group))](
        qkv,
        positions,
        slot_mapping,
        cos_sin,
        kv_cache,
        qkv if query_weight is None else query_weight,
        qkv if key_weight is None else key_weight,
        eps,
        value_stride,
        block_stride,
        head_stride,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HALF_DIM=head_dim // 2,
        HALF_BLOCK=half_block,
        GROUP=group,
        HAS_NORM=query_weight is not None,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
