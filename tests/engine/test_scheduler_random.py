"""Random traffic on tiny machines: whatever happens, every request gives the tokens it gives alone, and ends.

The harness checks the scheduler's invariants after every step; the fake executor checks every KV position it reads.
"""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncllm.config import SpeculativeConfig
from asyncllm.types import FinishReason, Pooling, SamplingParams, Submit
from tests.engine.harness import Harness, expected_tokens, submit
from tests.fakes import expected_sums, greedy, repeating_token

VOCAB = 97


def random_prompt(rng: random.Random, max_length: int) -> list[int]:
    """Often the beginning of one of two common prompts, so that prefixes are shared and split."""
    length = rng.randrange(1, max_length + 1)
    stride = rng.choice([3, 5])
    common = [(number * stride) % VOCAB for number in range(1, length + 1)]
    shared = rng.choice([0, length // 2, length])
    return common[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]


def random_params(rng: random.Random, max_context_length: int, num_prompt_tokens: int) -> SamplingParams:
    max_tokens = rng.randrange(0, max_context_length - num_prompt_tokens + 1)
    if rng.random() < 0.3:  # nothing that keeps it from drafting
        return greedy(max_tokens, stop_token_ids=tuple(rng.sample(range(VOCAB), 8)))
    return greedy(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, min(3, max_tokens)]),
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 8]))),
        bad_words=rng.choice([(), (), ((rng.randrange(VOCAB),),), ((rng.randrange(VOCAB), rng.randrange(VOCAB)),)]),
        logprobs=rng.choice([None, None, 0, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        speculative_tokens=rng.choice([None, None, 0, 1, 4, 16]),
    )


def random_submit(rng: random.Random, request_id: int, machine: Harness) -> Submit:
    capacity = machine.executor.capacity
    longest = min(capacity.max_context_length, capacity.num_kv_tokens - 1)
    prompt = random_prompt(rng, longest)
    pooling = rng.choice([None, None, None, None, Pooling.LAST, Pooling.MEAN])
    params = random_params(rng, capacity.max_context_length, len(prompt))
    return submit(
        request_id,
        prompt,
        params if pooling is None else greedy(0, prompt_logprobs=params.prompt_logprobs),
        pooling=pooling,
        arrival_s=float(rng.randrange(20)),
        priority=rng.choice([0, 0, 0, 1, -1]),
        cache_salt=rng.choice(["", "", "salt"]),
        after=rng.choice([0, 0, max(0, request_id - 1)]),
    )


def random_machine(rng: random.Random) -> Harness:
    max_sequences = rng.choice([1, 2, 3, 5])
    return Harness(
        depth=rng.choice([1, 2, 3]),
        prefix_cache=rng.random() < 0.8,
        max_batched_tokens=max_sequences + rng.choice([0, 3, 40]),
        max_chunk_tokens=rng.choice([1, 3, 8, 50]),
        num_blocks=rng.choice([4, 7, 12, 30]),
        block_size=rng.choice([1, 2, 4]),
        max_sequences=max_sequences,
        max_context_length=rng.choice([16, 40]),
        next_token=rng.choice([None, repeating_token(VOCAB)]),
        speculative=SpeculativeConfig(
            method=rng.choice(["off", "ngram"]),
            num_speculative_tokens=rng.choice([1, 3, 16]),
            prompt_lookup_min=rng.choice([1, 2]),
            prompt_lookup_max=4,
            disable_by_batch_size=rng.choice([1, 2, 16]),
            auto_off=rng.random() < 0.5,
        ),
    )


def assert_as_if_alone(machine: Harness, request: Submit, aborted: bool) -> None:
    capacity = machine.executor.capacity
    max_length = min(capacity.max_context_length, capacity.num_kv_tokens + 1)
    prompt = request.prompt_token_ids
    expected, reason = expected_tokens(prompt, request.params, VOCAB, max_length, machine.executor.next_token)
    tokens = machine.tokens.get(request.request_id, [])
    finished = machine.finished[request.request_id]
    if aborted and finished.reason is FinishReason.ABORT:
        assert tokens == expected[: len(tokens)]
        return
    assert (tokens, finished.reason) == (expected, reason)
    assert finished.stop_token_id == (expected[-1] if reason is FinishReason.STOP else None)
    if request.params.logprobs is not None and expected:
        assert [entry.token_id for entry in machine.logprobs[request.request_id]] == expected
    if request.params.prompt_logprobs is not None and len(prompt) > 1:
        assert [entry.token_id for entry in machine.prompt_logprobs[request.request_id]] == prompt[1:]
    if request.pooling is not None:
        sums = expected_sums(prompt, request.pooling, capacity.hidden_size)
        assert machine.pooled[request.request_id].tolist() == sums
    else:
        assert request.request_id not in machine.pooled


def play(seed: int, num_requests: int) -> Harness:
    """Random arrivals and aborts while the machine runs; then until it is idle."""
    rng = random.Random(seed)
    machine = random_machine(rng)
    requests: list[Submit] = []
    aborted: set[int] = set()
    while len(requests) < num_requests:
        for _ in range(rng.randrange(4)):
            requests.append(random_submit(rng, len(requests) + 1, machine))
            machine.add(requests[-1])
        machine.turns(rng.randrange(4))
        if requests and rng.random() < 0.2:
            victim = rng.choice(requests).request_id
            aborted.add(victim)
            machine.scheduler.abort(victim)
            machine.scheduler.check()
    machine.run()
    stats = machine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens, stats.num_used_blocks) == (0, 0, 0, 0)
    assert machine.finished.keys() == {request.request_id for request in requests}
    for request in requests:
        assert_as_if_alone(machine, request, request.request_id in aborted)
    return machine


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_random_traffic_gives_every_request_the_tokens_it_gives_alone(seed: int) -> None:
    machine = play(seed, num_requests=12)  # compares every request with a run alone
    assert len(machine.finished) >= 12


@pytest.mark.parametrize("seed", range(8))
def test_a_long_day_of_traffic_leaves_an_empty_machine(seed: int) -> None:
    assert play(seed, num_requests=150).scheduler.pool.num_used == 0


def test_random_traffic_reaches_preemption_prefix_hits_and_drafts_right_and_wrong() -> None:
    machines = [play(seed, num_requests=40) for seed in range(100, 124)]
    num_accepted = sum(sum(machine.scheduler.stats().num_accepted_tokens) for machine in machines)
    num_drafted = sum(machine.scheduler.stats().num_draft_tokens for machine in machines)
    assert num_accepted > 10 and num_drafted - num_accepted > 10
    assert sum(machine.scheduler.stats().num_preemptions for machine in machines) > 20
    assert sum(machine.scheduler.stats().prefix_hit_tokens for machine in machines) > 100


@pytest.mark.parametrize("seed", range(10))
def test_warm_answers_are_those_of_a_cold_cache(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [random_prompt(rng, 30) for _ in range(6)]
    machine = Harness(depth=rng.choice([1, 2]), num_blocks=60)
    answers = []
    for lap in range(2):
        for number, prompt in enumerate(prompts):
            machine.add(submit(lap * 10 + number + 1, prompt))
        machine.run()
        answers.append([machine.tokens[lap * 10 + number + 1] for number in range(6)])
    assert answers[0] == answers[1]
    assert any(machine.started[10 + number + 1].num_cached_tokens for number in range(6))


@pytest.mark.parametrize("seed", range(6))
def test_the_oldest_running_sequence_gets_on_in_every_step(seed: int) -> None:
    """Why nobody starves: preemption comes from behind, so whoever is in front only moves forward."""
    rng = random.Random(seed)
    machine = Harness(num_blocks=8, max_sequences=4, max_batched_tokens=8)
    for request_id in range(1, 25):
        prompt = random_prompt(rng, 20)
        machine.add(submit(request_id, prompt, greedy(max_tokens=rng.randrange(1, 9)), arrival_s=0.0))
    machine.turn()
    while machine.scheduler.has_work:
        running = machine.scheduler._running
        slot = running[0].slot if running else None
        machine.turn()
        assert slot is None or slot in machine.executor.plans[-1].slots, f"{seed=}"
    machine.run()
    assert machine.finished.keys() == set(range(1, 25))
