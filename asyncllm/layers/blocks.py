"""Weights as a file stores them: GGUF's Q4_0, Q4_1 and Q8_0, blocks of 32 values of a row, or plain 16-bit numbers.

Knows how large a block is and what its values are; knows no files, and no products. Engine thread.
"""

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

BLOCK_VALUES = 32
# Of a block: a scale in float16 (and an offset), then 4 or 8 bits a value.
BLOCK_BYTES = {"BF16": 2 * BLOCK_VALUES, "F16": 2 * BLOCK_VALUES, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16}


class BlockRows(msgspec.Struct, frozen=True):
    """A matrix [N, K] in blocks, as it lies in the file."""

    kind: str  # a key of BLOCK_BYTES
    rows: Tensor  # [N, K / 32 * bytes of a block] uint8; may be reordered in place

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        num_rows, num_bytes = self.rows.shape
        return num_rows, num_bytes // BLOCK_BYTES[self.kind] * BLOCK_VALUES

    def values(self) -> Tensor:
        """[N, K]: float32, or bfloat16 or float16 where it is that."""
        if self.kind in PLAIN:
            return self.rows.view(PLAIN[self.kind])
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(self.rows.numpy(), GGMLQuantizationType[self.kind]))

    def in_eight_bits(self) -> "BlockRows":
        """As Q8_0, rounded anew unless it is that."""
        if self.kind == "Q8_0":
            return self
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import quantize

        return BlockRows("Q8_0", torch.from_numpy(quantize(self.values().float().numpy(), GGMLQuantizationType.Q8_0)))

    @staticmethod
    def of(values: Tensor) -> "BlockRows":
        """[N, K] in float16 if it is that, and rounded to bfloat16 if not."""
        if values.dtype is not torch.float16:
            return BlockRows.of_bfloat16(values)
        return BlockRows("F16", values.contiguous().view(torch.uint8))

    @staticmethod
    def of_bfloat16(values: Tensor) -> "BlockRows":
        """[N, K] rounded to bfloat16."""
        return BlockRows("BF16", values.to(torch.bfloat16).contiguous().view(torch.uint8))

    @staticmethod
    def joined(parts: "Sequence[BlockRows]") -> "BlockRows":
        """Matrices of one kind, one below the other."""
        return parts[0] if len(parts) == 1 else BlockRows(parts[0].kind, torch.cat([part.rows for part in parts]))
