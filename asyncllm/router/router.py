"""Requests in, text out: numbers them, hands them to the engine, and feeds their streams from its outputs.

Knows the engine's handle and both of its message types; nothing of HTTP, nothing of tensors. All state belongs to the
loop thread; the engine reaches it through `call_soon_threadsafe(drain)` only, once per step.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from asyncllm.config import Config
from asyncllm.errors import CapacityError, InvalidRequest, StartupError, Unavailable, show
from asyncllm.router.admission import Queue
from asyncllm.router.answers import AnswerFormat
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.constraint import Grammar
from asyncllm.router.grammar import GrammarSpec
from asyncllm.router.running import Running
from asyncllm.router.seams import EngineHandle, RouterMetrics
from asyncllm.router.stream import ChoiceInput, ChoiceStream, RequestStream
from asyncllm.router.strict_calls import CallStarts
from asyncllm.router.text_pool import TextPool
from asyncllm.router.tokenizer import ContextLimit, Tokenizer
from asyncllm.types import (
    Capacity,
    EngineDead,
    EngineReady,
    FinishReason,
    StartupPhase,
    StepOutput,
    Submit,
)

STARTING, READY, DRAINING, DEAD = "starting", "ready", "draining", "dead"
CLOSE_POLL_S = 0.005  # between two looks at an engine thread that is to end
MAX_NAMED = 20  # requests that the log names of those that died with the engine
MAX_AT_ONCE = 512  # rows of a step whose text is sent as it is read, some 3 ms
MAX_DRAIN_ROWS = 4096  # rows of one drain; the rest waits until the loop has looked at everybody else
MAX_DRAIN_S = 0.002  # of one drain: 256 rows take 2 ms where nothing disturbs, and took 20 beside long prompts

log = logging.getLogger("asyncllm.router")


class Router:
    """The event loop's side of the engine. Built, used and closed on the loop thread."""

    def __init__(
        self,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: Config,
        metrics: RouterMetrics,
        phases: dict[str, float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`phases`: where phases of start-up are written as they pass: seconds, None while one runs."""
        self.tokenizer = tokenizer
        self.answers = AnswerFormat(template, tokenizer, config.model.tool_parser, config.model.reasoning_parser)
        self.state = STARTING
        self.capacity: Capacity | None = None  # once the engine is ready
        self.facts: dict[str, str] = {}  # device, dtype, memory
        self.phases: dict[str, float | None] = {} if phases is None else phases
        self.queue = Queue(config.scheduler)
        self._engine = engine
        self._config = config.scheduler
        self._metrics = metrics
        self._clock = clock
        self._pool = TextPool(tokenizer, template, config.api.tokenizer_threads, config.scheduler.max_queued)
        self._request_ids = itertools.count(1)
        ends = tokenizer.eos_token_ids + self.answers.stop_token_ids
        self._running = Running(engine, self.queue, metrics, ends, config.api.stream_interval, clock)
        self._died: EngineDead | None = None
        self._ready_or_dead = asyncio.Event()
        self._dead = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_behind = False  # the rest of the outputs is drained behind those who have news

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread; readiness comes later."""
        loop = self._loop = asyncio.get_running_loop()

        def notify() -> None:  # on the engine thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self.drain)

        self._engine.start(notify)
        self._pool.prepare()

    async def wait_ready(self) -> None:
        """Wait until the first request may run. Raises StartupError when the engine could not start."""
        await self._ready_or_dead.wait()
        if self._died is not None:
            raise StartupError(self._died.message)

    async def wait_dead(self) -> str:
        """Wait for the engine's death; returns its last words."""
        await self._dead.wait()
        assert self._died is not None
        return self._died.message

    def accepting(self) -> Capacity:
        """What the engine can hold. Raises Unavailable unless requests are taken now."""
        if self.state == READY:
            assert self.capacity is not None
            return self.capacity
        if self._died is not None:
            error = Unavailable("The engine died; the server is about to restart.", code="engine_dead")
        elif self.state == DRAINING:
            error = Unavailable("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
        else:
            running = next((name for name, seconds in self.phases.items() if seconds is None), "starting")
            error = Unavailable(f"The model is loading: {running}.", code="not_ready", retry_after_s=1.0)
        self._metrics.count_rejected(error.code or "")
        raise error

    def begin_drain(self) -> None:
        """Take no more requests; those that run may finish."""
        if self.state != DEAD:
            self.state = DRAINING

    async def wait_idle(self) -> None:
        """Wait until no request runs."""
        await self._running.idle.wait()

    def abort_all(self) -> None:
        """End every request with finish_reason "abort"; the text so far is kept."""
        for stream in self._running.all():
            self._running.cut(stream, FinishReason.ABORT)

    async def close(self, timeout_s: float) -> bool:
        """End everything and stop the engine thread; False when it did not end in time."""
        self.begin_drain()
        self.abort_all()
        self._pool.close()
        if self._loop is None:
            return True
        self._engine.stop()
        # Looked at rather than waited for in a thread: at the end of a program, no pool takes work any more.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._engine.join(0.0):  # noqa: ASYNC110 (a thread sets no event)
                    await asyncio.sleep(CLOSE_POLL_S)
                return True
        return False

    # --- text in -----------------------------------------------------------------------------------------------------

    async def encode_prompts(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        num_bytes: int,
        add_special_tokens: bool = True,
        limit: ContextLimit | None = None,
    ) -> list[Sequence[int]]:
        """Token ids of raw prompts. Raises InvalidRequest, ContextLengthExceeded, Overloaded or Unavailable.

        `num_bytes`: of the request they came in; what is short is worked on at once. `limit`: the context if None.
        """
        limit = self._limit(limit, "prompt")
        return await self._pool.encode_prompts(prompts, add_special_tokens, limit, num_bytes)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        num_bytes: int,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: ContextLimit | None = None,
    ) -> Sequence[int]:
        """Token ids of a conversation. Raises InvalidRequest, ContextLengthExceeded, Overloaded or Unavailable.

        `num_bytes`: of the request it came in; what is short is worked on at once. `limit`: the context if None.
        """
        return await self._pool.render_chat(
            messages,
            self._limit(limit, "messages"),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs or {},
            num_bytes=num_bytes,
        )

    async def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        num_bytes: int,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """A conversation as one text, to look at: text in it that looks like a special token cannot be told from one.

        Raises InvalidRequest, Overloaded or Unavailable. `num_bytes`: of the request it came in.
        """
        self.accepting()
        return await self._pool.render_text(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs or {},
            num_bytes=num_bytes,
        )

    async def decode(self, token_ids: Sequence[int], *, num_bytes: int) -> str:
        """The text of these tokens, special ones too. Raises Overloaded. `num_bytes`: of the request they came in."""
        return await self._pool.decode(token_ids, num_bytes)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; half a character shows as U+FFFD. Raises Overloaded."""
        return await self._pool.token_texts(token_ids)

    async def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that `SamplingParams.bad_words` must hold to keep these words out."""
        return await self._pool.encode_bad_words(words)

    async def compile_grammar(self, spec: GrammarSpec, param: str) -> Grammar:
        """What outputs must obey; `Grammar.constraint()` makes one for each choice.

        Raises InvalidRequest naming `param` and what in it is wrong or not supported, or Overloaded.
        """
        return await self._pool.compile_grammar(spec, param)

    async def call_starts(self) -> CallStarts:
        """How the model's tokens lead into calls. Raises Overloaded."""
        return await self._pool.call_starts(self.answers.tools, self.accepting().vocab_size)

    def _limit(self, limit: ContextLimit | None, param: str) -> ContextLimit:
        context = self.accepting().max_context_length
        return ContextLimit(context, param) if limit is None else limit

    # --- requests ----------------------------------------------------------------------------------------------------

    @property
    def num_streams(self) -> int:
        """Requests that run or wait."""
        return len(self._running)

    def stream_ids(self) -> list[str]:
        """Their public ids."""
        return self._running.ids()

    def submit(
        self,
        public_id: str,
        choices: Sequence[ChoiceInput],
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        arrival_s: float | None = None,
        adapter: int = 0,
    ) -> RequestStream:
        """Hand all choices to the engine, or none.

        Raises Unavailable, CapacityError, or Overloaded with the time after which to try again. `arrival_s` is where
        the clock of timings and deadline starts, now if not given; `timeout_s` None means the configured default.
        `adapter`: its number in the order of `lora.adapters`, from 1; 0 = none.
        """
        capacity = self.accepting()
        assert choices, "a request has at least one choice"
        for choice in choices:
            _check_capacity(choice, capacity)
            if self.tokenizer.vocab_size > capacity.vocab_size:
                self._check_vocabulary(choice.prompt_token_ids, capacity.vocab_size)
        num_tokens = sum({choice.prompt_index: len(choice.prompt_token_ids) for choice in choices}.values())
        if refusal := self.queue.refusal(len(choices), num_tokens):
            self._metrics.count_rejected(refusal[0])
            raise refusal[1]
        now_s = self._clock()
        running = self._running
        stream = RequestStream(public_id, now_s if arrival_s is None else arrival_s, running.abandon, running.wake_list)
        self._running.add_stream(stream)
        self._push(stream, choices, priority, cache_salt, adapter)
        limit_s = self._time_limit_s(timeout_s)
        if limit_s is not None:
            assert self._loop is not None
            left_s = max(stream.arrival_s + limit_s - now_s, 0.0)
            stream.deadline = self._loop.call_later(left_s, self._running.cut, stream, FinishReason.TIMEOUT)
        return stream

    def _check_vocabulary(self, token_ids: Sequence[int], vocab_size: int) -> None:
        """Refuse tokens that the tokenizer knows and the model has no vector for, which would be the engine's end."""
        unknown = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
        if unknown is not None:
            text = show(self.tokenizer.decode([unknown]))
            raise InvalidRequest(
                f"The prompt holds {text}, token {unknown} of the tokenizer, but this model knows only {vocab_size}."
            )

    def abort(self, public_id: str) -> bool:
        """End a request with finish_reason "abort"; False when no such request runs."""
        streams = self._running.find(public_id)
        for stream in streams:
            self._running.cut(stream, FinishReason.ABORT)
        return bool(streams)

    def _push(
        self, stream: RequestStream, choices: Sequence[ChoiceInput], priority: int, cache_salt: str, adapter: int
    ) -> None:
        firsts: dict[int, int] = {}  # prompt index -> the request that computes this prompt for its siblings
        for index, choice in enumerate(choices):
            request_id = next(self._request_ids)
            first = firsts.setdefault(choice.prompt_index, request_id)
            after = 0 if first == request_id else first
            command = Submit(
                request_id=request_id,
                prompt_token_ids=choice.prompt_token_ids,
                params=choice.params,
                arrival_s=stream.arrival_s,
                priority=priority,
                cache_salt=cache_salt,
                after=after,
                constraint=choice.constraint,
                pooling=choice.pooling,
                adapter=adapter,
            )
            if not self._engine.submit(command):
                self._running.withdraw(stream)
                self._metrics.count_rejected("ring_full")
                raise self.queue.ring_full()
            detokenizer = self.tokenizer.detokenizer(choice.skip_special_tokens, choice.visible_tokens)
            num_queued_tokens = 0 if after else len(choice.prompt_token_ids)
            self._running.add_choice(ChoiceStream(stream, index, request_id, choice, detokenizer, num_queued_tokens))

    def _time_limit_s(self, timeout_s: float | None) -> float | None:
        """What the request asks for or the default, and never more than the most; None = no limit."""
        longest_s = self._config.max_timeout_s or None
        wanted_s = (self._config.default_timeout_s or None) if timeout_s is None else timeout_s
        if wanted_s is None or longest_s is None:
            return longest_s if wanted_s is None else wanted_s
        return min(wanted_s, longest_s)

    # --- outputs -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:  # hot: once per step
        """Hand every finished step to its streams. The only loop over outputs in this process."""
        if not self._is_behind:
            self._drain()

    def _catch_up(self) -> None:
        self._is_behind = False
        self._drain()

    def _drain(self) -> None:  # hot
        engine, num_rows, end_s = self._engine, 0, self._clock() + MAX_DRAIN_S
        self._metrics.set_ring_depth(engine.num_queued_commands, engine.num_queued_outputs)
        while num_rows < MAX_DRAIN_ROWS and (not num_rows or self._clock() < end_s):
            output = engine.pop_output()
            if output is None:
                break
            if type(output) is StepOutput:
                num_rows += 1 + len(output.token_ids)
                self._feed(output)
            elif isinstance(output, StartupPhase):
                self.phases[output.name] = output.seconds
            elif isinstance(output, EngineReady):
                self._on_ready(output)
            elif isinstance(output, EngineDead):
                self._on_dead(output)
        else:
            # The loop was late by many steps: merged deltas are ready for their readers, who come first. So do the
            # wake-ups of later steps that are queued in front of them already: they find nothing to do.
            assert self._loop is not None
            self._is_behind = True
            self._loop.call_soon(self._catch_up)
        engine.flush()

    def _feed(self, output: StepOutput) -> None:  # hot
        # With more steps in the ring the loop is late: their tokens are merged, since sending is most of the work.
        is_late = self._engine.num_queued_outputs > 0 or len(output.request_ids) > MAX_AT_ONCE
        self._metrics.observe_wakeup(self._clock() - output.committed_s)
        self._running.feed(output, not is_late)
        if output.stats is not None:
            self._metrics.observe_step(output.stats)
            self.queue.rate.observe(output.stats, output.committed_s)

    def _on_ready(self, ready: EngineReady) -> None:
        self.capacity = ready.capacity
        self.facts = ready.facts | {"sampling defaults": str(self.tokenizer.text.sampling)}
        if self.tokenizer.vocab_size > ready.capacity.vocab_size:
            log.warning(
                "the tokenizer has %d tokens and the model %d: prompts that hold one of the others are refused",
                self.tokenizer.vocab_size,
                ready.capacity.vocab_size,
            )
        if self.state == STARTING:
            self.state = READY
        self._ready_or_dead.set()

    def _on_dead(self, dead: EngineDead) -> None:
        if dead.detail:
            log.error("%s%s\n%s", dead.message, self._where(dead), dead.detail)
        self.state = DEAD
        self._died = dead
        for stream in self._running.all():
            self._running.fail(stream, Unavailable(f"The engine died: {dead.message}", code="engine_dead"))
        self._ready_or_dead.set()
        self._dead.set()

    def _where(self, dead: EngineDead) -> str:
        """Where the engine died, and who was there, by the names that clients know."""
        if not dead.phase:
            return ""
        where = f" in {dead.phase} of step {dead.step}" if dead.step else f" in {dead.phase}"
        ids = self._running.ids_of(dead.request_ids)
        more = ", ..." if len(ids) > MAX_NAMED else ""
        return f"{where}; {len(ids)} requests were in flight: {', '.join(ids[:MAX_NAMED]) or 'none'}{more}"


def _check_capacity(choice: ChoiceInput, capacity: Capacity) -> None:
    """Refuse what could not run even alone: the engine would find out only after the status line is out."""
    num_tokens = len(choice.prompt_token_ids) + (1 if choice.params.max_tokens else 0)
    if num_tokens > capacity.num_kv_tokens:
        raise CapacityError(
            f"The prompt has {len(choice.prompt_token_ids)} tokens; the KV cache holds {capacity.num_kv_tokens} in all "
            "(cache.memory_gib, cache.num_blocks).",
        )
