"""The real model through the real engine thread, in float32: what a request gets does not depend on what else runs."""

import threading
from collections.abc import Iterator

import pytest
import torch

from asyncllm.config import load
from asyncllm.engine.engine import Engine
from asyncllm.executor.build import build_executor
from asyncllm.types import EngineReady, SamplingParams, StepOutput, Submit
from asyncllm.weights.checkpoint import open_checkpoint

NUM_REQUESTS = 6
MAX_TOKENS = 24
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.7, "min_p": 0.05, "logit_bias": ((28, -100.0),)},
    {"temperature": 0.0, "min_tokens": 20, "stop_token_ids": (2, 28)},
]


class Run:
    """An engine with a cache of so many blocks, and the tokens it made."""

    def __init__(self, num_blocks: int, max_chunk_tokens: int) -> None:
        environment = {
            "ASYNCLLM_MODEL__DTYPE": "float32",
            "ASYNCLLM_CACHE__NUM_BLOCKS": str(num_blocks),
            "ASYNCLLM_SCHEDULER__MAX_SEQUENCES": "8",
            "ASYNCLLM_SCHEDULER__MAX_CHUNK_TOKENS": str(max_chunk_tokens),
            "ASYNCLLM_MODEL__MAX_CONTEXT_LENGTH": "256",
        }
        config = load(None, environment)
        checkpoint = open_checkpoint(config.model.path)
        self.woken = threading.Semaphore(0)
        self.engine = Engine(
            lambda report: build_executor(config, checkpoint, report), config.scheduler, config.cache, debug=True
        )
        self.engine.start(self.woken.release)
        self.tokens: dict[int, list[int]] = {}
        self.finished: set[int] = set()
        self.cached: dict[int, int] = {}
        self.num_preemptions = 0
        self.is_ready = False
        self.until(lambda: self.is_ready)

    def until(self, condition) -> None:
        while not condition():
            output = self.engine.pop_output()
            if output is None:
                assert self.woken.acquire(timeout=60), "the engine is silent"
                continue
            self.is_ready |= isinstance(output, EngineReady)
            assert type(output).__name__ != "EngineDead", output
            if isinstance(output, StepOutput):
                for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
                    self.tokens.setdefault(request_id, []).extend((output.runs or {}).get(request_id, ()))
                    self.tokens[request_id].append(token_id)
                self.finished |= output.finished.keys()
                for request_id, started in (output.started or {}).items():
                    self.cached[request_id] = started.num_cached_tokens
                self.num_preemptions = output.stats.num_preemptions if output.stats else 0

    def submit(self, request_id: int, kind: int, salt: str = "") -> None:
        prompt = [(7919 * (kind + 1) * (i + 1)) % 40_000 + 1000 for i in range(40 + 9 * kind)]
        params = SamplingParams(max_tokens=MAX_TOKENS, seed=1234 + kind, **PARAMS[kind])
        assert self.engine.submit(Submit(request_id, prompt, params, arrival_s=0.0, cache_salt=salt))

    def results(self, first: int) -> list[list[int]]:
        wanted = set(range(first, first + NUM_REQUESTS))
        self.until(lambda: wanted <= self.finished)
        return [self.tokens[request_id] for request_id in sorted(wanted)]

    def close(self) -> None:
        self.engine.stop()
        assert self.engine.join(30.0)


@pytest.fixture
def run() -> Iterator:
    runs: list[Run] = []

    def run(num_blocks: int, max_chunk_tokens: int = 512) -> Run:
        runs.append(Run(num_blocks, max_chunk_tokens))
        return runs[-1]

    threads = torch.get_num_threads()
    yield run
    for started in runs:
        started.close()
    torch.set_num_threads(threads)


def test_alone_together_warm_chunked_and_preempted_are_the_same_tokens(run) -> None:
    roomy = run(num_blocks=200)
    for kind in range(NUM_REQUESTS):
        roomy.submit(1 + kind, kind)
        roomy.until(lambda kind=kind: 1 + kind in roomy.finished)
    alone = roomy.results(1)
    assert all(alone) and not any(roomy.cached.values())

    for kind in range(NUM_REQUESTS):
        roomy.submit(101 + kind, kind, salt="together")
    assert roomy.results(101) == alone

    for kind in range(NUM_REQUESTS):
        roomy.submit(201 + kind, kind)
    assert roomy.results(201) == alone
    assert all(roomy.cached[201 + kind] >= 32 for kind in range(NUM_REQUESTS)), "the prompts were found in the cache"
    assert roomy.num_preemptions == 0
    roomy.close()

    tight = run(num_blocks=18, max_chunk_tokens=7)
    for kind in range(NUM_REQUESTS):
        tight.submit(1 + kind, kind)
    assert tight.results(1) == alone
    assert tight.num_preemptions > 0
