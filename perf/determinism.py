"""How often does the batch a request runs in change its text? Same prompts and seeds, alone and all at once.

    python -m perf.determinism [--dtypes float32,bfloat16] [--prompts 32] [--output-tokens 64]

The noise of a request depends on its seed and positions only, so what differs comes from rounding: another batch shape
takes other kernels, a logit moves by one unit in the last place, and a near tie tips over. In float32 that is expected
never to show, in bfloat16 now and then on torch, and never with the CPU's native kernels. Prints a line per precision
and kind of sampling, and one JSON line last.
"""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from perf import facts
from perf.client import open_session
from perf.prompts import make_prompt
from perf.servers import Server, asyncllm, free_port

READY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 600.0
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0},
    "seeded top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
}


async def complete(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> str:
    """The text of one completion. Each run has a cache of its own, so that a warm prefix plays no part."""
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        text: str = (await response.json())["choices"][0]["text"]
        return text


async def count_changed(url: str, num_prompts: int, output_tokens: int, sampling: dict[str, Any]) -> tuple[int, int]:
    """(texts that differ in a batch, texts that differ in a second run alone) of `num_prompts`."""
    bodies = [
        {"prompt": make_prompt(i, 40), "max_tokens": output_tokens, "seed": i, "ignore_eos": True, **sampling}
        for i in range(num_prompts)
    ]
    async with open_session(REQUEST_TIMEOUT_S) as session:
        alone = [await complete(session, url, body | {"cache_salt": "a"}) for body in bodies]
        again = [await complete(session, url, body | {"cache_salt": "b"}) for body in bodies]
        batch = await asyncio.gather(*(complete(session, url, body | {"cache_salt": "c"}) for body in bodies))
    return (
        sum(one != other for one, other in zip(alone, batch)),
        sum(one != other for one, other in zip(alone, again)),
    )


def measure(dtype: str, num_prompts: int, output_tokens: int, directory: Path) -> dict[str, Any]:
    """Counts of changed texts by kind of sampling, on a fresh server of this precision."""
    port = free_port()
    spec = asyncllm("smollm2-135m-instruct", port, directory, "auto", dtype)
    counts: dict[str, Any] = {}
    with Server(spec, port, directory / f"{dtype}.log") as server:
        server.wait_ready(READY_TIMEOUT_S)
        for name, sampling in SAMPLING.items():
            in_batch, again = asyncio.run(count_changed(server.url, num_prompts, output_tokens, sampling))
            counts[name] = {"changed_in_batch": in_batch, "changed_alone_again": again}
            print(
                f"{dtype:>9}  {name:<17} {in_batch:>3} of {num_prompts} texts changed in a batch, {again} alone again"
            )
    return counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How often the batch changes a text.")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        changed = {
            dtype: measure(dtype, options.prompts, options.output_tokens, Path(directory))
            for dtype in options.dtypes.split(",")
        }
    machine = facts.machine()
    report = {
        "bench": "determinism",
        "changed": changed,
        "parameters": vars(options),
        "machine": {"cpu": machine.cpu, "cores": machine.cores},
        "versions": facts.versions() | {"threads": os.environ.get("ASYNCLLM_EXECUTOR__THREADS", "auto")},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
