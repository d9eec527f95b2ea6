"""The paged decode attention kernel alone, in bytes of keys and values per second.

From 32 rows on it is what a decode step of a small model spends its time on, so its bandwidth is the engine's speed.
"""

import math

import torch

from asyncllm.models.config import ModelArchitecture
from perf.gpu_check.device import Device
from perf.gpu_check.findings import Found
from perf.gpu_check.roofline import Ceilings, attention_bytes
from perf.gpu_check.setup import Box, Setup
from perf.stats import ratio

MAX_LAYERS = 64  # of one graph; for the smallest batch their caches still hold several times what an L2 does


def attention_speed(
    device: Device, setup: Setup, shapes: ModelArchitecture, ceilings: Ceilings, box: Box, found: Found
) -> None:
    """One layer's attention of a decode step, by batch size at the main context; uneven lengths at the largest."""
    scale = setup.scale
    for batch in scale.attention_batches:
        if box.is_over:
            return
        lengths = torch.full((batch,), scale.main_context, dtype=torch.int32)
        found[f"b{batch}_c{scale.main_context}"] = _measure(device, setup, shapes, lengths, ceilings)
        device.free_memory()
    batch = max(scale.attention_batches)
    generator = torch.Generator().manual_seed(0)
    uneven = torch.randint(1, 2 * scale.main_context, (batch,), dtype=torch.int32, generator=generator)
    found[f"b{batch}_uneven"] = _measure(device, setup, shapes, uneven, ceilings)


def _measure(
    device: Device, setup: Setup, shapes: ModelArchitecture, lengths: torch.Tensor, ceilings: Ceilings
) -> dict[str, float | None]:
    """Several layers' caches take turns in one captured graph, so that none of them is found in the L2."""
    # Imported here: where Triton is missing, the rest of the part still runs.
    from asyncllm.attention.triton_decode import decode_attention, make_decode_scratch, plan_splits

    scale, batch = setup.scale, len(lengths)
    dtype = getattr(torch, scale.dtype)
    heads, kv_heads, head_dim = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
    block_size = scale.block_size
    num_columns = -(-int(lengths.max()) // block_size)
    num_blocks = batch * num_columns + 1
    layer_bytes = attention_bytes(shapes, scale.dtype, 1, int(lengths.sum()))
    num_layers = min(MAX_LAYERS, max(2, -(-scale.beyond_l2_bytes // layer_bytes)))
    caches = [
        torch.randn(2, num_blocks, kv_heads, block_size, head_dim, dtype=dtype, device=device.torch)
        for _ in range(num_layers)
    ]
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
    block_table = order.reshape(batch, num_columns).to(device.torch, torch.int32)
    slots = torch.arange(batch, dtype=torch.int32, device=device.torch)
    seq_lens = lengths.to(device.torch)
    query = torch.randn(batch, heads, head_dim, dtype=dtype, device=device.torch)
    out = torch.empty_like(query)
    scratch = make_decode_scratch(batch, heads, kv_heads, head_dim, device.num_sms, device.torch)
    plan_splits(seq_lens, scratch, kv_heads)

    def attend() -> None:
        for cache in caches:
            decode_attention(query, cache, block_table, slots, seq_lens, scratch, out, 1 / math.sqrt(head_dim))

    seconds = device.seconds(device.graphed(attend), repeats=3 if setup.rehearse else 10) / num_layers
    speed = layer_bytes / seconds
    return {
        "us": round(seconds * 1e6, 2),
        "gb_per_s": round(speed / 1e9, 1),
        "of_bandwidth": ratio(speed, ceilings.bandwidth) if ceilings.bandwidth > 1.0 else None,
    }
