"""Pooled prompts through scheduler and executor against the hidden states of transformers, on a tiny random model.

The CUDA executor runs whole, its kernels interpreted where there is no CUDA; see `test_cuda_executor`.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.executor.base import Executor
from asyncllm.executor.cuda_executor import CudaExecutor
from asyncllm.executor.pooling import pool
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.types import Capacity, Pooling, Submit
from asyncllm.weights.base import Checkpoint
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from tests.engine.harness import Harness, submit
from tests.executor.test_cuda_executor import host
from tests.fakes import greedy
from tests.weights.tiny import TINY, save_llama

CPU = torch.device("cpu")
ROWS = 4
POOLINGS = pytest.mark.parametrize("pooling", Pooling)

MakeExecutor = Callable[[Capacity], Executor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, LlamaForCausalLM]:
    directory: Path = tmp_path_factory.mktemp("llama")
    reference = save_llama(directory, head_dim=64)
    return open_checkpoint(str(directory)), reference


def make_torch(checkpoint: Checkpoint) -> MakeExecutor:
    model = load_model(checkpoint, TorchAttention(), torch.float32, CPU)
    return lambda capacity: TorchExecutor(model, checkpoint.architecture, capacity, CPU, torch.float32, {})


def make_cuda(checkpoint: Checkpoint) -> MakeExecutor:
    a, device = checkpoint.architecture, host()
    attention = TritonAttention(ROWS, a.num_heads, a.num_kv_heads, a.head_dim, device.torch_device, device.num_sms)
    model = load_model(checkpoint, attention, torch.float32, device.torch_device)

    def make(capacity: Capacity) -> CudaExecutor:
        executor = CudaExecutor(model, attention, a, capacity, device, torch.float32, {}, graph_rows=2, graph_tokens=16)
        while executor.improve():
            pass
        return executor

    return make


@pytest.fixture(scope="module", params=["torch", "cuda"])
def make_executor(request: pytest.FixtureRequest, tiny: tuple[Checkpoint, LlamaForCausalLM]) -> MakeExecutor:
    return make_torch(tiny[0]) if request.param == "torch" else make_cuda(tiny[0])


@pytest.fixture(scope="module")
def reference(tiny: tuple[Checkpoint, LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny[1]


def tokens_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, TINY["vocab_size"]), k=length)


class Run(Harness):
    """The step loop over a real executor."""

    def __init__(self, make_executor: MakeExecutor, num_blocks: int = 62, max_batched_tokens: int = 64) -> None:
        super().__init__()
        self.executor = make_executor(Capacity(num_blocks, 4, ROWS, 96, TINY["vocab_size"], TINY["hidden_size"]))
        self.scheduler = Scheduler(
            self.executor.capacity,
            SchedulerConfig(max_sequences=ROWS, max_batched_tokens=max_batched_tokens, max_chunk_tokens=8),
            CacheConfig(),
            clock=lambda: 42.0,
        )


def pooled(request_id: int, tokens: list[int], pooling: Pooling) -> Submit:
    return submit(request_id, tokens, greedy(0), pooling=pooling)


def assert_sums(run: Run, request_id: int, reference: LlamaForCausalLM, tokens: list[int], pooling: Pooling) -> None:
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([tokens])).last_hidden_state[0]
    expected = hidden[-1] if pooling is Pooling.LAST else hidden.sum(0)
    ours = torch.from_numpy(run.pooled[request_id])
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@POOLINGS
@pytest.mark.parametrize("max_batched_tokens", [64, 7], ids=["whole", "chunked"])
def test_sums_are_those_of_transformers(
    make_executor: MakeExecutor, reference: LlamaForCausalLM, pooling: Pooling, max_batched_tokens: int
) -> None:
    run = Run(make_executor, max_batched_tokens=max_batched_tokens)
    prompts = {1: tokens_of(1, 37), 2: tokens_of(2, 1), 3: tokens_of(3, 16)}
    run.add(*(pooled(request_id, tokens, pooling) for request_id, tokens in prompts.items()))
    run.run()
    for request_id, tokens in prompts.items():
        assert_sums(run, request_id, reference, tokens, pooling)


@POOLINGS
def test_a_prefix_that_others_computed_changes_no_sum(
    make_executor: MakeExecutor, reference: LlamaForCausalLM, pooling: Pooling
) -> None:
    run = Run(make_executor)
    shared = tokens_of(4, 21)
    run.add(submit(1, shared, greedy(2)))
    run.run()
    run.add(pooled(2, shared, pooling), pooled(3, shared + tokens_of(5, 9), pooling))
    run.run()
    assert (run.started[2].num_cached_tokens > 0) == (pooling is Pooling.LAST)
    assert_sums(run, 2, reference, shared, pooling)
    assert_sums(run, 3, reference, shared + tokens_of(5, 9), pooling)


def test_rows_of_all_kinds_share_a_step(make_executor: MakeExecutor, reference: LlamaForCausalLM) -> None:
    run = Run(make_executor, max_batched_tokens=40)
    run.add(submit(1, tokens_of(6, 5), greedy(12)))
    run.turns(3)  # it decodes by now
    prompts = {2: (tokens_of(7, 19), Pooling.MEAN), 3: (tokens_of(8, 11), Pooling.LAST)}
    run.add(*(pooled(request_id, *prompt) for request_id, prompt in prompts.items()))
    run.add(submit(4, tokens_of(9, 13), greedy(6)))
    run.run()
    for request_id, prompt in prompts.items():
        assert_sums(run, request_id, reference, *prompt)
    alone = Run(make_executor)
    for request_id, seed, length, num_tokens in ((1, 6, 5, 12), (4, 9, 13, 6)):
        alone.add(submit(request_id, tokens_of(seed, length), greedy(num_tokens)))
        alone.run()
        assert run.tokens[request_id] == alone.tokens[request_id]


@POOLINGS
def test_a_preempted_prompt_has_the_sums_of_one_that_was_not(
    make_executor: MakeExecutor, reference: LlamaForCausalLM, pooling: Pooling
) -> None:
    run = Run(make_executor, num_blocks=8, max_batched_tokens=3)
    run.add(submit(1, tokens_of(10, 4), greedy(10)))
    run.turns(4)
    tokens = tokens_of(11, 14)
    run.add(pooled(2, tokens, pooling))
    run.run()
    assert run.scheduler.stats().num_preemptions > 0
    assert_sums(run, 2, reference, tokens, pooling)


def test_half_precision_is_summed_in_float32() -> None:
    hidden = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    hidden[0] = 0.5
    sums = pool(hidden, {0: (1, 3000), 2: (0, 1)}, torch.tensor([0, 0, 5]).numpy())
    assert sums.dtype is torch.float32
    assert sums.tolist() == [[2999.0, 2999.0], [1.0, 1.0]]
