"""POST /v1/chat/completions: from messages to a job, and from deltas to OpenAI's chat shapes."""

from typing import Any

from aiohttp import web

from asyncllm.router.answers import Reader
from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.output.tools import check_tool_choice, check_tools
from asyncllm.router.stream import Delta
from asyncllm.server import params
from asyncllm.server.chunks import ChunkFrames
from asyncllm.server.conversation import Conversation, converse, starts_turn
from asyncllm.server.job import Job, prepare
from asyncllm.server.logprobs import chat_logprobs
from asyncllm.server.replies import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    ToolCall,
    Usage,
    encode_json,
    prompt_logprobs,
)
from asyncllm.server.respond import respond
from asyncllm.server.serving import SERVING
from asyncllm.server.structured import wanted_of
from asyncllm.server.wire import ChatCompletionRequest


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Generate the next turn of a conversation."""
    arrived = await prepare(request, ChatCompletionRequest)
    body = arrived.body
    params.check_chat(body)
    params.check_token_ids(body, arrived.capacity.vocab_size)
    job, reader = await converse(request, arrived, conversation_of(body))
    fields = request.app[SERVING].config.api.reasoning_fields if body.include_reasoning is not False else ()
    answer = ChatAnswer(job, reader, fields)
    return await respond(request, job, answer, answer.whole)


def conversation_of(body: ChatCompletionRequest) -> Conversation:
    """The request in no API's words."""
    tools = check_tools(body.tools) if body.tools is not None else []
    budget = body.thinking_token_budget
    return Conversation(
        parameters=body,
        messages=params.chat_messages(body.messages),
        tools=tools,
        tool_choice=check_tool_choice(body.tool_choice, tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        wanted=wanted_of(body),
        template_kwargs=params.template_kwargs(body.chat_template_kwargs, body.reasoning_effort),
        thinking_budget=None if budget is None or budget < 0 else budget,
        add_generation_prompt=starts_turn(body.add_generation_prompt, body.continue_final_message),
        continue_final_message=bool(body.continue_final_message),
        num_choices=body.n or 1,
        max_tokens=params.resolve_max_tokens(body, chat=True),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )


class ChatAnswer(ChunkFrames):
    """Frames and whole body of one chat request."""

    def __init__(self, job: Job, reader: Reader, reasoning_fields: tuple[str, ...]) -> None:
        """`reasoning_fields`: the names under which thinking is shown; none = it is not."""
        super().__init__(job, "chat.completion.chunk")
        self._reader = reader
        self._reasoning_fields = reasoning_fields
        self._indexes = range(len(job.stream.choices))
        self._starts = [self.start(index, b"delta") for index in self._indexes]
        self._plain_end = self.end()
        # What is sent for nearly every token, in three pieces.
        self._plain = [(start + b'{"content":', b"}" + self._plain_end) for start in self._starts]

    # --- streamed ----------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The role, once per choice."""
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._starts[index] + delta + self._plain_end for index in self._indexes)

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """A content chunk, or whatever the text turns out to be."""
        if not self._reader.is_plain:
            return self._chunks(index, self._reader.push(index, text), self._plain_end)
        head, tail = self._plain[index]
        return head + encode_json(text) + tail

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Chunks of what there is to show, then the finish chunk where it ended."""
        index, reader = delta.index, self._reader
        if reader.is_plain and usage is None and delta.finish_reason is None and delta.logprobs is None:
            return self.text(index, delta.text) if delta.text else b""
        parts, reason = reader.read(delta)
        frames = b""
        if delta.logprobs:  # with the first of the parts; the tokens of a marker may be all there is
            first = parts.pop(0) if parts else Part(PartKind.CONTENT)
            frames = self._chunks(index, [first], self.end(self._logprobs(delta), usage=usage))
        frames += self._chunks(index, parts, self.end(usage=usage))
        if delta.finish_reason is not None:
            end = self.end(finish=self.reason(reason, delta.stop_reason), usage=usage)
            frames += self._starts[index] + b"{}" + end
        return frames

    def _chunks(self, index: int, parts: list[Part], end: bytes) -> bytes:
        start = self._starts[index]
        return b"".join([start + encode_json(delta) + end for part in parts if (delta := self._delta(part))])

    def _delta(self, part: Part) -> dict[str, Any]:
        """The value of `delta`; empty where nothing is to be shown."""
        if part.kind is PartKind.CONTENT:
            return {"content": part.text}
        if part.kind is PartKind.REASONING:
            return dict.fromkeys(self._reasoning_fields, part.text)
        if part.kind is PartKind.CALL_BEGIN:
            function = {"name": part.name, "arguments": ""}
            return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def _logprobs(self, delta: Delta) -> bytes:
        return encode_json(self._whole_logprobs(delta))

    # --- whole -------------------------------------------------------------------------------------------------------

    def whole(self, choices: list[Delta]) -> ChatCompletion:
        """The whole answer."""
        job, first = self.job, choices[0].prompt_logprobs
        return ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=[self._choice(choice) for choice in choices],
            usage=job.usage(),
            prompt_logprobs=prompt_logprobs(first, job.token_text.text) if first is not None else None,
        )

    def _choice(self, choice: Delta) -> ChatChoice:
        answer = self._reader.whole(choice)
        message = ChatMessage(content=answer.content if answer.content or not answer.calls else None)
        if answer.calls:
            message.tool_calls = [ToolCall(call.id, FunctionCall(call.name, call.arguments)) for call in answer.calls]
        if answer.reasoning:
            for name in self._reasoning_fields:
                setattr(message, name, answer.reasoning)
        logprobs = self._whole_logprobs(choice) if choice.logprobs is not None else None
        return ChatChoice(choice.index, message, logprobs, answer.finish_reason, choice.stop_reason)

    def _whole_logprobs(self, delta: Delta) -> ChatLogprobs:
        return ChatLogprobs(chat_logprobs(delta.logprobs or [], self.job.token_text))
