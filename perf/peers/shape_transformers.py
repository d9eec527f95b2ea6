"""The bare loop of `transformers` on a shape: `python -m perf.peers.shape_transformers`, config.json on its input.

Weights are random, in bfloat16. Prefill, then one forward pass and one argmax a step: `generate()` can only be slower.
Prints one JSON line. Runs in the peer's own environment: knows torch, transformers and, of this checkout, `shape_turn`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from perf.peers import shape_turn
from perf.peers.shape_turn import WARM_STEPS

NUM_BYTES = 256  # token ids that every vocabulary has


def measure(
    config: dict[str, Any], row_counts: Sequence[int], context: int, steps: int, prompt_tokens: int
) -> dict[str, Any]:
    """Tokens a second: `decode` by rows, over `context` tokens in the middle of the steps, and of one prompt."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **settings), dtype=torch.bfloat16
    )
    model.eval()
    with torch.inference_mode():
        prompt = torch.arange(prompt_tokens)[None] % NUM_BYTES
        model(prompt, logits_to_keep=1)
        start_s = time.perf_counter()
        model(prompt, logits_to_keep=1)
        prompt_s = time.perf_counter() - start_s
        decode = {rows: rows * steps / _decode_s(model, rows, context, steps) for rows in row_counts}
    return {"decode": decode, "prompt": prompt_tokens / prompt_s}


def _decode_s(model: Any, rows: int, context: int, steps: int) -> float:
    import torch

    # Every row continues the same context: it has to be computed once only, and costs the same to read. Each does so
    # with a token of its own, as experts are chosen by tokens.
    prompt = torch.arange(max(1, context - steps // 2 - WARM_STEPS))[None] % NUM_BYTES
    begun = model(prompt, logits_to_keep=1, use_cache=True)
    cache = begun.past_key_values
    cache.batch_repeat_interleave(rows)
    tokens = torch.arange(rows)[:, None] % NUM_BYTES
    start_s = 0.0
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            start_s = time.perf_counter()
        tokens = model(tokens, past_key_values=cache, logits_to_keep=1, use_cache=True).logits.argmax(-1)
        tokens.tolist()
    return time.perf_counter() - start_s


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.peers.shape_transformers", description="transformers' loop.")
    return shape_turn.main(
        parser,
        lambda args: measure(json.load(sys.stdin), args.rows, args.context, args.steps, args.prompt_tokens),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
