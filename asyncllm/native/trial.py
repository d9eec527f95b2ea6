"""Two builds of the kernels side by side for some milliseconds: whether one is right here, and worth its place.

For instructions that few machines have: a hypervisor may only pretend to, and the first server on a new processor must
not find out by what its users read. Products of integers have the same bits in all builds, so that which of them is
taken changes no text.
"""

import ctypes
from time import perf_counter_ns

import numpy as np

from asyncllm.native import library as c
from asyncllm.native.library import Library

NUM_OUTPUTS, WIDTH, NUM_ROWS = 256, 512, 64
NUM_ROUNDS = 5
MOST_ERROR = 0.01  # of the largest product: rows in bfloat16 are off by a 512th each, those in float32 are not
BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}  # as GGUF stores 32 weights
SCALES = {"Q4_1": 2, "Q8_0": 1}  # of float16, before a block's weights


class Trial:
    """The product of the same rows with the same weights by one build."""

    def __init__(self, library: Library, kind: str) -> None:
        """`kind`: one of `library.STORED`."""
        self.library, self.kind = library, kind
        stored_as, packed_as = c.STORED[kind]
        stored, self._rows = _weights(kind), np.random.default_rng(1).standard_normal((NUM_ROWS, WIDTH), np.float32)
        self._packed = np.zeros(library.packed_bytes(packed_as, NUM_OUTPUTS, WIDTH) + 64, np.uint8)
        self._offsets = np.zeros(NUM_OUTPUTS // c.GROUP, np.int64)
        data, offsets = self._packed.ctypes.data, self._offsets.ctypes.data
        library.pack(stored_as, stored.ctypes.data, NUM_OUTPUTS, WIDTH, data, offsets)
        head = c.Matrix(packed_as, NUM_OUTPUTS, WIDTH, data, offsets)
        sizes = {"hidden_size": WIDTH, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "block_size": c.PAGE}
        self._decoder = library.decoder_new(ctypes.byref(c.Model(head=head, **sizes)), 1)
        self.products = np.empty((NUM_ROWS, NUM_OUTPUTS), np.float32)
        self.least_ns = 1 << 62  # that it took

    def run(self) -> None:
        """Leaves `products`, and what it took if that is less than before."""
        begin = perf_counter_ns()
        self.library.decoder_logits(self._decoder, self._rows.ctypes.data, NUM_ROWS, self.products.ctypes.data)
        self.least_ns = min(self.least_ns, perf_counter_ns() - begin)

    def close(self) -> None:
        """Frees the decoder; `products` stay."""
        self.library.decoder_delete(self._decoder)


def why_worse(library: Library, other: Library) -> str:
    """Why another build is to be taken instead, in a few words; empty where nothing speaks for that."""
    for kind in ("Q4_1", "Q8_0", "BF16"):
        mine, others = Trial(library, kind), Trial(other, kind)
        try:
            for _ in range(NUM_ROUNDS):
                mine.run()
                others.run()
        finally:
            mine.close()
            others.close()
        error = np.abs(mine.products - others.products).max() / np.abs(others.products).max()
        if not error <= (MOST_ERROR if kind == "BF16" else 0.0):
            difference = f"differ from those of {other.description} by {error:.2g} of the largest"
            return f"products with {kind} weights {difference}"
        if mine.least_ns > others.least_ns:
            return f"products with {kind} weights take {mine.least_ns / others.least_ns:.1f} times as long"
    return ""


def _weights(kind: str) -> np.ndarray:
    random = np.random.default_rng(2)
    if kind == "BF16":
        values = random.standard_normal((NUM_OUTPUTS, WIDTH), np.float32)
        return np.ascontiguousarray(values.view(np.uint16)[:, 1::2])
    blocks = random.integers(0, 256, (NUM_OUTPUTS, WIDTH // 32, BLOCK_BYTES[kind]), np.uint8)
    scales = random.uniform(0.01, 0.1, (*blocks.shape[:2], SCALES[kind])).astype(np.float16)
    blocks[..., : 2 * SCALES[kind]] = scales.view(np.uint8)
    return blocks
