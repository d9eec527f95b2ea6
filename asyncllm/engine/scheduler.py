"""Continuous batching: decides which tokens of which sequences the next step computes, and books what it produced.

There is no prefill phase and no decode phase: every sequence has tokens and a number of them that is computed, and each
step lets some sequences catch up under one budget of query tokens. Knows sequences and KV blocks; knows nothing of
tensors, text or threads. Engine thread only.
"""

import bisect
import sys
import time
from collections.abc import Callable
from itertools import islice
from operator import attrgetter

from asyncllm.config import ONLY_ON_REQUEST, CacheConfig, SchedulerConfig, SpeculativeConfig
from asyncllm.engine.block_pool import BlockPool
from asyncllm.engine.sequence import NO_SLOT, Sequence, SequenceStatus
from asyncllm.engine.speculation import Speculation
from asyncllm.engine.step import ScheduledStep, StepBuilder
from asyncllm.engine.waiting import WaitingQueue
from asyncllm.errors import CapacityError, InvalidRequest
from asyncllm.executor.base import StepPlan, StepResult
from asyncllm.types import Capacity, Finished, FinishReason, Floats, Started, StepOutput, StepStats, Submit

WATERMARK_SHARE = 100  # one block in so many stays free at admission, so that the running can grow a little

_order = attrgetter("order")


class Scheduler:
    """Plans steps and commits their results; several steps may be planned before the first is committed.

    The running sequences are kept sorted by (priority, arrival, request id). They are served from the front and
    preempted from the back, so a victim never stands in the plan being built, and the first one always gets on.
    """

    def __init__(
        self,
        capacity: Capacity,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        speculative: SpeculativeConfig = ONLY_ON_REQUEST,
        balance_tokens: int = 1,
        depth: int = 1,
        most_prompt_tokens: int = sys.maxsize,
    ) -> None:
        """`clock`: monotonic seconds, for the time at which a sequence was first scheduled.

        `balance_tokens`, `depth`: the executor's, by which drafts are judged; `most_prompt_tokens` is its too.
        """
        self.pool = BlockPool(capacity.num_blocks, capacity.block_size, cache_config.prefix_cache)
        self._capacity = capacity
        self._block_size = capacity.block_size
        self._max_batched_tokens = scheduler_config.max_batched_tokens
        self._max_chunk_tokens = scheduler_config.max_chunk_tokens
        self._most_prompt_tokens = most_prompt_tokens
        self._watermark = max(1, self.pool.num_blocks // WATERMARK_SHARE)
        self._clock = clock
        self._speculation = Speculation(speculative, balance_tokens, depth)

        self._sequences: dict[int, Sequence] = {}  # all that have not ended
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._num_slots = min(capacity.max_sequences, scheduler_config.max_sequences)
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self._num_promised_blocks = 0  # that the running still need for prompts they have begun

        # Told in the next StepOutput.
        self._finished: dict[int, Finished] = {}
        self._started: dict[int, Started] = {}

        # Counters of the engine's life.
        self._num_preemptions = 0
        self._prefix_queried_tokens = 0
        self._prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._sequences)

    def add(self, submit: Submit) -> None:
        """Queue a request. Raises CapacityError if it cannot fit an empty cache."""
        num_prompt_tokens = len(submit.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        limit = min(self._capacity.num_kv_tokens - 1, self._capacity.max_context_length)
        if num_prompt_tokens > limit:
            raise CapacityError(f"the prompt has {num_prompt_tokens} tokens, but the server holds at most {limit}")
        # The last token is never computed, so a full cache still samples one more.
        max_length = min(
            num_prompt_tokens + submit.params.max_tokens,
            self._capacity.max_context_length,
            self._capacity.num_kv_tokens + 1,
        )
        sequence = Sequence(submit, max_length)
        self._speculation.begin(sequence)
        self._sequences[submit.request_id] = sequence
        # A leader must have come first: a chain of siblings can then never close into a ring.
        leader = self._sequences.get(submit.after) if submit.after != submit.request_id else None
        if leader is None or leader.prompt_is_committed:
            self._waiting.push(sequence)
        else:
            self._waiting.hold(sequence, leader)

    def refuse(self, request_id: int, error: str) -> None:
        """End a request that `add` did not take; `error` is a sentence for the client."""
        self._finished[request_id] = Finished(FinishReason.ERROR, error=error)

    def abort(self, request_id: int) -> None:
        """End a request now and free what it holds; harmless if it already ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            was_running = sequence.status is SequenceStatus.RUNNING
            self._end(sequence, Finished(FinishReason.ABORT))
            if was_running:
                self._drop_ended()

    def schedule(self) -> ScheduledStep | None:  # hot: once per step
        """Plan the next step, or None when nothing can run before another step is committed.

        Reserves KV blocks for every planned token; preempts the newest sequence of the lowest priority when they run
        out. A sequence whose last tokens are in flight is planned on without their values.
        """
        # Whoever may still be admitted samples a token too. And prompts come before drafts.
        num_spare_samples = self._capacity.max_samples - min(self._num_slots, len(self._sequences))
        builder = StepBuilder(
            self._max_batched_tokens,
            min(num_spare_samples, self._max_batched_tokens // 4),
            self._most_prompt_tokens,
        )
        num_preemptions = self._num_preemptions
        self._num_promised_blocks = 0
        if self._running:
            self._schedule_running(builder)
        # What a preemption just freed belongs to those who caused it.
        if self._waiting and num_preemptions == self._num_preemptions:
            self._schedule_waiting(builder)
        step = builder.build()
        if step is not None and step.failures:
            for sequence, error in step.failures:
                self._fail(sequence, error)
            self._drop_ended()
        return step

    def _schedule_running(self, builder: StepBuilder) -> None:  # hot
        """One row for every running sequence that has something to compute, while budget and blocks last."""
        running = self._running
        block_size = self._block_size
        others_decode = any(sequence.samples_in_slot or sequence.draft for sequence in running)
        chunk_limit = self._max_chunk_tokens if others_decode else self._max_batched_tokens
        index = 0
        while index < len(running) and builder.budget > 0:  # preemption shortens it from the end
            sequence = running[index]
            index += 1
            if sequence.samples_in_slot:
                # All but the token in the slot are computed, or will be by steps in flight.
                num_computed, num_in_flight = sequence.num_computed_tokens, sequence.num_in_flight
                if num_in_flight and (sequence.needs_last_token or num_computed + 1 >= sequence.max_length):
                    continue
                if num_computed % block_size or self._reserve(sequence, num_computed + 1, builder):
                    builder.add_decode(sequence, num_computed, num_in_flight)
                continue
            if sequence.draft:
                self._schedule_draft(sequence, len(running) - index, builder)
                continue
            # Everyone behind keeps one token of the budget: a long prompt does not hold up those who decode.
            num_new = min(
                len(sequence.tokens) - sequence.num_computed_tokens,
                builder.budget - (len(running) - index),
                builder.prompt_budget,
                chunk_limit,
            )
            if num_new > 0 and self._reserve(sequence, sequence.num_computed_tokens + num_new, builder):
                builder.add_prefill(sequence, num_new)
            self._num_promised_blocks += self._num_missing_blocks(sequence)

    def _schedule_draft(self, sequence: Sequence, num_behind: int, builder: StepBuilder) -> None:
        """A row that verifies as much of a draft as fits without taking anything from others; else a decode row."""
        draft, sequence.draft = sequence.draft, []
        sequence.samples_in_slot = True
        num_computed = sequence.num_computed_tokens  # all but the last token
        num_blocks = len(sequence.blocks) + max(0, self.pool.num_free - self._watermark)
        num_drafts = min(
            len(draft),
            builder.budget - num_behind - 1,
            builder.num_spare_samples,
            sequence.max_length - num_computed - 2,  # verified, they bring one token more
            num_blocks * self._block_size - num_computed - 1,
        )
        if num_drafts > 0:
            self._reserve(sequence, num_computed + 1 + num_drafts, builder)
            builder.add_draft(sequence, draft[:num_drafts])
        elif num_computed % self._block_size or self._reserve(sequence, num_computed + 1, builder):
            builder.add_decode(sequence, num_computed, 0)

    def _reserve(self, sequence: Sequence, num_tokens: int, builder: StepBuilder) -> bool:
        """Blocks for the first `num_tokens` tokens; False when the sequence itself had to be preempted for them."""
        num_columns = len(sequence.blocks)
        missing = self._num_blocks(num_tokens) - num_columns
        while self.pool.num_free < missing:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
            builder.write_blocks(sequence, num_columns)
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Back to the queue, to be computed anew; its blocks stay findable until somebody needs them."""
        self._num_preemptions += 1
        self._release(victim)
        victim.status = SequenceStatus.WAITING
        self._waiting.push(victim)

    def _schedule_waiting(self, builder: StepBuilder) -> None:
        """Admit sequences in order while there are slots, blocks and budget. The first that does not fit ends it.

        Letting smaller ones pass would starve it.
        """
        while builder.budget > 0 and builder.prompt_budget > 0 and self._free_slots:
            sequence = self._waiting.peek()
            if sequence is None or not self._find_room(sequence):
                return
            self._waiting.pop()
            bisect.insort(self._running, sequence, key=_order)
            sequence.status = SequenceStatus.RUNNING
            sequence.slot = self._free_slots.pop()
            builder.enter_slot(sequence)
            num_cached_tokens = sequence.num_computed_tokens
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = num_cached_tokens
                self._started[sequence.request_id] = Started(num_cached_tokens, self._clock())
                self._prefix_queried_tokens += sequence.num_prompt_tokens
                self._prefix_hit_tokens += num_cached_tokens
            num_new = min(len(sequence.tokens) - num_cached_tokens, builder.budget, builder.prompt_budget)
            if builder.num_decode_rows:
                num_new = min(num_new, self._max_chunk_tokens)
            sequence.blocks += self.pool.allocate(
                self._num_blocks(num_cached_tokens + num_new) - num_cached_tokens // self._block_size
            )
            builder.write_blocks(sequence, 0)
            builder.add_prefill(sequence, num_new)
            self._num_promised_blocks += self._num_missing_blocks(sequence)

    def _find_room(self, sequence: Sequence) -> bool:
        """Hold the blocks that cache the sequence's beginning, if the rest of its known tokens fits as well.

        The whole prompt must fit, though only its first chunk is allocated: two long prompts that were admitted by
        their first chunks would preempt each other for ever. Nothing is asked for tokens still to be generated.
        """
        if self._running:
            num_room = self.pool.num_free - self._num_promised_blocks - self._watermark
            # The second look at a prompt that waits for room is cheap: it is not matched again before that can help.
            if num_room < sequence.num_blocks_wanted:
                return False
        else:
            num_room = self.pool.num_free
        # The last token is computed in any case, as is every position of which something is still owed.
        max_tokens = len(sequence.tokens) - 1
        if (
            sequence.params.prompt_logprobs is not None
            and sequence.num_prompt_logprobs < sequence.num_prompt_tokens - 1
        ):
            max_tokens = sequence.num_prompt_logprobs
        if sequence.num_pooled_tokens < sequence.num_prompt_tokens:
            max_tokens = min(max_tokens, sequence.num_pooled_tokens)
        found = self.pool.match_prefix(sequence.tokens, sequence.cache_salt, max_tokens)
        num_wanted = self._num_blocks(len(sequence.tokens)) - sum(block.ref_count > 0 for block in found)
        if num_wanted > num_room:
            assert self._running, f"{sequence} does not fit an empty cache"
            sequence.num_blocks_wanted = num_wanted
            return False
        self.pool.acquire(found)
        sequence.blocks = found
        sequence.num_computed_tokens = sequence.num_committed_tokens = len(found) * self._block_size
        sequence.cache_parent = found[-1].uid if found else sequence.cache_salt
        return True

    def commit(self, step: ScheduledStep, result: StepResult) -> StepOutput:  # hot: once per step
        """Book what a step computed, in the order of scheduling; rows of sequences that left meanwhile are skipped."""
        plan = step.plan
        output = StepOutput([], [], {})
        num_ended = len(self._finished)
        if step.constrained_rows:
            self._accept(step, result.token_ids)
        if result.logprobs or result.prompt_logprobs:
            self._take_logprobs(step, result, output)
        if result.pooled:
            self._take_pooled(step, result.pooled, output)
        self._commit_decodes(step, result.token_ids, output)
        if len(step.sequences) > plan.num_decode_rows:
            self._commit_prefills(step, result, output)
        if step.constrained_rows:
            self._end_complete(step)
        if len(self._finished) > num_ended:
            self._drop_ended()
        if step.drafting_rows:
            self._speculation.guess(step, len(self._running))
        self._tell(output)
        return output

    def _commit_decodes(self, step: ScheduledStep, sampled: list[int], output: StepOutput) -> None:  # hot
        """Rows of one token that sampled one."""
        plan, block_size = step.plan, self._block_size
        request_ids, token_ids = output.request_ids, output.token_ids
        decodes = islice(step.sequences, plan.num_decode_rows)
        for sequence, epoch, num_computed, token_id in zip(decodes, step.epochs, plan.num_computed_tokens, sampled):
            if sequence.epoch != epoch:
                continue
            num_computed += 1
            if not num_computed % block_size:
                self._cache_blocks(sequence, num_computed // block_size)
            sequence.num_committed_tokens = num_computed
            request_ids.append(sequence.request_id)
            token_ids.append(token_id)
            sequence.tokens.append(token_id)
            sequence.num_in_flight -= 1
            if token_id in sequence.stop_token_ids or num_computed + 1 >= sequence.max_length:
                self._end_by(sequence, token_id)

    def _commit_prefills(self, step: ScheduledStep, result: StepResult, output: StepOutput) -> None:
        """Chunks of known tokens; the last one of a sequence sampled a token. And rows with drafts, behind them."""
        plan, sampled, verified = step.plan, result.token_ids, result.verified
        for row in range(plan.num_decode_rows, len(step.sequences)):
            sequence, token_id = step.sequences[row], sampled[row]
            if sequence.epoch != step.epochs[row]:
                continue
            if verified is not None and row in verified:
                run = self._speculation.verify(sequence, plan.drafts[row], verified[row], len(self._running))
                self._commit_run(sequence, run, output)
                continue
            num_query = plan.num_query_tokens[row]
            num_computed = plan.num_computed_tokens[row] + num_query
            if num_computed % self._block_size < num_query:  # the row went over the end of a block
                self._cache_blocks(sequence, num_computed // self._block_size)
            sequence.num_committed_tokens = num_computed
            if sequence.followers is not None and sequence.prompt_is_committed:
                self._waiting.release_followers(sequence)
            if plan.samples[row]:
                output.request_ids.append(sequence.request_id)
                output.token_ids.append(token_id)
                sequence.tokens.append(token_id)
                sequence.num_in_flight -= 1
                self._end_by(sequence, token_id)
            elif num_computed == sequence.max_length:  # nothing but the prompt was wanted
                self._end(sequence, Finished(FinishReason.LENGTH))

    def _commit_run(self, sequence: Sequence, run: list[int], output: StepOutput) -> None:
        """Tokens that a row with a draft brought.

        What the cache holds behind the last of them is overwritten by the rows to come, and not findable.
        """
        sequence.tokens.extend(run)
        num_computed = len(sequence.tokens) - 1
        if num_computed // self._block_size > sequence.num_committed_tokens // self._block_size:
            self._cache_blocks(sequence, num_computed // self._block_size)
        sequence.num_committed_tokens = sequence.num_computed_tokens = num_computed
        sequence.num_in_flight = 0
        output.request_ids.append(sequence.request_id)
        output.token_ids.append(run[-1])
        if len(run) > 1:
            output.runs = output.runs or {}
            output.runs[sequence.request_id] = run[:-1]
        self._end_by(sequence, run[-1])

    def _end_by(self, sequence: Sequence, token_id: int) -> None:
        """End a sequence if its last token is a stop, or the last it may have."""
        if token_id in sequence.stop_token_ids and sequence.num_output_tokens >= sequence.params.min_tokens:
            self._end(sequence, Finished(FinishReason.STOP, stop_token_id=token_id))
        elif len(sequence.tokens) >= sequence.max_length:
            self._end(sequence, Finished(FinishReason.STOP if sequence.is_complete else FinishReason.LENGTH))

    def _accept(self, step: ScheduledStep, sampled: list[int]) -> None:
        """Let constraints follow their sequences. Where one raises, the token is not committed any more."""
        for row in step.constrained_rows:
            sequence = step.sequences[row]
            if sequence.epoch != step.epochs[row] or sequence.constraint is None:
                continue
            try:
                sequence.constraint.accept(sampled[row])
                sequence.is_complete = sequence.constraint.is_done
            except BaseException as error:  # a panic in native code is no Exception
                self._fail(sequence, error)

    def _end_complete(self, step: ScheduledStep) -> None:
        """End sequences that nothing may follow, whatever min_tokens says."""
        for row in step.constrained_rows:
            sequence = step.sequences[row]
            if sequence.is_complete and sequence.epoch == step.epochs[row]:
                self._end(sequence, Finished(FinishReason.STOP))

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence whose constraint raised; a running one is still to be dropped from the list."""
        sentence = (
            str(error) if isinstance(error, ValueError) else f"The structured output failed: {type(error).__name__}."
        )
        self._end(sequence, Finished(FinishReason.ERROR, error=sentence))

    def take_notices(self) -> StepOutput | None:
        """What happened to requests outside any step, or None."""
        if not self._finished and not self._started:
            return None
        output = StepOutput([], [], {})
        self._tell(output)
        return output

    def _tell(self, output: StepOutput) -> None:
        if self._finished:
            output.finished, self._finished = self._finished, output.finished
        if self._started:
            output.started, self._started = self._started, {}

    def _cache_blocks(self, sequence: Sequence, num_full: int) -> None:
        """Make blocks findable that this commit filled: only now does the host know all their tokens."""
        start = sequence.num_committed_tokens // self._block_size
        sequence.cache_parent = self.pool.cache_full_blocks(
            sequence.tokens, sequence.blocks, start, num_full, sequence.cache_parent
        )

    def _take_logprobs(self, step: ScheduledStep, result: StepResult, output: StepOutput) -> None:
        """Hand on log-probabilities, each position of a prompt once, however often it was computed."""
        if result.logprobs:
            output.logprobs = {}
            for row, entry in result.logprobs.items():
                if step.sequences[row].epoch == step.epochs[row]:
                    output.logprobs[step.sequences[row].request_id] = entry
        if result.prompt_logprobs:
            output.prompt_logprobs = {}
            for row, entries in result.prompt_logprobs.items():
                sequence = step.sequences[row]
                if sequence.epoch == step.epochs[row]:
                    start = step.plan.num_computed_tokens[row]
                    output.prompt_logprobs[sequence.request_id] = entries[sequence.num_prompt_logprobs - start :]
                    sequence.num_prompt_logprobs = start + len(entries)

    def _take_pooled(self, step: ScheduledStep, pooled: dict[int, Floats], output: StepOutput) -> None:
        """Hand on sums of hidden states, each token of a prompt in one of them, however often it was computed."""
        output.pooled = {}
        for row, sums in pooled.items():
            sequence = step.sequences[row]
            if sequence.epoch == step.epochs[row]:
                output.pooled[sequence.request_id] = sums
                sequence.num_pooled_tokens = step.plan.num_computed_tokens[row] + step.plan.pooled_rows[row][1]

    def _end(self, sequence: Sequence, finished: Finished) -> None:
        """Say how a sequence ended, and free all it holds. A running one is still to be dropped from the list."""
        was_waiting = sequence.status is SequenceStatus.WAITING
        sequence.status = SequenceStatus.FINISHED
        self._finished[sequence.request_id] = finished
        del self._sequences[sequence.request_id]
        if was_waiting:
            self._waiting.discard(sequence)
        else:
            self._release(sequence)
        self._waiting.release_followers(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back slot and blocks, even with rows in flight: one stream orders their writes before a new owner's."""
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        sequence.slot = NO_SLOT
        sequence.samples_in_slot = False
        sequence.draft = []
        sequence.num_in_flight = 0
        sequence.num_computed_tokens = sequence.num_committed_tokens = 0
        sequence.num_blocks_wanted = 1
        sequence.epoch += 1

    def _drop_ended(self) -> None:
        self._running = [sequence for sequence in self._running if sequence.status is SequenceStatus.RUNNING]

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that a running sequence needs beyond those it holds to compute all its known tokens."""
        if sequence.status is not SequenceStatus.RUNNING:
            return 0
        return self._num_blocks(len(sequence.tokens)) - len(sequence.blocks)

    def stats(self, plan: StepPlan | None = None) -> StepStats:
        """How full the engine is now, after the step of `plan`."""
        return StepStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=self._waiting.num_tokens,
            num_used_blocks=self.pool.num_used,
            num_cached_blocks=self.pool.num_cached_free,
            num_blocks=self.pool.num_blocks,
            num_scheduled_tokens=plan.num_tokens if plan else 0,
            num_decode_rows=plan.num_decode_rows if plan else 0,
            num_preemptions=self._num_preemptions,
            prefix_queried_tokens=self._prefix_queried_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            num_drafts=self._speculation.num_drafts,
            num_draft_tokens=self._speculation.num_draft_tokens,
            num_accepted_tokens=self._speculation.num_accepted_tokens,
        )

    def check(self) -> None:
        """Assert every invariant; for tests and idle time in debug mode."""
        running, slots = self._running, [sequence.slot for sequence in self._running]
        self.pool.check(sequence.blocks for sequence in self._sequences.values())
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), f"{slots=} {self._free_slots=}"
        assert [s.order for s in running] == sorted(s.order for s in running), f"running out of order: {running}"
        waiting = [s for s in self._sequences.values() if s.status is SequenceStatus.WAITING]
        assert len(running) + len(waiting) == len(self._sequences), f"{running=} {waiting=} {self._sequences=}"
        assert len(waiting) == len(self._waiting), f"{len(self._waiting)} in the queue, waiting: {waiting}"
        assert sum(len(s.tokens) for s in waiting) == self._waiting.num_tokens, (
            f"{self._waiting.num_tokens=} {waiting=}"
        )
        for sequence in waiting:
            assert sequence.slot == NO_SLOT and not sequence.blocks and not sequence.num_in_flight, f"{sequence}"
        for sequence in running:
            assert sequence.status is SequenceStatus.RUNNING, f"{sequence} is in the running list"
            assert sequence.num_committed_tokens <= sequence.num_computed_tokens, f"{sequence}"
            assert sequence.num_computed_tokens <= len(sequence.tokens) + sequence.num_in_flight, f"{sequence}"
            assert sequence.num_computed_tokens <= len(sequence.blocks) * self._block_size, f"{sequence}"
            assert len(sequence.tokens) + sequence.num_in_flight <= max(sequence.max_length, sequence.num_prompt_tokens)
