"""POST /v1/completions: prompts as text or token ids, echo, best_of, and OpenAI's text shapes."""

from aiohttp import web

from asyncllm.router.stream import Delta
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import params
from asyncllm.server.chunks import ChunkFrames
from asyncllm.server.job import Asked, Job, admit, prepare
from asyncllm.server.logprobs import append_completion_logprobs, append_token
from asyncllm.server.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    encode_json,
    prompt_logprobs,
)
from asyncllm.server.respond import respond
from asyncllm.server.serving import SERVING
from asyncllm.server.structured import wanted_of
from asyncllm.server.wire import CompletionRequest
from asyncllm.types import TokenLogprobs

DEFAULT_MAX_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or many."""
    serving = request.app[SERVING]
    arrived = await prepare(request, CompletionRequest)
    body = arrived.body
    params.check_completion(body)
    params.check_token_ids(body, arrived.capacity.vocab_size)
    limit = ContextLimit(arrived.capacity.max_context_length, "prompt")
    prompts = params.prompts_of(body.prompt, arrived.capacity.vocab_size, limit)
    add_special_tokens = body.add_special_tokens is not False
    token_ids = await serving.router.encode_prompts(
        prompts, num_bytes=arrived.num_bytes, add_special_tokens=add_special_tokens
    )
    wanted = wanted_of(body)
    grammar = None if wanted is None else await serving.router.compile_grammar(wanted.spec, wanted.param)
    keep = body.n or 1
    made = body.best_of or keep
    logprobs = body.logprobs
    if made > keep and logprobs is None:
        logprobs = 0  # to rank them
    job = await admit(
        request,
        arrived,
        Asked(
            parameters=body,
            prefix="cmpl-",
            param="prompt",
            prompts=token_ids,
            num_choices=made,
            max_tokens=params.resolve_max_tokens(body, chat=False),
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=logprobs,
            prompt_logprobs=_prompt_logprobs(body),
            make_constraint=None if grammar is None else grammar.constraint,
        ),
    )
    answer = CompletionAnswer(job, body, keep, made)
    return await respond(request, job, answer, answer.whole)


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """Alternatives per prompt token: asked for by name, or by echo with logprobs."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((number for number in wanted if number is not None), default=None)


def mean_logprob(choice: Delta) -> float:
    """What best_of ranks by."""
    entries = choice.logprobs or []
    return sum(entry.logprob for entry in entries) / len(entries) if entries else float("-inf")


class CompletionAnswer(ChunkFrames):
    """Frames and whole body of one completion request; knows per choice how far its text has got."""

    def __init__(self, job: Job, body: CompletionRequest, keep: int, made: int) -> None:
        super().__init__(job, "text_completion")
        self._keep, self._made = keep, made
        self._wants_logprobs = body.logprobs is not None
        self._asked_prompt_logprobs = body.prompt_logprobs is not None
        self._echo = bool(body.echo)
        self._is_plain = not (self._echo or self._wants_logprobs or self._asked_prompt_logprobs)
        count = len(job.stream.choices)
        self._offsets = [0] * count  # characters of this choice's text so far
        self._echoed = [not self._echo] * count
        self._prompt_entries: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        self._starts = [self.start(index, b"text") for index in range(count)]
        self._plain_end = self.end()

    # --- streamed --------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The echoed prompts, unless their log-probabilities must be waited for."""
        if not self._echo or self._wants_logprobs:
            return b""
        self._echoed = [True] * len(self._echoed)
        return b"".join(
            start + encode_json(self._prompt_text(index)) + self._plain_end for index, start in enumerate(self._starts)
        )

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """A text chunk."""
        return self._starts[index] + encode_json(text) + self._plain_end

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """A text chunk where there is text, then the finish chunk where it ended."""
        index = delta.index
        if self._is_plain and usage is None and delta.finish_reason is None:
            return self.text(index, delta.text) if delta.text else b""
        if delta.prompt_logprobs:
            self._prompt_entries[index] += delta.prompt_logprobs
        frames = b""
        if not self._echoed[index] and (delta.token_ids or delta.finish_reason is not None):
            frames = self._echo_frame(index)
        start = self._starts[index]
        if delta.text or (self._wants_logprobs and delta.logprobs):
            end = self._plain_end
            if usage is not None or self._wants_logprobs:
                end = self.end(self._logprobs(delta), usage=usage)
            frames += start + encode_json(delta.text) + end
        if delta.finish_reason is not None:
            frames += start + b'""' + self.end(finish=self.reason(delta.finish_reason, delta.stop_reason), usage=usage)
        return frames

    def _logprobs(self, delta: Delta) -> bytes:
        if not self._wants_logprobs or not delta.logprobs:
            return b"null"
        columns = CompletionLogprobs()
        offset = self._offsets[delta.index]
        self._offsets[delta.index] = append_completion_logprobs(columns, delta.logprobs, self.job.token_text, offset)
        return encode_json(columns)

    def _echo_frame(self, index: int) -> bytes:
        self._echoed[index] = True
        columns = CompletionLogprobs()
        self._offsets[index] = self._append_prompt(columns, index, self._prompt_entries[index])
        return (
            self._starts[index]
            + encode_json(self._prompt_text(index))
            + self.end(encode_json(columns) if self._wants_logprobs else b"null")
        )

    # --- whole -----------------------------------------------------------------------------------------------------

    def whole(self, choices: list[Delta]) -> Completion:
        """The whole answer; of best_of choices per prompt the n most probable ones, by mean log-probability."""
        rows: list[CompletionChoice] = []
        for first in range(0, len(choices), self._made):
            made = range(first, first + self._made)
            if self._made > self._keep:
                made_by_rank = sorted(made, key=lambda i: (-mean_logprob(choices[i]), i))[: self._keep]
            else:
                made_by_rank = list(made)
            rows += [self._choice(len(rows) + i, c, choices[c]) for i, c in enumerate(made_by_rank)]
        return Completion(
            id=self.job.id,
            created=self.job.created,
            model=self.job.model,
            system_fingerprint=self.job.fingerprint,
            choices=rows,
            usage=self.job.usage(),
        )

    def _choice(self, index: int, made: int, choice: Delta) -> CompletionChoice:
        columns = None
        entries = choice.prompt_logprobs or []
        if self._wants_logprobs:
            columns = CompletionLogprobs()
            offset = self._append_prompt(columns, made, entries) if self._echo else 0
            append_completion_logprobs(columns, choice.logprobs or [], self.job.token_text, offset)
        text = self._prompt_text(made) + choice.text if self._echo else choice.text
        answer = CompletionChoice(index, text, columns, choice.finish_reason or "", choice.stop_reason)
        if self._asked_prompt_logprobs:
            answer.prompt_logprobs = prompt_logprobs(entries, self.job.token_text.text)
        return answer

    # --- both ------------------------------------------------------------------------------------------------------

    def _prompt_text(self, choice: int) -> str:
        return self.job.prompt_text(choice)

    def _append_prompt(self, into: CompletionLogprobs, choice: int, entries: list[TokenLogprobs]) -> int:
        """Columns of the echoed prompt; its first token has no log-probability."""
        token_text = self.job.token_text
        first = self.job.choices[choice].prompt_token_ids[0]
        offset = append_token(into, token_text.text(first), None, None, 0)
        return append_completion_logprobs(into, entries, token_text, offset)
