"""Weights in blocks as GGUF stores them: their values, and layers that hand them over as they are."""

import gguf.quants
import msgspec
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from asyncllm.layers.blocks import BlockRows
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.linear import Linear
from asyncllm.layers.rotary import Rotary
from asyncllm.models.decoder import DecoderAttention
from tests.executor.tiny_model import TINY

OUT, IN = 48, 96
KINDS = [Kind.BF16, Kind.F16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]


def quantized(kind: Kind, out_features: int = OUT, seed: int = 0) -> tuple[BlockRows, torch.Tensor]:
    """Random blocks and the values that gguf reads from them."""
    values = numpy.random.default_rng(seed).normal(0.02, 0.1, (out_features, IN)).astype(numpy.float32)
    rows = gguf.quants.quantize(values, kind).view(numpy.uint8)
    return BlockRows(kind.name, torch.from_numpy(rows)), torch.from_numpy(gguf.quants.dequantize(rows, kind))


def layer_of_two(kept: dict[int, BlockRows], weight: torch.Tensor) -> Linear:
    layer = Linear(IN, 2 * OUT, parts={"a": OUT, "b": OUT})
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    for part, blocks in kept.items():
        layer.keep_blocks(part, blocks)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_what_gguf_reads_from_them(kind: Kind) -> None:
    blocks, expected = quantized(kind)
    assert blocks.shape == (OUT, IN)
    torch.testing.assert_close(blocks.values().float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_blocks_of_one_kind_are_handed_over_as_they_are(kind: Kind) -> None:
    (first, _), (second, _) = quantized(kind, seed=0), quantized(kind, seed=1)
    layer = layer_of_two({0: first, 1: second}, torch.full((2 * OUT, IN), torch.nan))
    assert layer.take_rows() == [first, second]
    assert layer.weight is None, "the weight, which nothing filled, is let go of"


@pytest.mark.parametrize(
    ("dtype", "rounded", "kind"),
    [(torch.float32, torch.bfloat16, "BF16"), (torch.float16, torch.float16, "F16")],
)
def test_beside_a_part_without_blocks_all_become_sixteen_bits(
    dtype: torch.dtype, rounded: torch.dtype, kind: str
) -> None:
    blocks, values = quantized(Kind.Q4_1)
    weight = torch.cat((torch.full((OUT, IN), torch.nan), torch.randn(OUT, IN))).to(dtype)
    expected = torch.cat((values.to(dtype), weight[OUT:])).to(rounded)
    rows = BlockRows.joined(layer_of_two({0: blocks}, weight).take_rows())
    assert rows.kind == kind and torch.equal(rows.values(), expected)


@pytest.mark.parametrize("second", [Kind.Q4_0, Kind.Q8_0])
def test_parts_of_two_kinds_become_eight_bits(second: Kind) -> None:
    (blocks, values), (other, others) = quantized(Kind.Q4_1), quantized(second, seed=1)
    layer = layer_of_two({0: blocks, 1: other}, torch.full((2 * OUT, IN), torch.nan))
    rows = BlockRows.joined(layer.take_rows())
    assert rows.kind == "Q8_0"
    assert second is not Kind.Q8_0 or torch.equal(rows.rows[OUT:], other.rows)
    expected = torch.cat((values, others))
    torch.testing.assert_close(rows.values(), expected, rtol=0, atol=0.6 / 127 * float(expected.abs().max()))


def test_an_embedding_hands_over_its_blocks_or_its_rounded_table() -> None:
    blocks, _ = quantized(Kind.Q8_0)
    for kept in (True, False):
        embedding = Embedding(OUT, IN)
        table = torch.randn(OUT, IN)
        embedding.weight = torch.nn.Parameter(table, requires_grad=False)
        if kept:
            embedding.keep_blocks(0, blocks)
        (rows,) = embedding.take_rows()
        assert rows.kind == ("Q8_0" if kept else "BF16")
        assert torch.equal(rows.values(), blocks.values() if kept else table.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_partial_rotation_reorders_blocks_as_it_reorders_weights(kind: Kind) -> None:
    shapes = msgspec.structs.replace(TINY, hidden_size=IN, num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8)
    attention = DecoderAttention(shapes, shapes.layer_kinds[0], Rotary(16, 10_000.0, 64, 8))
    projection = attention.qkv_proj
    parts = [quantized(kind, rows, seed) for seed, rows in enumerate((projection.parts or {}).values())]
    weight = torch.cat([values for _, values in parts])
    projection.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    for part, (blocks, _) in enumerate(parts):
        projection.keep_blocks(part, blocks)
    attention.prepare(fused=False)
    assert not torch.equal(projection.weight, weight)
    arranged = projection.weight.detach().clone()
    rows = BlockRows.joined(projection.take_rows())
    assert rows.kind == kind.name and torch.equal(rows.values().float(), arranged)
