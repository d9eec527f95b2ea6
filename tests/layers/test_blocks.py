"""4-bit blocks as GGUF stores them: unpacked as gguf does, and multiplied by torch's int4 product."""

import gguf.quants
import msgspec
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from asyncllm.layers.blocks import BlockProduct, BlockRows
from asyncllm.layers.linear import Linear, can_pack
from asyncllm.layers.rotary import Rotary
from asyncllm.models.decoder import DecoderAttention
from tests.executor.tiny_model import TINY

OUT, IN = 48, 96
KINDS = [Kind.Q4_0, Kind.Q4_1]


def quantized(kind: Kind, out_features: int = OUT, seed: int = 0) -> tuple[BlockRows, torch.Tensor]:
    """Random blocks and the values that gguf reads from them."""
    values = numpy.random.default_rng(seed).normal(0.02, 0.1, (out_features, IN)).astype(numpy.float32)
    rows = gguf.quants.quantize(values, kind)
    return BlockRows(kind.name, torch.from_numpy(rows)), torch.from_numpy(gguf.quants.dequantize(rows, kind))


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (result.double() - exact).norm(dim=1) / exact.norm(dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_what_gguf_reads_from_them(kind: Kind) -> None:
    blocks, expected = quantized(kind)
    quants, scale, offset = blocks.unpacked()
    values = quants.unflatten(1, (-1, 32)) * scale[..., None] + offset[..., None]
    torch.testing.assert_close(values.flatten(1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_product_errs_no_more_than_one_of_bfloat16_weights(kind: Kind, num_rows: int) -> None:
    parts = [quantized(kind, OUT, seed) for seed in range(2)]
    weight = torch.cat([values for _, values in parts])
    x = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ weight.double().T
    of_blocks = relative_error(BlockProduct([blocks for blocks, _ in parts])(x), exact)
    of_rounded = relative_error(x @ weight.bfloat16().T, exact)
    # Both round weights to 8 bits, and the result; a block with a wrong scale would be a hundred times that.
    assert (of_blocks < 2 * of_rounded + 1e-3).all(), (of_blocks, of_rounded)


def make_layer(
    monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor, max_rows: int, kept: dict[int, BlockRows]
) -> Linear:
    monkeypatch.setattr("asyncllm.layers.linear.max_rows", lambda: max_rows)
    layer = Linear(IN, 2 * OUT, bias=True, parts={"a": OUT, "b": OUT})
    layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.arange(2 * OUT).bfloat16(), requires_grad=False)
    if not can_pack(layer.weight):
        pytest.skip("no packed bfloat16 product on this CPU")
    for part, blocks in kept.items():
        layer.keep_blocks(part, blocks)
    layer.prepare(fused=False)
    return layer


def test_few_rows_read_the_blocks_and_many_the_packed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, _), (second, _) = quantized(Kind.Q4_1, seed=0), quantized(Kind.Q4_1, seed=1)
    # Another weight than the blocks', to tell which of the two was read.
    layer = make_layer(monkeypatch, torch.zeros(2 * OUT, IN), 4, {0: first, 1: second})
    x = torch.ones(5, IN, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[0], layer.bias)
        expected = BlockProduct([first, second])(x[:4]) + layer.bias
        torch.testing.assert_close(layer(x[:4]), expected)
    assert layer.num_bytes < IN * 2 * OUT


@pytest.mark.parametrize("max_rows,parts", [(4, 1), (0, 2)])
def test_a_layer_half_in_blocks_or_without_a_fast_product_reads_the_packed_weight(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, parts: int
) -> None:
    kept = {part: quantized(Kind.Q4_1, seed=part)[0] for part in range(parts)}
    layer = make_layer(monkeypatch, torch.zeros(2 * OUT, IN), max_rows, kept)
    assert layer.block_product is None
    with torch.inference_mode():
        torch.testing.assert_close(layer(torch.ones(1, IN, dtype=torch.bfloat16))[0], layer.bias)


def test_partial_rotation_reorders_blocks_as_it_reorders_weights() -> None:
    shapes = msgspec.structs.replace(TINY, hidden_size=IN, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8)
    attention = DecoderAttention(shapes, shapes.layer_kinds[0], Rotary(16, 10_000.0, 64, 8))
    projection = attention.qkv_proj
    parts = [quantized(Kind.Q4_1, rows, seed) for seed, rows in enumerate((projection.parts or {}).values())]
    weight = torch.cat([values for _, values in parts])
    projection.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    for part, (blocks, _) in enumerate(parts):
        projection.keep_blocks(part, blocks)
    attention.prepare(fused=False)
    arranged = []
    for blocks, _ in parts:
        quants, scale, offset = blocks.unpacked()
        arranged.append((quants.unflatten(1, (-1, 32)) * scale[..., None] + offset[..., None]).flatten(1))
    assert not torch.equal(projection.weight, weight)
    torch.testing.assert_close(torch.cat(arranged), projection.weight.detach(), rtol=0, atol=1e-6)
