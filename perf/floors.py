"""What this machine can do at best: bytes read, and products, a second. Knows no model but its shapes.

Times are the best of some by the wall, which neighbours spoil least.
"""

import ctypes
import time
from collections.abc import Callable
from typing import Any

from asyncllm.native.library import GROUP, STORED, Library, Matrix, Model

READ_BYTES = 256 * 2**20  # far more than any cache of a small machine
PRODUCT = (64, 576, 3072)  # rows, in, out: gate and up of the embedded model
REPEATS = 30


def read_gb_per_s(num_threads: int) -> float:
    """Memory read from end to end, in pages as large as those that weights lie in."""
    import torch

    from asyncllm.host_memory import advise_huge_pages

    read = torch.empty(READ_BYTES // 4)
    advise_huge_pages(read.data_ptr(), read.nbytes)
    read.zero_()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return READ_BYTES / _best_s(read.sum) / 1e9
    finally:
        torch.set_num_threads(before)


def torch_gflop_per_s() -> dict[str, float]:
    """Of a linear layer in bfloat16, as the server prepares it."""
    import torch

    from asyncllm.layers.linear import Linear

    rows, width, out = PRODUCT
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    linear = Linear(width, out)
    linear.weight = torch.nn.Parameter(torch.randn(out, width, dtype=torch.bfloat16), requires_grad=False)
    linear.prepare(fused=False)
    return {"bfloat16": _gflop_per_s(lambda: linear(x))}


def native_gflop_per_s(library: Library, num_threads: int) -> dict[str, float]:
    """Of the library's product with each kind of weight, activations made ready included.

    A decoder without layers, whose head is the matrix: its logits are one product.
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows, width, out = PRODUCT
    x, y = torch.randn(rows, width), torch.empty(rows, out)
    weights = torch.randn(out, width)
    rates = {}
    for name, kind in (("bfloat16", "BF16"), ("int8 x 4-bit", "Q4_1"), ("int8 x 8-bit", "Q8_0")):
        stored, packed_kind = STORED[kind]
        if kind == "BF16":
            lying = weights.bfloat16()
        else:
            lying = torch.from_numpy(np.ascontiguousarray(quantize(weights.numpy(), GGMLQuantizationType[kind])))
        packed = torch.empty(library.packed_bytes(packed_kind, out, width), dtype=torch.uint8)
        offsets = np.empty(out // GROUP, dtype=np.int64)
        library.pack(stored, lying.data_ptr(), out, width, packed.data_ptr(), offsets.ctypes.data)
        head = Matrix(packed_kind, out, width, packed.data_ptr(), offsets.ctypes.data, None)
        model = Model(hidden_size=width, num_heads=1, num_kv_heads=1, head_dim=32, block_size=16, head=head)
        decoder = library.decoder_new(ctypes.byref(model), num_threads)
        assert decoder is not None
        try:
            arguments = decoder, x.data_ptr(), rows, y.data_ptr()
            rates[name] = _gflop_per_s(lambda arguments=arguments: library.decoder_logits(*arguments))  # type: ignore[misc]
        finally:
            library.decoder_delete(decoder)
    return rates


def _gflop_per_s(product: Callable[[], Any]) -> float:
    rows, width, out = PRODUCT
    return 2 * rows * width * out / _best_s(product) / 1e9


def _best_s(run: Callable[[], Any]) -> float:
    times_s = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)
