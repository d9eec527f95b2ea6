"""Drafts on their way through the scheduler: who makes them, which of their tokens are taken, and what came of all.

Knows sequences and what their rows sampled; knows nothing of budgets and blocks, which are the scheduler's. Engine
thread only.
"""

from asyncllm.config import SpeculativeConfig
from asyncllm.engine.prompt_lookup import Drafter, count_right
from asyncllm.engine.sequence import Sequence
from asyncllm.engine.step import ScheduledStep


class Speculation:
    """The drafts of all sequences. The numbers are counters of the engine's life."""

    __slots__ = ("_balance_tokens", "_config", "_depth", "num_accepted_tokens", "num_draft_tokens", "num_drafts")

    def __init__(self, config: SpeculativeConfig, balance_tokens: int, depth: int) -> None:
        """`balance_tokens`, `depth`: the executor's, by which drafts are judged."""
        self._config = config
        self._balance_tokens = balance_tokens
        self._depth = depth
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens: tuple[int, ...] = ()  # by place in a draft

    def begin(self, sequence: Sequence) -> None:
        """Give a new sequence a drafter, if it is to have one."""
        config, asked = self._config, sequence.params.speculative_tokens
        if asked is None:
            asked = config.num_speculative_tokens if config.method == "ngram" else 0
        if asked and sequence.may_draft:
            sequence.begin_to_draft(Drafter(sequence.tokens, asked, config, self._balance_tokens, self._depth))

    def guess(self, step: ScheduledStep, num_running: int) -> None:  # hot: once per step with drafting rows
        """Drafts for the sequences of a step that was committed, where a few run and it pays.

        One that drafts is not planned ahead of the device: which tokens its row has depends on the last one.
        """
        is_off = num_running > self._config.disable_by_batch_size
        for row in step.drafting_rows:
            sequence = step.sequences[row]
            drafter = sequence.drafter
            if drafter is None or sequence.epoch != step.epochs[row]:
                continue
            if is_off:
                sequence.needs_last_token = False
                continue
            draft = drafter.draft(num_running)
            sequence.needs_last_token = drafter.pays
            if draft and drafter.pays and not sequence.num_in_flight:
                sequence.draft = draft
                sequence.samples_in_slot = False  # not a decode row next

    def verify(self, sequence: Sequence, draft: list[int], sampled: list[int], num_running: int) -> list[int]:
        """The samples up to the first that differs from its draft, or that ends the sequence: 1 to all of them.

        Those behind it were drawn behind a token that is not there. A sample's noise depends on its position alone, so
        every one that is taken is what a decode row would have sampled there, at any temperature.
        """
        num_right = count_right(draft, sampled)
        run = sampled[: num_right + 1]
        stop_token_ids = sequence.stop_token_ids
        for place, token_id in enumerate(run):
            if token_id in stop_token_ids:
                del run[place + 1 :]
                break
        num_drafts, num_taken = len(draft), min(num_right, len(run))
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        accepted = self.num_accepted_tokens
        accepted += (0,) * (num_drafts - len(accepted))
        self.num_accepted_tokens = (*(count + 1 for count in accepted[:num_taken]), *accepted[num_taken:])
        if sequence.drafter is not None:
            sequence.drafter.observe(num_drafts, num_right, num_running)
        return run
