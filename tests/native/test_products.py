"""Products of rows with weights of every kind, against float64 of the same values."""

import ctypes

import gguf.quants
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from asyncllm.native import library as c
from asyncllm.native.library import Library

KINDS = [Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]
N, K = 259, 96  # 16 outputs are computed at once, and inputs come in blocks of 32
MOST_ROWS = 140  # rows are taken in blocks of 64


class Product:
    """x Wᵀ + b as the head of a decoder without layers."""

    def __init__(
        self, library: Library, kind: Kind, num_threads: int = 1, num_outputs: int = N, width: int = K
    ) -> None:
        random = numpy.random.default_rng(kind)
        values = random.normal(0.05, 1.0, (num_outputs, width)).astype(numpy.float32)
        values[0, :32] = 0.0  # a block of zeros, whose scale is 0
        values[-1] *= 1000.0
        stored = numpy.ascontiguousarray(gguf.quants.quantize(values, kind))
        self.weight = torch.from_numpy(gguf.quants.dequantize(stored, kind)).double()
        self.bias = torch.from_numpy(random.normal(0.0, 1.0, num_outputs).astype(numpy.float32))
        self.kind, self._library = kind, library
        stored_as, packed_as = c.STORED[kind.name]
        # Behind it lies what must not be written.
        num_bytes = library.packed_bytes(packed_as, num_outputs, width)
        self._packed = torch.full((num_bytes + 64,), 171, dtype=torch.uint8)
        library.pack(stored_as, stored.ctypes.data, num_outputs, width, self._packed.data_ptr())
        assert (self._packed[-64:] == 171).all()
        matrix = c.Matrix(packed_as, num_outputs, width, self._packed.data_ptr(), self.bias.data_ptr())
        model = c.Model(hidden_size=width, num_heads=1, num_kv_heads=1, head_dim=32, block_size=16, head=matrix)
        self._decoder = library.decoder_new(ctypes.byref(model), num_threads)

    def __del__(self) -> None:
        self._library.decoder_delete(self._decoder)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(x) + 1, len(self.bias)), 12345.0)
        assert self._library.decoder_logits(self._decoder, x.data_ptr(), len(x), logits.data_ptr()) == 0
        assert (logits[-1] == 12345.0).all(), "nothing is written behind the last row"
        return logits[:-1]

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Rows as the product takes them: bfloat16, or a scale for each 32 values and 8 bits, 15 if they are large."""
        if self.kind == Kind.BF16:
            return x.bfloat16().double()
        blocks = x.unflatten(1, (-1, 32))
        most = blocks.abs().amax(-1, keepdim=True)
        is_fine = most > 1.5 * most.pow(2).mean(1, keepdim=True).sqrt()
        steps = torch.where(is_fine, 127.0 * 128.0, 127.0)
        quants = (blocks * torch.where(most > 0, steps / most, 0.0)).round()
        assert (quants.abs() <= steps).all()
        return (quants.double() * (most / steps).double()).flatten(1)


def rows_of(num_rows: int, width: int = K) -> torch.Tensor:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))
    x[0, :32] = 0.0
    x[-1, 32:64] *= 1e4
    return x * torch.logspace(-3, 3, num_rows)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows_has_the_products_of_float64(library: Library, kind: Kind) -> None:
    product = Product(library, kind)
    for num_rows in (*range(1, 21), MOST_ROWS):
        x = rows_of(num_rows)
        rounded = product.rounded(x)
        exact = rounded @ product.weight.T + product.bias
        # What is left is the rounding of float32 sums: of some 100 terms, each of 6e-8 at most of all that is added.
        largest = rounded.abs() @ product.weight.abs().T + product.bias.abs()
        error = (product(x) - exact).abs() / largest
        assert error.max() < 2e-6, (num_rows, float(error.max()))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
def test_rows_with_a_few_large_values_lose_little(best_library: Library, kind: Kind) -> None:
    # As hidden states have them: 8 bits alone would err by 1 / 254 of the largest value, for all in its block.
    product = Product(best_library, kind, width=960)
    x = torch.randn(9, 960, generator=torch.Generator().manual_seed(3))
    x[:, 77] = 100.0
    exact = x.double() @ product.weight.T + product.bias
    error = (product(x) - exact)[:, :-1].norm(dim=1) / exact[:, :-1].norm(dim=1)
    assert error.max() < 0.004, float(error.max())  # 0.013 without the finer blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_among_others_has_the_product_it_has_alone(library: Library, kind: Kind) -> None:
    x = rows_of(MOST_ROWS)
    products = [Product(library, kind, num_threads) for num_threads in (1, 2, 4)]
    alone = torch.cat([products[0](x[i : i + 1].contiguous()) for i in range(MOST_ROWS)])
    for num_rows in (2, 3, 4, 5, 7, 8, 9, 13, 64, 65, MOST_ROWS):
        for product in products:
            assert torch.equal(product(x[:num_rows].contiguous()), alone[:num_rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_outputs", "width"), [(1, 32), (16, 64), (17, 1056), (31, 32)])
def test_other_shapes_have_the_products_of_float64_too(
    best_library: Library, kind: Kind, num_outputs: int, width: int
) -> None:
    product, x = Product(best_library, kind, 2, num_outputs, width), rows_of(5, width)
    rounded = product.rounded(x)
    largest = rounded.abs() @ product.weight.abs().T + product.bias.abs()
    error = (product(x) - (rounded @ product.weight.T + product.bias)).abs() / largest
    assert error.max() < 5e-6


def test_the_largest_values_of_8_bits_do_not_overflow(library: Library) -> None:
    # All weights and inputs at ±127 and -128, of which the AVX2 products' 16-bit sums of pairs have no room to spare.
    stored = numpy.zeros((16, 34), numpy.uint8)
    stored[:, :2] = numpy.frombuffer(numpy.float16(1.0).tobytes(), numpy.uint8)
    stored[:, 2:] = numpy.where(numpy.arange(16)[:, None] % 2, 127, -128).astype(numpy.int8).view(numpy.uint8)
    packed = torch.empty(library.packed_bytes(c.EIGHT_BIT, 16, 32), dtype=torch.uint8)
    library.pack(c.STORED["Q8_0"][0], stored.ctypes.data, 16, 32, packed.data_ptr())
    matrix = c.Matrix(c.EIGHT_BIT, 16, 32, packed.data_ptr(), None)
    model = c.Model(hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=32, block_size=16, head=matrix)
    decoder = library.decoder_new(ctypes.byref(model), 1)
    try:
        for sign in (1.0, -1.0):
            x, logits = torch.full((1, 32), sign * 127.0), torch.empty(1, 16)
            library.decoder_logits(decoder, x.data_ptr(), 1, logits.data_ptr())
            assert logits[0].tolist() == [sign * 127.0 * 32 * w for w in (-128, 127)] * 8
    finally:
        library.decoder_delete(decoder)


@pytest.mark.parametrize("width", [1, 15, 64, 65, 259, 1000])
def test_the_largest_logit_is_the_first_of_several(library: Library, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.cat((
        torch.randint(-3, 3, (40, width), generator=generator).float(),  # many are the largest
        torch.eye(width)[torch.randint(0, width, (40,), generator=generator)],  # one is, at any place
        -1e30 * torch.rand(4, width, generator=generator),
        torch.full((2, width), -torch.inf),
    ))  # fmt: skip
    rows[-1, -1] = -5.0
    found = torch.empty(len(rows), dtype=torch.int64)
    library.argmax(rows.data_ptr(), len(rows), width, found.data_ptr())
    expected = [row.tolist().index(max(row.tolist())) for row in rows]
    assert found.tolist() == expected
