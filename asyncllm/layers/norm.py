"""Root-mean-square norm and layer norm, alone or behind a residual add. Engine thread."""

from types import ModuleType

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, hidden_size: int, eps: float, plus_one: bool = False) -> None:
        """`plus_one`: the checkpoint stores what is to be added to 1 (Gemma)."""
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self._kernels: ModuleType | None = None
        self._mirrored: Tensor | None = None  # [2 * hidden], see prepare

    def prepare(self, fused: bool) -> None:
        """Choose the fastest way: a kernel, or on a CPU `layer_norm`, which is fused there; `rms_norm` runs as ten.

        The mean of [x, -x] is 0 and its variance mean(x²), so the first half of its layer norm is the norm wanted.
        """
        dtype = self.weight.dtype
        if self.plus_one:
            # In float32, as 8 bits would lose most of what is added to 1.
            self.weight = nn.Parameter(self.weight.float() + 1.0, requires_grad=False)
        if fused:
            from asyncllm.layers import triton_norm

            self._kernels = triton_norm
        elif self.weight.device.type == "cpu" and dtype == torch.bfloat16:
            self._mirrored = torch.cat((self.weight, self.weight))

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[..., hidden] -> [..., hidden]."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.weight, self.eps)
        if self._mirrored is None:
            wide = x.to(self.weight.dtype)
            return torch.rms_norm(wide, (self.hidden_size,), self.weight, self.eps).to(x.dtype)
        mirrored = torch.cat((x, x.neg()), dim=-1)
        normed = torch.layer_norm(mirrored, (2 * self.hidden_size,), self._mirrored, None, self.eps)
        return normed[..., : self.hidden_size].contiguous()

    def add_norm(self, x: Tensor, residual: Tensor) -> Tensor:  # hot
        """Add `x` to `residual` in place, and return the norm of the sum."""
        if self._kernels is not None:
            return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)
        return self.forward(residual.add_(x))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) · weight + bias (https://arxiv.org/abs/1607.06450)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[..., hidden] -> [..., hidden]."""
        return torch.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)

    def add_norm(self, x: Tensor, residual: Tensor) -> Tensor:  # hot
        """Add `x` to `residual` in place, and return the norm of the sum."""
        return self.forward(residual.add_(x))
