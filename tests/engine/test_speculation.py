"""Drafts in the scheduler: the tokens are those of none, nothing is taken from anybody, and it ends where it costs."""

import random

import pytest

from asyncllm.config import SpeculativeConfig
from asyncllm.types import FinishReason, SamplingParams, Submit
from tests.engine.harness import DEPTHS, Harness, expected_tokens, prompt, submit
from tests.fakes import greedy, hash_of, mask_of, repeating_token

VOCAB = 97
PERIODIC = [11, 22, 33, 44, 55] * 3
ALWAYS = SpeculativeConfig(method="ngram", num_speculative_tokens=4, prompt_lookup_min=2, auto_off=False)


def periodic(tokens) -> int:
    """Goes round in fives for ever."""
    return tokens[-5]


def aimless(tokens) -> int:
    """One of few tokens, so that something always matches, by a rule that nothing repeats."""
    return hash_of(tokens) % 7


def machine_of(next_token=periodic, speculative: SpeculativeConfig = ALWAYS, **options) -> Harness:
    return Harness(next_token=next_token, speculative=speculative, **options)


def drafts_of(machine: Harness) -> list[int]:
    """Length of every draft, in the order of the steps."""
    return [len(draft) for plan in machine.executor.plans for draft in plan.drafts.values()]


@DEPTHS
def test_right_drafts_bring_several_tokens_in_a_step(depth: int) -> None:
    machine = machine_of(depth=depth)
    machine.add(submit(1, PERIODIC, greedy(20 + depth)))
    tokens = machine.run()[1]
    assert tokens == [PERIODIC[i % 5] for i in range(20 + depth)]
    # The prompt's step brings a token, and one that was planned behind it; each of these brings five.
    assert drafts_of(machine) == [4, 4, 4, 4]
    assert machine.executor.num_steps == 2 * depth + 3 if depth == 1 else 6
    stats = machine.scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 16, (4, 4, 4, 4))


@DEPTHS
def test_wrong_drafts_cost_no_token(depth: int) -> None:
    machine = machine_of(aimless, SpeculativeConfig(method="ngram", prompt_lookup_min=1, auto_off=False), depth=depth)
    machine.add(submit(1, [1, 2, 3, 4] * 4, greedy(40)))
    expected, _ = expected_tokens([1, 2, 3, 4] * 4, greedy(40), next_token=aimless)
    assert machine.run()[1] == expected
    assert machine.scheduler.stats().num_draft_tokens > sum(machine.scheduler.stats().num_accepted_tokens)


@DEPTHS
@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_ends_an_accepted_run_where_it_would_have_ended_anyway(depth: int, max_tokens: int) -> None:
    machine = machine_of(depth=depth)
    machine.add(submit(1, PERIODIC, greedy(max_tokens)))
    assert machine.run().get(1) == [PERIODIC[i % 5] for i in range(max_tokens)]
    assert machine.finished[1].reason is FinishReason.LENGTH


@DEPTHS
@pytest.mark.parametrize("stop", range(5))
def test_a_stop_token_inside_an_accepted_run_is_the_last_one(depth: int, stop: int) -> None:
    machine = machine_of(lambda tokens: tokens[-5] if len(tokens) < 17 + stop else 90, depth=depth)
    machine.add(submit(1, PERIODIC, greedy(30, stop_token_ids=(90,))))
    assert machine.run()[1] == [PERIODIC[i % 5] for i in range(2 + stop)] + [90]
    assert (machine.finished[1].reason, machine.finished[1].stop_token_id) == (FinishReason.STOP, 90)
    assert machine.scheduler.pool.num_used == 0


def test_what_stands_behind_a_stop_in_a_right_draft_is_not_given_out() -> None:
    machine = machine_of(prefix_cache=False)
    machine.add(submit(1, PERIODIC, greedy(30, stop_token_ids=(33,))))  # drafts go on behind it, and are right
    assert machine.run()[1] == [11, 22, 33]


def test_the_end_of_the_context_is_not_drafted_over() -> None:
    machine = machine_of(max_context_length=20, num_blocks=6)
    machine.add(submit(1, PERIODIC, greedy(1000)))
    assert len(machine.run()[1]) == 5
    assert max(drafts_of(machine)) < 4


@DEPTHS
def test_a_draft_takes_no_block_that_others_need(depth: int) -> None:
    # 10 blocks: 6 for the first, 4 for the second, and one that stays free at admission.
    machine = machine_of(
        depth=depth, num_blocks=12, speculative=SpeculativeConfig(method="ngram", num_speculative_tokens=16)
    )
    machine.add(submit(1, PERIODIC, greedy(9)), submit(2, prompt(10), greedy(6)))
    machine.run()
    assert drafts_of(machine)
    assert machine.scheduler.stats().num_preemptions == 0


def test_a_sequence_preempted_between_its_draft_and_its_row_starts_over() -> None:
    machine = machine_of(num_blocks=14, prefix_cache=False)
    machine.add(submit(1, prompt(24), greedy(24)), submit(2, PERIODIC, greedy(30)))
    machine.run()
    assert machine.scheduler.stats().num_preemptions > 0
    assert machine.tokens[2] == [PERIODIC[i % 5] for i in range(30)]


def test_what_drafts_left_in_the_cache_is_not_found_by_others() -> None:
    wrong = lambda tokens: tokens[-5] if len(tokens) % 3 else 7  # noqa: E731
    machine = machine_of(wrong, num_blocks=60)
    machine.add(submit(1, PERIODIC, greedy(20)))
    first = machine.run()[1]
    # Prompts that go on as drafts did, and as the answer did: the fake device checks what each of them reads.
    machine.add(submit(2, PERIODIC + PERIODIC, greedy(5)), submit(3, PERIODIC + first, greedy(5)))
    machine.run()
    assert machine.started[3].num_cached_tokens >= len(PERIODIC + first) // 4 * 4 - 4


ASKS: dict[str, dict] = {
    "penalties": {"frequency_penalty": 0.1},
    "min_tokens": {"min_tokens": 2, "stop_token_ids": (1,)},
    "bad_words": {"bad_words": ((96,),)},
    "logprobs": {"logprobs": 0},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "an answer to nothing": {"speculative_tokens": 0},
}


@pytest.mark.parametrize("name", ASKS)
def test_a_request_that_asks_for_this_never_drafts(name: str) -> None:
    machine = machine_of()
    machine.add(submit(1, PERIODIC, greedy(20, **ASKS[name])))
    assert len(machine.run()[1]) == 20
    assert drafts_of(machine) == []


def test_a_request_asks_for_drafts_where_the_configuration_does_not() -> None:
    machine = machine_of(speculative=SpeculativeConfig())
    machine.add(submit(1, PERIODIC, greedy(20, speculative_tokens=6)), submit(2, PERIODIC, greedy(20)))
    machine.run()
    assert set(drafts_of(machine)[:-1]) == {6}
    assert all(len(plan.drafts) <= 1 for plan in machine.executor.plans)


class _Only:
    """A constraint that allows one token for ever."""

    is_done = False

    def mask(self) -> bytes:
        return mask_of([11])

    def accept(self, token_id: int) -> None:
        assert token_id == 11


def test_a_request_with_a_grammar_never_drafts() -> None:
    machine = machine_of()
    machine.add(submit(1, PERIODIC, greedy(12), constraint=_Only()))
    assert machine.run()[1] == [11] * 12
    assert drafts_of(machine) == []


def test_nobody_drafts_while_too_many_run() -> None:
    config = SpeculativeConfig(method="ngram", prompt_lookup_min=2, disable_by_batch_size=2)
    machine = machine_of(speculative=config, num_blocks=60)
    machine.add(*(submit(i, PERIODIC, greedy(12 if i < 3 else 30)) for i in (1, 2, 3)))
    machine.run()
    for plan in machine.executor.plans:
        assert len(plan.slots) < 3 or not plan.drafts
    assert drafts_of(machine), "once two of them have ended, the third drafts"


def test_drafts_leave_everybody_their_token_of_the_budget() -> None:
    machine = machine_of(max_batched_tokens=8, num_blocks=60, max_sequences=3)
    machine.add(*(submit(i, PERIODIC, greedy(30)) for i in (1, 2, 3)))
    machine.run()
    assert max(drafts_of(machine)) == 2  # a quarter of the budget, of all of them
    first = next(number for number, plan in enumerate(machine.executor.plans) if len(plan.slots) == 3)
    assert all(len(plan.slots) == 3 and plan.num_tokens <= 8 for plan in machine.executor.plans[first : first + 9])


@DEPTHS
def test_a_sequence_whose_drafts_are_wrong_stops_and_one_whose_are_right_goes_on(depth: int) -> None:
    config = SpeculativeConfig(method="ngram", prompt_lookup_min=1)
    wrong = machine_of(aimless, config, depth=depth, max_context_length=400, num_blocks=200)
    right = machine_of(periodic, config, depth=depth, max_context_length=400, num_blocks=200)
    for machine in (wrong, right):
        machine.add(submit(1, [1, 2, 3, 4, 5, 6] * 3, greedy(300)))
        machine.run()
    assert 0 < len(drafts_of(wrong)) < 40
    assert sum(drafts_of(right)) > 200


@DEPTHS
def test_drafts_come_back_when_they_would_have_been_right(depth: int) -> None:
    turn = 160
    machine = machine_of(
        lambda tokens: tokens[-5] if len(tokens) > turn else aimless(tokens),
        SpeculativeConfig(method="ngram", prompt_lookup_min=1),
        depth=depth,
        max_context_length=500,
        num_blocks=200,
    )
    machine.add(submit(1, [1, 2, 3, 4, 5, 6] * 3, greedy(400)))
    machine.run()
    at = [plan.num_computed_tokens[row] for plan in machine.executor.plans for row in plan.drafts]
    assert not [place for place in at if turn - 80 < place < turn], "it was off"
    assert len([place for place in at if place > turn]) > 20


def test_an_abort_frees_a_sequence_that_has_drafts_in_flight() -> None:
    machine = machine_of(depth=2)
    machine.add(submit(1, PERIODIC, greedy(40)))
    machine.turns(3)
    machine.scheduler.abort(1)
    machine.run()
    assert machine.finished[1].reason is FinishReason.ABORT
    assert machine.scheduler.pool.num_used == 0


def random_traffic(seed: int) -> Harness:
    """Plain requests whose answers repeat themselves, on machines that are too small for them."""
    rng = random.Random(seed)
    max_sequences = rng.choice([1, 2, 4])
    machine = machine_of(
        repeating_token(VOCAB, rng.choice([1, 3, 5])),
        SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=rng.choice([1, 4, 16]),
            prompt_lookup_min=rng.choice([1, 2]),
            auto_off=rng.random() < 0.5,
        ),
        depth=rng.choice([1, 2, 3]),
        max_sequences=max_sequences,
        max_batched_tokens=max_sequences + rng.choice([3, 40]),
        num_blocks=rng.choice([20, 40]),
        block_size=rng.choice([1, 4]),
        max_context_length=rng.choice([40, 120]),
        prefix_cache=rng.random() < 0.7,
    )
    limit = min(machine.executor.capacity.max_context_length, machine.executor.capacity.num_kv_tokens + 1)
    requests: list[tuple[Submit, SamplingParams]] = []
    for request_id in range(1, 25):
        tokens = [(number * 3) % 5 for number in range(rng.randrange(1, limit // 2))]
        params = greedy(rng.randrange(1, 60), stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 3]))))
        requests.append((submit(request_id, tokens, params), params))
        machine.add(requests[-1][0])
        machine.turns(rng.randrange(6))
    machine.run()
    for request, params in requests:
        expected = expected_tokens(list(request.prompt_token_ids), params, VOCAB, limit, machine.executor.next_token)
        assert (machine.tokens[request.request_id], machine.finished[request.request_id].reason) == expected, f"{seed=}"
    return machine


def test_random_traffic_of_repeating_answers_gives_the_tokens_of_no_drafts() -> None:
    machines = [random_traffic(seed) for seed in range(40)]
    stats = [machine.scheduler.stats() for machine in machines]
    assert sum(each.num_preemptions for each in stats) > 20
    num_accepted = sum(sum(each.num_accepted_tokens) for each in stats)
    assert num_accepted > 1000 and sum(each.num_draft_tokens for each in stats) > num_accepted + 1000
