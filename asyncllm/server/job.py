"""The way of a generation request, the same for chat and completions, streamed and whole.

prepare (read, decode) -> the API's own checks and prompts -> admit (limits, parameters, submit) -> respond. Everything
that can be refused is refused before the status line.
"""

import difflib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
from aiohttp import web

from asyncllm.errors import InvalidRequest
from asyncllm.router.answers import Reader
from asyncllm.router.stream import ChoiceInput, RequestStream
from asyncllm.server import params
from asyncllm.server.body import check_content_type, decode_body, read_body
from asyncllm.server.embeddings_wire import EmbeddingParameters
from asyncllm.server.logprobs import TokenText
from asyncllm.server.replies import Usage, usage
from asyncllm.server.serving import REQUEST_ID, SERVING, Serving
from asyncllm.server.wire import GenerationRequest, ModelRequest
from asyncllm.types import Capacity, Constraint
from asyncllm.weights.base import TextFacts

R = TypeVar("R", bound=ModelRequest)
Submit = Callable[[Sequence[ChoiceInput]], RequestStream]
MAX_HEADER_CHARS = 1024

log = logging.getLogger("asyncllm.server")


class Arrived(msgspec.Struct, Generic[R]):
    """A decoded request that names a served model."""

    body: R
    num_bytes: int  # of the body on the wire, inflated
    headers: dict[str, str]  # for the answer
    arrival_s: float
    capacity: Capacity


class Asked(msgspec.Struct, kw_only=True):
    """The one generation request inside the server: what each API makes of its body, once there are tokens."""

    parameters: GenerationRequest  # OpenAI's and vLLM's; the body itself where it has them
    prefix: str  # of the public id, as in cmpl-
    param: str  # the field that holds the prompt, for errors
    prompts: Sequence[Sequence[int]]  # token ids
    num_choices: int  # per prompt
    max_tokens: int | None
    default_max_tokens: int | None  # where none was asked for; None = what is left of the context
    logprobs: int | None
    prompt_logprobs: int | None
    visible_tokens: tuple[str, ...] = ()  # special tokens that are shown all the same
    stop_token_ids: tuple[int, ...] = ()  # end the answer, beside those that end any text
    make_constraint: Callable[[], Constraint] | None = None  # called once per choice


class Job(msgspec.Struct):
    """An admitted request: it runs, and must be aborted if nobody waits for it any more."""

    id: str
    created: int
    model: str
    fingerprint: str
    stream: RequestStream
    choices: list[ChoiceInput]
    num_choices_per_prompt: int
    streamed: bool
    include_usage: bool
    continuous_usage: bool
    headers: dict[str, str]
    token_text: TokenText
    decode_prompt: Callable[[Sequence[int]], str]
    reader: Reader | None = None  # of a conversation's answers

    def usage(self) -> Usage:
        """Tokens so far: each prompt counts once, however many choices it has."""
        states = self.stream.choices
        prompts = range(0, len(states), self.num_choices_per_prompt)
        return usage(
            sum(len(self.choices[i].prompt_token_ids) for i in prompts),
            sum(state.num_output_tokens for state in states),
            sum(states[i].num_cached_tokens for i in prompts),
            0 if self.reader is None else self.reader.num_reasoning_tokens,
        )

    def prompt_text(self, choice: int) -> str:
        """The text of a choice's prompt, for echo."""
        return self.decode_prompt(self.choices[choice].prompt_token_ids)


async def prepare(request: web.Request, struct: type[R]) -> Arrived[R]:
    """Read and decode the body; refuse what the server cannot take now, and models it does not serve."""
    serving = request.app[SERVING]
    arrival_s = time.monotonic()
    capacity = serving.router.accepting()
    api = serving.config.api
    check_content_type(request)
    raw = await read_body(request, api.max_body_bytes, serving.config.server.body_timeout_s)
    body, unknown = await decode_body(raw, struct)
    headers = {"x-ignored-params": ignored(unknown, struct, serving)} if unknown else {}
    serving.check_model(body.model)
    return Arrived(body, len(raw), headers, arrival_s, capacity)


def ignored(unknown: list[str], struct: type[msgspec.Struct], serving: Serving) -> str:
    """The header that names fields nobody reads; in strict mode they are refused with the nearest known name."""
    serving.metrics.ignored_parameters += len(unknown)
    if serving.config.api.strict:
        close = difflib.get_close_matches(unknown[0], struct.__struct_fields__, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InvalidRequest(
            f"{unknown[0][:200]!r} is not a parameter of this route{hint}",
            param=unknown[0][:200],
            code="unknown_parameter",
        )
    return ",".join(quote(name[:200], safe="._-$[]") for name in unknown)[:MAX_HEADER_CHARS]


def submitter(
    request: web.Request, arrived: Arrived[Any], asked: GenerationRequest | EmbeddingParameters, prefix: str
) -> Submit:
    """What hands choices to the router with this request's priority, timeout and adapter. `prefix`: of the public id.

    Raises InvalidRequest for a timeout, in body or header, that cannot be.
    """
    serving = request.app[SERVING]
    header = request.headers.get("X-Request-Timeout")
    return functools.partial(
        serving.router.submit,
        f"{prefix}{request[REQUEST_ID]}",
        priority=asked.priority or 0,
        cache_salt=asked.cache_salt or "",
        timeout_s=params.request_timeout(asked.timeout, header, serving.config.scheduler.max_timeout_s),
        arrival_s=arrived.arrival_s,
        adapter=serving.adapter(asked.model),
    )


async def admit(request: web.Request, arrived: Arrived[Any], asked: Asked) -> Job:
    """Check what needs the tokens, build every choice and hand them all to the router, or none.

    Raises ContextLengthExceeded, InvalidRequest, Overloaded or Unavailable.
    """
    serving, body = request.app[SERVING], asked.parameters
    router = serving.router
    if len(asked.prompts) * asked.num_choices > serving.config.api.max_choices:
        raise InvalidRequest(
            f"{len(asked.prompts)} prompts x {asked.num_choices} choices: at most {serving.config.api.max_choices} in "
            "one request (api.max_choices).",
            param="n",
        )
    submit = submitter(request, arrived, body, asked.prefix)
    bad_words = await router.encode_bad_words(body.bad_words) if body.bad_words else ()
    choices = build_choices(arrived, asked, bad_words, router.tokenizer.text)
    stream = submit(choices)
    options = body.stream_options
    return Job(
        id=stream.public_id,
        created=int(time.time()),
        model=body.model or serving.model_name,
        fingerprint=serving.fingerprint,
        stream=stream,
        choices=choices,
        num_choices_per_prompt=asked.num_choices,
        streamed=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        headers=arrived.headers,
        token_text=TokenText(router.tokenizer),
        decode_prompt=router.tokenizer.decode,
    )


def build_choices(
    arrived: Arrived[Any], asked: Asked, bad_words: tuple[tuple[int, ...], ...], text: TextFacts
) -> list[ChoiceInput]:
    """Every choice of every prompt. A prompt's choices have seeds seed, seed + 1, …, in a batch as alone."""
    body, choices = asked.parameters, []
    stop = params.stop_strings(body)
    first_seed = params.first_seed(body)
    for prompt_index, prompt in enumerate(asked.prompts):
        max_tokens = params.fit_max_tokens(
            asked.max_tokens, asked.default_max_tokens, len(prompt), arrived.capacity.max_context_length, asked.param
        )
        sampling = params.sampling_params(
            body,
            max_tokens=max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.prompt_logprobs,
            eos_token_ids=text.eos_token_ids + asked.stop_token_ids,
            defaults=text.sampling,
            bad_words=bad_words,
            seed=first_seed,
        )
        choices += [
            ChoiceInput(
                prompt_token_ids=prompt,
                params=params.with_seed(sampling, first_seed + index),
                stop=stop,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                visible_tokens=asked.visible_tokens,
                constraint=asked.make_constraint() if asked.make_constraint is not None else None,
                prompt_index=prompt_index,
            )
            for index in range(asked.num_choices)
        ]
    return choices
