"""Rotary position embedding over whole heads, halves rotated (https://arxiv.org/abs/2104.09864). Engine thread."""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of a step's positions, worked out once per step for all layers.

    Kernels read them from a table over all positions instead. Plain torch has none: for a step's few tokens six small
    operations cost less than a table's memory (128k positions of 128 dimensions: 64 MiB).
    """

    inv_freq: Tensor  # [D / 2] float32

    def __init__(self, head_dim: int, theta: float, max_position: int) -> None:
        super().__init__()
        self.max_position = max_position
        self.table: Tensor | None = None  # [max_position, D] float32, cosines then sines; only where kernels run
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        self.register_buffer("inv_freq", 1.0 / theta**exponents, persistent=False)

    def prepare(self, fused: bool) -> None:
        """Build the table that kernels read."""
        if fused:
            positions = torch.arange(self.max_position, device=self.inv_freq.device)
            angles = positions[:, None].float() * self.inv_freq
            self.table = torch.cat((angles.cos(), angles.sin()), dim=-1)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[N] int64 -> cos and sin, each [N, 1, D]; angles in float32; the first half of sin is negated.

        With that sign, x · cos + roll(x, D / 2) · sin is the rotation, and no half needs negating in any layer.
        """
        angles = positions[:, None].float() * self.inv_freq  # [N, D / 2]
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).to(dtype)[:, None],
            torch.cat((-sin, sin), dim=-1).to(dtype)[:, None],
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # hot
    """Rotate heads by their position: x [N, heads, D]; cos, sin [N, 1, D] from `Rotary`."""
    return (x * cos).addcmul_(torch.roll(x, x.shape[-1] // 2, -1), sin)
