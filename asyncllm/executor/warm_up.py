"""Runs dummy steps through an executor, so that the first request does not pay for first calls.

A fresh process loads kernels, picks algorithms per shape and grows allocator pools on first use. The steps run in the
padding slot over the null block, where nothing of a request ever lives.
"""

from asyncllm.executor.base import Executor, SlotInit, StepPlan
from asyncllm.types import Capacity, SamplingParams

_DECODE_ROWS = (1, 2, 4, 8, 16)
_PREFILL_TOKENS = 64
# One row of each kind of draw.
_DRAWS = (
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9, top_k=40),
    SamplingParams(max_tokens=1),
)
# All that a row may want beside a draw.
_EXTRAS = SamplingParams(
    max_tokens=1, temperature=0.7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, logit_bias=((0, 1.0),)
)


def warm_up(executor: Executor, max_batched_tokens: int) -> None:
    """One prefill, then a decode step for a few batch sizes."""
    capacity = executor.capacity
    num_tokens = min(_PREFILL_TOKENS, max_batched_tokens, capacity.max_context_length)
    for params in _DRAWS:
        executor.launch(_plan(capacity, params, [num_tokens], is_decode=False)).wait()
    for num_rows in _DECODE_ROWS:
        if num_rows <= min(capacity.max_sequences, max_batched_tokens):
            executor.launch(_plan(capacity, None, [1] * num_rows, is_decode=True)).wait()


def warm_up_largest(executor: Executor, max_batched_tokens: int) -> None:
    """The largest steps there can be, with everything rows can ask for: what they take is the most a step will take.

    Also compiles every kernel, those of rare requests included.
    """
    capacity = executor.capacity
    longest = capacity.max_context_length
    lens = [longest] * (max_batched_tokens // longest) + [max_batched_tokens % longest or longest]
    prompts = _plan(capacity, _EXTRAS, lens[: capacity.max_sequences], is_decode=False)
    _ask_everything(prompts, capacity)
    prompts.prompt_logprob_rows = {0: (20, [0] * (prompts.num_query_tokens[0] - 1))}
    prompts.pooled_rows = {row: (0, num_tokens) for row, num_tokens in enumerate(prompts.num_query_tokens)}
    executor.launch(prompts).wait()
    rows = [1] * min(capacity.max_sequences, max_batched_tokens)
    decodes = _plan(capacity, None, rows, is_decode=True)
    _ask_everything(decodes, capacity)
    executor.launch(decodes).wait()
    drafts = _draft_plan(capacity, max_batched_tokens)
    _ask_everything(drafts, capacity)
    executor.launch(drafts).wait()
    for params in _DRAWS:
        # One decode row beside prompts, then all rows alone.
        mixed = _plan(capacity, params, [1, min(2, longest)][: capacity.max_sequences], is_decode=False)
        mixed.num_decode_rows, mixed.token_ids = 1, mixed.token_ids[1:]
        executor.launch(mixed).wait()
        executor.launch(_plan(capacity, None, rows, is_decode=True)).wait()


def _ask_everything(plan: StepPlan, capacity: Capacity) -> None:
    rows = range(len(plan.slots))
    plan.banned = {0: [1]}
    plan.masks = dict.fromkeys(rows, b"\xff" * (4 * -(-capacity.vocab_size // 32)))
    plan.logprob_rows = dict.fromkeys(rows, 20)


def _draft_plan(capacity: Capacity, max_batched_tokens: int) -> StepPlan:
    """As many samples as there can be, the drafts spread over all rows."""
    num_rows = min(capacity.max_sequences, max_batched_tokens)
    room = min(capacity.max_samples, max_batched_tokens, num_rows * capacity.max_context_length) - num_rows
    lens = [1 + room // num_rows + (row < room % num_rows) for row in range(num_rows)]
    plan = _plan(capacity, None, lens, is_decode=False)
    plan.drafts = {row: [0] * (num_query - 1) for row, num_query in enumerate(lens) if num_query > 1}
    return plan


def _plan(
    capacity: Capacity, params: SamplingParams | None, num_query_tokens: list[int], *, is_decode: bool
) -> StepPlan:
    num_rows, num_tokens = len(num_query_tokens), sum(num_query_tokens)
    padding_slot = capacity.max_sequences
    return StepPlan(
        slots=[padding_slot] * num_rows,
        num_query_tokens=num_query_tokens,
        num_computed_tokens=[0] * num_rows,
        samples=[True] * num_rows,
        num_decode_rows=num_rows if is_decode else 0,
        token_ids=[] if is_decode else [0] * num_tokens,
        new_slots=[] if params is None else [SlotInit(padding_slot, params, [0], 1)],
        block_writes=[],
        banned={},
        logprob_rows={},
        prompt_logprob_rows={},
    )
