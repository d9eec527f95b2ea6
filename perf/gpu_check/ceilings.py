"""What the machine does at best: copying, reading, a large product, and products with few rows.

The figures everything else is held against, measured in the same run. Knows tensors and shapes, no engine.
"""

from functools import partial

import torch
from torch.nn import functional

from asyncllm.models.config import ModelArchitecture
from perf.gpu_check.device import Device
from perf.gpu_check.findings import Found
from perf.gpu_check.roofline import Ceilings
from perf.gpu_check.setup import Box, Scale

GIGA = 1e9


def measure_ceilings(device: Device, scale: Scale, found: Found) -> Ceilings:
    """Copy and read bandwidth, and the rate of one large product."""
    source = torch.ones(scale.copy_bytes // 2, dtype=torch.bfloat16, device=device.torch)
    target = torch.empty_like(source)
    copy_s = device.seconds(partial(target.copy_, source))
    del source, target
    device.free_memory()
    values = torch.ones(scale.read_bytes // 4, dtype=torch.float32, device=device.torch)
    read_s = device.seconds(values.sum)
    del values
    device.free_memory()
    size = scale.gemm_size
    left, right = (torch.randn(size, size, device=device.torch).to(torch.bfloat16) for _ in range(2))
    gemm_s = device.seconds(lambda: left @ right)
    ceilings = Ceilings(2 * scale.copy_bytes / copy_s, scale.read_bytes / read_s, 2 * size**3 / gemm_s)
    found["copy_gb_per_s"] = round(ceilings.copy_bytes_per_s / GIGA, 1)
    found["read_gb_per_s"] = round(ceilings.read_bytes_per_s / GIGA, 1)
    found["gemm_tflops"] = round(ceilings.gemm_flops_per_s / 1e12, 2)
    return ceilings


def skinny_products(device: Device, shapes: ModelArchitecture, scale: Scale, box: Box, found: Found) -> None:
    """Products of few rows with each of the model's matrices, as the vendor's library does them: time and GB/s.

    Several copies of a matrix take turns inside one captured graph, so that neither launches nor the cache flatter.
    """
    heads = (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim
    matrices = {
        "qkv": (heads, shapes.hidden_size),
        "o": (shapes.hidden_size, shapes.num_heads * shapes.head_dim),
        "gate_up": (2 * shapes.intermediate_size, shapes.hidden_size),
        "down": (shapes.hidden_size, shapes.intermediate_size),
        "head": (shapes.vocab_size, shapes.hidden_size),
    }
    for name, (out_features, in_features) in matrices.items():
        num_bytes = 2 * out_features * in_features
        copies = max(2, -(-scale.beyond_l2_bytes // num_bytes))
        weights = torch.randn(copies, out_features, in_features, device=device.torch).to(torch.bfloat16)
        for rows in scale.skinny_rows:
            if box.is_over:
                return
            x = torch.randn(rows, in_features, device=device.torch).to(torch.bfloat16)

            def multiply(x: torch.Tensor = x, weights: torch.Tensor = weights) -> None:
                for weight in weights:
                    functional.linear(x, weight)

            seconds = device.seconds(device.graphed(multiply)) / copies
            found[f"{name}_m{rows}"] = {
                "us": round(seconds * 1e6, 2),
                "gb_per_s": round(num_bytes / seconds / GIGA, 1),
            }
        del weights
        device.free_memory()
