"""Pooled prompts: which hidden states are summed in which step, and that each token of a prompt counts once."""

import random

import pytest

from asyncllm.types import FinishReason, Pooling
from tests.engine.harness import DEPTHS, Harness, prompt, submit
from tests.fakes import expected_sums, greedy

POOLINGS = pytest.mark.parametrize("pooling", Pooling)


def pooled(request_id: int, tokens: list[int], pooling: Pooling, **fields):
    return submit(request_id, tokens, greedy(0), pooling=pooling, **fields)


def ranges(machine: Harness) -> list[tuple[int, int]]:
    """Positions of every pooled range in the order of steps, whosever it is."""
    return [
        (plan.num_computed_tokens[row] + first, plan.num_computed_tokens[row] + end)
        for plan in machine.executor.plans
        for row, (first, end) in plan.pooled_rows.items()
    ]


def sums(tokens: list[int], pooling: Pooling) -> list[float]:
    return expected_sums(tokens, pooling, 6)


@DEPTHS
@POOLINGS
def test_a_prompt_in_chunks_has_the_sums_of_a_whole_one(pooling: Pooling, depth: int) -> None:
    for max_batched_tokens in (64, 8, 7, 4):
        machine = Harness(depth=depth, max_batched_tokens=max_batched_tokens)
        machine.add(pooled(1, prompt(30), pooling))
        machine.run()
        assert machine.pooled[1].tolist() == sums(prompt(30), pooling)
        assert machine.finished[1].reason is FinishReason.LENGTH
        assert machine.tokens == {}


def test_only_the_row_that_reaches_the_last_token_pools_it() -> None:
    machine = Harness(max_batched_tokens=8)
    machine.add(pooled(1, prompt(20), Pooling.LAST))
    machine.run()
    assert ranges(machine) == [(19, 20)]


def test_a_last_token_is_pooled_behind_a_prefix_that_others_computed() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(20), greedy(1)))
    machine.run()
    machine.add(pooled(2, prompt(20), Pooling.LAST))
    machine.run()
    assert machine.started[2].num_cached_tokens == 16
    assert machine.pooled[2].tolist() == sums(prompt(20), Pooling.LAST)


def test_a_mean_takes_nothing_from_the_prefix_cache_but_leaves_its_prompt_there() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(20), greedy(1)))
    machine.run()
    machine.add(pooled(2, prompt(20), Pooling.MEAN))
    machine.run()
    assert machine.started[2].num_cached_tokens == 0
    machine.add(pooled(3, prompt(24, start=2), Pooling.MEAN))
    machine.run()
    machine.add(submit(4, prompt(24, start=2), greedy(1)))
    machine.run()
    assert machine.started[4].num_cached_tokens == 20
    assert machine.pooled[2].tolist() == sums(prompt(20), Pooling.MEAN)


@DEPTHS
@POOLINGS
def test_a_preempted_prompt_goes_on_where_its_sums_ended(pooling: Pooling, depth: int) -> None:
    machine = Harness(depth=depth, num_blocks=13, max_batched_tokens=6)
    machine.add(submit(1, prompt(4), greedy(30)))
    machine.turns(8)
    machine.add(pooled(2, prompt(24, start=2), pooling), submit(3, prompt(8, start=3), greedy(20), priority=-1))
    while machine.scheduler.stats().num_preemptions == 0:
        assert machine.turn() is not None
    assert 2 not in machine.finished, "it was to be preempted in the middle of its prompt"
    machine.run()
    assert machine.pooled[2].tolist() == sums(prompt(24, start=2), pooling)
    if pooling is Pooling.MEAN:
        assert sum(end - first for first, end in ranges(machine)) >= 24


def test_what_was_handed_out_before_a_preemption_may_come_from_the_cache_behind_it() -> None:
    machine = Harness(num_blocks=13, max_batched_tokens=6)
    machine.add(pooled(1, prompt(24), Pooling.MEAN))
    machine.turns(3)  # 18 tokens are summed
    victim = machine.scheduler._running.pop()
    machine.scheduler._preempt(victim)
    machine.run()
    assert ranges(machine) == [(0, 6), (6, 12), (12, 18), (18, 22), (22, 24)]
    computed = [plan.num_computed_tokens[0] for plan in machine.executor.plans]
    assert computed == [0, 6, 12, 16, 22]  # four blocks of four were found again
    assert machine.pooled[1].tolist() == sums(prompt(24), Pooling.MEAN)


@DEPTHS
def test_every_token_counts_once_whenever_prompts_are_preempted(depth: int) -> None:
    num_resumed = 0
    for seed in range(12):
        rng = random.Random(seed)
        machine = Harness(
            depth=depth, num_blocks=30, max_batched_tokens=rng.randint(4, 11), prefix_cache=rng.random() < 0.5
        )
        requests = {i: (prompt(rng.randint(1, 30), start=i % 3), rng.choice(list(Pooling))) for i in range(1, 13)}
        machine.add(*(pooled(i, *request) for i, request in requests.items()))
        while machine.turn() is not None:
            running = machine.scheduler._running
            if running and rng.random() < 0.4:
                machine.scheduler._preempt(running.pop(rng.randrange(len(running))))
        for request_id, (tokens, pooling) in requests.items():
            assert machine.pooled[request_id].tolist() == sums(tokens, pooling), f"{seed=}"
        pooled_rows = [pair for plan in machine.executor.plans for pair in plan.pooled_rows.values()]
        num_resumed += sum(first > 0 and end - first > 1 for first, end in pooled_rows)
    assert num_resumed > 5, "hardly any went on in the middle of a row"


@DEPTHS
def test_an_aborted_prompt_hands_out_nothing_more(depth: int) -> None:
    machine = Harness(depth=depth, max_batched_tokens=8)
    machine.add(pooled(1, prompt(40), Pooling.MEAN), pooled(2, prompt(9, start=2), Pooling.MEAN))
    machine.turns(2)
    before = machine.pooled[1].tolist()
    machine.scheduler.abort(1)
    machine.run()
    assert machine.pooled[1].tolist() == before
    assert machine.finished[1].reason is FinishReason.ABORT
    assert machine.pooled[2].tolist() == sums(prompt(9, start=2), Pooling.MEAN)


def test_log_probabilities_of_a_prompt_and_its_sums_go_together() -> None:
    machine = Harness(max_batched_tokens=8)
    machine.add(submit(1, prompt(20), greedy(0, prompt_logprobs=0), pooling=Pooling.MEAN))
    machine.run()
    assert [entry.token_id for entry in machine.prompt_logprobs[1]] == prompt(20)[1:]
    assert machine.pooled[1].tolist() == sums(prompt(20), Pooling.MEAN)
