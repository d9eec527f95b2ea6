"""Requests as data: one for the engine, and the workload by which engines are compared.

The workload's lengths are those of nano-vllm's bench: Python's generator from seed 0, drawn in its order, so that
figures compare across engines and machines. Pure.
"""

import random

import msgspec

from asyncllm.types import SamplingParams
from perf.gpu_check.setup import Scale


class Request(msgspec.Struct, frozen=True):
    """One request of a run."""

    prompt: list[int]
    params: SamplingParams
    cache_salt: str = ""


class Workload(msgspec.Struct, frozen=True):
    """Prompts and the length of each answer, which no end token cuts."""

    prompts: list[list[int]]
    max_tokens: list[int]

    def requests(self, temperature: float, salt: str) -> list[Request]:
        """The workload for the engine; a salt of its own keeps one run's prefixes from the next."""
        return [
            Request(prompt, SamplingParams(max_tokens=length, temperature=temperature, seed=index), salt)
            for index, (prompt, length) in enumerate(zip(self.prompts, self.max_tokens, strict=True))
        ]


def make_workload(scale: Scale) -> Workload:
    """At full scale 142,827 prompt tokens and 133,966 output tokens."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, scale.max_prompt_token_id) for _ in range(rng.randint(scale.min_tokens, scale.max_tokens))]
        for _ in range(scale.num_requests)
    ]
    return Workload(prompts, [rng.randint(scale.min_tokens, scale.max_tokens) for _ in range(scale.num_requests)])
