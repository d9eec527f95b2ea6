"""The arithmetic that decode and prefill kernels share: scores in units of log2, and softmax over tiles of keys.

Pure functions of tiles in registers; no pointers. Engine thread.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled_scores(products: tl.tensor, scale: tl.tensor, SOFT_CAP: tl.constexpr) -> tl.tensor:
    """Query-key products -> scores in units of log2, so that softmax is 2 ** score: exp2 is one instruction."""
    if SOFT_CAP > 0.0:
        # tanh(x) = 1 - 2 / (e ** 2x + 1) keeps its limits where the exponential overflows.
        power = tl.exp2(products * (scale * (2.0 * LOG2_E / SOFT_CAP)))
        return (1.0 - 2.0 / (power + 1.0)) * (SOFT_CAP * LOG2_E)
    else:
        return products * (scale * LOG2_E)


@triton.jit
def fold_tile(
    acc: tl.tensor,  # [M, D], values weighted by 2 ** (score - top)
    total: tl.tensor,  # [M], sum of these weights
    top: tl.tensor,  # [M], greatest score so far
    scores: tl.tensor,  # [M, TILE], -inf where a key is hidden
    values: tl.tensor,  # [TILE, D], finite
    MAY_SEE_NOTHING: tl.constexpr,  # some row may have seen no key by the end of this tile
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax: take one more tile of keys into acc, total and top."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MAY_SEE_NOTHING:
        # -inf - -inf would be NaN.
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top
