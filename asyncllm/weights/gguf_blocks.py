"""GGUF's matrices in the few kinds of blocks that are multiplied as they are: `layers.blocks.BLOCK_BYTES`.

Q4_0, Q4_1, Q8_0, bfloat16 and float16 stay as they are. Q4_K is Q4_1 with its scales packed: unpacked, they are
rounded to float16, 11 bits where the values have 4. All others become Q8_0: against the 2 to 6 bits of theirs its
rounding is small, and it is half of bfloat16's memory. Knows layouts of blocks; no files and no names. Engine thread.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

# Values brought over at once: in float32, and as gguf joins pieces, a large head whole takes 8 bytes of each.
SLAB_VALUES = 1 << 20
KEPT = ("Q4_0", "Q4_1", "Q8_0", "BF16", "F16")
_SUPER_BYTES = 144  # of Q4_K's 256 values: two float16, 12 bytes of scales and minima, 128 bytes of values
_SUB_BLOCKS = 8


def blocks_kind(kind: str) -> str:
    """What `as_blocks` makes of a type, F32 excepted."""
    return kind if kind in KEPT else "Q4_1" if kind == "Q4_K" else "Q8_0"


def as_blocks(kind: str, rows: "Bytes") -> "Bytes":
    """Rows of a type, F32 excepted, [N, bytes of a row], as rows of blocks of `blocks_kind(kind)`."""
    if kind in KEPT:
        return rows
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    from asyncllm.layers.blocks import BLOCK_BYTES, BLOCK_VALUES

    stored = GGMLQuantizationType[kind]
    values_per_block, block_bytes = GGML_QUANT_SIZES[stored]
    width = rows.shape[1] // block_bytes * values_per_block
    blocks = np.empty((len(rows), width // BLOCK_VALUES * BLOCK_BYTES[blocks_kind(kind)]), dtype=np.uint8)
    step = max(1, SLAB_VALUES // width)
    for start in range(0, len(rows), step):
        slab = rows[start : start + step]
        blocks[start : start + step] = (
            _q4_1_of_q4_k(slab) if kind == "Q4_K" else quantize(dequantize(slab, stored), GGMLQuantizationType.Q8_0)
        )
    return blocks


def _q4_1_of_q4_k(rows: "Bytes") -> "Bytes":
    """w = (d · scale) · q - dmin · minimum, with six bits for each scale and minimum of 32 values."""
    super_blocks = rows.reshape(-1, _SUPER_BYTES)
    factors = super_blocks[:, :4].copy().view(np.float16).astype(np.float32)  # d, dmin
    scales, minima = _six_bits(super_blocks[:, 4:16])  # [n, 8]
    blocks = np.empty((len(super_blocks), _SUB_BLOCKS, 20), dtype=np.uint8)
    blocks[..., 0:2] = (factors[:, :1] * scales).astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2:4] = (-factors[:, 1:] * minima).astype(np.float16)[..., None].view(np.uint8)
    # A run of 32 bytes has one block's values in its low halves, the next one's in the high ones.
    runs = super_blocks[:, 16:].reshape(-1, _SUB_BLOCKS // 2, 32)
    values = np.stack((runs & 15, runs >> 4), axis=2).reshape(-1, _SUB_BLOCKS, 32)
    blocks[..., 4:] = values[..., :16] | values[..., 16:] << 4
    return blocks.reshape(len(rows), -1)


def _six_bits(packed: "Bytes") -> "tuple[Bytes, Bytes]":
    """12 bytes -> eight scales and eight minima: four of each in six bits, four in four and two."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    return scales, minima
