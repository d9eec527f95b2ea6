"""Who runs, in which order, and who makes room: budget, chunks, admission, preemption."""

import pytest

from asyncllm.errors import CapacityError
from asyncllm.types import FinishReason
from tests.engine.harness import DEPTHS, Harness, expected_tokens, prompt, submit
from tests.fakes import greedy


def test_decode_rows_come_first_in_the_plan() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(20), priority=1))
    machine.turns(3)
    machine.add(submit(2, prompt(20, start=2), priority=0))  # older in the order, yet its prompt comes last
    machine.turn()
    plan = machine.executor.plans[-1]
    assert plan.num_decode_rows == 1
    assert plan.num_query_tokens == [1, 8]
    assert len(plan.token_ids) == 8


def test_a_prompt_alone_is_computed_whole() -> None:
    machine = Harness(max_chunk_tokens=4)
    machine.add(submit(1, prompt(30)))
    machine.turn()
    assert machine.executor.plans[0].num_query_tokens == [30]


def test_a_prompt_is_chunked_while_others_decode() -> None:
    machine = Harness(max_chunk_tokens=4)
    machine.add(submit(1, prompt(3), greedy(max_tokens=20)))
    machine.turn()
    machine.add(submit(2, prompt(10, start=2)))
    machine.turns(3)
    assert [plan.num_query_tokens for plan in machine.executor.plans[1:]] == [[1, 4], [1, 4], [1, 2]]
    assert [plan.samples for plan in machine.executor.plans[1:]] == [[True, False], [True, False], [True, True]]


def test_prompts_share_the_tokens_that_a_step_has_for_them_in_order() -> None:
    machine = Harness(most_prompt_tokens=12)
    machine.add(submit(1, prompt(10)), submit(2, prompt(15, start=2)), submit(3, prompt(8, start=3)))
    machine.turns(3)
    first, second, third = machine.executor.plans[:3]
    assert first.num_query_tokens == [10, 2]
    # The first one decodes from here on: the second goes on in chunks of 8, and the third has what is left.
    assert second.num_decode_rows == 1 and second.num_query_tokens == [1, 8, 4]
    assert third.num_query_tokens[1:] == [5, 4]
    tokens = machine.run()
    for request_id, its_prompt in enumerate((prompt(10), prompt(15, start=2), prompt(8, start=3)), start=1):
        assert tokens[request_id] == expected_tokens(its_prompt, greedy())[0]


def test_the_budget_bounds_a_step_and_keeps_a_token_for_everyone_behind() -> None:
    machine = Harness(max_batched_tokens=6)
    machine.add(*(submit(i, prompt(4, start=i), greedy(max_tokens=30)) for i in (2, 3)))
    machine.turns(2)
    machine.add(submit(1, prompt(20), priority=-1))
    machine.turns(2)
    assert all(plan.num_tokens <= 6 for plan in machine.executor.plans)
    assert machine.executor.plans[-1].num_query_tokens == [1, 1, 4]


def test_waiting_sequences_start_by_priority_then_arrival_then_id() -> None:
    machine = Harness(max_sequences=1)
    machine.add(
        submit(1, prompt(3), arrival_s=5.0, priority=1),
        submit(2, prompt(3), arrival_s=9.0, priority=0),
        submit(3, prompt(3), arrival_s=4.0, priority=0),
        submit(5, prompt(3), arrival_s=7.0, priority=0),
        submit(4, prompt(3), arrival_s=7.0, priority=0),
    )
    machine.run()
    assert machine.start_order == [3, 4, 5, 2, 1]


def test_a_request_that_does_not_fit_yet_is_not_overtaken_by_smaller_ones() -> None:
    machine = Harness(num_blocks=11)
    machine.add(submit(1, prompt(24), greedy(max_tokens=4)))
    machine.turn()
    machine.add(submit(2, prompt(24, start=2)), submit(3, prompt(2, start=3)))
    machine.turn()
    assert machine.start_order == [1]
    machine.run()
    assert machine.start_order == [1, 2, 3]


def test_admission_leaves_a_watermark_free_while_others_run() -> None:
    machine = Harness(num_blocks=6)  # five blocks to hold
    machine.add(submit(1, prompt(8), greedy(max_tokens=8)))
    machine.turn()
    machine.add(submit(2, prompt(12, start=2)))
    machine.turn()
    assert machine.start_order == [1]  # three blocks are free, it wants three, one must stay
    machine.run()
    assert machine.finished.keys() == {1, 2}


def test_admission_ignores_the_watermark_when_nothing_runs() -> None:
    machine = Harness(num_blocks=4)
    machine.add(submit(1, prompt(11), greedy(max_tokens=1)))  # all three blocks
    machine.turn()
    assert machine.start_order == [1]


def test_blocks_promised_to_begun_prompts_are_not_given_away() -> None:
    machine = Harness(max_chunk_tokens=8)
    machine.add(submit(1, prompt(3), greedy(max_tokens=12)))
    machine.turn()
    machine.add(submit(2, prompt(40, start=2)))
    machine.turn()  # has two blocks, wants ten
    machine.add(submit(3, prompt(24, start=3)))  # six of the 13 free ones would be enough for it
    machine.run()
    assert machine.scheduler.stats().num_preemptions == 0
    assert list(machine.finished)[-1] == 3


@DEPTHS
def test_the_newest_of_the_lowest_priority_is_preempted_and_gives_the_same_tokens(depth: int) -> None:
    machine = Harness(depth=depth, num_blocks=8)
    params = greedy(max_tokens=14)
    machine.add(
        submit(1, prompt(7, start=1), params, priority=1),
        submit(2, prompt(7, start=2), params, priority=0),
        submit(3, prompt(7, start=3), params, priority=1),
    )
    machine.run()
    assert machine.scheduler.stats().num_preemptions > 0
    preempted = [list(init.token_ids[:7]) for plan in machine.executor.plans for init in plan.new_slots]
    assert preempted.count(prompt(7, start=2)) == 1  # the most urgent never was
    assert list(machine.finished) == [2, 1, 3]
    for request_id in (1, 2, 3):
        assert machine.tokens[request_id] == expected_tokens(prompt(7, start=request_id), params)[0]


def test_nothing_is_admitted_in_the_step_of_a_preemption() -> None:
    machine = Harness(num_blocks=11)
    machine.add(submit(1, prompt(11), greedy(max_tokens=12)), submit(2, prompt(15, start=2), greedy(max_tokens=12)))
    machine.turn()
    machine.add(submit(3, prompt(16, start=3), priority=-1))  # lacks one block, and is first in the queue
    while machine.scheduler.stats().num_preemptions == 0:
        machine.turn()
    assert machine.executor.plans[-1].new_slots == []
    machine.turn()
    assert machine.start_order == [1, 2, 3]


def test_a_preempted_sequence_is_resumed_before_newer_ones_and_finds_its_blocks() -> None:
    machine = Harness(num_blocks=9, max_sequences=2)
    machine.add(submit(1, prompt(11), greedy(max_tokens=14)), submit(2, prompt(11, start=2), greedy(max_tokens=14)))
    machine.turn()
    machine.add(submit(3, prompt(3, start=3), greedy(max_tokens=2)))
    machine.run()
    assert machine.scheduler.stats().num_preemptions == 1
    assert machine.start_order == [1, 2, 3]
    assert list(machine.finished) == [1, 3, 2]
    [(resumed_in, num_known)] = [entry for entry in machine.executor.slot_entries if entry[1] > 11]
    plan = machine.executor.plans[resumed_in - 1]
    assert plan.num_decode_rows == 0
    assert 0 < plan.num_computed_tokens[0] < num_known


def test_a_resumed_sequence_is_not_started_twice() -> None:
    machine = Harness(num_blocks=8)
    machine.add(*(submit(i, prompt(7, start=i), greedy(max_tokens=14)) for i in (1, 2, 3)))
    machine.run()  # the harness refuses a second Started
    assert machine.started.keys() == {1, 2, 3}
    assert all(started.num_cached_tokens == 0 for started in machine.started.values())


def test_a_sequence_that_outgrows_the_whole_cache_ends_with_length() -> None:
    machine = Harness(num_blocks=4, depth=2)  # twelve tokens of KV; one more can be sampled
    machine.add(submit(1, prompt(7), greedy(max_tokens=50)), submit(2, prompt(3, start=2), greedy(max_tokens=50)))
    machine.run()
    assert [len(machine.tokens[i]) for i in (1, 2)] == [13 - 7, 13 - 3]
    assert machine.finished[1].reason is machine.finished[2].reason is FinishReason.LENGTH


def test_a_prompt_that_never_fits_is_refused_at_once() -> None:
    machine = Harness(num_blocks=4)
    with pytest.raises(CapacityError, match="12 tokens, but the server holds at most 11"):
        machine.add(submit(1, prompt(12)))
    machine.add(submit(2, prompt(11)))
    machine.run()
    assert machine.finished.keys() == {2}


def test_steady_decode_writes_a_block_only_when_a_sequence_enters_one() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(4), greedy(max_tokens=12)))
    machine.run()
    writes = [len(plan.block_writes) for plan in machine.executor.plans]
    assert writes == [1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert [len(plan.new_slots) for plan in machine.executor.plans] == [1] + [0] * 11


def test_a_request_of_low_priority_gets_its_turn_when_the_urgent_ones_are_done() -> None:
    machine = Harness(max_sequences=2, num_blocks=9)
    machine.add(submit(1, prompt(20), greedy(max_tokens=10), priority=9))
    for request_id in range(2, 30):
        machine.add(submit(request_id, prompt(3, start=request_id), greedy(max_tokens=4)))
    machine.run()
    assert len(machine.finished) == 29
    assert machine.start_order[-1] == 1


def test_many_dead_entries_do_not_pile_up_in_the_queue() -> None:
    machine = Harness(max_sequences=1)
    machine.add(submit(1, prompt(3), greedy(max_tokens=60)))
    machine.turn()
    for request_id in range(2, 1000):
        machine.add(submit(request_id, prompt(3), priority=5))
        machine.scheduler.abort(request_id)
    assert len(machine.scheduler._waiting._heap) < 100
    machine.scheduler.check()
