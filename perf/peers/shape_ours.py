"""Our executor's speed on one GGUF file, without scheduler and HTTP: `python -m perf.peers.shape_ours FILE.gguf`.

A process of its own for each round, as llama-bench is. Prints one JSON line. Knows step plans.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig, SchedulerConfig
from asyncllm.executor.base import Executor, SlotInit, StepPlan
from asyncllm.executor.build import build_executor
from asyncllm.types import SamplingParams
from asyncllm.weights.checkpoint import open_checkpoint
from perf.gpu_check.models import NUM_BYTES
from perf.peers import shape_turn
from perf.peers.shape_turn import WARM_STEPS
from perf.profile_step import decode_plan


def measure(
    path: str, row_counts: Sequence[int], context: int, steps: int, prompt_tokens: int, threads: int = 0
) -> dict[str, Any]:
    """Tokens a second: `decode` by rows, each over `context` tokens, and of one prompt."""
    import torch

    block_size = CacheConfig().block_size
    num_blocks = max(max(row_counts) * (context // block_size + 2), prompt_tokens // block_size + 2)
    config = Config(
        model=ModelConfig(path=path, dtype="bfloat16", device="cpu"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_sequences=max(row_counts)),
        executor=ExecutorConfig(threads=threads),
    )
    with torch.inference_mode():
        executor = build_executor(config, open_checkpoint(path), lambda phase: None)
        prompt_s = _seconds(executor, prompt_plan(executor, prompt_tokens), 1, warm=1)
        decode = {}
        for num_rows in row_counts:
            decode[num_rows] = num_rows * steps / _seconds(executor, decode_plan(executor, num_rows, context), steps)
        executor.close()
    return {"decode": decode, "prompt": prompt_tokens / prompt_s}


def prompt_plan(executor: Executor, num_tokens: int) -> StepPlan:
    """A step that computes a whole prompt and samples behind it."""
    token_ids = [index % NUM_BYTES for index in range(num_tokens)]
    return StepPlan(
        slots=[0],
        num_query_tokens=[num_tokens],
        num_computed_tokens=[0],
        samples=[True],
        num_decode_rows=0,
        token_ids=token_ids,
        new_slots=[SlotInit(0, SamplingParams(max_tokens=1, temperature=0.0), token_ids, num_tokens)],
        block_writes=[(0, column, 1 + column) for column in range(-(-num_tokens // executor.capacity.block_size))],
        banned={},
        logprob_rows={},
        prompt_logprob_rows={},
    )


def _seconds(executor: Executor, plan: StepPlan, steps: int, warm: int = WARM_STEPS) -> float:
    for _ in range(warm):
        executor.launch(plan).wait()
    start_s = time.perf_counter()
    for _ in range(steps):
        executor.launch(plan).wait()
    return time.perf_counter() - start_s


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.peers.shape_ours", description="Our executor on a GGUF file.")
    parser.add_argument("file")
    return shape_turn.main(
        parser, lambda args: measure(args.file, args.rows, args.context, args.steps, args.prompt_tokens), argv
    )


if __name__ == "__main__":
    sys.exit(main())
