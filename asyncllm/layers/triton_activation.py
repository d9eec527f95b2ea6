"""Gated activations on CUDA: act(gate) · up in one pass, gate and up side by side as one product leaves them.

Computes in float32 and rounds once. Engine thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many rows, narrow programs spread a row over more of the device.
FEW_ROWS = 16


@triton.jit
def activate(gate: tl.tensor, GELU_TANH: tl.constexpr) -> tl.tensor:
    """silu, or gelu in its tanh form, of float32 values."""
    logit = gate
    if GELU_TANH:
        # (1 + tanh(z)) / 2 = sigmoid(2z): both activations are x · sigmoid(some polynomial of x).
        logit = gate * (1.5957691216057308 + 0.07135481282736302 * gate * gate)  # 2·sqrt(2/π)·(x + 0.044715·x³)
    return gate * (1.0 / (1.0 + tl.exp2(logit * -1.4426950408889634)))  # -log2(e)


@triton.jit
def _gate(
    gate_up: tl.tensor,  # [N, 2F]
    out: tl.tensor,  # [N, F]
    NUM_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU_TANH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64) * NUM_FEATURES
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = columns < NUM_FEATURES
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + 2 * row + columns, mask=present, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + NUM_FEATURES + columns, mask=present, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + row + columns, (activate(gate, GELU_TANH) * up).to(out.dtype.element_ty), mask=present)


def silu_and_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:  # hot
    """silu(gate) · up: [N, 2F] contiguous -> [N, F]."""
    return _launch(gate_up, False, pdl)


def gelu_tanh_and_mul(gate_up: Tensor, pdl: bool = False) -> Tensor:  # hot
    """gelu(gate) · up, gelu in its tanh form: [N, 2F] contiguous -> [N, F]."""
    return _launch(gate_up, True, pdl)


def _launch(gate_up: Tensor, gelu_tanh: bool, pdl: bool) -> Tensor:
    num_rows, width = gate_up.shape
    assert gate_up.is_contiguous() and width % 2 == 0
    num_features = width // 2
    out = torch.empty((num_rows, num_features), dtype=gate_up.dtype, device=gate_up.device)
    num_warps = 1 if num_rows <= FEW_ROWS else 4
    block = 256 * num_warps  # 16 bytes per thread and load
    _gate[(num_rows, triton.cdiv(num_features, block))](
        gate_up,
        out,
        NUM_FEATURES=num_features,
        BLOCK=block,
        GELU_TANH=gelu_tanh,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return out
