"""Where min_p, top_k and top_p cut the rows of a step, without sorting and without asking the host.

The definition is `executor/narrowing.py`: min_p first, of the rest the top_k largest, of those, renormalised, the
fewest that reach top_p; among equals the lowest ids. Engine thread only.

`summarize` (parallel over blocks) leaves the best of each group of 32 tokens. From those `cut` (one program a row)
derives a floor that the threshold cannot be below: k groups whose best reaches x hold k tokens that do. Groups below
the floor are not read again; 20 to 50 of 4,748 are usually left, and `triton_narrowing.py` searches those. A flat row
with a wide nucleus leaves all groups, and one program then reads the whole row six to eight times.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.layers.sampling_columns import LOG_MIN_P, MIN_TEMPERATURE, NUM_COLUMNS, TEMPERATURE, TOP_K, TOP_P
from asyncllm.layers.triton_narrowing import GROUP, cut_row, exp, load_scaled

_SUMMARY_BLOCK = 4096

_GROUP, _NUM_COLUMNS, _MIN_TEMPERATURE = tl.constexpr(GROUP), tl.constexpr(NUM_COLUMNS), tl.constexpr(MIN_TEMPERATURE)
_TEMPERATURE, _TOP_P = tl.constexpr(TEMPERATURE), tl.constexpr(TOP_P)
_LOG_MIN_P, _TOP_K = tl.constexpr(LOG_MIN_P), tl.constexpr(TOP_K)
_INFINITY = tl.constexpr(float("inf"))
# Noise lies between -2.9 and 21.5: a token 24.4 nats below the best can never be drawn, so no cut need look deeper.
_REACH = tl.constexpr(25.0)
_BISECTIONS = tl.constexpr(10)  # of 25 nats, to 0.025: few groups get in for nothing


@dataclass(slots=True)
class CutScratch:
    """Up to S rows; G groups of 32 tokens, padded to whole blocks."""

    threshold: Tensor  # [S] float32: a token stays if z is above, or if it is equal and ...
    last_equal: Tensor  # [S] int32: ... its id is at most this
    group_best: Tensor  # [S, G] float32, z of the best token
    group_mass: Tensor  # [S, G] float32, sum of exp(z - group_best); valid for rows with top_p alone
    group_list: Tensor  # [S, G] int32, the groups that a cut looks into


def make_cut_scratch(num_rows: int, vocab_size: int, device: torch.device) -> CutScratch:
    """Scratch for up to `num_rows` rows; 58 kB a row at V = 151,936."""
    num_groups = triton.cdiv(vocab_size, _SUMMARY_BLOCK) * (_SUMMARY_BLOCK // GROUP)
    return CutScratch(
        threshold=torch.zeros(num_rows, dtype=torch.float32, device=device),
        last_equal=torch.zeros(num_rows, dtype=torch.int32, device=device),
        group_best=torch.zeros((num_rows, num_groups), dtype=torch.float32, device=device),
        group_mass=torch.zeros((num_rows, num_groups), dtype=torch.float32, device=device),
        group_list=torch.zeros((num_rows, num_groups), dtype=torch.int32, device=device),
    )


def cut(logits: Tensor, slots: Tensor, floats: Tensor, ints: Tensor, scratch: CutScratch, pdl: bool = False) -> None:
    """Fill threshold and last_equal of every row; rows that are greedy or have no limits keep everything.

    logits [R, V] of any float dtype, rows contiguous; slots [R] int32; floats, ints [L, 16], the parameter table.
    """
    num_rows, vocab_size = logits.shape
    num_groups = scratch.group_best.shape[1]
    _summarize_kernel[(num_rows, num_groups * GROUP // _SUMMARY_BLOCK)](
        logits,
        logits.stride(0),
        slots,
        floats,
        ints,
        scratch.group_best,
        scratch.group_mass,
        num_groups,
        vocab_size,
        BLOCK=_SUMMARY_BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    _cut_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        slots,
        floats,
        ints,
        scratch.group_best,
        scratch.group_mass,
        scratch.group_list,
        scratch.threshold,
        scratch.last_equal,
        num_groups,
        vocab_size,
        GROUPS=triton.next_power_of_2(num_groups),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=16,
    )


@triton.jit
def _limits(
    floats: tl.tensor, ints: tl.tensor, slot: tl.tensor, V: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """temperature, log_min_p, top_k and top_p of a slot, and whether there is anything to cut."""
    temperature = tl.load(floats + slot * _NUM_COLUMNS + _TEMPERATURE)
    log_min_p = tl.load(floats + slot * _NUM_COLUMNS + _LOG_MIN_P)
    top_p = tl.load(floats + slot * _NUM_COLUMNS + _TOP_P)
    top_k = tl.load(ints + slot * _NUM_COLUMNS + _TOP_K)
    top_k = tl.where(top_k < V, top_k, 0)
    limited = (log_min_p > -_INFINITY) | (top_k > 0) | (top_p < 1.0)
    return temperature, log_min_p, top_k, top_p, limited & (temperature >= _MIN_TEMPERATURE)


@triton.jit(do_not_specialize=["slots"])
def _summarize_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    slots: tl.tensor,  # [R] int32
    floats: tl.tensor,  # [L, 16]
    ints: tl.tensor,  # [L, 16]
    group_best: tl.tensor,  # [R, G]
    group_mass: tl.tensor,  # [R, G]
    num_groups: tl.tensor,  # G, padded
    V: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature, _, top_k, top_p, limited = _limits(floats, ints, tl.load(slots + row), V)
    if limited:
        token_ids = block * BLOCK + tl.arange(0, BLOCK)
        z = load_scaled(logits + row.to(tl.int64) * stride, token_ids, token_ids < V, temperature)
        z = tl.reshape(z, [BLOCK // _GROUP, _GROUP])
        best = tl.max(z, 1)
        groups = row * num_groups + block * (BLOCK // _GROUP) + tl.arange(0, BLOCK // _GROUP)
        tl.store(group_best + groups, best)
        if (top_p < 1.0) & (top_k == 0):
            base = tl.where(best > -_INFINITY, best, 0.0)
            tl.store(group_mass + groups, tl.sum(exp(z - base[:, None]), 1))


@triton.jit(do_not_specialize=["slots"])
def _cut_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    slots: tl.tensor,  # [R] int32
    floats: tl.tensor,  # [L, 16]
    ints: tl.tensor,  # [L, 16]
    group_best: tl.tensor,  # [R, G]
    group_mass: tl.tensor,  # [R, G]
    group_list: tl.tensor,  # [R, G]
    threshold: tl.tensor,  # [R]
    last_equal: tl.tensor,  # [R]
    num_groups: tl.tensor,  # G, padded
    V: tl.tensor,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    temperature, log_min_p, top_k, top_p, limited = _limits(floats, ints, tl.load(slots + row), V)
    lowest, last = -_INFINITY, V - 1
    if limited:
        groups = tl.arange(0, GROUPS)
        inside = groups < num_groups
        best = tl.load(group_best + row * num_groups + groups, mask=inside, other=-_INFINITY)
        peak = tl.max(best, 0)
        lowest = peak + log_min_p
        if (top_k > 0) | (top_p < 1.0):
            mass = tl.zeros([GROUPS], tl.float32)
            if top_k == 0:
                mass = tl.load(group_mass + row * num_groups + groups, mask=inside, other=0.0)
            floor, goal = _bound(best, mass, peak, log_min_p, top_k, top_p)
            listed = inside & (best >= floor)
            row_list = group_list + row * num_groups
            tl.store(row_list + tl.cumsum(listed.to(tl.int32), 0) - 1, groups, mask=listed)
            num_listed = tl.sum(listed.to(tl.int32), 0) * _GROUP
            tl.debug_barrier()  # the list is read by other threads than wrote it
            row_logits = logits + row.to(tl.int64) * stride
            lowest, last = cut_row(row_logits, row_list, num_listed, temperature, peak, floor, top_k, top_p, goal, V)
    tl.store(threshold + row, lowest)
    tl.store(last_equal + row, last)


@triton.jit
def _bound(
    best: tl.tensor, mass: tl.tensor, peak: tl.tensor, log_min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """A value that the threshold is not below, and the mass to reach if that is known already, else -1.

    best, mass [G]; masses here and below are in units of the most probable token's.
    """
    floor = peak - _REACH
    base = tl.where(peak > -_INFINITY, peak, 0.0)
    goal = -1.0
    if log_min_p > -_INFINITY:
        floor = tl.maximum(floor, peak + log_min_p)
    if top_k > 0:
        high = peak
        for _ in range(_BISECTIONS):
            middle = 0.5 * (floor + high)
            enough = tl.sum((best >= middle).to(tl.int32), 0) >= top_k
            floor, high = tl.where(enough, middle, floor), tl.where(enough, high, middle)
    elif log_min_p == -_INFINITY:
        first = exp(best - base)
        mass = mass * first
        goal = top_p * tl.sum(mass, 0)
        # Of a group that reaches x at least its best is at or above, and all but what 31 tokens below x can weigh.
        needed = goal * 1.0001
        high = peak
        for _ in range(_BISECTIONS):
            middle = 0.5 * (floor + high)
            at_least = tl.maximum(first, mass - (_GROUP - 1) * exp(middle - base))
            enough = tl.sum(tl.where(best >= middle, at_least, 0.0), 0) >= needed
            floor, high = tl.where(enough, middle, floor), tl.where(enough, high, middle)
    return floor, goal
