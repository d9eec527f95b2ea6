"""Rotary position embedding, halves of heads rotated (https://arxiv.org/abs/2104.09864). Engine thread.

Whatever a layer's rope is, it is cosines and sines of D / 2 angles per position: no rope and partial rope are angles of
zero, and scaling of contexts changes the frequencies once, when the model is built. So attention and its kernels know
one rotation.
"""

import math

import torch
from torch import Tensor, nn

from asyncllm.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)


class Rotary(nn.Module):
    """Cosines and sines of a step's positions, worked out once per step for all layers.

    Kernels read them from a table over all positions instead. Plain torch has none: for a step's few tokens six small
    operations cost less than a table's memory (128k positions of 128 dimensions: 64 MiB).
    """

    inv_freq: Tensor  # [D / 2] float32
    amplitude: Tensor | None  # [D / 2] float32, what cosines and sines are multiplied by; None for 1

    def __init__(
        self, head_dim: int, theta: float, max_position: int, rotary_dim: int, scaling: RopeScaling | None = None
    ) -> None:
        """`rotary_dim` dimensions turn; see `rotary_order` for where they are. 0 of them: no rope."""
        super().__init__()
        self.turns = rotary_dim > 0
        self.max_position = max_position
        self.table: Tensor | None = None  # [max_position, D] float32, cosines then sines; only where kernels run
        with torch.device("cpu"):
            inv_freq, amplitude = torch.zeros(head_dim // 2), torch.ones(head_dim // 2)
            if rotary_dim:
                turning = slice(0, rotary_dim // 2)
                inv_freq[turning], amplitude[turning] = frequencies(rotary_dim, theta, max_position, scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("amplitude", amplitude if (amplitude != 1).any() else None, persistent=False)

    def prepare(self, fused: bool) -> None:
        """Build the table that kernels read."""
        if fused:
            positions = torch.arange(self.max_position, device=self.inv_freq.device)
            self.table = torch.cat(self._cos_sin(positions), dim=-1)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[N] int64 -> cos and sin, each [N, 1, D]; angles in float32; the first half of sin is negated.

        With that sign, x · cos + roll(x, D / 2) · sin is the rotation, and no half needs negating in any layer.
        """
        cos, sin = self._cos_sin(positions)
        return (
            torch.cat((cos, cos), dim=-1).to(dtype)[:, None],
            torch.cat((-sin, sin), dim=-1).to(dtype)[:, None],
        )

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> [N, D / 2] twice, float32."""
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.amplitude is None else (cos * self.amplitude, sin * self.amplitude)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # hot
    """Rotate heads by their position: x [N, heads, D]; cos, sin [N, 1, D] from `Rotary`."""
    return (x * cos).addcmul_(torch.roll(x, x.shape[-1] // 2, -1), sin)


def rotary_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Where each dimension of a head is in the checkpoint, if only its first `rotary_dim` turn: [D] int64.

    Dimension i turns with i + D / 2 here, and with i + rotary_dim / 2 there. Scores do not change when queries and keys
    are reordered alike, so reordering their projections once replaces slicing and joining heads in every layer.
    """
    dims = torch.arange(head_dim)
    turning, still = dims[:rotary_dim].chunk(2), dims[rotary_dim:].chunk(2)
    return torch.cat((turning[0], still[0], turning[1], still[1]))


def frequencies(dim: int, theta: float, max_position: int, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Angles per position [dim / 2] float32, and what cosines and sines are multiplied by.

    One set of frequencies serves all positions up to `max_position`, since keys stay in the cache as they were rotated:
    where a scaling depends on the length of the context, it is that of the longest one.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = 1.0 / theta**exponents
    match scaling:
        case None:
            return inv_freq, 1.0
        case LinearScaling():
            return inv_freq / scaling.factor, 1.0
        case DynamicScaling():
            stretch = max(max_position / scaling.original_max_position_embeddings, 1.0)
            base = theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base**exponents, 1.0
        case Llama3Scaling():
            return _llama3(inv_freq, scaling), 1.0
        case YarnScaling():
            return _yarn(inv_freq, dim, theta, scaling), _yarn_amplitude(scaling)
        case LongRopeScaling():
            is_long = max_position > scaling.original_max_position_embeddings
            factors = torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
            return 1.0 / (factors * theta**exponents), _longrope_amplitude(scaling)


def _llama3(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep what turns often within the original context, divide what hardly turns, blend linearly between."""
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(inv_freq / scaling.factor, inv_freq, kept.clamp(0, 1))


def _yarn(inv_freq: Tensor, dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """Keep dimensions below the one that turns beta_fast times, divide those above beta_slow, blend between."""

    def dimension(num_turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (2 * math.pi * num_turns)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    divided = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return torch.lerp(inv_freq, inv_freq / scaling.factor, divided)


def _yarn_amplitude(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)


def _longrope_amplitude(scaling: LongRopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
