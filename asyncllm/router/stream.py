"""One API request on its way back: the text of its choices as it grows, and the waiting consumer.

A late consumer finds everything since its last look merged into one delta per choice, so a slow client costs memory for
its own text and slows nobody else. A consumer that only waits for the next token can leave a sink behind, which is
called with the news without waking it: a wake-up costs more than all other work on a token. Where the loop keeps up
with the engine, not even a delta is made: each token's text goes from the step to the sink. Knows text and counters;
nothing of HTTP or of the engine. Loop thread only.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from asyncllm.errors import AsyncLLMError
from asyncllm.router.detokenizer import Detokenizer
from asyncllm.router.stop import StopMatcher
from asyncllm.types import Constraint, FinishReason, Floats, Pooling, SamplingParams, TokenLogprobs

MAX_WOKEN = 64  # streams woken in one callback of the loop: 0.5 ms, and four times that on a busy machine


class ChoiceInput(msgspec.Struct, frozen=True):
    """One sequence to generate: a prompt with everything its text needs."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string, or the stop token's text, is part of the output
    skip_special_tokens: bool = True
    visible_tokens: tuple[str, ...] = ()  # special tokens that are shown all the same
    prompt_index: int = 0  # choices of one prompt share its computation
    constraint: Constraint | None = None  # this choice's own
    pooling: Pooling | None = None  # wanted: a sum of the prompt's hidden states


class Delta(msgspec.Struct):
    """News about a choice since the last look."""

    index: int
    text: str = ""
    token_ids: list[int] = []  # every generated token, the one that stopped it too
    logprobs: list[TokenLogprobs] | None = None  # parallel to token_ids, where asked for
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the stop token's id unless that is an eos


class Sink(Protocol):
    """Where news goes while its consumer does nothing but wait for it. Called on the loop thread; must not block."""

    def text(self, index: int, text: str) -> bool:
        """Take the next text of a choice, of which nothing else is to be told; False where that cannot be done now."""
        ...

    def news(self, choices: list["ChoiceStream"]) -> bool:
        """Take the news of these choices (`ChoiceStream.take`); False where there is no room for it now."""
        ...


class Gather:
    """The sink of a consumer that waits for the end: it lets everything gather."""

    def text(self, index: int, text: str) -> bool:
        """Nothing is taken: it becomes news."""
        return False

    def news(self, choices: list["ChoiceStream"]) -> bool:
        """There is always room, and nothing is taken."""
        return True


class ChoiceStream:
    """One sequence: its detokenizer, its stop strings, its counters, and the delta nobody has fetched yet."""

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_pending",
        "_pieces",
        "_stop",
        "arrival_s",
        "finish_reason",
        "first_token_s",
        "has_news",
        "index",
        "last_token_s",
        "num_cached_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_queued_tokens",
        "pooled",
        "request_id",
        "scheduled_s",
        "stream",
    )

    def __init__(
        self,
        stream: "RequestStream",
        index: int,
        request_id: int,
        choice: ChoiceInput,
        detokenizer: Detokenizer,
        num_queued_tokens: int,
    ) -> None:
        """`num_queued_tokens`: prompt tokens it adds to the queue, 0 where a sibling computes them."""
        self.stream = stream
        self.index = index
        self.request_id = request_id
        self.num_prompt_tokens = len(choice.prompt_token_ids)
        self.num_queued_tokens = num_queued_tokens
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.arrival_s = stream.arrival_s
        self.scheduled_s = 0.0  # 0 = it did not happen yet; the same below
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.finish_reason: str | None = None
        self.pooled: Floats | None = None  # [hidden], the sum so far; complete where finish_reason is "length"
        self.has_news = False
        self._detokenizer = detokenizer
        self._stop = StopMatcher(choice.stop, choice.include_stop) if choice.stop else None
        self._include_stop = choice.include_stop
        self._min_tokens = choice.params.min_tokens
        self._pending: Delta | None = None
        self._pieces: list[str] = []  # of text behind that of `_pending`: joined once, however long nobody looks

    def push(
        self, token_id: int, logprobs: TokenLogprobs | None, now_s: float, is_stop: bool, at_once: bool
    ) -> bool:  # hot
        """Take the next token; True when its text completed a stop string.

        `is_stop`: this token is what stopped the sequence, so it counts but is not shown, unless asked for. `at_once`:
        its text may go to the sink now, without becoming news, where it is all there is to tell.
        """
        self.num_output_tokens += 1
        if not self.first_token_s:
            self.first_token_s = now_s
        self.last_token_s = now_s
        text, stop = "", self._stop
        if not is_stop or self._include_stop:
            text = self._detokenizer.push(token_id)
            if stop is not None and text:
                # As in vLLM: the token that fulfils min_tokens is not checked yet, the next one is.
                text = stop.push(text, self.num_output_tokens > self._min_tokens)
        delta = self._pending
        if delta is not None:
            self._pieces.append(text)
            delta.token_ids.append(token_id)
        elif at_once and text and logprobs is None and self.stream.hand_text(self.index, text):
            return stop is not None and stop.matched is not None
        else:
            delta = self._pending = Delta(self.index, text, [token_id])
        if logprobs is not None:
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(logprobs)
            self.has_news = True
        elif text:
            self.has_news = True
        return stop is not None and stop.matched is not None

    def push_prompt_logprobs(self, rows: list[TokenLogprobs]) -> None:
        """Take the next positions of the prompt."""
        delta = self._pending_delta()
        delta.prompt_logprobs = (delta.prompt_logprobs or []) + rows
        self.has_news = True

    def push_pooled(self, sums: Floats, now_s: float) -> None:
        """Add the sum of more hidden states. Nothing to tell yet: a part of a prompt has no vector."""
        self.pooled = sums if self.pooled is None else self.pooled + sums
        self.first_token_s = self.last_token_s = now_s  # so that its time is prefill

    def finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        """End it: held-back text is shown, up to a stop string that its very end completes."""
        delta = self._pending_delta()
        text = self._detokenizer.finish()
        if self._stop is not None:
            text = self._stop.push(text, self.num_output_tokens > self._min_tokens) + self._stop.finish()
            if self._stop.matched is not None:
                reason, stop_reason = FinishReason.STOP, self._stop.matched
        self._pieces.append(text)
        delta.finish_reason = self.finish_reason = reason.value
        delta.stop_reason = stop_reason
        self.has_news = True

    def take(self) -> Delta:
        """The news; afterwards there is none."""
        delta = self._pending_delta()
        self._pending = None
        self.has_news = False
        if self._pieces:
            delta.text += "".join(self._pieces)
            self._pieces = []
        return delta

    def timings(self) -> tuple[float, float, float] | None:
        """Seconds of queue, prefill and decode; None while it waits in the queue."""
        if not self.scheduled_s:
            return None
        prefill_s = self.first_token_s - self.scheduled_s if self.first_token_s else 0.0
        return self.scheduled_s - self.arrival_s, prefill_s, self.last_token_s - self.first_token_s

    def _pending_delta(self) -> Delta:
        if self._pending is None:
            self._pending = Delta(self.index)
        return self._pending


class WakeList:
    """Streams with news in this turn of the event loop; each is woken once, when the turn's outputs are all read."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[RequestStream] = []

    def add(self, stream: "RequestStream", is_first: bool) -> None:  # hot where the loop is late
        """There is news for a stream that is not listed yet. First tokens go first: all others have text to read."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._wake)
        if is_first:
            self._streams.insert(0, stream)
        else:
            self._streams.append(stream)

    def _wake(self) -> None:  # hot: once per step
        """Wake everybody; in slices, so that the loop looks at other things in between."""
        streams = self._streams
        if len(streams) <= MAX_WOKEN:
            self._streams = []
        else:
            self._streams = streams[MAX_WOKEN:]
            del streams[MAX_WOKEN:]
            asyncio.get_running_loop().call_soon(self._wake)
        for stream in streams:
            stream.hand_over()


class RequestStream:
    """What the server holds of a running request. One consumer."""

    __slots__ = (
        "_error",
        "_on_abort",
        "_sink",
        "_waiter",
        "_wake_list",
        "arrival_s",
        "choices",
        "deadline",
        "is_listed",
        "num_running",
        "public_id",
    )

    def __init__(
        self,
        public_id: str,
        arrival_s: float,
        on_abort: Callable[["RequestStream"], None],
        wake_list: WakeList,
    ) -> None:
        self.public_id = public_id
        self.arrival_s = arrival_s
        self.choices: list[ChoiceStream] = []
        self.num_running = 0  # choices that have not ended
        self.deadline: asyncio.TimerHandle | None = None
        self._on_abort = on_abort
        self._wake_list = wake_list
        self.is_listed = False  # it will be woken
        self._waiter: asyncio.Future[None] | None = None
        self._error: AsyncLLMError | None = None
        self._sink: Sink | None = None

    def attach(self, sink: Sink) -> None:
        """From now on, news that comes while the consumer waits in `get` is offered to `sink`.

        The consumer still gets what `sink` does not take, what comes while it does something else, and the end. What
        `sink` raises ends the request with that error.
        """
        self._sink = sink

    async def get(self) -> list[Delta]:
        """Wait for news, then everything since the last call: one merged delta per choice that has some.

        An empty list says that the request is over and everything was handed out; so do all later calls. Raises the
        error that ended the request, after what was generated before it.
        """
        while True:
            news = [choice.take() for choice in self.choices if choice.has_news]
            if news:
                return news
            if self._error is not None:
                raise self._error
            if not self.num_running:
                return []
            assert self._waiter is None, f"two consumers wait for {self.public_id}"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def collect(self) -> list[Delta]:
        """Wait for the end: one delta per choice, in order. Raises the error that ended the request."""
        self.attach(Gather())
        whole = [Delta(choice.index) for choice in self.choices]
        while news := await self.get():
            for delta in news:
                merge(whole[delta.index], delta)
        return whole

    def abort(self) -> None:
        """Nobody waits for it any more: free everything. Harmless when it is over."""
        if self.num_running:
            self._on_abort(self)

    def wake(self, is_first: bool = False) -> None:  # hot where the loop is late
        """There is news, maybe the first: hand it over once everybody's was read. Called by the router."""
        if not self.is_listed and self._waiter is not None:
            self.is_listed = True
            self._wake_list.add(self, is_first)

    def hand_text(self, index: int, text: str) -> bool:  # hot: once per token
        """Offer the next text of a choice to the sink; False where it has to become news."""
        if self._waiter is None or self._sink is None:
            return False
        try:
            return self._sink.text(index, text)
        except Exception as error:
            if not self._waiter.done():
                self._waiter.set_exception(error)
            return True

    def hand_over(self) -> None:  # hot: once per step where the loop is late
        """Offer the news to the sink, or wake the consumer. Called by the wake list."""
        self.is_listed = False
        waiter, sink = self._waiter, self._sink
        if waiter is None or waiter.done():  # it does something else, and looks for news itself before it waits again
            return
        try:
            if sink is None or not self.num_running or self._error is not None or not sink.news(self.choices):
                waiter.set_result(None)
        except Exception as error:
            waiter.set_exception(error)

    def fail(self, error: AsyncLLMError) -> None:
        """The request ends with this error. Called by the router."""
        self._error = error
        self.wake()


def merge(into: Delta, delta: Delta) -> None:
    """Append a later delta of the same choice."""
    into.text += delta.text
    into.token_ids += delta.token_ids
    if delta.logprobs is not None:
        into.logprobs = (into.logprobs or []) + delta.logprobs
    if delta.prompt_logprobs is not None:
        into.prompt_logprobs = (into.prompt_logprobs or []) + delta.prompt_logprobs
    if delta.finish_reason is not None:
        into.finish_reason, into.stop_reason = delta.finish_reason, delta.stop_reason
