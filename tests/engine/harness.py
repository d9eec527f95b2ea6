"""Drives scheduler and fake executor as the worker does, without threads; and what a request must give, by itself."""

import sys
from collections import deque

import pytest

from asyncllm.config import ONLY_ON_REQUEST, CacheConfig, SchedulerConfig, SpeculativeConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.types import Finished, FinishReason, Floats, SamplingParams, Started, StepOutput, Submit, TokenLogprobs
from tests.fakes import FakeExecutor, NextToken, choose, greedy, pseudo_random_token, small_capacity

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def prompt(length: int, start: int = 1) -> list[int]:
    """Tokens that differ from those of any other `start` at the first place."""
    return [(start + 7 * i) % 97 for i in range(length)]


def submit(request_id: int, prompt: list[int], params: SamplingParams | None = None, **fields) -> Submit:
    """A request that arrives at second `request_id`, unless told otherwise."""
    fields.setdefault("arrival_s", float(request_id))
    return Submit(request_id, prompt, params or greedy(), **fields)


class Harness:
    """The step loop of one machine, one turn at a time, every invariant checked after each."""

    def __init__(
        self,
        *,
        depth: int = 1,
        next_token: NextToken | None = None,
        prefix_cache: bool = True,
        max_batched_tokens: int = 64,
        max_chunk_tokens: int = 8,
        speculative: SpeculativeConfig = ONLY_ON_REQUEST,
        most_prompt_tokens: int = sys.maxsize,
        **capacity: int,
    ) -> None:
        self.executor = FakeExecutor(small_capacity(**capacity), depth, next_token)
        self.scheduler = Scheduler(
            self.executor.capacity,
            SchedulerConfig(max_batched_tokens=max_batched_tokens, max_chunk_tokens=max_chunk_tokens),
            CacheConfig(prefix_cache=prefix_cache),
            clock=lambda: 42.0,
            speculative=speculative,
            balance_tokens=self.executor.balance_tokens,
            most_prompt_tokens=most_prompt_tokens,
            depth=depth,
        )
        self.in_flight: deque = deque()
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, Finished] = {}
        self.started: dict[int, Started] = {}
        self.start_order: list[int] = []
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.pooled: dict[int, Floats] = {}

    def add(self, *submits: Submit) -> None:
        for each in submits:
            self.scheduler.add(each)

    def turn(self) -> StepOutput | None:
        """Plan and launch; commit if the device is full or there is nothing to plan. None when idle."""
        step = self.scheduler.schedule()
        self.scheduler.check()
        if step is not None:
            self.in_flight.append((step, self.executor.launch(step.plan)))
            if len(self.in_flight) < self.executor.depth:
                return self.turn()
        if self.in_flight:
            step, handle = self.in_flight.popleft()
            output = self.scheduler.commit(step, handle.wait())
        else:
            notices = self.scheduler.take_notices()
            if notices is None:
                assert not self.scheduler.has_work, "stuck"
                return None
            output = notices
        self.scheduler.check()
        self._book(output)
        return output

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def run(self, max_turns: int = 10_000) -> dict[int, list[int]]:
        """Until idle; the tokens of every request so far."""
        for _ in range(max_turns):
            if self.turn() is None:
                return self.tokens
        raise AssertionError(f"not idle after {max_turns} turns: {self.scheduler.stats()}")

    def _book(self, output: StepOutput) -> None:
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            assert request_id not in self.finished, "a token after the end"
            self.tokens.setdefault(request_id, []).extend((output.runs or {}).get(request_id, ()))
            self.tokens[request_id].append(token_id)
        assert len(set(output.request_ids)) == len(output.request_ids), "two rows of one request"
        assert set(output.runs or ()) <= set(output.request_ids)
        for request_id, started in (output.started or {}).items():
            assert request_id not in self.started, "started twice"
            self.started[request_id] = started
            self.start_order.append(request_id)
        for request_id, entry in (output.logprobs or {}).items():
            self.logprobs.setdefault(request_id, []).append(entry)
        for request_id, entries in (output.prompt_logprobs or {}).items():
            self.prompt_logprobs.setdefault(request_id, []).extend(entries)
        for request_id, sums in (output.pooled or {}).items():
            assert request_id not in self.finished, "sums after the end"
            self.pooled[request_id] = self.pooled.get(request_id, 0) + sums
        for request_id, finished in output.finished.items():
            assert request_id not in self.finished, "finished twice"
            self.finished[request_id] = finished


def expected_tokens(
    prompt: list[int],
    params: SamplingParams,
    vocab_size: int = 97,
    max_length: int = 64,
    next_token: NextToken | None = None,
) -> tuple[list[int], FinishReason]:
    """What a request must give on the fake device, whatever else runs: written down without any scheduling."""
    next_token = next_token or pseudo_random_token(vocab_size)
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + params.max_tokens, max_length):
        num_output = len(tokens) - len(prompt)
        banned = list(params.stop_token_ids) if num_output < params.min_tokens else []
        output = tokens[len(prompt) :]
        for word in params.bad_words:
            before = list(word[:-1])
            if len(output) >= len(before) and output[len(output) - len(before) :] == before:
                banned.append(word[-1])
        tokens.append(choose(next_token, tokens, banned, vocab_size))
        if tokens[-1] in params.stop_token_ids:
            return tokens[len(prompt) :], FinishReason.STOP
    return tokens[len(prompt) :], FinishReason.LENGTH
