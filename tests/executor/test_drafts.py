"""Rows with drafts on real executors: the tokens are those of rows without, whatever the drafts and the temperature."""

import random

import msgspec
import numpy as np
import pytest
import torch

from asyncllm.config import ONLY_ON_REQUEST, SpeculativeConfig
from asyncllm.executor.base import StepPlan
from asyncllm.executor.cuda_executor import CudaExecutor
from asyncllm.executor.drafts import by_row, draft_arrays, sampling_places, settle
from asyncllm.executor.torch_executor import TorchExecutor
from tests.engine.harness import submit
from tests.executor.reference import random_params
from tests.executor.test_cuda_executor import Run, cuda_executor, torch_executor
from tests.executor.tiny_model import VOCAB

CONFIG = SpeculativeConfig(method="ngram", num_speculative_tokens=6, auto_off=False)


class Oracle:
    """Stands in for the look-up: it knows how the sequence goes on, and is wrong now and then."""

    def __init__(self, tokens, whole: list[int], rng: random.Random) -> None:
        self.tokens, self.whole, self.rng = tokens, whole, rng

    def find(self, num_tokens: int) -> list[int]:
        draft = self.whole[len(self.tokens) :][: self.rng.randint(0, num_tokens)]
        return [token if self.rng.random() < 0.8 else self.rng.randrange(VOCAB) for token in draft]


def requests(seed: int, count: int) -> list:
    """Prompts with a shared beginning, parameters of every kind that may draft, and some that may not."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(13)]
    submits = []
    for request_id in range(1, count + 1):
        params = random_params(rng, VOCAB)
        if request_id % 4:
            params = msgspec.structs.replace(
                params,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                repetition_penalty=1.0,
                temperature=request_id % 3 / 2,
            )
        params = msgspec.structs.replace(
            params, max_tokens=rng.choice((3, 16, 30)), stop_token_ids=tuple(range(0, VOCAB, 24))
        )
        tail = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
        submits.append(submit(request_id, shared * rng.randint(0, 1) + tail, params))
    return submits


def play(executor: CudaExecutor | TorchExecutor, submits: list, answers: dict[int, list[int]] | None) -> Run:
    """Serve these; with `answers`, which are right, guess at them."""
    run = Run(executor, speculative=ONLY_ON_REQUEST if answers is None else CONFIG)
    for number, each in enumerate(submits):
        run.add(each)
        sequence = run.scheduler._sequences.get(each.request_id)
        if answers is not None and sequence is not None and sequence.drafter is not None:
            whole = [*each.prompt_token_ids, *answers[each.request_id]]
            sequence.drafter._lookup = Oracle(sequence.tokens, whole, random.Random(number))
        if number > 4:
            run.turns(2)
    while run.turn() is not None:
        pass
    return run


@pytest.mark.parametrize("num_blocks", [62, 14], ids=["roomy", "preempting"])
@pytest.mark.parametrize("seed", range(3))
def test_drafts_right_and_wrong_give_the_tokens_of_none(seed: int, num_blocks: int) -> None:
    submits = requests(seed, count=9)
    expected = play(torch_executor(num_blocks=num_blocks), submits, None)
    run = play(torch_executor(num_blocks=num_blocks), submits, expected.tokens)
    assert run.tokens == expected.tokens
    assert {i: f.reason for i, f in run.finished.items()} == {i: f.reason for i, f in expected.finished.items()}
    stats = run.scheduler.stats()
    assert 10 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens - 5
    assert (stats.num_preemptions > 0) == (num_blocks == 14)


def test_a_device_that_runs_ahead_gives_the_same_tokens() -> None:
    submits = [
        msgspec.structs.replace(each, params=msgspec.structs.replace(each.params, max_tokens=9))
        for each in requests(seed=1, count=3)
    ]
    expected = play(torch_executor(), submits, None)
    run = play(cuda_executor(graph_rows=1, overlap=True), submits, expected.tokens)
    assert run.tokens == expected.tokens
    stats = run.scheduler.stats()
    assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens


def plan_of(num_query: list[int], samples: list[bool], drafts: dict[int, list[int]]) -> StepPlan:
    slots = list(range(10, 10 + len(num_query)))
    return StepPlan(slots, num_query, [0] * len(slots), samples, 0, [], [], [], {}, {}, {}, drafts=drafts)


def test_a_row_with_drafts_samples_behind_its_first_token_and_behind_each_draft() -> None:
    plan = plan_of([1, 5, 3, 2], [True, False, True, True], {2: [7, 8], 3: [9]})
    rows, num_behind = sampling_places(plan)
    assert rows.tolist() == [0, 2, 2, 2, 3, 3]
    assert num_behind is not None and num_behind.tolist() == [0, 2, 1, 0, 1, 0]
    assert by_row(plan.drafts, rows.tolist(), [1, 2, 3, 4, 5, 6], 4) == ([1, -1, -1, -1], {2: [2, 3, 4], 3: [5, 6]})


def test_a_step_without_drafts_samples_at_the_last_token_of_rows() -> None:
    rows, num_behind = sampling_places(plan_of([1, 5, 3], [True, False, True], {}))
    assert rows.tolist() == [0, 2] and num_behind is None


@pytest.mark.parametrize(
    ("sampled", "expected"),
    [
        ([1, 7, 8, 4, 9, 6], {12: 4, 13: 6}),
        ([1, 7, 5, 4, 5, 9], {12: 5, 13: 5}),
        ([1, 5, 8, 4, 5, 6], {12: 5, 13: 5}),
    ],
    ids=["all right", "the first right", "none right"],
)
def test_a_slot_is_left_with_the_sample_behind_its_right_drafts(sampled: list[int], expected: dict[int, int]) -> None:
    plan = plan_of([1, 5, 3, 2], [True, False, True, True], {2: [7, 8], 3: [9]})
    last_token = torch.full((14,), -5, dtype=torch.int32)
    arrays = draft_arrays(plan, sampling_places(plan)[0])
    settle(torch.tensor(sampled), last_token, *(torch.from_numpy(np.asarray(array)) for array in arrays))
    assert {slot: token for slot, token in enumerate(last_token.tolist()) if token != -5} == expected
