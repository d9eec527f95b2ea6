"""`FakeExecutor`: an honest device without tensors. It never trusts the plan, it checks it.

The fake KV cache stores, per (block, offset), a hash of everything up to and including that token, as real keys and
values depend on the whole prefix. Before a row "attends", every position it reads must hold the hash that the row's own
tokens have there: a wrong block, a stale one, a bad share, a skipped or doubled chunk all fail at once.
"""

import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from asyncllm.executor.base import StepPlan, StepResult
from asyncllm.types import Capacity, Floats, Pooling, SamplingParams, TokenLogprobs

NextToken = Callable[[Sequence[int]], int]


def small_capacity(**overrides: int) -> Capacity:
    """A tiny machine; any field can be named."""
    fields = dict(num_blocks=17, block_size=4, max_sequences=4, max_context_length=64, vocab_size=97, hidden_size=6)
    return Capacity(**{**fields, **overrides})


def greedy(max_tokens: int = 8, **fields) -> SamplingParams:
    """Parameters of a greedy request."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def prefix_hash(previous: int, token_id: int) -> int:
    """What the fake device stores for a token behind a prefix."""
    return zlib.crc32(token_id.to_bytes(4, "little"), previous)


def hash_of(tokens: Sequence[int]) -> int:
    """What it stores for the last of `tokens`."""
    value = 0
    for token_id in tokens:
        value = prefix_hash(value, token_id)
    return value


def pseudo_random_token(vocab_size: int) -> NextToken:
    """A next token that depends on every token before it, and on nothing else."""
    return lambda tokens: hash_of(tokens) % vocab_size


def repeating_token(vocab_size: int, period: int = 5) -> NextToken:
    """A next token that mostly is the one a few places back, so that drafts are right, and now and then is not."""

    def next_token(tokens: Sequence[int]) -> int:
        value = hash_of(tokens)
        return tokens[-period] if len(tokens) >= period and value % 7 else value % vocab_size

    return next_token


def choose(
    next_token: NextToken, tokens: Sequence[int], banned: Sequence[int], vocab_size: int, mask: bytes | None = None
) -> int:
    """The fake's sampling rule: the first token from `next_token` upwards that is neither banned nor masked."""
    token_id = next_token(tokens)
    for _ in range(vocab_size):
        if token_id not in banned and (mask is None or allows(mask, token_id)):
            return token_id
        token_id = (token_id + 1) % vocab_size
    raise AssertionError("no token is left to choose")


def mask_of(token_ids: Collection[int]) -> bytes:
    """The mask that allows these tokens, as short as it can be."""
    words = bytearray(4 * (max(token_ids) // 32 + 1))
    for token_id in token_ids:
        words[token_id // 8] |= 1 << token_id % 8
    return bytes(words)


def allows(mask: bytes, token_id: int) -> bool:
    """Whether a mask's bit is set."""
    return token_id < 8 * len(mask) and bool(mask[token_id // 8] >> (token_id % 8) & 1)


def fake_logprobs(prefix: Sequence[int], token_id: int, num_alternatives: int) -> TokenLogprobs:
    """Log-probabilities that name the position they were computed at."""
    value = -float(hash_of(prefix) % 1000) / 100
    return TokenLogprobs(token_id, value, 1, list(range(num_alternatives)), [value] * num_alternatives)


def fake_hidden(prefix: Sequence[int], hidden_size: int) -> Floats:
    """The last token's hidden state: 1, then small integers that depend on the prefix and add up without rounding."""
    value = hash_of(prefix)
    return np.array([1, *(value // 31**i % 97 - 48 for i in range(1, hidden_size))], dtype=np.float32)


def expected_sums(prompt: Sequence[int], pooling: Pooling, hidden_size: int) -> list[float]:
    """What a pooled request must get on the fake device, whatever else runs."""
    ends = range(len(prompt) if pooling is Pooling.LAST else 1, len(prompt) + 1)
    return sum(fake_hidden(prompt[:end], hidden_size) for end in ends).tolist()


class FakeHandle:
    """A step in flight; the host learns its tokens in `wait`."""

    def __init__(self, executor: "FakeExecutor", number: int, result: StepResult) -> None:
        self._executor = executor
        self._number = number
        self._result = result

    def wait(self) -> StepResult:
        executor = self._executor
        if executor.gate is not None:
            executor.gate.acquire()
        assert executor.in_flight.popleft() is self, "steps must be waited for in the order of their launch"
        if executor.fail_wait_at == self._number:
            executor.failed = True
            raise RuntimeError("the device fell off the bus")
        return self._result


class FakeExecutor:
    """Deterministic tokens, real bookkeeping.

    `gate`: a semaphore that each `wait` acquires, so that a test can hold a step; `launched` is released by each
    launch. `fail_launch_at`, `fail_wait_at`: number of the step (from 1) that raises. `num_improvements`: pieces of
    work that `improve` finds; `improve_gate` holds each call. `on_close`: what closing meets.
    """

    def __init__(
        self,
        capacity: Capacity,
        depth: int = 1,
        next_token: NextToken | None = None,
        *,
        fail_launch_at: int = 0,
        fail_wait_at: int = 0,
        gate: threading.Semaphore | None = None,
        num_improvements: int = 0,
        improve_gate: threading.Semaphore | None = None,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self.capacity = capacity
        self.depth = depth
        self.balance_tokens = 16
        self.most_prompt_tokens = sys.maxsize
        self.facts = {"device": "fake"}
        self.next_token = next_token or pseudo_random_token(capacity.vocab_size)
        self.fail_launch_at = fail_launch_at
        self.fail_wait_at = fail_wait_at
        self.gate = gate
        self.num_improvements = num_improvements
        self.improve_gate = improve_gate
        self.on_close = on_close
        self.launched = threading.Semaphore(0)
        self.improving = threading.Semaphore(0)  # released as each call of `improve` begins
        self.device_facts: tuple[bool, float, float | None] = (
            False,
            0.0,
            None,
        )  # replayed, device_s, gap_s of each step
        self.improved_at: list[int] = []  # steps launched before each call of `improve`
        self.closed = False
        self.failed = False
        self.num_steps = 0
        self.in_flight: deque[FakeHandle] = deque()
        self.plans: list[StepPlan] = []
        self.slot_entries: list[tuple[int, int]] = []  # number of the step, tokens the sequence had then
        # The device's memory.
        self.kv: dict[tuple[int, int], int] = {}  # (block id, offset) -> prefix hash
        self.slot_tokens: list[list[int]] = [[] for _ in range(capacity.max_sequences)]
        self.block_tables: list[dict[int, int]] = [{} for _ in range(capacity.max_sequences)]
        self.slot_adapters = [0] * capacity.max_sequences  # what the hash of a prefix begins with

    def launch(self, plan: StepPlan) -> FakeHandle:
        assert not self.closed and len(self.in_flight) < self.depth, "more steps in flight than the executor allows"
        self.num_steps += 1
        if self.fail_launch_at == self.num_steps:
            self.failed = True
            raise RuntimeError("the kernel did not launch")
        self.plans.append(plan)
        self._check_shape(plan)
        for new in plan.new_slots:
            self.slot_tokens[new.slot] = list(new.token_ids)
            self.slot_adapters[new.slot] = new.adapter
            self.block_tables[new.slot] = {}
            self.slot_entries.append((self.num_steps, len(new.token_ids)))
        for slot, column, block_id in plan.block_writes:
            assert 0 < block_id < self.capacity.num_blocks
            assert column not in self.block_tables[slot], "a block table entry was written twice"
            self.block_tables[slot][column] = block_id
        self._store(plan)
        handle = FakeHandle(self, self.num_steps, self._sample(plan))
        self.in_flight.append(handle)
        self.launched.release()
        return handle

    def improve(self) -> bool:
        assert not self.closed and not self.in_flight, "improved with steps in flight"
        self.improved_at.append(self.num_steps)
        self.improving.release()
        if self.improve_gate is not None:
            self.improve_gate.acquire()
        assert self.num_improvements >= 0, "asked again after it said that nothing is left"
        self.num_improvements -= 1
        return self.num_improvements >= 0

    def close(self) -> None:
        self.on_close()
        assert self.failed or not self.in_flight, "closed with steps in flight"
        self.closed = True

    def _check_shape(self, plan: StepPlan) -> None:
        num_rows = len(plan.slots)
        assert num_rows == len(plan.num_query_tokens) == len(plan.num_computed_tokens) == len(plan.samples) > 0
        assert len(set(plan.slots)) == num_rows, "one row per slot"
        assert len({new.slot for new in plan.new_slots}) == len(plan.new_slots)
        assert plan.num_query_tokens[: plan.num_decode_rows] == [1] * plan.num_decode_rows
        assert all(plan.samples[: plan.num_decode_rows])
        assert len(plan.token_ids) == sum(plan.num_query_tokens[plan.num_decode_rows :])
        assert all(plan.samples[row] for row in plan.masks), "a row is masked that does not sample"
        for row, (first, end) in plan.pooled_rows.items():
            assert row >= plan.num_decode_rows and 0 <= first < end <= plan.num_query_tokens[row]
        for row, draft in plan.drafts.items():
            assert (
                row >= plan.num_decode_rows and plan.samples[row] and 1 + len(draft) == plan.num_query_tokens[row] > 1
            )
            others = (plan.banned, plan.masks, plan.logprob_rows, plan.prompt_logprob_rows, plan.pooled_rows)
            assert not any(row in other for other in others), "a row with drafts asks for nothing else"
        num_samples = sum(plan.samples) + sum(map(len, plan.drafts.values()))
        assert num_samples <= self.capacity.max_samples, "more samples than there is room for"

    def _query_tokens(self, plan: StepPlan) -> list[list[int]]:
        """[S] lists of input tokens, decode rows read from their slots."""
        queries, offset = [], 0
        for row, (slot, count) in enumerate(zip(plan.slots, plan.num_query_tokens)):
            if row < plan.num_decode_rows:
                assert len(self.slot_tokens[slot]) == plan.num_computed_tokens[row] + 1, "not the token sampled last"
                queries.append(self.slot_tokens[slot][-1:])
            else:
                queries.append(plan.token_ids[offset : offset + count])
                offset += count
        return queries

    def _tokens(self, plan: StepPlan, row: int) -> list[int]:
        """What the row's sequence is in this step: its tokens, and the drafts behind them."""
        return self.slot_tokens[plan.slots[row]] + plan.drafts.get(row, [])

    def _address(self, slot: int, position: int) -> tuple[int, int]:
        return self.block_tables[slot][position // self.capacity.block_size], position % self.capacity.block_size

    def _store(self, plan: StepPlan) -> None:
        """Write this step's KV, behind a prefix that must be there; then every row must find its own whole prefix."""
        written: set[tuple[int, int]] = set()
        for row, query in enumerate(self._query_tokens(plan)):
            slot, start = plan.slots[row], plan.num_computed_tokens[row]
            tokens = self._tokens(plan, row)
            assert query == tokens[start : start + len(query)], "input tokens are not the sequence's"
            assert row not in plan.drafts or start + len(query) == len(tokens), "drafts not behind the last token"
            value = self.kv[self._address(slot, start - 1)] if start else self.slot_adapters[slot]
            for position, token_id in enumerate(query, start):
                value = prefix_hash(value, token_id)
                address = self._address(slot, position)
                assert address not in written, "two rows write the same place"
                written.add(address)
                self.kv[address] = value
        for row, (slot, start) in enumerate(zip(plan.slots, plan.num_computed_tokens)):
            expected, tokens = self.slot_adapters[slot], self._tokens(plan, row)
            for position in range(start + plan.num_query_tokens[row]):
                expected = prefix_hash(expected, tokens[position])
                assert self.kv.get(self._address(slot, position)) == expected, f"wrong KV: {slot=} {position=}"

    def _sample(self, plan: StepPlan) -> StepResult:
        result = StepResult([], None, None, *self.device_facts)
        for row, slot in enumerate(plan.slots):
            tokens, start = self.slot_tokens[slot], plan.num_computed_tokens[row]
            end = start + plan.num_query_tokens[row]
            if row in plan.prompt_logprob_rows:
                num_alternatives, targets = plan.prompt_logprob_rows[row]
                result.prompt_logprobs = result.prompt_logprobs or {}
                result.prompt_logprobs[row] = [
                    fake_logprobs(tokens[: start + 1 + i], target, num_alternatives) for i, target in enumerate(targets)
                ]
                assert 0 < len(targets) <= plan.num_query_tokens[row]
            if row in plan.pooled_rows:
                first, last = plan.pooled_rows[row]
                states = [
                    fake_hidden(tokens[:i], self.capacity.hidden_size)
                    for i in range(start + first + 1, start + last + 1)
                ]
                result.pooled = result.pooled or {}
                result.pooled[row] = np.sum(states, 0, dtype=np.float32)
            if not plan.samples[row]:
                result.token_ids.append(-1)
                continue
            if row in plan.drafts:
                self._verify(plan.drafts[row], row, tokens, result)
                continue
            assert end == len(tokens), "only a row that reaches the end of its tokens may sample"
            token_id = choose(
                self.next_token, tokens, plan.banned.get(row, ()), self.capacity.vocab_size, plan.masks.get(row)
            )
            if row in plan.logprob_rows:
                result.logprobs = result.logprobs or {}
                result.logprobs[row] = fake_logprobs(tokens, token_id, plan.logprob_rows[row])
            result.token_ids.append(token_id)
            tokens.append(token_id)
        return result

    def _verify(self, draft: list[int], row: int, tokens: list[int], result: StepResult) -> None:
        """Sample behind the last token and behind each draft; the slot keeps what the host will keep."""
        samples = [self.next_token(tokens + draft[:count]) for count in range(len(draft) + 1)]
        num_right = 0
        while num_right < len(draft) and draft[num_right] == samples[num_right]:
            num_right += 1
        result.token_ids.append(-1)
        result.verified = result.verified or {}
        result.verified[row] = samples
        tokens += samples[: num_right + 1]
