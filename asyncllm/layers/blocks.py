"""Weights in 4-bit blocks, multiplied as they are stored: GGUF's Q4_0 and Q4_1.

32 values of a row share a scale and an offset: w = q · scale + offset. Knows the layout of a block and torch's int4
product; knows no files. Engine thread.
"""

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

BLOCK_VALUES = 32
QUANT_BYTES = 16  # of a block, behind its scale and offset: value i in the low half of byte i, i + 16 in the high half
BLOCK_BYTES = {"Q4_0": 2 + QUANT_BYTES, "Q4_1": 4 + QUANT_BYTES}  # a scale in float16; a scale and an offset
OUT_MULTIPLE = 16  # of a matrix's rows, for torch's product


class BlockRows(msgspec.Struct, frozen=True):
    """A matrix [N, K] in blocks, as it lies in the file."""

    kind: str  # a key of BLOCK_BYTES
    rows: Tensor  # [N, K / 32 * bytes of a block] uint8; may be reordered in place

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, K] uint8 in 0..15; scale and offset [N, K / 32] float32."""
        blocks = self.rows.unflatten(1, (-1, BLOCK_BYTES[self.kind]))
        factors = blocks[..., :-QUANT_BYTES].contiguous().view(torch.float16).float()  # [N, K / 32, 1 or 2]
        packed = blocks[..., -QUANT_BYTES:]
        quants = torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)
        scale = factors[..., 0]
        return quants, scale, factors[..., 1] if self.kind == "Q4_1" else -8 * scale


class BlockProduct:
    """x Wᵀ with W in blocks. Scales and offsets are rounded to bfloat16: an error of the size of bfloat16 weights' own.

    Against float64, 576 x 576, relative: 0.0025 and 0.0024 in bfloat16, of which 0.0017 is the rounding of the result.
    """

    __slots__ = ("_packed", "_scales", "num_bytes")

    def __init__(self, parts: Sequence[BlockRows]) -> None:
        """`parts` are stacked."""
        quants, scale, offset = (torch.cat(columns) for columns in zip(*(part.unpacked() for part in parts)))
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants.int(), 1)
        # torch's product means (q - 8) · scale + zero.
        zero = offset + 8 * scale
        self._scales = torch.stack((scale.T, zero.T), dim=-1).bfloat16().contiguous()  # [K / 32, N, 2]
        self.num_bytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:  # hot
        """[N, in] -> [N, out], bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, BLOCK_VALUES, self._scales)


def max_rows() -> int:
    """Up to how many tokens the product above is faster here than the packed bfloat16 one; 0: never, or not measured.

    One Zen 4 core, blocks against bfloat16, in µs: 576 x 3072, 1 row: 125 against 348, 4 rows: 213 against 293, 6 rows:
    351 against 330; 1536 x 576: 52 against 147, 87 against 128, 145 against 129. With AMX bfloat16 gains earlier.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    return 1 if torch.cpu._is_amx_tile_supported() else 4
