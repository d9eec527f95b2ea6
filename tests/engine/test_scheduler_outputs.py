"""What a step says besides tokens: log-probabilities, statistics, errors."""

from asyncllm.types import FinishReason
from tests.engine.harness import DEPTHS, Harness, prompt, submit
from tests.fakes import greedy


def test_a_refused_request_is_told_with_its_error() -> None:
    machine = Harness()
    machine.scheduler.refuse(7, "too long")
    machine.run()
    assert (machine.finished[7].reason, machine.finished[7].error) == (FinishReason.ERROR, "too long")


@DEPTHS
def test_logprobs_are_given_to_those_who_asked(depth: int) -> None:
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(5), greedy(logprobs=2)), submit(2, prompt(5, start=2)))
    machine.run()
    assert [entry.token_id for entry in machine.logprobs[1]] == machine.tokens[1]
    assert all(len(entry.top_token_ids) == 2 for entry in machine.logprobs[1])
    assert 2 not in machine.logprobs
    assert all(len(plan.logprob_rows) <= 1 for plan in machine.executor.plans)


@DEPTHS
def test_prompt_logprobs_over_chunks_are_those_of_one_piece(depth: int) -> None:
    params = greedy(max_tokens=2, prompt_logprobs=0)
    whole, chunked = Harness(), Harness(depth=depth, max_batched_tokens=7)
    for machine in (whole, chunked):
        machine.add(submit(1, prompt(30), params))
        machine.run()
    assert whole.prompt_logprobs[1] == chunked.prompt_logprobs[1]
    assert [entry.token_id for entry in whole.prompt_logprobs[1]] == prompt(30)[1:]


def test_prompt_logprobs_do_not_read_the_prefix_cache_but_fill_it() -> None:
    machine = Harness()
    for request_id in (1, 2):
        machine.add(submit(request_id, prompt(12), greedy(prompt_logprobs=0)))
        machine.run()
    machine.add(submit(3, prompt(12)))
    machine.run()
    assert [machine.started[i].num_cached_tokens for i in (1, 2, 3)] == [0, 0, 8]
    assert machine.prompt_logprobs[1] == machine.prompt_logprobs[2]


@DEPTHS
def test_prompt_logprobs_are_not_told_twice_after_a_preemption(depth: int) -> None:
    params = greedy(max_tokens=14, prompt_logprobs=1)
    machine = Harness(depth=depth, num_blocks=8, max_chunk_tokens=3)
    machine.add(*(submit(i, prompt(7, start=i), params) for i in (1, 2, 3)))
    machine.run()
    assert machine.scheduler.stats().num_preemptions > 0
    for request_id in (1, 2, 3):
        assert [entry.token_id for entry in machine.prompt_logprobs[request_id]] == prompt(7, start=request_id)[1:]


def test_a_prompt_of_one_token_has_no_prompt_logprobs() -> None:
    machine = Harness()
    machine.add(submit(1, [5], greedy(prompt_logprobs=1)))
    machine.run()
    assert machine.prompt_logprobs == {}


def test_statistics_say_how_full_the_engine_is() -> None:
    machine = Harness(max_sequences=1)
    machine.add(submit(1, prompt(5)), submit(2, prompt(6, start=2)))
    machine.turn()
    stats = machine.scheduler.stats(machine.executor.plans[-1])
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (1, 1, 6)
    assert (stats.num_used_blocks, stats.num_blocks) == (2, 16)
    assert (stats.num_scheduled_tokens, stats.num_decode_rows) == (5, 0)
    assert machine.started[1].scheduled_s == 42.0
