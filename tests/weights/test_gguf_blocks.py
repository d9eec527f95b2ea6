"""Quantized matrices in the blocks that native kernels multiply: the values that gguf reads from the original ones."""

import gguf.quants
import numpy
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

from asyncllm.layers.blocks import BLOCK_BYTES
from asyncllm.weights.gguf import DTYPES, SERVED_TYPES
from asyncllm.weights.gguf_blocks import as_blocks, blocks_kind

NUM_ROWS, WIDTH = 6, 768


def random_rows(kind: Kind) -> numpy.ndarray:
    """Rows of random bytes, but for scales: those are small numbers rather than infinities."""
    per_block, num_bytes = GGML_QUANT_SIZES[kind]
    generator = numpy.random.default_rng(kind.value)
    blocks = generator.integers(0, 256, (NUM_ROWS * WIDTH // per_block, num_bytes), dtype=numpy.uint8)
    scale = numpy.frombuffer(numpy.float16(0.013).tobytes(), numpy.uint8)
    for place in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
                  "Q6_K": (208,)}.get(kind.name, (0,)):  # fmt: skip
        blocks[:, place : place + 2] = scale
    return blocks.reshape(NUM_ROWS, -1)


@pytest.mark.parametrize("name", sorted(set(SERVED_TYPES) - set(DTYPES)))
def test_every_served_type_keeps_its_values(name: str) -> None:
    rows = random_rows(Kind[name])
    exact = gguf.quants.dequantize(rows, Kind[name])
    kind, blocks = blocks_kind(name), as_blocks(name, rows)
    assert kind in BLOCK_BYTES and blocks.shape == (NUM_ROWS, WIDTH // 32 * BLOCK_BYTES[kind])
    read = gguf.quants.dequantize(blocks, Kind[kind])
    most = numpy.abs(exact.reshape(-1, 32)).max(axis=1, keepdims=True)
    off = numpy.abs(read - exact).reshape(-1, 32) / most
    # Q8_0 has 127 steps on either side, and rounds its scale to 11 bits; what is kept is kept.
    assert off.max() <= (0 if kind == name else 0.0015 if name == "Q4_K" else 0.6 / 127)


def test_a_large_matrix_is_brought_over_in_slabs_with_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: as_blocks(name, random_rows(Kind[name])) for name in ("Q4_K", "Q6_K", "Q5_0")}
    monkeypatch.setattr("asyncllm.weights.gguf_blocks.SLAB_VALUES", 4 * WIDTH)
    for name, blocks in whole.items():
        numpy.testing.assert_array_equal(as_blocks(name, random_rows(Kind[name])), blocks, err_msg=name)
