"""transformers' continuous batching on the workload, as a peer: `python -m perf.gpu_check.transformers_peer`.

Random weights in the workload's shapes. Stops when its time is over and counts what was generated until then. Knows
transformers alone.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

NUM_WARM_REQUESTS = 4
POLL_S = 0.2


def build_model(workload: dict[str, Any]) -> Any:
    """The model, its weights drawn on the device."""
    config = AutoConfig.for_model(**workload["config"])
    with torch.device(workload["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, workload["dtype"]))
    return model.eval()


def generate(manager: Any, prompts: list[list[int]], max_tokens: list[int], seconds: float) -> tuple[int, float, bool]:
    """(tokens, seconds, whether all requests ended). Only requests that ended count."""
    counts: dict[str, int] = {}
    num_open = len(prompts)
    started_s = time.perf_counter()
    for prompt, length in zip(prompts, max_tokens, strict=True):
        manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
    while num_open and time.perf_counter() - started_s < seconds:
        result = manager.get_result(timeout=POLL_S)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the generation thread ended")
            continue
        if result.error:
            raise RuntimeError(result.error)
        counts[result.request_id] = len(result.generated_tokens)
        num_open -= result.is_finished()
    return sum(counts.values()), time.perf_counter() - started_s, num_open == 0


def main() -> int:
    """Measure and print."""
    workload = json.loads(Path(os.environ["WORKLOAD"]).read_text())
    model = build_model(workload)
    sampling = workload["temperature"] > 0
    config = GenerationConfig(
        max_new_tokens=max(workload["max_tokens"]),
        do_sample=sampling,
        temperature=workload["temperature"] if sampling else None,
        top_k=0,  # off; the default is 50
        eos_token_id=-1,
        pad_token_id=0,
    )
    # Left alone it takes what a GPU has free. On a CPU that is most of the machine, which takes a minute to write.
    cache = ContinuousBatchingConfig(num_blocks=16) if workload["device"] == "cpu" else None
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=cache)
    manager.start()
    warm = workload["prompts"][:NUM_WARM_REQUESTS]
    generate(manager, warm, [2] * len(warm), workload["seconds"])
    tokens, seconds, is_complete = generate(manager, workload["prompts"], workload["max_tokens"], workload["seconds"])
    print(
        json.dumps(
            {
                "tokens_per_s": round(tokens / seconds, 1),
                "output_tokens": tokens,
                "wall_s": round(seconds, 2),
                "is_complete": is_complete,  # False: finished requests only, so rather too few tokens
                "version": transformers.__version__,
            }
        ),
        flush=True,
    )
    # Stopping the manager can take as long as the requests that are left.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
