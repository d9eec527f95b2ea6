"""Products of rows with weights of every kind, against float64 of the same values."""

import ctypes

import gguf.quants
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from asyncllm.native import library as c
from asyncllm.native.library import Library

KINDS = [Kind.BF16, Kind.F16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]
N, K = 259, 96  # 16 outputs are computed at once, and inputs come in blocks of 32
MOST_ROWS = 140  # rows are taken in blocks of 64


class Packed:
    """A matrix in the order that products read it."""

    def __init__(
        self, library: Library, kind: Kind, stored: numpy.ndarray, shape: tuple[int, int], bias: int | None = None
    ) -> None:
        stored_as, packed_as = c.STORED[kind.name]
        # Behind it lies what must not be written.
        most = library.packed_bytes(packed_as, *shape)
        self.memory = torch.full((most + 64,), 171, dtype=torch.uint8)
        self.offsets = numpy.zeros(-(-shape[0] // c.GROUP), dtype=numpy.int64)
        self.num_bytes = library.pack(
            stored_as, stored.ctypes.data, *shape, self.memory.data_ptr(), self.offsets.ctypes.data
        )
        assert self.num_bytes <= most and (self.memory[self.num_bytes :] == 171).all()
        self._matrix = c.Matrix(packed_as, *shape, self.memory.data_ptr(), self.offsets.ctypes.data, bias)
        self._library = library

    def decoder(self, num_threads: int = 1) -> int:
        """A model without layers whose head this is."""
        width = self._matrix.k
        model = c.Model(hidden_size=width, num_heads=1, num_kv_heads=1, head_dim=32, block_size=16, head=self._matrix)
        return int(self._library.decoder_new(ctypes.byref(model), num_threads))


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
        self.packed = Packed(library, kind, stored, (num_outputs, width), self.bias.data_ptr())
        self._decoder = self.packed.decoder(num_threads)

    def __del__(self) -> None:
        self._library.decoder_delete(self._decoder)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(x) + 1, len(self.bias)), 12345.0)
        assert self._library.decoder_logits(self._decoder, x.data_ptr(), len(x), logits.data_ptr()) == 0
        assert (logits[-1] == 12345.0).all(), "nothing is written behind the last row"
        return logits[:-1]

    def likeliest(self, x: torch.Tensor) -> list[int]:
        places = torch.full((len(x) + 1,), -7)
        assert self._library.decoder_likeliest(self._decoder, x.data_ptr(), len(x), places.data_ptr()) == 0
        assert places[-1] == -7
        return places[:-1].tolist()

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Rows as the product takes them: bfloat16 where a build has an instruction for it, else as they are, as
        float16 weights always meet them; or a scale for each 32 values and 8 bits, 15 if they are large.
        """
        if self.kind == Kind.F16:
            return x.double()
        if self.kind == Kind.BF16:
            return (x.bfloat16() if "bfloat16" in self._library.description else x).double()
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
    packed = Packed(library, Kind.Q8_0, stored, (16, 32))
    decoder = packed.decoder()
    try:
        for sign in (1.0, -1.0):
            x, logits = torch.full((1, 32), sign * 127.0), torch.empty(1, 16)
            library.decoder_logits(decoder, x.data_ptr(), 1, logits.data_ptr())
            assert logits[0].tolist() == [sign * 127.0 * 32 * w for w in (-128, 127)] * 8
    finally:
        library.decoder_delete(decoder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_outputs", [1, 16, 17, N])
def test_the_likeliest_is_where_the_logits_are_largest(library: Library, kind: Kind, num_outputs: int) -> None:
    for num_threads in (1, 3):
        product = Product(library, kind, num_threads, num_outputs)
        product.bias[num_outputs // 3 :: 5] = 9.0
        for num_rows in (1, 2, 7, 9, 64, 65, MOST_ROWS):
            x = rows_of(num_rows)
            x[num_rows // 2] = 0.0  # nothing but the bias, largest at several places
            assert product.likeliest(x) == product(x).argmax(-1).tolist()
    x = torch.full((2, K), torch.nan)
    product.bias.fill_(torch.nan)
    assert product.likeliest(x) == [0, 0], "where nothing is a number"


LEAST = 113  # exponent, of the 15 that fit below 128


def bfloat16(exponent: int, fraction: int = 1, sign: int = 0) -> int:
    return sign << 15 | exponent << 7 | fraction


# What lies in one block beside numbers of the largest exponent, 127, and whether it fits into 12 bits a weight.
BLOCKS = {
    "15 exponents": ([bfloat16(e, f, s) for e in range(LEAST, 128) for f in (0, 85, 127) for s in (0, 1)], True),
    "zeros of both signs": ([0, 0x8000] * 20, True),
    "an exponent below": ([bfloat16(LEAST - 1, 127)], False),
    "its negative": ([bfloat16(LEAST - 1, 127, 1)], False),
    "a denormal": ([1], False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_in_12_bits_has_lost_nothing(library: Library, name: str) -> None:
    others, fits = BLOCKS[name]
    words = numpy.full((16, 64), bfloat16(127, 3), numpy.uint16)  # the second block fits
    words[:, :32].flat[: len(others)] = others
    words[:, :32] = numpy.random.default_rng(7).permuted(words[:, :32].ravel()).reshape(16, 32)
    packed = Packed(library, Kind.BF16, words, (16, 64))
    assert packed.num_bytes == 64 + (768 if fits else 1024) + 768
    stored = torch.from_numpy(words.view(numpy.int16)).view(torch.bfloat16).float()
    stored[stored.abs() < 2.0**-126] = 0.0  # processors' products of bfloat16 take denormals for 0
    decoder = packed.decoder()
    try:
        for num_rows in (1, 64):  # one reads the weights as they are, more have them widened
            x, logits = torch.eye(64)[:num_rows].contiguous(), torch.empty(num_rows, 16)
            library.decoder_logits(decoder, x.data_ptr(), num_rows, logits.data_ptr())
            assert torch.equal(logits.T.where(logits.T.abs() >= 2.0**-126, 0.0), stored[:, :num_rows])
    finally:
        library.decoder_delete(decoder)


@pytest.mark.parametrize(
    ("exponent", "fits"),
    [(0, True), (1, False), (2, True), (16, True), (17, True), (190, True), (206, True), (255, False)],
)
def test_weights_of_any_size_are_as_they_were(library: Library, exponent: int, fits: bool) -> None:
    # Infinities among them, and blocks of nothing but zeros. Beyond 2^79 their products may be infinite.
    words = numpy.full((16, 32), bfloat16(exponent, 5 if 0 < exponent < 255 else 0), numpy.uint16)
    words[::2] |= 0x8000
    packed = Packed(library, Kind.BF16, words, (16, 32))
    assert packed.num_bytes == 64 + (768 if fits else 1024)
    x, logits = torch.ones(1, 32), torch.empty(1, 16)
    decoder = packed.decoder()
    try:
        library.decoder_logits(decoder, x.data_ptr(), 1, logits.data_ptr())
    finally:
        library.decoder_delete(decoder)
    expected = torch.from_numpy(words.view(numpy.int16)).view(torch.bfloat16).double().sum(1).float()
    assert torch.equal(logits[0], expected)


def test_common_weights_take_12_bits_and_a_few_blocks_more(best_library: Library) -> None:
    product = Product(best_library, Kind.BF16, num_outputs=1024, width=512)
    assert 0.75 < product.packed.num_bytes / (2 * 1024 * 512) < 0.8


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
