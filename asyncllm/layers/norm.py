"""Root-mean-square norm, alone or behind a residual add. Engine thread."""

from types import ModuleType

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self._kernels: ModuleType | None = None
        self._mirrored: Tensor | None = None  # [2 * hidden], see prepare

    def prepare(self, fused: bool) -> None:
        """Choose the fastest way: a kernel, or on a CPU `layer_norm`, which is fused there; `rms_norm` runs as ten.

        The mean of [x, -x] is 0 and its variance mean(x²), so the first half of its layer norm is the norm wanted.
        """
        if fused:
            from asyncllm.layers import triton_norm

            self._kernels = triton_norm
        elif self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self._mirrored = torch.cat((self.weight, self.weight))

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[..., hidden] -> [..., hidden]."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.weight, self.eps)
        if self._mirrored is None:
            return torch.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        mirrored = torch.cat((x, x.neg()), dim=-1)
        normed = torch.layer_norm(mirrored, (2 * self.hidden_size,), self._mirrored, None, self.eps)
        return normed[..., : self.hidden_size].contiguous()

    def add_norm(self, x: Tensor, residual: Tensor) -> Tensor:  # hot
        """Add `x` to `residual` in place, and return the norm of the sum."""
        if self._kernels is not None:
            return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)
        return self.forward(residual.add_(x))
