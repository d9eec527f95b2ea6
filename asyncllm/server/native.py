"""The native API: /generate and its relatives, /chat, /models and /stats.

One prompt has one answer here. A stream's events are `{"text", "request_id", "tokens_generated"}`, with `index` where
`prompts` asked for many; the last one of each prompt has `finish_reason` and `"final": true`, and nothing follows it.
What the model of a chat thinks comes in events with `reasoning` and an empty text.
"""

import time
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from asyncllm.errors import AsyncLLMError, InvalidRequest, show
from asyncllm.router.answers import Reader
from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.stream import Delta
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import params
from asyncllm.server.conversation import Conversation, converse
from asyncllm.server.job import Arrived, Asked, Job, admit, prepare
from asyncllm.server.native_wire import (
    DEFAULT_MAX_TOKENS,
    CacheStats,
    GeneratedMessage,
    GeneratedText,
    GenerateRequest,
    NativeChatRequest,
    NativeMessage,
    NativeModel,
    NativeModels,
    NativeRequest,
    SchedulerStats,
    Stats,
    Timings,
)
from asyncllm.server.replies import Usage, encode_json, error_body, json_response
from asyncllm.server.respond import respond
from asyncllm.server.serving import SERVING, Serving

BACKEND = "torch"
MAX_METADATA_BYTES = 16 * 1024  # it comes back with every text of a batch


# --- generation ------------------------------------------------------------------------------------------------------


async def generate(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or many."""
    arrived = await prepare(request, GenerateRequest)
    return await _generate(request, arrived)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or many, always streamed."""
    arrived = await prepare(request, GenerateRequest)
    if arrived.body.stream is False:
        raise InvalidRequest("stream = false: this route always streams; use /generate.", param="stream")
    arrived.body.stream = True
    return await _generate(request, arrived)


async def basic_generate(request: web.Request) -> web.StreamResponse:
    """Continue prompts greedily; the answer is the list of their texts."""
    arrived = await prepare(request, GenerateRequest)
    body = arrived.body
    if body.stream:
        raise InvalidRequest("stream = true: this route answers whole; use /generate_stream.", param="stream")
    if body.temperature is None:
        body.temperature = 0.0
    job = await _admit_prompts(request, arrived)
    return await respond(request, job, NativeFrames(job, is_batch=False), texts_body)


async def chat(request: web.Request) -> web.StreamResponse:
    """Generate the next turn of a conversation."""
    arrived = await prepare(request, NativeChatRequest)
    body = arrived.body
    check(body, arrived.capacity.vocab_size)
    conversation = Conversation(
        parameters=body,
        messages=params.chat_messages(body.messages),
        max_tokens=params.resolve_max_tokens(body, chat=True),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        prefix="chat-",
    )
    job, reader = await converse(request, arrived, conversation)
    whole = partial(message_body, job, reader, _metadata(request.app[SERVING], job, body))
    return await respond(request, job, NativeChatFrames(job, reader), whole)


async def _generate(request: web.Request, arrived: Arrived[GenerateRequest]) -> web.StreamResponse:
    body = arrived.body
    job = await _admit_prompts(request, arrived)
    is_batch = body.prompts is not None
    whole = partial(generated_body, job, _metadata(request.app[SERVING], job, body), is_batch)
    return await respond(request, job, NativeFrames(job, is_batch), whole)


async def _admit_prompts(request: web.Request, arrived: Arrived[GenerateRequest]) -> Job:
    serving, body = request.app[SERVING], arrived.body
    check(body, arrived.capacity.vocab_size)
    param, prompts = prompts_of(body, serving.config.api.max_choices)
    token_ids = await serving.router.encode_prompts(
        prompts,
        num_bytes=arrived.num_bytes,
        add_special_tokens=body.add_special_tokens is not False,
        limit=ContextLimit(arrived.capacity.max_context_length, param),
    )
    return await admit(
        request,
        arrived,
        Asked(
            parameters=body,
            prefix="gen-",
            param=param,
            prompts=token_ids,
            num_choices=1,
            max_tokens=params.resolve_max_tokens(body, chat=True),
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=None,
            prompt_logprobs=None,
        ),
    )


def prompts_of(body: GenerateRequest, max_prompts: int) -> tuple[str, list[str | list[int]]]:
    """The field that holds the prompts, and the prompts. Raises InvalidRequest for none, for both and for too many."""
    if body.prompt is not None and body.prompts is not None:
        raise InvalidRequest("prompt and prompts exclude each other.", param="prompts")
    if body.prompt is not None:
        return "prompt", [body.prompt]
    if body.prompts is None:
        raise InvalidRequest("prompt or prompts is required.", param="prompt", code="missing_required_parameter")
    if len(body.prompts) > max_prompts:
        raise InvalidRequest(
            f"prompts holds {len(body.prompts)} prompts: at most {max_prompts} in one request (api.max_choices).",
            param="prompts",
        )
    return "prompts", list(body.prompts)


def check(body: NativeRequest, vocab_size: int) -> None:
    """Rules of all generating routes; `stop` holds the stop strings afterwards, by whichever name they came."""
    if (body.n or 1) > 1:
        raise InvalidRequest(
            f"n = {body.n}: a prompt has one answer here; to get more, repeat it in prompts.",
            param="n",
            code="unsupported_parameter",
        )
    for name in ("stream_options", "prompt_logprobs", "response_format", "structured_outputs"):
        if (value := getattr(body, name)) is not None:
            raise InvalidRequest(
                f"{name} = {show(value)}: {name} is not part of the native API; use /v1/chat/completions.",
                param=name,
                code="unsupported_parameter",
            )
    params.check_common(body, chat=True)
    params.check_token_ids(body, vocab_size)
    if body.stop_sequences is not None:
        other, other_strings = body.stop, params.stop_strings(body)
        body.stop = body.stop_sequences
        if other is not None and set(other_strings) != set(params.stop_strings(body)):
            raise InvalidRequest(
                f"stop_sequences = {show(body.stop)}, stop = {show(other)}: these are synonyms and must agree.",
                param="stop_sequences",
            )
    if body.metadata is not None and len(encode_json(body.metadata)) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata is larger than {MAX_METADATA_BYTES} bytes of JSON.", param="metadata")


def _metadata(serving: Serving, job: Job, body: NativeRequest) -> dict[str, Any]:
    return {**(body.metadata or {}), "model_name": job.model, "backend": BACKEND}


# --- answers ---------------------------------------------------------------------------------------------------------


class NativeFrames:
    """Events of the native streams."""

    def __init__(self, job: Job, is_batch: bool) -> None:
        """`is_batch`: events say which prompt they are about."""
        self._choices = job.stream.choices
        self._middle = b',"request_id":' + encode_json(job.id) + b',"tokens_generated":'
        self._tails = [b',"index":%d' % index if is_batch else b"" for index in range(len(self._choices))]

    def opening(self) -> bytes:
        """Nothing yet."""
        return b""

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """The event of the next text."""
        return self._start(index, text) + b"}\n\n"

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """The event of what is new, final where the text ended; none where there is nothing to show yet."""
        if delta.finish_reason is not None:
            end = b',"finish_reason":%b,"final":true}\n\n' % encode_json(delta.finish_reason)
            return self._start(delta.index, delta.text) + end
        return self.text(delta.index, delta.text) if delta.text else b""

    def closing(self) -> bytes:
        """Nothing: the final events said it."""
        return b""

    def failing(self, error: AsyncLLMError) -> bytes:
        """An error after the status line, the last event."""
        return b"data: " + encode_json(error_body(error)) + b"\n\n"

    def _start(self, index: int, text: str) -> bytes:
        num_tokens = self._choices[index].num_output_tokens
        return b'data: {"text":%b%b%d%b' % (encode_json(text), self._middle, num_tokens, self._tails[index])


class NativeChatFrames(NativeFrames):
    """Events of a native conversation: what the model thinks is told from what it says."""

    def __init__(self, job: Job, reader: Reader) -> None:
        super().__init__(job, is_batch=False)
        self._reader = reader

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """The event of the next text, or of the next thought."""
        if self._reader.is_plain:
            return super().text(index, text)
        return b"".join([self._part(index, part) for part in self._reader.push(index, text)])

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Events of what is new, a final one where the text ended."""
        if self._reader.is_plain:
            return super().delta(delta, usage)
        parts, reason = self._reader.read(delta)
        frames = b"".join([self._part(delta.index, part) for part in parts])
        return frames + super().delta(Delta(delta.index, finish_reason=reason), usage) if reason else frames

    def _part(self, index: int, part: Part) -> bytes:
        if part.kind is PartKind.REASONING:
            return self._start(index, "") + b',"reasoning":%b}\n\n' % encode_json(part.text)
        return super().text(index, part.text)


def generated_body(job: Job, metadata: dict[str, Any], is_batch: bool, choices: list[Delta]) -> Any:
    """One answer, or the list of them in the order of their prompts."""
    answers = [GeneratedText(text=choice.text, **_about(job, metadata, choice)) for choice in choices]
    return answers if is_batch else answers[0]


def texts_body(choices: list[Delta]) -> Any:
    """Nothing but the texts."""
    return [choice.text for choice in choices]


def message_body(job: Job, reader: Reader, metadata: dict[str, Any], choices: list[Delta]) -> GeneratedMessage:
    """The answer as a turn of the conversation."""
    (choice,) = choices
    answer = reader.whole(choice)
    message = NativeMessage(answer.content, reasoning=answer.reasoning or msgspec.UNSET)
    return GeneratedMessage(message=message, **_about(job, metadata, choice))


def _about(job: Job, metadata: dict[str, Any], choice: Delta) -> dict[str, Any]:
    """The fields of `Generated`."""
    state = job.stream.choices[choice.index]
    seconds = state.timings()
    timings = Timings(*seconds) if seconds is not None else None
    generation_s = timings.prefill_s + timings.decode_s if timings is not None else 0.0
    return {
        "request_id": job.id,
        "tokens_generated": state.num_output_tokens,
        "generation_time": generation_s,
        "tokens_per_second": _ratio(state.num_output_tokens, generation_s),
        "finish_reason": choice.finish_reason or "",
        "timings": timings,
        "metadata": metadata,
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by else 0.0


# --- about the server ------------------------------------------------------------------------------------------------


async def models(request: web.Request) -> web.Response:
    """The served model under all its names, and its adapters."""
    serving = request.app[SERVING]
    capacity = serving.router.capacity if serving.attached else None
    parameters = serving.facts.get("parameters", "").replace(",", "")
    return json_response(
        NativeModels(
            models=[
                NativeModel(
                    name=name,
                    type="causal_lm",
                    parameters=int(parameters) if parameters.isdecimal() else None,
                    context_length=capacity.max_context_length if capacity else None,
                    loaded=capacity is not None,
                    backend=BACKEND,
                    parent=serving.model_name if name in serving.adapters else None,
                )
                for name in serving.listed_names
            ],
            default_model=serving.model_name,
        )
    )


async def stats(request: web.Request) -> web.Response:
    """What was done since the start, and what is being done: the figures of /metrics, added up."""
    serving = request.app[SERVING]
    metrics, engine = serving.metrics, serving.metrics.stats
    capacity = serving.router.capacity if serving.attached else None
    num_texts = sum(metrics.finished.values.values())
    num_tokens = int(metrics.generation_length.total)
    inference_s = metrics.inference.total
    return json_response(
        Stats(
            is_loaded=capacity is not None,
            is_ready=serving.state == "ready",
            backend_type=BACKEND,
            request_count=num_texts,
            total_tokens_generated=num_tokens,
            total_inference_time=inference_s,
            avg_tokens_per_request=_ratio(num_tokens, num_texts),
            avg_time_per_request=_ratio(inference_s, num_texts),
            avg_tokens_per_second=_ratio(num_tokens, inference_s),
            uptime=max(time.time() - metrics.started_s, 0.0),
            scheduler=SchedulerStats(
                running=engine.num_running,
                waiting=engine.num_waiting,
                waiting_tokens=engine.num_waiting_tokens,
                max_sequences=capacity.max_sequences if capacity else None,
                streams_open=metrics.streams_open,
                steps=engine.num_steps,
                graph_steps=engine.num_graph_steps,
                preemptions=engine.num_preemptions,
            ),
            kv_cache=CacheStats(
                num_blocks=capacity.num_blocks - 1 if capacity else None,  # the null block holds nothing
                block_size=capacity.block_size if capacity else None,
                used_blocks=engine.num_used_blocks,
                cached_blocks=engine.num_cached_blocks,
                usage=metrics.kv_usage,
                prefix_queried_tokens=engine.prefix_queried_tokens,
                prefix_hit_tokens=engine.prefix_hit_tokens,
            ),
        )
    )
