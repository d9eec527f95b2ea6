"""Root-mean-square norm, alone or behind a residual add. Engine thread."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self._mirrored: Tensor | None = None  # [2 * hidden], see prepare

    def prepare(self) -> None:
        """On a CPU, lay the weight out for `layer_norm`, which has a fused kernel there; `rms_norm` runs as ten.

        The mean of [x, -x] is 0 and its variance mean(x²), so the first half of its layer norm is the norm wanted.
        """
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self._mirrored = torch.cat((self.weight, self.weight))

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        if self._mirrored is None:
            return torch.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        mirrored = torch.cat((x, x.neg()), dim=-1)
        normed = torch.layer_norm(mirrored, (2 * self.hidden_size,), self._mirrored, None, self.eps)
        return normed[:, : self.hidden_size].contiguous()

    def add_norm(self, x: Tensor, residual: Tensor) -> Tensor:  # hot
        """Add `x` to `residual` in place, and return the norm of the sum: one name, so that one kernel can do both."""
        return self.forward(residual.add_(x))
