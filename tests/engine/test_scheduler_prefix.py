"""Sharing the KV of equal beginnings, and waiting for a sibling that computes it."""

from asyncllm.types import FinishReason
from tests.engine.harness import DEPTHS, Harness, expected_tokens, prompt, submit
from tests.fakes import greedy


@DEPTHS
def test_a_second_request_finds_the_prompt_and_the_answer_of_the_first(depth: int) -> None:
    machine = Harness(depth=depth)
    machine.add(submit(1, prompt(10), greedy(max_tokens=7)))
    machine.run()
    turn_two = prompt(10) + machine.tokens[1] + [3, 4]
    machine.add(submit(2, turn_two))
    machine.run()
    assert machine.started[2].num_cached_tokens == 16  # 16 of 17 tokens were computed, all in full blocks
    assert machine.tokens[2] == expected_tokens(turn_two, greedy())[0]
    stats = machine.scheduler.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (10 + 19, 16)


def test_every_turn_of_a_conversation_finds_all_turns_before() -> None:
    machine = Harness(num_blocks=40)
    history = prompt(10)
    for turn in range(1, 5):
        machine.add(submit(turn, history, greedy(max_tokens=7)))
        machine.run()
        num_known = len(history) + 7 - 1  # the last token was sampled, not computed
        history = history + machine.tokens[turn] + [turn, turn]
        machine.add(submit(10 + turn, history, greedy(max_tokens=1)))
        machine.run()
        assert machine.started[10 + turn].num_cached_tokens == num_known // 4 * 4
    # The end of a conversation is not taken for the beginning of another one.
    machine.add(submit(99, history[12:]))
    machine.run()
    assert machine.started[99].num_cached_tokens == 0


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(8)))
    machine.run()
    machine.add(submit(2, prompt(8)))
    machine.run()
    assert machine.started[2].num_cached_tokens == 4
    assert machine.tokens[1] == machine.tokens[2]


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    machine = Harness(prefix_cache=False)
    machine.add(submit(1, prompt(12)))
    machine.run()
    machine.add(submit(2, prompt(12)))
    machine.run()
    assert machine.started[2].num_cached_tokens == 0
    assert machine.tokens[1] == machine.tokens[2]


def test_cache_salts_separate_requests() -> None:
    machine = Harness()
    for request_id, salt in enumerate(["a", "b", "a"], 1):
        machine.add(submit(request_id, prompt(12), cache_salt=salt))
        machine.run()
    assert [machine.started[i].num_cached_tokens for i in (1, 2, 3)] == [0, 0, 8]


@DEPTHS
def test_adapters_separate_requests_whatever_their_salts(depth: int) -> None:
    machine = Harness(depth=depth, num_blocks=40)
    wanted = [(0, ""), (1, ""), (2, ""), (1, ""), (0, ""), (1, "a"), (2, "a"), (1, "a"), (0, "1"), (0, "a")]
    for request_id, (adapter, salt) in enumerate(wanted, 1):
        machine.add(submit(request_id, prompt(12), adapter=adapter, cache_salt=salt))
        machine.run()  # on a device whose KV depends on the adapter, and which checks what it reads
    assert [machine.started[i].num_cached_tokens for i in range(1, 11)] == [0, 0, 0, 8, 8, 0, 0, 8, 0, 0]
    assert [new.adapter for plan in machine.executor.plans for new in plan.new_slots] == [a for a, _ in wanted]


@DEPTHS
def test_a_preempted_sequence_comes_back_with_its_adapter(depth: int) -> None:
    machine = Harness(depth=depth, num_blocks=9)
    for request_id in (1, 2, 3):
        machine.add(submit(request_id, prompt(8), greedy(max_tokens=12), adapter=request_id % 3))
    machine.run()
    assert machine.scheduler.stats().num_preemptions > 0
    entered = [new.adapter for plan in machine.executor.plans for new in plan.new_slots]
    assert len(entered) > 3 and set(entered) == {0, 1, 2}


@DEPTHS
def test_siblings_wait_for_the_shared_prompt_and_do_not_hold_up_others(depth: int) -> None:
    machine = Harness(depth=depth, max_batched_tokens=8)
    machine.add(submit(1, prompt(20)), submit(2, prompt(20), after=1), submit(3, prompt(20), after=1))
    machine.add(submit(4, prompt(2, start=5)))
    machine.run()
    assert machine.start_order == [1, 4, 2, 3]
    assert machine.started[2].num_cached_tokens == machine.started[3].num_cached_tokens == 16
    assert machine.tokens[1] == machine.tokens[2] == machine.tokens[3]


def test_siblings_start_when_the_one_they_wait_for_is_aborted() -> None:
    machine = Harness(max_batched_tokens=8)
    machine.add(submit(1, prompt(20)), submit(2, prompt(20), after=1), submit(3, prompt(20), after=2))
    machine.turn()
    machine.scheduler.abort(1)
    machine.run()
    assert machine.start_order == [1, 2, 3]
    assert machine.finished[3].reason is FinishReason.LENGTH


def test_an_aborted_sibling_stays_out() -> None:
    machine = Harness(max_batched_tokens=8)
    machine.add(submit(1, prompt(20)), submit(2, prompt(20), after=1), submit(3, prompt(20), after=1))
    machine.turn()
    machine.scheduler.abort(2)
    machine.run()
    assert machine.start_order == [1, 3]


def test_a_sibling_of_an_unknown_or_finished_request_starts_at_once() -> None:
    machine = Harness()
    machine.add(submit(1, prompt(3), greedy(max_tokens=1)))
    machine.run()
    machine.add(submit(2, prompt(3), after=1), submit(3, prompt(3), after=99), submit(4, prompt(3), after=4))
    machine.run()
    assert machine.start_order == [1, 2, 3, 4]
