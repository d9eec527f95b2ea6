"""POST /v1/embeddings: vectors of texts or token ids, from the served model's own hidden states.

A batch goes through the engine slice by slice, so that neither it nor its answer is in the way of others: the queue
keeps room, and what is written of 2,048 vectors, 25 MB as numbers, is written in pieces between which the loop runs.
"""

import asyncio
import base64
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from aiohttp import web

from asyncllm.errors import ContextLengthExceeded, InvalidRequest, Timeout, Unavailable
from asyncllm.router.pooling import VectorForm, vector
from asyncllm.router.router import DRAINING, Router
from asyncllm.router.stream import ChoiceInput, ChoiceStream, RequestStream
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import params
from asyncllm.server.embeddings_wire import (
    Embedding,
    EmbeddingParameters,
    EmbeddingsAbout,
    EmbeddingsRequest,
    EmbeddingsUsage,
)
from asyncllm.server.job import Submit, prepare, submitter
from asyncllm.server.pause import Pause
from asyncllm.server.replies import PromptTokensDetails, encode_json
from asyncllm.server.serving import SERVING
from asyncllm.types import Floats, Pooling, SamplingParams

MAX_INPUTS = 2048  # of one request: OpenAI's limit
# Of one slice; two are at work at a time, and fill many steps.
SLICE_INPUTS = 128
SLICE_TOKENS = 65_536
SLICES_AT_ONCE = 2
ROOM_POLL_S = 0.01  # between two looks at a full queue
PIECE_S = 0.001  # of work on the loop, before it looks at everybody else


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Turn a text, or each of many, into a vector.

    It is made of the hidden states behind the model's last norm, as `pooling` says; the answer repeats it.
    """
    serving = request.app[SERVING]
    router, scheduler = serving.router, serving.config.scheduler
    arrived = await prepare(request, EmbeddingsRequest)
    body, capacity = arrived.body, arrived.capacity
    form = form_of(body, Pooling(serving.config.model.pooling), capacity.hidden_size)
    submit = submitter(request, arrived, body, "embd-")
    limit = InputLimit(capacity.max_context_length, "input", is_batch=_is_batch(body.input))
    prompts = await router.encode_prompts(
        await inputs_of(body.input, capacity.vocab_size, limit),
        num_bytes=arrived.num_bytes,
        add_special_tokens=body.add_special_tokens is not False,
        limit=limit,
    )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise limit.empty(index)

    batch = Batch(router, submit, form, body.encoding_format == "base64")
    choices = [pooled_choice(prompt, form, index) for index, prompt in enumerate(prompts)]
    max_tokens = min(SLICE_TOKENS, scheduler.max_queued_tokens)
    vectors = await batch.run(slices_of(choices, min(SLICE_INPUTS, scheduler.max_queued), max_tokens))
    num_tokens = sum(map(len, prompts))
    about = EmbeddingsAbout(
        model=body.model or serving.model_name,
        usage=EmbeddingsUsage(num_tokens, num_tokens, PromptTokensDetails(batch.num_cached_tokens)),
        pooling=form.pooling.value,
    )
    # Written as `Embeddings` would be, which holds all of them at once.
    pieces = [b'{"object":"list","data":[', *vectors, b"]," + encode_json(about)[1:]]
    return await _send(request, pieces, arrived.headers | {"Server-Timing": batch.server_timing()})


# --- what is asked ---------------------------------------------------------------------------------------------------


class InputLimit(ContextLimit, frozen=True):
    """How many tokens an input may have, and how the wrong one of many is called."""

    is_batch: bool = False

    def name(self, index: int) -> str:
        """What clients call this input."""
        return f"{self.param}[{index}]" if self.is_batch else self.param

    def exceeded(self, what: str, index: int = 0) -> ContextLengthExceeded:
        """The error; `what` says how long the input is, `index` which one it is."""
        name = self.name(index)
        return ContextLengthExceeded(
            f"{name}: this model's maximum context length is {self.num_tokens} tokens. However, {what}. Please shorten "
            "it.",
            param=name,
        )

    def empty(self, index: int) -> InvalidRequest:
        """The error for an input without tokens."""
        name = self.name(index)
        return InvalidRequest(f"{name} is empty: at least one token is needed.", param=name)


def form_of(asked: EmbeddingParameters, default: Pooling, hidden_size: int) -> VectorForm:
    """What vectors are to be. Raises InvalidRequest for more dimensions than the model has."""
    if asked.dimensions is not None and asked.dimensions > hidden_size:
        raise InvalidRequest(
            f"dimensions = {asked.dimensions}: this model's vectors have {hidden_size} numbers.", param="dimensions"
        )
    return VectorForm(
        default if asked.pooling is None else Pooling(asked.pooling),
        asked.dimensions or hidden_size,
        asked.normalize is not False,
    )


def pooled_choice(prompt: Sequence[int], form: VectorForm, index: int = 0) -> ChoiceInput:
    """A prompt of which nothing is wanted but its hidden states."""
    return ChoiceInput(prompt, SamplingParams(max_tokens=0), prompt_index=index, pooling=form.pooling)


def _is_batch(given: Any) -> bool:
    """Whether there are many inputs: neither one text nor one list of token ids."""
    return not isinstance(given, str) and not (given and isinstance(given[0], int))


async def inputs_of(given: Any, vocab_size: int, limit: InputLimit) -> list[str | Sequence[int]]:
    """The inputs, each a text or token ids of the vocabulary, with pauses for the loop.

    Raises InvalidRequest, and ContextLengthExceeded for too many ids, naming the input.
    """
    inputs = given if _is_batch(given) else [given]
    if not inputs:
        raise InvalidRequest("input is empty: at least one text is needed.", param="input")
    if len(inputs) > MAX_INPUTS:
        raise InvalidRequest(f"input holds {len(inputs)} inputs: at most {MAX_INPUTS} in one request.", param="input")
    if any(type(item) is not type(inputs[0]) for item in inputs):
        raise params.mixed("input")
    checked: list[str | Sequence[int]] = []
    pause = Pause(PIECE_S)
    for index, item in enumerate(inputs):
        if not item:
            raise limit.empty(index)
        if not isinstance(item, str):
            if len(item) > limit.num_tokens:
                raise limit.exceeded(f"it has {len(item)}", index)
            item = params.packed_ids(item, vocab_size, limit.name(index), "input")
        checked.append(item)
        await pause.when_due()
    return checked


# --- the way through the engine --------------------------------------------------------------------------------------


def slices_of(choices: Sequence[ChoiceInput], max_inputs: int, max_tokens: int) -> Iterator[list[ChoiceInput]]:
    """The choices in order, cut so that no slice but one of a single input is larger."""
    cut: list[ChoiceInput] = []
    num_tokens = 0
    for choice in choices:
        num_tokens += len(choice.prompt_token_ids)
        if cut and (len(cut) == max_inputs or num_tokens > max_tokens):
            yield cut
            cut, num_tokens = [], len(choice.prompt_token_ids)
        cut.append(choice)
    yield cut


class Batch:
    """The inputs of one request on their way through the engine, and what they cost."""

    def __init__(self, router: Router, submit: Submit, form: VectorForm, as_base64: bool) -> None:
        self._router = router
        self._submit = submit
        self._form = form
        self._as_base64 = as_base64
        self._expires_s = float("inf")  # on the loop's clock
        self.num_cached_tokens = 0
        self._queue_s = self._prefill_s = 0.0

    async def run(self, slices: Iterator[list[ChoiceInput]]) -> list[bytes]:
        """The JSON of each vector, in order, with the commas between them.

        Raises Overloaded where there is no room for the first slice; the others wait until there is. Whatever happens,
        nothing of the request stays behind.
        """
        vectors: list[bytes] = []
        running: deque[RequestStream] = deque()
        try:
            for choices in slices:
                if running or vectors:
                    await self._room(choices)
                running.append(self._submit(choices))
                if (deadline := running[-1].deadline) is not None:
                    self._expires_s = deadline.when()
                if len(running) == SLICES_AT_ONCE:
                    await self._finish(running[0], vectors)
                    running.popleft()
            while running:
                await self._finish(running[0], vectors)
                running.popleft()
        finally:
            for stream in running:
                stream.abort()
        return vectors

    def server_timing(self) -> str:
        """Milliseconds in the queue and in the model: the slowest input of each."""
        return f"queue;dur={self._queue_s * 1000:.2f}, prefill;dur={self._prefill_s * 1000:.2f}"

    async def _room(self, choices: Sequence[ChoiceInput]) -> None:
        """Wait until the queue takes these. Raises Timeout, and Unavailable."""
        num_tokens = sum(len(choice.prompt_token_ids) for choice in choices)
        loop = asyncio.get_running_loop()
        while self._router.queue.refusal(len(choices), num_tokens) is not None:
            if loop.time() >= self._expires_s:
                raise _expired()
            await asyncio.sleep(ROOM_POLL_S)
            self._router.accepting()

    async def _finish(self, stream: RequestStream, vectors: list[bytes]) -> None:
        """Wait for the end of a slice and append its vectors."""
        await stream.collect()
        pause = Pause(PIECE_S)
        for choice in stream.choices:
            values = vector(pooled_sums(choice, self._router), choice.num_prompt_tokens, self._form)
            embedding: str | list[float] = _base64(values) if self._as_base64 else values.tolist()
            encoded = encode_json(Embedding(index=len(vectors), embedding=embedding))
            vectors.append(b"," + encoded if vectors else encoded)
            self.num_cached_tokens += choice.num_cached_tokens
            queue_s, prefill_s, _ = choice.timings() or (0.0, 0.0, 0.0)
            self._queue_s, self._prefill_s = max(self._queue_s, queue_s), max(self._prefill_s, prefill_s)
            await pause.when_due()


def pooled_sums(choice: ChoiceStream, router: Router) -> Floats:
    """The sums of a choice that is over. Raises Timeout or Unavailable where it ended before its time."""
    if choice.finish_reason == "length" and choice.pooled is not None:
        return choice.pooled
    if choice.finish_reason == "timeout":
        raise _expired()
    if router.state == DRAINING:
        raise Unavailable("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
    raise Unavailable("The request was aborted.", code="aborted")


def _expired() -> Timeout:
    return Timeout("Not all inputs were computed within the request's timeout.", param="timeout")


# --- the answer ------------------------------------------------------------------------------------------------------


def _base64(values: Floats) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


async def _send(request: web.Request, pieces: Sequence[bytes], headers: dict[str, str]) -> web.StreamResponse:
    """A JSON answer in pieces, as fast as the client reads; one that reads nothing is given up after a while."""
    response = web.StreamResponse(headers=headers | {"Content-Type": "application/json; charset=utf-8"})
    response.content_length = sum(map(len, pieces))
    await response.prepare(request)
    timeout_s = request.app[SERVING].config.server.write_timeout_s or None
    pause = Pause(PIECE_S)
    try:
        for piece in pieces:
            async with asyncio.timeout(timeout_s):
                await response.write(piece)
            await pause.when_due()
        await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None
    return response
