"""`AsyncLLM`: a model and its engine thread inside somebody's own asyncio program, without HTTP.

A request takes the server's own way (its rules, `build_choices`, the router), so the same parameters give the same
answer. Belongs to the event loop it was started on.
"""

import asyncio
import contextlib
import gc
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from asyncllm.config import Config, load, override
from asyncllm.errors import AsyncLLMError, InvalidRequest, Overloaded, Unavailable, show
from asyncllm.llm.batch import Progress, run_batch
from asyncllm.llm.inputs import (
    Messages,
    Prompt,
    checked_prompt,
    checked_turns,
    conversations_of,
    num_bytes,
    prompts_of,
    template_options,
    tool_options,
)
from asyncllm.llm.output import Choice, Embedding, Output, Timings
from asyncllm.llm.params import Params, SamplingParams, embedding_params, params_of
from asyncllm.router.answers import Reader
from asyncllm.router.constraint import Grammar
from asyncllm.router.pooling import vector
from asyncllm.router.router import Router
from asyncllm.router.stream import ChoiceInput, ChoiceStream, Delta, RequestStream
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import lifecycle, params
from asyncllm.server.completions import DEFAULT_MAX_TOKENS
from asyncllm.server.conversation import Conversation, make_ready
from asyncllm.server.embeddings import form_of, pooled_choice, pooled_sums
from asyncllm.server.embeddings_wire import EmbeddingParameters
from asyncllm.server.job import Arrived, Asked, build_choices
from asyncllm.server.serving import Serving
from asyncllm.server.structured import wanted_of
from asyncllm.types import Constraint, Pooling

T = TypeVar("T")

ROOM_POLL_S = 0.01  # between two looks at a full queue
AT_ONCE = 2  # sequences at work for each that can run: while one ends, the next one is tokenized and waits


class Encoded(msgspec.Struct, frozen=True):
    """A prompt that is ready for the engine."""

    text: str | None
    token_ids: Sequence[int]
    param: str  # prompt or messages: the word for it in errors
    make_constraint: Callable[[], Constraint] | None  # called once per choice
    visible_tokens: tuple[str, ...] = ()  # special tokens that are shown all the same
    stop_token_ids: tuple[int, ...] = ()  # end the answer, beside those that end any text
    reader: Callable[[Sequence[ChoiceStream]], Reader] | None = None  # of a conversation's answers

    @property
    def is_chat(self) -> bool:
        """Whether its answer may take what is left of the context."""
        return self.param == "messages"


class AsyncLLM:
    """`async with AsyncLLM("smollm2-135m-instruct") as llm: [output] = await llm.generate("Once upon a time")`.

    `close` ends what runs and gives everything back; the object can be started again then, also on another loop.
    """

    def __init__(
        self, model: str | Path | None = None, *, config: Config | str | Path | None = None, **options: Any
    ) -> None:
        """`model`: alias, directory, .gguf file or hub name. `options`: keys of the configuration by their bare names.

        `config`: a configuration, or its file. Unless it is a `Config`, the environment's ASYNCLLM_ variables count as
        they do for the server; `model` and `options` win over both. Raises ConfigError. Loads nothing yet.
        """
        base = config if isinstance(config, Config) else load(config)
        if model is not None:
            options["path"] = str(model)
        self.config = override(base, options)
        self._serving: Serving | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that it was started on
        self._switch_interval_s = (0.0, 0.0)  # the process's own, and ours
        self._numbers = itertools.count(1)

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model and wait until it takes work. Raises StartupError where that cannot be."""
        if self._loop is not None:
            raise AsyncLLMError("This AsyncLLM was started already.")
        self._loop = asyncio.get_running_loop()
        serving = self.serving
        ours_s = self.config.executor.switch_interval_us / 1e6
        self._switch_interval_s = (sys.getswitchinterval(), ours_s)
        sys.setswitchinterval(ours_s)
        gc.callbacks.append(serving.metrics.gc_pauses)
        try:
            await lifecycle.load(serving, lifecycle.place_threads(self.config))
        except BaseException as error:
            serving.startup.error = str(error)
            await self.close()
            raise

    async def close(self) -> None:
        """End what runs with finish_reason "abort", stop the engine thread and free the model. Idempotent."""
        serving, self._serving, loop, self._loop = self._serving, None, self._loop, None
        if serving is None or loop is None:
            return
        await lifecycle.close(serving)
        with contextlib.suppress(ValueError):
            gc.callbacks.remove(serving.metrics.gc_pauses)
        before_s, ours_s = self._switch_interval_s
        if abs(sys.getswitchinterval() - ours_s) < 1e-9:  # nobody else has set it meanwhile
            sys.setswitchinterval(before_s)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_started(self) -> bool:
        """Whether it loads or runs."""
        return self._loop is not None

    @property
    def serving(self) -> Serving:
        """What the server's handlers know of it; a new one after each `close`."""
        if self._serving is None:
            self._serving = Serving(self.config)
        return self._serving

    @property
    def facts(self) -> dict[str, str]:
        """Device, precision and memory, once it runs."""
        return self.serving.facts

    # --- work --------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        adapter: str | None = None,
        progress: bool | Progress = False,
        **fields: Any,
    ) -> list[Output]:
        """Continue one prompt or thousands; an `Output` for each, in their order.

        `params`: for all, or one for each; or their fields as keywords. Wrong parameters raise InvalidRequest before
        anything runs; what goes wrong with one prompt is its output's `error`, and the others go on. `adapter`: one of
        `lora.adapters`. `progress`: show a line on standard error, or call a function with how many are done, and of
        how many.
        """
        given = prompts_of(prompts)
        wanted = params_of(params, fields, len(given))

        async def encode(index: int) -> Encoded:
            return await self._encode(given[index], wanted[index])

        return await self._run(wanted, encode, progress, self._adapter(adapter))

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params | Sequence[Params] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        progress: bool | Progress = False,
        **fields: Any,
    ) -> list[Output]:
        """The next turn of one conversation or thousands; as `generate` in everything else.

        `tools`, `tool_choice`, `parallel_tool_calls`: as in POST /v1/chat/completions, for all of them.
        """
        conversations = conversations_of(messages)
        wanted = params_of(params, fields, len(conversations))
        template = template_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        template |= tool_options(tools, tool_choice, parallel_tool_calls)

        async def encode(index: int) -> Encoded:
            return await self._render(conversations[index], wanted[index], template)

        return await self._run(wanted, encode, progress, self._adapter(adapter))

    def stream(
        self, prompt: Prompt, params: Params | None = None, *, adapter: str | None = None, **fields: Any
    ) -> AsyncIterator[Delta]:
        """Continue a prompt; what is new, as it comes. Who stops iterating ends the request."""
        given = _only(prompts_of(prompt), "prompt")
        sampling = _streamed(params, fields)
        return self._stream(lambda: self._encode(given, sampling), sampling, self._adapter(adapter))

    def stream_chat(
        self,
        messages: Messages,
        params: Params | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        **fields: Any,
    ) -> AsyncIterator[Delta]:
        """The next turn of a conversation; what is new, as it comes. Who stops iterating ends the request."""
        conversation = _only(conversations_of(messages), "messages")
        sampling = _streamed(params, fields)
        template = template_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        return self._stream(lambda: self._render(conversation, sampling, template), sampling, self._adapter(adapter))

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: str | None = None,
        progress: bool | Progress = False,
        **fields: Any,
    ) -> list[Embedding]:
        """The vector of one prompt or of thousands; an `Embedding` for each, in their order.

        `fields`: pooling, normalize, dimensions and the others of POST /v1/embeddings. Errors, `adapter` and `progress`
        as in `generate`.
        """
        given, asked, number = prompts_of(prompts), embedding_params(fields), self._adapter(adapter)
        capacity = self._router().accepting()
        form = form_of(asked, Pooling(self.config.model.pooling), capacity.hidden_size)
        limit = ContextLimit(capacity.max_context_length, "prompt")

        async def work(index: int) -> Embedding:
            embedding = Embedding()
            try:
                embedding.prompt, token_ids = await self._tokens(given[index], asked)
                embedding.prompt_token_ids = list(token_ids)
                if len(token_ids) > limit.num_tokens:
                    raise limit.exceeded(f"your prompt has {len(token_ids)} tokens")
                stream = await self._push([pooled_choice(token_ids, form)], asked, "prompt", number)
                try:
                    await stream.collect()
                    [choice] = stream.choices
                    embedding.vector = vector(pooled_sums(choice, self._router()), len(token_ids), form)
                    embedding.num_cached_tokens = choice.num_cached_tokens
                finally:
                    stream.abort()
            except AsyncLLMError as error:
                embedding.error = error
            return embedding

        params.request_timeout(asked.timeout, None, self.config.scheduler.max_timeout_s)
        return await run_batch(len(given), self._num_at_once(), work, progress)

    # --- the way of a prompt -----------------------------------------------------------------------------------------

    async def _run(
        self,
        wanted: list[SamplingParams],
        encode: Callable[[int], Awaitable[Encoded]],
        progress: bool | Progress,
        adapter: int,
    ) -> list[Output]:
        capacity = self._router().accepting()
        for sampling in {id(sampling): sampling for sampling in wanted}.values():
            params.check_token_ids(sampling, capacity.vocab_size)
            params.request_timeout(sampling.timeout, None, self.config.scheduler.max_timeout_s)
            await self._grammar(sampling)
            if (sampling.n or 1) > self.config.scheduler.max_queued:
                raise InvalidRequest(
                    f"n = {sampling.n}: at most {self.config.scheduler.max_queued} (scheduler.max_queued).", param="n"
                )

        async def work(index: int) -> Output:
            output = Output(None, [])
            try:
                prompt = await encode(index)
                output.prompt, output.prompt_token_ids = prompt.text, list(prompt.token_ids)
                stream = await self._submit(prompt, wanted[index], adapter)
                try:
                    reader = None if prompt.reader is None else prompt.reader(stream.choices)
                    _fill(output, await stream.collect(), stream, reader)
                finally:
                    stream.abort()
            except AsyncLLMError as error:
                output.error = error
            return output

        widest = max((sampling.n or 1 for sampling in wanted), default=1)
        return await run_batch(len(wanted), max(self._num_at_once() // widest, 1), work, progress)

    def _num_at_once(self) -> int:
        """Sequences that are at work at a time."""
        return min(AT_ONCE * self._router().accepting().max_sequences, self.config.scheduler.max_queued)

    async def _stream(
        self, encode: Callable[[], Awaitable[Encoded]], sampling: SamplingParams, adapter: int
    ) -> AsyncIterator[Delta]:
        params.check_token_ids(sampling, self._router().accepting().vocab_size)
        stream = await self._submit(await encode(), sampling, adapter)
        try:
            while deltas := await stream.get():
                for delta in deltas:
                    yield delta
        finally:
            stream.abort()

    async def _tokens(
        self, prompt: Prompt, asked: SamplingParams | EmbeddingParameters
    ) -> tuple[str | None, Sequence[int]]:
        """The text, where the prompt is one, and its token ids."""
        router = self._router()
        checked = checked_prompt(prompt, router.accepting().vocab_size)
        text = checked if isinstance(checked, str) else None
        [token_ids] = await _when_room(
            lambda: router.encode_prompts(
                [checked],
                num_bytes=num_bytes(text or "", "prompt"),
                add_special_tokens=asked.add_special_tokens is not False,
            )
        )
        return text, token_ids

    async def _encode(self, prompt: Prompt, sampling: SamplingParams) -> Encoded:
        text, token_ids = await self._tokens(prompt, sampling)
        grammar = await self._grammar(sampling)
        return Encoded(text, token_ids, "prompt", None if grammar is None else grammar.constraint)

    async def _render(self, messages: Messages, sampling: SamplingParams, template: dict[str, Any]) -> Encoded:
        router, turns = self._router(), checked_turns(messages)
        size = sum(num_bytes(str(value), "messages") for turn in turns for value in turn.values())
        asked = Conversation(parameters=sampling, messages=turns, wanted=wanted_of(sampling), **template)
        ready = await _when_room(lambda: make_ready(router, asked, size))
        text = router.tokenizer.decode(ready.prompt)
        return Encoded(
            text,
            ready.prompt,
            "messages",
            ready.make_constraint,
            visible_tokens=ready.visible_tokens,
            stop_token_ids=ready.stop_token_ids,
            reader=ready.reader,
        )

    async def _grammar(self, sampling: SamplingParams) -> Grammar | None:
        """What the text has to follow; compiled once, however many prompts ask for it."""
        router, wanted = self._router(), wanted_of(sampling)
        if wanted is None:
            return None
        return await _when_room(lambda: router.compile_grammar(wanted.spec, wanted.param))

    async def _submit(self, prompt: Encoded, sampling: SamplingParams, adapter: int) -> RequestStream:
        """Hand a prompt over; waits while the queue is full."""
        router = self._router()
        capacity = router.accepting()
        words = sampling.bad_words
        bad_words = await _when_room(lambda: router.encode_bad_words(words)) if words else ()
        asked = Asked(
            parameters=sampling,
            prefix="llm-",
            param=prompt.param,
            prompts=[prompt.token_ids],
            num_choices=sampling.n or 1,
            max_tokens=params.resolve_max_tokens(sampling, chat=prompt.is_chat),
            default_max_tokens=None if prompt.is_chat else DEFAULT_MAX_TOKENS,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            visible_tokens=prompt.visible_tokens,
            stop_token_ids=prompt.stop_token_ids,
            make_constraint=prompt.make_constraint,
        )
        arrived = Arrived(sampling, 0, {}, time.monotonic(), capacity)
        choices = build_choices(arrived, asked, bad_words, router.tokenizer.text)
        return await self._push(choices, sampling, prompt.param, adapter)

    async def _push(
        self, choices: Sequence[ChoiceInput], asked: SamplingParams | EmbeddingParameters, param: str, adapter: int
    ) -> RequestStream:
        """Hand the choices of a prompt over; waits while the queue is full."""
        router, config = self._router(), self.config.scheduler
        num_tokens = len(choices[0].prompt_token_ids)
        if num_tokens > config.max_queued_tokens:
            raise InvalidRequest(
                f"The prompt has {num_tokens} tokens: at most {config.max_queued_tokens} may wait "
                "(scheduler.max_queued_tokens).",
                param=param,
            )
        timeout_s = params.request_timeout(asked.timeout, None, config.max_timeout_s)
        while True:
            with contextlib.suppress(Overloaded):  # of the ring
                if router.queue.refusal(len(choices), num_tokens) is None:
                    return router.submit(
                        f"llm-{next(self._numbers)}",
                        choices,
                        priority=asked.priority or 0,
                        cache_salt=asked.cache_salt or "",
                        timeout_s=timeout_s,
                        adapter=adapter,
                    )
            await asyncio.sleep(ROOM_POLL_S)
            router.accepting()

    def _adapter(self, name: str | None) -> int:
        """Its number; 0 = none. Raises InvalidRequest for a name that is not in `lora.adapters`."""
        adapters = self.serving.adapters
        if name is not None and name not in adapters:
            known = ", ".join(adapters) or "none"
            raise InvalidRequest(f"adapter = {show(name)}: not in lora.adapters, which has {known}.", param="adapter")
        return self.serving.adapter(name)

    def _router(self) -> Router:
        """The router. Raises Unavailable before `start`, AsyncLLMError on a loop that is not its own."""
        if self._loop is None:
            raise Unavailable("This AsyncLLM does not run: await start() first, or use it in `async with`.")
        if self._loop is not asyncio.get_running_loop():
            raise AsyncLLMError("This AsyncLLM was started on another event loop: use it there.")
        return self.serving.router


async def _when_room(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again where others keep the tokenizer's threads busy."""
    while True:
        try:
            return await attempt()
        except Overloaded:
            await asyncio.sleep(ROOM_POLL_S)


def _only(given: list[T], name: str) -> T:
    if len(given) != 1:
        raise InvalidRequest(f"{name} holds {len(given)} of them: a stream takes one.", param=name)
    return given[0]


def _streamed(given: Params | None, fields: dict[str, Any]) -> SamplingParams:
    [sampling] = params_of(given, fields, 1)
    params.check_common(msgspec.structs.replace(sampling, stream=True), chat=False)
    return sampling


def _fill(output: Output, deltas: list[Delta], stream: RequestStream, reader: Reader | None) -> None:
    """The whole answer of every choice, and what the request cost."""
    for delta in deltas:
        choice = Choice(
            delta.index, delta.text, delta.token_ids, delta.finish_reason or "abort", delta.stop_reason, delta.logprobs
        )
        if reader is not None:
            answer = reader.whole(delta)
            choice.content, choice.reasoning, choice.tool_calls = answer.content, answer.reasoning, answer.calls
            choice.finish_reason = answer.finish_reason or choice.finish_reason
        output.choices.append(choice)
    output.prompt_logprobs = deltas[0].prompt_logprobs
    output.num_cached_tokens = stream.choices[0].num_cached_tokens
    timings = [timing for choice in stream.choices if (timing := choice.timings()) is not None]
    if timings:
        output.timings = Timings(*map(max, zip(*timings)))
