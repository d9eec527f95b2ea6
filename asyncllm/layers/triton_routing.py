"""Which experts a token goes to, and all tokens in the order of their experts, found on the device alone.

A pair is a token and one of its k choices: token · k + choice. Pairs are ordered by expert, and cut in tiles that each
have one expert, so that a tile is one product. What a tile computes depends on its own pairs only; no atomics, so the
order is the same every time. The host is never asked: grids and tensors have the sizes that the worst choice needs, as
a captured graph must. Knows router logits; knows no weights. Engine thread.

    route    softmax, top k and weights of each token; the order as well where one program takes all tokens
    place    the order, where several do: each must know how many pairs the others have for each expert
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 1024
# Tokens x experts of a program, padded, 16 a thread: 64 tokens of 128 experts are still one launch, not two.
_MOST_CELLS = 8192
_CELLS_OF_MANY = 4096  # where several programs share the tokens
_CELLS_PER_WARP = 512
_FEWEST_ROWS, _MOST_ROWS = 16, 64  # 256 rows of 32 experts spill


@dataclass(slots=True)
class Routing:
    """N tokens, k choices of each, P = N · k pairs, at most T tiles."""

    weights: Tensor  # [P] float32, of each pair
    pairs: Tensor  # [P] int32, ordered by expert, then by token
    tiles: Tensor  # [T, 3] int32: expert, first place in `pairs`, number of pairs
    num_tiles: Tensor  # [1] int32, how many of T there are


def max_tiles(num_tokens: int, num_experts: int, num_chosen: int, tile_rows: int) -> int:
    """Tiles that any choice needs at most: every expert's last tile may hold a single pair."""
    num_pairs = num_tokens * num_chosen
    return (num_pairs + min(num_experts, num_pairs) * (tile_rows - 1)) // tile_rows


def route(logits: Tensor, num_chosen: int, renormalize: bool, tile_rows: int) -> Routing:  # hot
    """Choose by the softmax over logits [N, E] contiguous, in float32; of equal experts the first, as torch on CUDA.

    `renormalize`: the weights of a token's choices are scaled to add up to 1. A row of NaN chooses some experts, and
    its weights are NaN.
    """
    num_tokens, num_experts = logits.shape
    assert logits.is_contiguous() and num_chosen <= num_experts <= MAX_EXPERTS
    padded = triton.next_power_of_2(num_experts)
    rows = _FEWEST_ROWS
    while rows < num_tokens:
        rows *= 4  # not 2: every size is compiled by itself
    is_one_block = rows <= _MOST_ROWS and rows * padded <= _MOST_CELLS
    if not is_one_block:
        rows = min(_CELLS_OF_MANY // padded, _MOST_ROWS)
    num_blocks = triton.cdiv(num_tokens, rows)
    num_pairs = num_tokens * num_chosen

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    routing = Routing(
        weights=empty(num_pairs, dtype=torch.float32),
        pairs=empty(num_pairs),
        tiles=empty(max_tiles(num_tokens, num_experts, num_chosen, tile_rows), 3),
        num_tiles=empty(1),
    )
    chosen = routing.pairs if is_one_block else empty(num_tokens, num_chosen)
    counts = routing.pairs if is_one_block else empty(num_blocks, num_experts)
    num_warps = min(max(rows * padded // _CELLS_PER_WARP, 1), 16)
    _route[(num_blocks,)](
        logits,
        routing.weights,
        chosen,
        counts,
        routing.pairs,
        routing.tiles,
        routing.num_tiles,
        num_tokens,
        E=num_experts,
        K=num_chosen,
        EXPERTS=padded,
        ROWS=rows,
        TILE=tile_rows if is_one_block else 1,
        RENORMALIZE=renormalize,
        PLACE=is_one_block,
        num_warps=num_warps,
    )
    if not is_one_block:
        _place[(num_blocks,)](
            chosen,
            counts,
            routing.pairs,
            routing.tiles,
            routing.num_tiles,
            num_tokens,
            num_blocks,
            E=num_experts,
            K=num_chosen,
            EXPERTS=padded,
            ROWS=rows,
            TILE=tile_rows,
            num_warps=num_warps,
        )
    return routing


@triton.jit
def _place_rows(
    choices: tl.tensor,  # [ROWS, EXPERTS], which choice of its token an expert is; -1: none
    rows: tl.tensor,  # [ROWS], tokens
    before: tl.tensor,  # [EXPERTS], pairs of earlier blocks
    totals: tl.tensor,  # [EXPERTS], pairs of all blocks
    pairs: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    most_pairs: tl.tensor,  # of one expert: a token chooses it once
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write the pairs of one block to their places; programs share the writing of the tiles."""
    experts = tl.arange(0, EXPERTS)
    taken = (choices >= 0).to(tl.int32)
    first = tl.cumsum(totals, 0) - totals  # [EXPERTS]
    places = (first + before)[None, :] + tl.cumsum(taken, 0) - taken
    tl.store(pairs + places, rows[:, None] * K + choices, mask=choices >= 0)
    num = (totals + TILE - 1) // TILE
    first_tile = tl.cumsum(num, 0) - num
    program = tl.program_id(0)
    for index in range(program, tl.cdiv(most_pairs, TILE), tl.num_programs(0)):
        begin = index * TILE
        there = begin < totals
        tile = tiles + (first_tile + index) * 3
        tl.store(tile, experts, mask=there)
        tl.store(tile + 1, first + begin, mask=there)
        tl.store(tile + 2, tl.minimum(totals - begin, TILE), mask=there)
    if program == 0:
        tl.store(num_tiles, tl.sum(num, 0))


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits: tl.tensor,  # [N, E]
    weights: tl.tensor,  # [N * K]
    chosen: tl.tensor,  # [N, K], unless PLACE
    counts: tl.tensor,  # [blocks, E], unless PLACE
    pairs: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    num_tokens: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,  # E, up to a power of two
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # with PLACE
    RENORMALIZE: tl.constexpr,
    PLACE: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    real = experts < E
    cells = (rows < num_tokens)[:, None] & real[None, :]
    scores = tl.load(logits + rows.to(tl.int64)[:, None] * E + experts[None, :], mask=cells, other=0.0).to(tl.float32)
    scores = tl.where(real[None, :], scores, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    # NaN compares with nothing, and would let a lane beyond the last expert win.
    left = tl.where(shares == shares, shares, 0.0)
    left = tl.where(real[None, :], left, -1.0)
    choices = tl.full([ROWS, EXPERTS], -1, tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(K):
        best, index = tl.max(left, 1, return_indices=True)
        picked = experts[None, :] == index[:, None]
        choices = tl.where(picked, choice, choices)
        left = tl.where(picked, -1.0, left)
        total += best
    if RENORMALIZE:
        shares = shares / total[:, None]
    choices = tl.where((rows < num_tokens)[:, None], choices, -1)
    taken = choices >= 0
    numbers = rows[:, None] * K + choices
    tl.store(weights + numbers, shares, mask=taken)
    totals = tl.sum(taken.to(tl.int32), 0)
    if PLACE:
        none = tl.zeros([EXPERTS], tl.int32)
        _place_rows(choices, rows, none, totals, pairs, tiles, num_tiles, num_tokens, K, EXPERTS, TILE)
    else:
        tl.store(chosen + numbers, tl.broadcast_to(experts[None, :], [ROWS, EXPERTS]), mask=taken)
        tl.store(counts + tl.program_id(0) * E + experts, totals, mask=real)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _place(
    chosen: tl.tensor,  # [N, K]
    counts: tl.tensor,  # [blocks, E]
    pairs: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    choices = tl.full([ROWS, EXPERTS], -1, tl.int32)
    for choice in tl.static_range(K):
        expert = tl.load(chosen + rows * K + choice, mask=rows < num_tokens, other=-1)
        choices = tl.where(experts[None, :] == expert[:, None], choice, choices)
    before = tl.zeros([EXPERTS], tl.int32)
    totals = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_blocks, ROWS):
        blocks = start + tl.arange(0, ROWS)
        there = (blocks < num_blocks)[:, None] & (experts < E)[None, :]
        some = tl.load(counts + blocks[:, None] * E + experts[None, :], mask=there, other=0)
        totals += tl.sum(some, 0)
        before += tl.sum(tl.where((blocks < tl.program_id(0))[:, None], some, 0), 0)
    _place_rows(choices, rows, before, totals, pairs, tiles, num_tiles, num_tokens, K, EXPERTS, TILE)
