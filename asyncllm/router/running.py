"""The requests that run: feeds them from the engine's steps, ends them, and keeps the books about them.

Every request leaves through one of five doors: the engine finished it, a stop string or a deadline cut it, its client
abandoned it, an error failed it. All of them lead through `_forget`, once per choice. Loop thread only.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

from asyncllm.errors import AsyncLLMError
from asyncllm.router.admission import Queue
from asyncllm.router.seams import EngineHandle, RouterMetrics
from asyncllm.router.stream import ChoiceStream, RequestStream, WakeList
from asyncllm.types import Finished, FinishReason, Floats, Started, StepOutput, TokenLogprobs

log = logging.getLogger("asyncllm.router")


class Running:
    """Running requests by both of their names: the engine's per choice, the client's per request."""

    def __init__(
        self,
        engine: EngineHandle,
        queue: Queue,
        metrics: RouterMetrics,
        eos_token_ids: tuple[int, ...],
        stream_interval: int,
        clock: Callable[[], float],
    ) -> None:
        """`stream_interval`: tokens of a choice per event of its stream."""
        self._engine = engine
        self._queue = queue
        self._metrics = metrics
        self._eos_token_ids = eos_token_ids
        self._stream_interval = stream_interval
        self._clock = clock
        self._choices: dict[int, ChoiceStream] = {}
        self._streams: dict[str, list[RequestStream]] = {}  # clients may use an id twice
        self.wake_list = WakeList()
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        """Requests that run or wait."""
        return sum(map(len, self._streams.values()))

    def ids(self) -> list[str]:
        """Their public ids."""
        return list(self._streams)

    def ids_of(self, request_ids: Iterable[int]) -> list[str]:
        """Public ids behind the engine's; a request that ended here already keeps its number."""
        choices = self._choices
        names = (choices[i].stream.public_id if i in choices else f"(ended: {i})" for i in request_ids)
        return list(dict.fromkeys(names))

    def find(self, public_id: str) -> list[RequestStream]:
        """The requests of this id, mostly one or none."""
        return list(self._streams.get(public_id, ()))

    def all(self) -> list[RequestStream]:
        """Every request."""
        return [stream for streams in self._streams.values() for stream in streams]

    def add_stream(self, stream: RequestStream) -> None:
        """A request begins; its choices follow."""
        self._streams.setdefault(stream.public_id, []).append(stream)
        self.idle.clear()

    def add_choice(self, choice: ChoiceStream) -> None:
        """The engine took this choice."""
        self._choices[choice.request_id] = choice
        choice.stream.choices.append(choice)
        choice.stream.num_running += 1
        self._queue.enter(choice.num_queued_tokens)

    # --- outputs -----------------------------------------------------------------------------------------------------

    def feed(self, output: StepOutput, at_once: bool) -> None:  # hot: once per step
        """One step: who started, then tokens, then who ended. Rows of requests that are gone are skipped.

        `at_once`: text goes to those who wait for it right away; otherwise it is gathered for the wake list.
        """
        if output.started is not None:
            self._feed_started(output.started)
        if output.prompt_logprobs is not None:
            self._feed_prompt_logprobs(output.prompt_logprobs)
        if output.pooled is not None:
            self._feed_pooled(output.pooled, output.committed_s)
        if output.request_ids:
            self._feed_tokens(output, at_once)
        if output.finished:
            self._feed_finished(output.finished)

    def _feed_tokens(self, output: StepOutput, at_once: bool) -> None:  # hot: the only loop over tokens
        choices, finished, logprobs, runs = self._choices, output.finished, output.logprobs, output.runs
        metrics, committed_s = self._metrics, output.committed_s
        # The rows of a step mostly had their last token at the same time: one observation for all of them.
        previous_s, num_same = 0.0, 0
        interval, is_due = self._stream_interval, True
        # From the back, where the first tokens of new requests are: all others have something to read.
        for request_id, token_id in zip(reversed(output.request_ids), reversed(output.token_ids)):
            choice = choices.get(request_id)
            if choice is None:
                continue
            if runs is not None and request_id in runs and not self._feed_run(choice, output, at_once):
                continue
            last_s = choice.last_token_s
            if last_s == previous_s:
                num_same += 1
            else:
                if previous_s:
                    metrics.observe_inter_token(committed_s - previous_s, num_same)
                previous_s, num_same = last_s, 1
            if not last_s:
                metrics.observe_first_token(self._clock() - choice.arrival_s)
            if interval > 1:
                is_due = not choice.num_output_tokens % interval  # the first one is
            end = finished.get(request_id) if finished else None
            try:
                is_stopped = choice.push(
                    token_id,
                    None if logprobs is None else logprobs.get(request_id),
                    committed_s,
                    end is not None and end.stop_token_id is not None,
                    at_once and is_due and end is None,  # the last text and how it ended are one event
                )
            except Exception:
                self._fail_text(choice)
                continue
            if is_stopped:
                if end is None:
                    self._engine.abort(request_id)
                self._finish(choice, FinishReason.STOP, None)
            elif choice.has_news and is_due and not choice.stream.is_listed:
                choice.stream.wake(is_first=not last_s)
        if previous_s:
            metrics.observe_inter_token(committed_s - previous_s, num_same)

    def _feed_run(self, choice: ChoiceStream, output: StepOutput, at_once: bool) -> bool:
        """The tokens of a choice in front of its last one in this step; False where its text ended in them."""
        assert output.runs is not None
        committed_s = output.committed_s
        for token_id in output.runs[choice.request_id]:
            is_due = not choice.num_output_tokens % self._stream_interval
            self._metrics.observe_inter_token(committed_s - choice.last_token_s)
            try:
                is_stopped = choice.push(token_id, None, committed_s, False, at_once and is_due)
            except Exception:
                self._fail_text(choice)
                return False
            if is_stopped:
                if choice.request_id not in output.finished:
                    self._engine.abort(choice.request_id)
                self._finish(choice, FinishReason.STOP, None)
                return False
            if choice.has_news and is_due and not choice.stream.is_listed:
                choice.stream.wake()
        return True

    def _feed_started(self, started: dict[int, Started]) -> None:
        for request_id, start in started.items():
            choice = self._choices.get(request_id)
            if choice is not None:
                choice.scheduled_s = start.scheduled_s
                choice.num_cached_tokens = start.num_cached_tokens
                self._queue.leave(choice.num_queued_tokens)
                self._metrics.observe_queue(start.scheduled_s - choice.arrival_s)

    def _feed_prompt_logprobs(self, prompt_logprobs: dict[int, list[TokenLogprobs]]) -> None:
        for request_id, rows in prompt_logprobs.items():
            choice = self._choices.get(request_id)
            if choice is not None:
                choice.push_prompt_logprobs(rows)
                choice.stream.wake()

    def _feed_pooled(self, pooled: dict[int, Floats], committed_s: float) -> None:
        for request_id, sums in pooled.items():
            choice = self._choices.get(request_id)
            if choice is not None:
                choice.push_pooled(sums, committed_s)

    def _feed_finished(self, finished: dict[int, Finished]) -> None:
        for request_id, end in finished.items():
            choice = self._choices.get(request_id)
            if choice is None:  # it ended here before: a stop string, a deadline, a client that left
                continue
            if end.reason is FinishReason.ERROR:
                self.fail(choice.stream, AsyncLLMError(end.error or "The engine could not compute this request."))
                continue
            is_eos = end.stop_token_id in self._eos_token_ids
            self._finish(choice, end.reason, None if is_eos else end.stop_token_id)

    # --- ends --------------------------------------------------------------------------------------------------------

    def cut(self, stream: RequestStream, reason: FinishReason) -> None:
        """End what still runs of a request; the text so far is kept."""
        for choice in stream.choices:
            if choice.finish_reason is None:
                self._engine.abort(choice.request_id)
                self._finish(choice, reason, None)

    def withdraw(self, stream: RequestStream) -> None:
        """Undo a submit that the engine took in part only: as if the request had never come."""
        for choice in stream.choices:
            self._engine.abort(choice.request_id)
            self._queue.leave(choice.num_queued_tokens)
            del self._choices[choice.request_id]
        self._forget_stream(stream)

    def abandon(self, stream: RequestStream) -> None:
        """Nobody reads it any more: free what still runs, without a word."""
        self._drop(stream, FinishReason.ABORT)
        stream.wake()

    def fail(self, stream: RequestStream, error: AsyncLLMError) -> None:
        """End a request with an error, all of its choices."""
        self._drop(stream, FinishReason.ERROR)
        stream.fail(error)

    def _fail_text(self, choice: ChoiceStream) -> None:
        """A bug in text work must not take the other streams down with it."""
        log.exception("request %s: making text of a token failed", choice.stream.public_id)
        self.fail(choice.stream, AsyncLLMError("The server failed to make text of the model's output."))

    def _finish(self, choice: ChoiceStream, reason: FinishReason, stop_reason: str | int | None) -> None:
        choice.finish(reason, stop_reason)
        self._forget(choice)
        choice.stream.wake()

    def _drop(self, stream: RequestStream, reason: FinishReason) -> None:
        for choice in stream.choices:
            if choice.finish_reason is None:
                self._engine.abort(choice.request_id)
                choice.finish_reason = reason.value
                self._forget(choice)

    def _forget(self, choice: ChoiceStream) -> None:
        """Take a choice that has its finish_reason out of the books; the last one takes its request along."""
        del self._choices[choice.request_id]
        if choice.scheduled_s:
            self._queue.observe_output(choice.num_output_tokens)
        else:
            self._queue.leave(choice.num_queued_tokens)
        _, prefill_s, decode_s = choice.timings() or (0.0, 0.0, 0.0)
        self._metrics.observe_finished(
            choice.finish_reason or "",
            self._clock() - choice.arrival_s,
            choice.num_prompt_tokens,
            choice.num_cached_tokens,
            choice.num_output_tokens,
            prefill_s,
            decode_s,
        )
        stream = choice.stream
        stream.num_running -= 1
        if stream.num_running == 0:
            self._forget_stream(stream)

    def _forget_stream(self, stream: RequestStream) -> None:
        if stream.deadline is not None:
            stream.deadline.cancel()
        same_id = self._streams[stream.public_id]
        same_id.remove(stream)
        if not same_id:
            del self._streams[stream.public_id]
        if not self._streams:
            self.idle.set()
