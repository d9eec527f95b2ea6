"""Draws one token per row on the device: greedy, over the whole vocabulary, or within min_p, top_k and top_p.

Knows logits and a table of parameters by request slot; knows nothing of requests, penalties or streams. The definition
is `executor/sampler.py`. A row's token depends on its logits, seed and position alone, never on the batch, so every sum
is taken in a fixed order. Grids are fixed and the host is never asked: made for CUDA graphs. Engine thread only.

    cut    thresholds of the rows, only where rows may have limits                                     (triton_cut.py)
    draw   grid (R, NB)   best score of each block of tokens; the logits are read once               (triton_noise.py)
    pick   grid (R,)      best block of each row
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.layers.sampling_columns import MIN_TEMPERATURE, NUM_COLUMNS, TEMPERATURE
from asyncllm.layers.triton_cut import CutScratch, cut, make_cut_scratch
from asyncllm.layers.triton_narrowing import load_logits, load_scaled
from asyncllm.layers.triton_noise import log_exponential, noise_bits, row_key

Kind = Literal["greedy", "gumbel", "full"]

_BLOCK = 2048  # 75 programs for a single row of 151,936, 16 tokens a thread
_NUM_COLUMNS, _TEMPERATURE = tl.constexpr(NUM_COLUMNS), tl.constexpr(TEMPERATURE)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_INFINITY = tl.constexpr(float("inf"))


@dataclass(slots=True)
class SampleScratch:
    """Between the kernels of one step, for up to S rows and NB blocks; R <= S rows use the first of each."""

    block_best: Tensor  # [S, NB] float32
    block_index: Tensor  # [S, NB] int32, token id of block_best
    cut: CutScratch


def make_sample_scratch(num_rows: int, vocab_size: int, device: torch.device) -> SampleScratch:
    """Scratch for up to `num_rows` rows."""
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    return SampleScratch(
        block_best=torch.zeros((num_rows, num_blocks), dtype=torch.float32, device=device),
        block_index=torch.zeros((num_rows, num_blocks), dtype=torch.int32, device=device),
        cut=make_cut_scratch(num_rows, vocab_size, device),
    )


def sample(  # hot
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    token_hash: Tensor,
    kind: Kind,
    scratch: SampleScratch,
    last_token: Tensor,
    out: Tensor,
    pdl: bool = False,
) -> None:
    """Sample row i into out[i] and last_token[slots[i]]; padding rows name the padding slot.

    logits [R, V] float32, bfloat16 or float16, rows contiguous; slots [R] int32; positions [R] int32, the index of the
    sampled token in its sequence; floats, ints [L, 16], the parameter table; token_hash [V] int32; last_token [L], out
    [R] int32. `kind` says what the rows may ask for: "greedy" ignores the table, "gumbel" knows temperatures, "full"
    also min_p, top_k and top_p. NaN counts as -inf; a row of nothing else yields some id below V.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = scratch.block_best.shape[1]
    if kind == "full":
        cut(logits, slots, floats, ints, scratch.cut, pdl)
    _draw_kernel[(num_rows, num_blocks)](
        logits,
        logits.stride(0),
        slots,
        positions,
        floats,
        ints,
        token_hash,
        scratch.cut.threshold,
        scratch.cut.last_equal,
        scratch.block_best,
        scratch.block_index,
        vocab_size,
        KIND=kind,
        BLOCK=_BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    _pick_kernel[(num_rows,)](
        scratch.block_best,
        scratch.block_index,
        slots,
        last_token,
        out,
        num_blocks,
        PADDED=triton.next_power_of_2(num_blocks),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["slots", "positions"])
def _draw_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    slots: tl.tensor,  # [R] int32
    positions: tl.tensor,  # [R] int32
    floats: tl.tensor,  # [L, 16]
    ints: tl.tensor,  # [L, 16]
    token_hash: tl.tensor,  # [V] int32
    threshold: tl.tensor,  # [R]
    last_equal: tl.tensor,  # [R]
    block_best: tl.tensor,  # [R, NB]
    block_index: tl.tensor,  # [R, NB]
    V: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    token_ids = block * BLOCK + tl.arange(0, BLOCK)
    mask = token_ids < V
    row_logits = logits + row.to(tl.int64) * stride
    if PDL:
        tl.extra.cuda.gdc_wait()
    if KIND == "greedy":
        scores = load_logits(row_logits, token_ids, mask)
    else:
        slot = tl.load(slots + row)
        temperature = tl.load(floats + slot * _NUM_COLUMNS + _TEMPERATURE)
        greedy = temperature < _MIN_TEMPERATURE
        scores = load_scaled(row_logits, token_ids, mask, tl.where(greedy, 1.0, temperature))
        noisy = greedy == 0
        if KIND == "full":
            least = tl.load(threshold + row)
            kept = (scores > least) | ((scores == least) & (token_ids <= tl.load(last_equal + row)))
            scores = tl.where(kept, scores, -_INFINITY)
            # A block that the cut left empty needs no noise: below top_k nearly all of them.
            noisy = noisy & (tl.max(scores, 0) > -_INFINITY)
        if noisy:
            key_low, key_high = row_key(ints, slot, tl.load(positions + row))
            hashes = tl.load(token_hash + token_ids, mask=mask, other=0)
            scores -= log_exponential(noise_bits(hashes, key_low, key_high))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    best, index = tl.max(scores, 0, return_indices=True)
    tl.store(block_best + row * tl.num_programs(1) + block, best)
    tl.store(block_index + row * tl.num_programs(1) + block, block * BLOCK + index)


@triton.jit(do_not_specialize=["slots", "out"])
def _pick_kernel(
    block_best: tl.tensor,  # [R, NB]
    block_index: tl.tensor,  # [R, NB]
    slots: tl.tensor,  # [R] int32
    last_token: tl.tensor,  # [L] int32
    out: tl.tensor,  # [R] int32
    num_blocks: tl.tensor,
    PADDED: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    row = tl.program_id(0)
    blocks = tl.arange(0, PADDED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best = tl.load(block_best + row * num_blocks + blocks, mask=blocks < num_blocks, other=-_INFINITY)
    # Equal scores: the first block, and in it the first index, so the lowest id.
    _, block = tl.max(best, 0, return_indices=True)
    token_id = tl.load(block_index + row * num_blocks + block)
    tl.store(out + row, token_id)
    tl.store(last_token + tl.load(slots + row), token_id)
