"""Root-mean-square norm on CUDA, alone or behind a residual add: one pass over memory, a row per program.

Computes in float32 and rounds once, as `torch.rms_norm`. Engine thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x: tl.tensor,  # [N, F]
    residual: tl.tensor,  # [N, F], or anything without ADD
    weight: tl.tensor,  # [F]
    out: tl.tensor,  # [N, F]
    eps: tl.tensor,
    NUM_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,  # NUM_FEATURES, up to a power of two
    ADD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * NUM_FEATURES
    columns = tl.arange(0, BLOCK)
    present = columns < NUM_FEATURES
    # Constant, so it arrives while the predecessor still runs.
    scales = tl.load(weight + columns, mask=present, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row + columns, mask=present, other=0.0)
    if ADD:
        summands = tl.load(residual + row + columns, mask=present, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if ADD:
        # The norm sees what later layers will read, which is the rounded sum.
        values = (values.to(tl.float32) + summands.to(tl.float32)).to(values.dtype)
        tl.store(residual + row + columns, values, mask=present)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / NUM_FEATURES + eps)
    tl.store(out + row + columns, (wide * scale * scales.to(tl.float32)).to(values.dtype), mask=present)


def rms_norm(x: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:  # hot
    """x / sqrt(mean(x²) + eps) · weight: x [N, F] contiguous, weight [F] -> [N, F]."""
    return _launch(x, None, weight, eps, pdl)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:  # hot
    """Add `x` to `residual` in place, rounded to its dtype, and return the norm of that sum; all [N, F] contiguous."""
    return _launch(x, residual, weight, eps, pdl)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, pdl: bool) -> Tensor:
    num_rows, num_features = x.shape
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty_like(x)
    block = triton.next_power_of_2(num_features)
    _rms_norm[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        eps,
        NUM_FEATURES=num_features,
        BLOCK=block,
        ADD=residual is not None,
        PDL=pdl,
        # Eight values per thread, one 16-byte load each, so that a lone row is as many loads in flight as it can be.
        num_warps=min(max(block // 256, 1), 16),
        launch_pdl=pdl,
    )
    return out
