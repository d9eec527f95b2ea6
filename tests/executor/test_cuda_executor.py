"""The CUDA executor, whole, against the torch executor in float32: same plans in, same tokens out.

On a CPU its kernels are interpreted and its device is a queue that runs nothing before somebody waits, so a buffer that
is reused too early or a read that comes too soon gives other tokens. On CUDA the same tests run natively.
"""

import functools
import random
from collections import deque

import msgspec
import pytest
import torch

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.config import ONLY_ON_REQUEST, CacheConfig, SchedulerConfig, SpeculativeConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.executor.cuda_executor import CudaExecutor
from asyncllm.executor.device import CudaDevice, HostDevice
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.types import Capacity, FinishReason, SamplingParams
from asyncllm.weights.loader import load_model
from tests.engine.harness import Harness, submit
from tests.executor import test_build
from tests.executor.reference import random_params
from tests.executor.tiny_model import TINY, VOCAB, Driver, Sequence
from tests.fakes import allows, mask_of

ROWS = 4


class Checkpoint(test_build.TinyCheckpoint):
    """Heads wide enough for the kernels."""

    architecture = msgspec.structs.replace(
        TINY, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, hidden_size=32, max_position=96
    )


def capacity(num_blocks: int = 62, max_sequences: int = ROWS) -> Capacity:
    return Capacity(num_blocks, 4, max_sequences, 96, VOCAB)


@functools.cache
def host() -> CudaDevice | HostDevice:
    return CudaDevice(torch.device("cuda", 0), spin=True) if torch.cuda.is_available() else HostDevice()


def cuda_executor(graph_rows: int = ROWS, graph_tokens: int = 16, overlap: bool = False, **sizes: int) -> CudaExecutor:
    device, a = host(), Checkpoint.architecture
    attention = TritonAttention(ROWS, a.num_heads, a.num_kv_heads, a.head_dim, device.torch_device, device.num_sms)
    model = load_model(Checkpoint(), attention, torch.float32, device.torch_device)
    executor = CudaExecutor(
        model,
        attention,
        a,
        capacity(**sizes),
        device,
        torch.float32,
        {},
        graph_rows=graph_rows,
        graph_tokens=graph_tokens,
        overlap=overlap,
    )
    while executor.improve():
        pass
    # What nobody wrote must not be read.
    for cache in executor.kv_caches:
        cache.fill_(torch.nan)
    return executor


def torch_executor(**sizes: int) -> TorchExecutor:
    model = load_model(Checkpoint(), TorchAttention(), torch.float32, torch.device("cpu"))
    return TorchExecutor(model, Checkpoint.architecture, capacity(**sizes), torch.device("cpu"), torch.float32, {})


@pytest.fixture(scope="module")
def captured() -> CudaExecutor:
    return cuda_executor()


def assert_same_scores(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a.token_id, a.rank, a.top_token_ids) == (b.token_id, b.rank, b.top_token_ids)
        assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_every_kind_get_the_tokens_of_the_torch_executor(captured: CudaExecutor, seed: int) -> None:
    rng = random.Random(seed)
    specs = [
        ([rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))], random_params(rng, VOCAB)) for _ in range(ROWS)
    ]
    results = []
    for executor in (captured, torch_executor()):
        sequences = [
            Sequence(prompt, sampling, logprobs=index if index % 2 else None, prompt_logprobs=2 if index == 3 else None)
            for index, (prompt, sampling) in enumerate(specs)
        ]
        Driver(executor).run(sequences, 6, chunk=7)
        results.append(sequences)
    for ours, theirs in zip(*results):
        assert ours.tokens == theirs.tokens, f"{seed=} {ours.params}"
        assert_same_scores(ours.scored, theirs.scored)
        assert_same_scores(ours.prompt_scored, theirs.prompt_scored)


PLAIN = {
    "greedy": SamplingParams(max_tokens=9, temperature=0.0),
    "gumbel": SamplingParams(max_tokens=9, seed=3),
    "full": SamplingParams(max_tokens=9, seed=4, temperature=0.9, top_p=0.8, top_k=30),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_replayed_step_gives_the_tokens_of_an_eager_one(captured: CudaExecutor, kind: str, num_rows: int) -> None:
    outputs = []
    for executor in (captured, torch_executor()):
        driver = Driver(executor)
        sequences = [Sequence([5 + row, 9, 2 * row + 1], PLAIN[kind]) for row in range(num_rows)]
        driver.step([(sequence, 3) for sequence in sequences])
        for _ in range(8):
            _, result = driver.step([(sequence, 1) for sequence in sequences])
            assert result.replayed == (executor is captured)
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]


def test_banned_tokens_are_not_sampled_and_the_others_are_as_before(captured: CudaExecutor) -> None:
    outputs = []
    for executor in (captured, torch_executor()):
        driver = Driver(executor)
        sequences = [Sequence([5, 9], PLAIN["greedy"]), Sequence([7], PLAIN["gumbel"])]
        driver.step([(sequence, len(sequence.tokens)) for sequence in sequences])
        free = [sequence.tokens[-1] for sequence in sequences]
        for banned in ({0: free, 1: [1, 2]}, {1: free}, {}):
            driver.step([(sequence, 1) for sequence in sequences], banned)
        assert sequences[0].output[1] not in free
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]


def test_a_step_without_a_graph_of_its_kind_runs_eagerly() -> None:
    executor = cuda_executor(graph_rows=2)
    driver = Driver(executor)
    sequences = [Sequence([row + 1, 4], PLAIN["full"]) for row in range(3)]
    driver.step([(sequence, 2) for sequence in sequences])
    assert not driver.step([(sequence, 1) for sequence in sequences])[1].replayed
    assert driver.step([(sequence, 1) for sequence in sequences[:2]])[1].replayed


def test_graphs_come_one_by_one_and_serve_at_once() -> None:
    device, a = host(), Checkpoint.architecture
    attention = TritonAttention(ROWS, a.num_heads, a.num_kv_heads, a.head_dim, device.torch_device, device.num_sms)
    model = load_model(Checkpoint(), attention, torch.float32, device.torch_device)
    executor = CudaExecutor(model, attention, a, capacity(), device, torch.float32, {}, graph_rows=2)
    driver, sequence = Driver(executor), Sequence([3, 4], PLAIN["full"])
    driver.step([(sequence, 2)])
    assert not driver.step([(sequence, 1)])[1].replayed
    # The largest comes first and serves a single row too; captured between steps, it disturbs none of them.
    assert executor.improve()
    assert driver.step([(sequence, 1)])[1].replayed
    calls = 1
    while executor.improve():
        calls += 1
        driver.step([(sequence, 1)])
    assert executor.graphs.num_missing == 0 and calls + 1 == 8
    reference = Sequence([3, 4], PLAIN["full"])
    Driver(torch_executor()).run([reference], len(sequence.output))
    assert sequence.output == reference.output


class Run(Harness):
    """The step loop over a real executor."""

    def __init__(
        self,
        executor: CudaExecutor | TorchExecutor,
        prefix_cache: bool = True,
        speculative: SpeculativeConfig = ONLY_ON_REQUEST,
    ) -> None:
        super().__init__()
        self.executor = executor
        self.scheduler = Scheduler(
            executor.capacity,
            SchedulerConfig(max_sequences=ROWS, max_batched_tokens=24, max_chunk_tokens=8),
            CacheConfig(prefix_cache=prefix_cache),
            clock=lambda: 42.0,
            speculative=speculative,
            balance_tokens=executor.balance_tokens,
            depth=executor.depth,
        )
        self.in_flight = deque()


@pytest.mark.parametrize("seed", range(3))
def test_masked_rows_get_the_tokens_of_the_torch_executor(captured: CudaExecutor, seed: int) -> None:
    rng = random.Random(seed)
    specs = []
    for row in range(ROWS):
        # Rows without any mask between them, and steps without one.
        masks = [
            mask_of(rng.sample(range(VOCAB), rng.choice((1, 3, 20)))) if rng.random() < 0.6 else None for _ in "123456"
        ]
        specs.append(([rng.randrange(VOCAB) for _ in range(9)], random_params(rng, VOCAB), masks if row else None))
    results = []
    for executor in (captured, torch_executor()):
        sequences = [Sequence(prompt, params, logprobs=2, masks=masks) for prompt, params, masks in specs]
        Driver(executor).run(sequences, 6, chunk=7)
        results.append(sequences)
    for ours, theirs in zip(*results):
        assert ours.tokens == theirs.tokens, f"{seed=} {ours.params}"
        assert_same_scores(ours.scored, theirs.scored)
        for token_id, mask in zip(ours.output, ours.masks):
            assert mask is None or allows(mask, token_id)


def random_submits(seed: int, count: int) -> list:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(13)]
    submits = []
    for request_id in range(1, count + 1):
        tail = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
        params = msgspec.structs.replace(
            random_params(rng, VOCAB),
            max_tokens=rng.choice((1, 5, 14)),
            # An early stop is a step launched in vain.
            stop_token_ids=tuple(range(0, VOCAB, 16)),
            min_tokens=rng.choice((0, 0, 3)),
            logprobs=rng.choice((None, None, 2)),
        )
        submits.append(submit(request_id, shared * rng.randint(0, 1) + tail, params))
    return submits


@pytest.mark.parametrize("num_blocks", [62, 12], ids=["roomy", "preempting"])
@pytest.mark.parametrize("overlap", [False, True], ids=["depth-1", "depth-2"])
def test_the_engine_loop_gives_the_tokens_of_the_torch_executor(overlap: bool, num_blocks: int) -> None:
    submits = random_submits(seed=24, count=9)
    runs = []
    for executor in (cuda_executor(overlap=overlap, num_blocks=num_blocks), torch_executor(num_blocks=num_blocks)):
        run = Run(executor)
        run.add(*submits[:5])
        run.turns(3)
        run.add(*submits[5:])
        while run.turn() is not None:
            pass
        runs.append(run)
    ours, theirs = runs
    assert ours.tokens == theirs.tokens
    assert {i: f.reason for i, f in ours.finished.items()} == {i: f.reason for i, f in theirs.finished.items()}
    assert FinishReason.STOP in {finished.reason for finished in ours.finished.values()}
    assert ours.logprobs.keys() == theirs.logprobs.keys()
    for request_id, scores in ours.logprobs.items():
        assert_same_scores(scores, theirs.logprobs[request_id])
    if num_blocks == 12:
        assert ours.scheduler.stats().num_preemptions > 0


def test_times_of_the_device_are_told() -> None:
    driver, sequence = Driver(cuda_executor()), Sequence([3, 4], PLAIN["greedy"])
    first = driver.step([(sequence, 2)])[1]
    second = driver.step([(sequence, 1)])[1]
    assert first.device_s > 0 and second.device_s > 0
    assert first.gap_s is None
    assert second.gap_s is not None and second.gap_s >= 0
