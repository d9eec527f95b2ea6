"""Builds the plan of one step row by row, and remembers whose rows they are.

Knows what a row needs besides its tokens (bans, masks, log-probabilities, pooling); not which rows to take. Engine
thread only.
"""

from dataclasses import dataclass, field

from asyncllm.engine.sequence import Sequence
from asyncllm.executor.base import SlotInit, StepPlan
from asyncllm.types import Constraint


@dataclass(slots=True)
class ScheduledStep:
    """A plan for the executor, and for the commit the sequence behind each row and its epoch at that time."""

    plan: StepPlan
    sequences: list[Sequence]  # [S]
    epochs: list[int]  # [S]
    constrained_rows: list[int] = field(default_factory=list)  # that sample, masked or not
    drafting_rows: list[int] = field(default_factory=list)  # that sample, of sequences with a drafter
    failures: list[tuple[Sequence, BaseException]] = field(default_factory=list)  # whose constraint raised: to be ended


class StepBuilder:
    """Collects rows under one token budget; decode rows end up first, whatever order they came in."""

    __slots__ = (
        "_block_writes",
        "_decodes",
        "_drafts",
        "_extra_rows",
        "_new_slots",
        "_num_computed_tokens",
        "_prefills",
        "_slots",
        "budget",
        "num_spare_samples",
        "prompt_budget",
    )

    def __init__(self, budget: int, num_spare_samples: int, prompt_budget: int) -> None:
        """What the step may still take: query tokens, samples for drafts, and tokens of prompts."""
        self.budget = budget
        self.prompt_budget = prompt_budget
        self.num_spare_samples = num_spare_samples
        self._decodes: list[Sequence] = []
        self._slots: list[int] = []
        self._num_computed_tokens: list[int] = []
        self._prefills: list[tuple[Sequence, int, int]] = []  # sequence, first query token, number of them
        self._drafts: list[tuple[Sequence, list[int]]] = []
        self._extra_rows: list[int] = []  # rows that ask for more than a token
        self._new_slots: list[SlotInit] = []
        self._block_writes: list[tuple[int, int, int]] = []

    @property
    def num_decode_rows(self) -> int:
        """Decode rows so far."""
        return len(self._decodes)

    def enter_slot(self, sequence: Sequence) -> None:
        """Announce a sequence in the slot it just took."""
        self._new_slots.append(
            SlotInit(sequence.slot, sequence.params, sequence.tokens, sequence.num_prompt_tokens, sequence.adapter)
        )

    def write_blocks(self, sequence: Sequence, first_column: int) -> None:
        """Put a sequence's blocks from `first_column` on into its slot's block table."""
        blocks = sequence.blocks
        for column in range(first_column, len(blocks)):
            self._block_writes.append((sequence.slot, column, blocks[column].block_id))

    def add_decode(self, sequence: Sequence, num_computed: int, num_in_flight: int) -> None:  # hot: once per row
        """A row for the token that the sequence's slot sampled last; the numbers are the sequence's own."""
        if sequence.has_extras:
            self._extra_rows.append(len(self._decodes))
        self._decodes.append(sequence)
        self._slots.append(sequence.slot)
        self._num_computed_tokens.append(num_computed)
        sequence.num_computed_tokens = num_computed + 1
        sequence.num_in_flight = num_in_flight + 1
        self.budget -= 1

    def add_prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """A row for the next `num_tokens` known tokens; it samples if they are the last ones and more are wanted."""
        self._prefills.append((sequence, sequence.num_computed_tokens, num_tokens))
        sequence.num_computed_tokens += num_tokens
        self.budget -= num_tokens
        self.prompt_budget -= num_tokens
        if sequence.num_computed_tokens == len(sequence.tokens) < sequence.max_length:
            sequence.num_in_flight += 1
            sequence.samples_in_slot = True

    def add_draft(self, sequence: Sequence, draft: list[int]) -> None:
        """A row for the token that a sequence ends with and guesses behind it; all of them may turn out right."""
        self._drafts.append((sequence, draft))
        sequence.num_computed_tokens += 1 + len(draft)
        sequence.num_in_flight = 1 + len(draft)
        self.budget -= 1 + len(draft)
        self.num_spare_samples -= len(draft)

    def build(self) -> ScheduledStep | None:
        """The finished step, or None when it has no rows."""
        sequences = self._decodes
        num_decode_rows = len(sequences)
        if not num_decode_rows and not self._prefills and not self._drafts:
            return None
        plan = StepPlan(
            slots=self._slots,
            num_query_tokens=[1] * num_decode_rows,
            num_computed_tokens=self._num_computed_tokens,
            samples=[True] * num_decode_rows,
            num_decode_rows=num_decode_rows,
            token_ids=[],
            new_slots=self._new_slots,
            block_writes=self._block_writes,
            banned={},
            logprob_rows={},
            prompt_logprob_rows={},
        )
        for sequence, start, num_tokens in self._prefills:
            if sequence.has_extras:
                self._extra_rows.append(len(sequences))
            sequences.append(sequence)
            plan.slots.append(sequence.slot)
            plan.num_query_tokens.append(num_tokens)
            plan.num_computed_tokens.append(start)
            plan.samples.append(sequence.samples_in_slot)
            plan.token_ids += sequence.tokens[start : start + num_tokens]
        if self._drafts:
            self._extra_rows += range(len(sequences), len(sequences) + len(self._drafts))
        for sequence, draft in self._drafts:
            plan.drafts[len(sequences)] = draft
            sequences.append(sequence)
            plan.slots.append(sequence.slot)
            plan.num_query_tokens.append(1 + len(draft))
            plan.num_computed_tokens.append(len(sequence.tokens) - 1)
            plan.samples.append(True)
            plan.token_ids.append(sequence.tokens[-1])
            plan.token_ids += draft
        step = ScheduledStep(plan, sequences, [sequence.epoch for sequence in sequences])
        for row in self._extra_rows:
            sequence = sequences[row]
            if sequence.drafter is not None:  # it asks for nothing else
                if plan.samples[row]:
                    step.drafting_rows.append(row)
                continue
            _add_extras(plan, row, sequence)
            constraint = sequence.constraint
            if constraint is not None and plan.samples[row]:
                _add_mask(step, row, constraint)
        return step


def _add_extras(plan: StepPlan, row: int, sequence: Sequence) -> None:
    """What few rows ask for: bans, log-probabilities and pooling."""
    params = sequence.params
    start = plan.num_computed_tokens[row]
    end = start + plan.num_query_tokens[row]  # also the position of the token this row samples
    if plan.samples[row]:
        banned = _banned_token_ids(sequence, end)
        if banned:
            plan.banned[row] = banned
        if params.logprobs is not None:
            plan.logprob_rows[row] = params.logprobs
    # Position i predicts i + 1; what the last prompt token predicts is sampled, not scored.
    last_target = min(end + 1, sequence.num_prompt_tokens)
    if params.prompt_logprobs is not None and last_target - 1 > max(start, sequence.num_prompt_logprobs):
        plan.prompt_logprob_rows[row] = (params.prompt_logprobs, sequence.tokens[start + 1 : last_target].tolist())
    first_pooled = max(start, sequence.num_pooled_tokens)
    if first_pooled < min(end, sequence.num_prompt_tokens):
        plan.pooled_rows[row] = (first_pooled - start, min(end, sequence.num_prompt_tokens) - start)


def _add_mask(step: ScheduledStep, row: int, constraint: Constraint) -> None:
    """What a constrained row may sample. Where the constraint raises, the row stays in the plan; nobody commits it."""
    step.constrained_rows.append(row)
    plan = step.plan
    try:
        mask = constraint.mask()
        if mask is None:
            return
        if row in plan.banned and not _leaves_any(mask, plan.banned[row]):
            raise ValueError("min_tokens or bad_words forbid every token that the structured output allows.")
    except BaseException as error:  # a panic in native code is no Exception, and it must not end the engine either
        step.failures.append((step.sequences[row], error))
        return
    plan.masks[row] = mask


def _leaves_any(mask: bytes, banned: list[int]) -> bool:
    allowed = int.from_bytes(mask, "little")
    for token_id in banned:
        allowed &= ~(1 << token_id)
    return allowed != 0


def _banned_token_ids(sequence: Sequence, position: int) -> list[int]:
    """Tokens that must not stand at `position`: stops before min_tokens, and the ends of bad words."""
    params = sequence.params
    banned: list[int] = []
    if position - sequence.num_prompt_tokens < params.min_tokens:
        banned += params.stop_token_ids
    for word in params.bad_words:
        start = position - len(word) + 1
        # Words are looked for in the output only, as in vLLM. Those of several tokens are planned only once every token
        # before `position` is known (needs_last_token).
        if len(word) == 1 or (
            start >= sequence.num_prompt_tokens and tuple(sequence.tokens[start:position]) == word[:-1]
        ):
            banned.append(word[-1])
    return banned
