"""How sequences end: lengths, stops, bans, aborts, refusals."""

import itertools

import pytest

from asyncllm.errors import CapacityError, InvalidRequest
from asyncllm.types import FinishReason
from tests.engine.harness import DEPTHS, Harness, expected_tokens, prompt, submit
from tests.fakes import greedy


@DEPTHS
def test_a_request_gives_the_tokens_of_the_model_and_ends_with_length(depth: int) -> None:
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), greedy(max_tokens=6)))
    assert machine.run()[1] == expected_tokens(prompt(5), greedy(max_tokens=6))[0]
    assert machine.finished[1].reason is FinishReason.LENGTH
    assert machine.scheduler.stats().num_used_blocks == 0
    assert not machine.scheduler.has_work


@DEPTHS
def test_no_step_is_launched_past_max_tokens(depth: int) -> None:
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), greedy(max_tokens=3)))
    machine.run()
    assert machine.executor.num_steps == 3


@DEPTHS
def test_no_step_is_launched_past_the_context(depth: int) -> None:
    machine = Harness(depth=depth, max_context_length=8)
    machine.add(submit(1, prompt(5), greedy(max_tokens=100)))
    assert len(machine.run()[1]) == 3
    assert machine.finished[1].reason is FinishReason.LENGTH
    assert machine.executor.num_steps == 3


@DEPTHS
def test_a_stop_token_ends_a_sequence_and_is_its_last_token(depth: int) -> None:
    free_run, _ = expected_tokens(prompt(5), greedy(max_tokens=8))
    params = greedy(max_tokens=8, stop_token_ids=(free_run[3],))
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), params))
    assert machine.run()[1] == free_run[:4]
    assert machine.finished[1].reason is FinishReason.STOP
    assert machine.finished[1].stop_token_id == free_run[3]


def test_a_row_launched_behind_a_stop_token_is_not_committed() -> None:
    free_run, _ = expected_tokens(prompt(5), greedy())
    machine = Harness(depth=2)
    machine.add(submit(1, prompt(5), greedy(stop_token_ids=(free_run[0],))))
    machine.turns(1)
    assert 1 in machine.finished
    assert len(machine.in_flight) == 1  # the overshoot
    assert machine.scheduler.stats().num_used_blocks == 0  # freed at once all the same
    machine.add(submit(2, prompt(9, start=3)))  # takes the slot and the blocks
    machine.run()
    assert machine.tokens[1] == free_run[:1]
    assert machine.tokens[2] == expected_tokens(prompt(9, start=3), greedy())[0]


@DEPTHS
def test_stop_tokens_are_banned_until_min_tokens_exist(depth: int) -> None:
    free_run, _ = expected_tokens(prompt(5), greedy())
    params = greedy(max_tokens=8, min_tokens=4, stop_token_ids=(free_run[1], 96, *range(40, 80)))
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), params))
    tokens = machine.run()[1]
    assert (tokens, machine.finished[1].reason) == expected_tokens(prompt(5), params)
    assert len(tokens) >= 4
    assert not set(tokens[:4]) & set(params.stop_token_ids)


@DEPTHS
def test_bad_words_of_one_token_and_of_several_are_never_completed(depth: int) -> None:
    free_run, _ = expected_tokens(prompt(5), greedy())
    without, _ = expected_tokens(prompt(5), greedy(bad_words=((free_run[0],),)))
    # The last word stands across the end of the prompt: only the output is looked at.
    words = ((free_run[0],), (without[0], without[1]), (5, 6, 7), (prompt(5)[-1], without[0]))
    params = greedy(bad_words=words)
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), params), submit(2, prompt(5)))
    machine.run()
    assert machine.tokens[1] == expected_tokens(prompt(5), params)[0]
    assert machine.tokens[1][0] == without[0] != free_run[0]
    assert machine.tokens[1][1] != without[1]
    assert machine.tokens[2] == free_run  # the neighbour is not affected


def test_a_sequence_whose_plan_needs_its_last_token_is_not_planned_ahead() -> None:
    machine = Harness(depth=2)
    machine.add(submit(1, prompt(5), greedy(bad_words=((1, 2),))))
    machine.add(submit(2, prompt(5, start=2), greedy(max_tokens=30)))  # keeps the device busy in between
    machine.run()
    slot = machine.executor.plans[0].slots[0]
    steps = [number for number, plan in enumerate(machine.executor.plans) if slot in plan.slots]
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(steps))
    assert machine.tokens[1] == expected_tokens(prompt(5), greedy(bad_words=((1, 2),)))[0]


@DEPTHS
def test_max_tokens_of_zero_computes_the_prompt_and_samples_nothing(depth: int) -> None:
    machine = Harness(depth=depth, max_batched_tokens=6)
    machine.add(submit(1, prompt(10), greedy(max_tokens=0, prompt_logprobs=1)))
    machine.run()
    assert 1 not in machine.tokens
    assert machine.finished[1].reason is FinishReason.LENGTH
    assert [entry.token_id for entry in machine.prompt_logprobs[1]] == prompt(10)[1:]
    assert not any(any(plan.samples) for plan in machine.executor.plans)


@DEPTHS
def test_a_prompt_as_long_as_the_context_ends_with_length_and_no_tokens(depth: int) -> None:
    machine = Harness(depth=depth, max_context_length=8)
    machine.add(submit(1, prompt(8), greedy(max_tokens=4)))
    machine.run()
    assert 1 not in machine.tokens
    assert machine.finished[1].reason is FinishReason.LENGTH


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(CapacityError, match="at most 8"):
        Harness(max_context_length=8).add(submit(1, prompt(9)))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        Harness().add(submit(1, []))


@DEPTHS
def test_an_abort_frees_everything_at_once_and_is_told_once(depth: int) -> None:
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(9), greedy(max_tokens=30)), submit(2, prompt(9, start=2)))
    machine.turns(3)
    num_before = len(machine.tokens[1])
    machine.scheduler.abort(1)
    machine.scheduler.abort(1)
    machine.scheduler.check()
    assert machine.scheduler.stats().num_running == 1
    machine.run()
    assert machine.finished[1].reason is FinishReason.ABORT
    assert len(machine.tokens[1]) == num_before
    assert machine.tokens[2] == expected_tokens(prompt(9, start=2), greedy())[0]


def test_an_abort_before_the_first_step_is_told_without_a_step() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(9)))
    machine.scheduler.abort(1)
    output = machine.turn()
    assert output is not None and output.finished[1].reason is FinishReason.ABORT
    assert machine.executor.num_steps == 0
    assert machine.started == {}


def test_an_abort_of_an_unknown_request_is_harmless() -> None:
    machine = Harness()
    machine.scheduler.abort(7)
    assert machine.turn() is None
