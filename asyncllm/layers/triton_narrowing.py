"""The exact cut of one row by top_k and top_p, inside a kernel: threshold, and the last id of the tokens equal to it.

Looks only into the listed groups of the row's tokens; that these hold every token at or above a floor, and the
threshold with them, is the business of `triton_cut.py`. Masses are in units of exp(base), base the row's largest z.
Pure functions; engine thread only.

Every sum has its terms in the same places whatever is left out of it. So a sum of fewer terms is never larger, rounded
or not, which the interval relies on; and a row is cut alike in any batch.
"""

import triton
import triton.language as tl

GROUP = 32  # tokens
_GROUP = tl.constexpr(GROUP)
# 16 warps hold three accumulators of [1024, 8] in 48 registers a thread; twice the tile spills.
_TILE = tl.constexpr(1024)
_PIVOTS = tl.constexpr(8)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """e ** x by the fast exponential, to a few units in the last place."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def load_logits(row_logits: tl.tensor, token_ids: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Logits as float32, -inf for NaN and for what is masked."""
    z = tl.load(row_logits + token_ids, mask=mask, other=-_INFINITY).to(tl.float32)
    return tl.where(z == z, z, -_INFINITY)


@triton.jit
def load_scaled(row_logits: tl.tensor, token_ids: tl.tensor, mask: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """z = logits / temperature. Kernels must agree on it to the last bit, hence the division that rounds correctly."""
    return tl.div_rn(load_logits(row_logits, token_ids, mask), temperature)


@triton.jit
def cut_row(
    row_logits: tl.tensor,  # [V]
    row_list: tl.tensor,  # [G] int32, groups to look into, ascending
    num_listed: tl.tensor,  # tokens in them
    temperature: tl.tensor,
    peak: tl.tensor,
    floor: tl.tensor,
    top_k: tl.tensor,  # 0 = off
    top_p: tl.tensor,  # >= 1 = off
    goal: tl.tensor,  # mass of the nucleus, -1 where it depends on what top_k and the floor leave
    V: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Threshold and last_equal of a row, of its tokens at or above the floor."""
    base = tl.where(peak > -_INFINITY, peak, 0.0)
    number, mass, threshold = _reaching(row_logits, row_list, num_listed, temperature, base, floor, V)
    num_equal = V
    if (top_k > 0) & (number > top_k):
        threshold, above = _narrow(
            row_logits, row_list, num_listed, temperature, base, threshold, peak, top_k.to(tl.float32), V, False
        )
        num_equal = top_k - above.to(tl.int32)
        if top_p < 1.0:
            number, mass, _ = _reaching(row_logits, row_list, num_listed, temperature, base, threshold, V)
            mass -= (number - top_k).to(tl.float32) * exp(threshold - base)
    if top_p < 1.0:
        goal = tl.where(goal < 0, top_p * mass, goal)
        nucleus, above = _narrow(
            row_logits, row_list, num_listed, temperature, base, threshold, peak, goal, V, True
        )  # fmt: skip
        # As many equals as it takes to reach the goal, and one in any case.
        needed = tl.ceil((goal - above) / exp(nucleus - base))
        needed = tl.minimum(tl.maximum(needed, 1.0), V.to(tl.float32)).to(tl.int32)
        num_equal = tl.where(nucleus > threshold, needed, tl.minimum(needed, num_equal))
        threshold = nucleus
    return threshold, _nth_equal(row_logits, row_list, num_listed, temperature, threshold, num_equal, V)


@triton.jit
def _load_listed(
    row_logits: tl.tensor,
    row_list: tl.tensor,
    start: tl.tensor,
    num_listed: tl.tensor,
    temperature: tl.tensor,
    V: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """z and token ids [TILE] from `start` on in the listed groups, in order of ids; -inf behind the end."""
    index = start + tl.arange(0, _TILE)
    group = tl.load(row_list + index // _GROUP, mask=index < num_listed, other=0)
    token_ids = group * _GROUP + index % _GROUP
    return load_scaled(row_logits, token_ids, (index < num_listed) & (token_ids < V), temperature), token_ids


@triton.jit
def _reaching(
    row_logits: tl.tensor,
    row_list: tl.tensor,
    num_listed: tl.tensor,
    temperature: tl.tensor,
    base: tl.tensor,
    floor: tl.tensor,
    V: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Number, mass and least of the listed tokens at or above the floor."""
    number = tl.zeros([_TILE], tl.int32)
    mass = tl.zeros([_TILE], tl.float32)
    least = tl.full([_TILE], _INFINITY, tl.float32)
    for start in range(0, num_listed, _TILE):
        z, _ = _load_listed(row_logits, row_list, start, num_listed, temperature, V)
        reach = z >= floor
        number += reach.to(tl.int32)
        mass += tl.where(reach, exp(z - base), 0.0)
        least = tl.minimum(least, tl.where(reach, z, _INFINITY))
    return tl.sum(number, 0), tl.sum(mass, 0), tl.min(least, 0)


@triton.jit
def _narrow(
    row_logits: tl.tensor,
    row_list: tl.tensor,
    num_listed: tl.tensor,
    temperature: tl.tensor,
    base: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    goal: tl.tensor,
    V: tl.tensor,
    BY_MASS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The smallest value in [low, high] with less than `goal` above it, and how much is above; by mass or by number.

    low and high are values of listed tokens, and stay so: the interval closes on one value, however values repeat.
    """
    above_high = 0.0
    while low < high:
        # The first pivot is `low` itself, so that every pass settles at least one value.
        pivots = low + (high - low) * (tl.arange(0, _PIVOTS).to(tl.float32) * (1.0 / _PIVOTS))
        above = tl.zeros([_TILE, _PIVOTS], tl.float32)
        after = tl.full([_TILE, _PIVOTS], _INFINITY, tl.float32)
        before = tl.full([_TILE, _PIVOTS], -_INFINITY, tl.float32)
        for start in range(0, num_listed, _TILE):
            z, _ = _load_listed(row_logits, row_list, start, num_listed, temperature, V)
            weight = tl.full([_TILE], 1.0, tl.float32)  # exact up to 2**24 tokens
            if BY_MASS:
                weight = exp(z - base)
            is_above = z[:, None] > pivots[None, :]
            above += tl.where(is_above, weight[:, None], 0.0)
            after = tl.minimum(after, tl.where(is_above, z[:, None], _INFINITY))
            before = tl.maximum(before, tl.where(is_above, -_INFINITY, z[:, None]))
        amount = tl.sum(above, 0)  # [PIVOTS], falling
        passed = amount >= goal  # what is looked for lies above these pivots
        low = tl.maximum(low, tl.max(tl.where(passed, tl.min(after, 0), -_INFINITY), 0))
        high = tl.minimum(high, tl.min(tl.where(passed, _INFINITY, tl.max(before, 0)), 0))
        above_high = tl.maximum(above_high, tl.max(tl.where(passed, 0.0, amount), 0))
    return low, above_high


@triton.jit
def _nth_equal(
    row_logits: tl.tensor,
    row_list: tl.tensor,
    num_listed: tl.tensor,
    temperature: tl.tensor,
    threshold: tl.tensor,
    number: tl.tensor,
    V: tl.tensor,
) -> tl.tensor:
    """Id of the `number`-th listed token equal to the threshold, or of the last one."""
    last, seen = -1, 0
    for start in range(0, num_listed, _TILE):
        z, token_ids = _load_listed(row_logits, row_list, start, num_listed, temperature, V)
        equal = (z == threshold).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0)
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (rank <= number), token_ids, -1), 0))
        seen += tl.sum(equal, 0)
    return last
