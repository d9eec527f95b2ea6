"""Resident memory over many requests: does the server grow? Knows one running server and the load on it."""

import asyncio
from collections.abc import Callable

import msgspec

from perf import load
from perf.servers import Server

SOAK_CONCURRENCY = 8
SOAK_STEP = 100  # requests between two looks at the memory
BLOCK_SIZE = 16  # tokens, the server's default


class SoakResult(msgspec.Struct, frozen=True):
    """Memory after so many requests; index 0 is the fresh server."""

    num_requests: list[int]
    rss_bytes: list[int]
    num_failed: int
    growth_bytes: int | None  # between the first step and the last; None with fewer than two steps


def soak_blocks(input_tokens: int, output_tokens: int) -> int:
    """KV blocks for a soak: few enough that every one was written before the first look.

    A page of the KV cache becomes resident when it is first written, and the prefix cache keeps finished requests
    until it is full. Both are a cache filling up, not growth, and both are over after three quarters of a step.
    """
    blocks_per_request = -(-(input_tokens + output_tokens) // BLOCK_SIZE)
    return max(2 * SOAK_CONCURRENCY, SOAK_STEP * 3 // 4) * blocks_per_request


def soak(server: Server, params: load.LoadParams, progress: Callable[[str], None]) -> SoakResult:
    """Send `params.num_requests` requests, all with prompts of their own, and look at the memory as they pass."""
    counts, rss_bytes, num_failed = [0], [server.memory().rss_bytes], 0
    while counts[-1] < params.num_requests:
        step = min(SOAK_STEP, params.num_requests - counts[-1])
        result = asyncio.run(load.run(msgspec.structs.replace(params, num_requests=step, seed=len(counts))))
        num_failed += result.num_failed
        counts.append(counts[-1] + step)
        rss_bytes.append(server.memory().rss_bytes)
        progress(f"soak {counts[-1]:>6} requests, {rss_bytes[-1] / 2**20:8.1f} MiB, {num_failed} failed")
    growth_bytes = rss_bytes[-1] - rss_bytes[1] if len(rss_bytes) > 2 else None
    return SoakResult(counts, rss_bytes, num_failed, growth_bytes)
