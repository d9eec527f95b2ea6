"""POST /v1/messages and its count_tokens: Anthropic's Messages, on the conversation that all chat APIs share."""

from typing import Any

import msgspec
from aiohttp import web

from asyncllm.errors import AsyncLLMError, InvalidRequest, show
from asyncllm.router.answers import Reader
from asyncllm.router.output.history import check_calls
from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.output.tools import check_tool_choice, check_tools
from asyncllm.router.stream import Delta
from asyncllm.server.conversation import Conversation, converse, render
from asyncllm.server.job import Job, prepare
from asyncllm.server.messages_wire import (
    CountTokensRequest,
    MessagesAnswer,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    MessagesUsage,
    PromptRequest,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolUseBlock,
    Turn,
)
from asyncllm.server.replies import Usage, encode_json, json_response
from asyncllm.server.respond import respond
from asyncllm.server.serving import ERROR_BODY, SERVING
from asyncllm.server.sse import event
from asyncllm.server.wire import GenerationRequest

STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}  # everything else was cut: max_tokens
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
NO_INPUT = b"{}"


async def messages(request: web.Request) -> web.StreamResponse:
    """Generate the next turn of a conversation, in Anthropic's shapes."""
    request[ERROR_BODY] = error_body
    arrived = await prepare(request, MessagesRequest)
    body = arrived.body
    conversation = conversation_of(body, generation_of(body))
    conversation.max_tokens = body.max_tokens
    job, reader = await converse(request, arrived, conversation)
    answer = MessageAnswer(job, reader)
    return await respond(request, job, answer, answer.whole)


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """How many tokens the prompt of these messages has."""
    request[ERROR_BODY] = error_body
    arrived = await prepare(request, CountTokensRequest)
    conversation = conversation_of(arrived.body, GenerationRequest())
    prompt = await render(request.app[SERVING].router, conversation, arrived.num_bytes)
    return json_response(TokenCount(len(prompt)), headers=arrived.headers)


def error_body(error: AsyncLLMError) -> dict[str, Any]:
    """Anthropic's error object."""
    return messages_error(error.status, error.message)


def messages_error(status: int, message: str) -> dict[str, Any]:
    """The same of its parts."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


# --- the way in ------------------------------------------------------------------------------------------------------


def generation_of(body: MessagesRequest) -> GenerationRequest:
    """Its parameters in the names of the internal request."""
    return GenerationRequest(
        model=body.model,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
        seed=body.seed,
        priority=body.priority,
        cache_salt=body.cache_salt,
        timeout=body.timeout,
    )


def conversation_of(body: PromptRequest, parameters: GenerationRequest) -> Conversation:
    """The request in no API's words. Raises InvalidRequest for blocks that this model cannot read."""
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _texts(body.system, "system")})
    for index, turn in enumerate(body.messages):
        turns += _turns(turn, f"messages[{index}]")
    tools = check_tools([_tool(tool, index) for index, tool in enumerate(body.tools)]) if body.tools else []
    choice, budget = body.tool_choice, None
    kwargs: dict[str, Any] = {}
    if body.thinking is not None:
        kwargs["enable_thinking"] = body.thinking.type != "disabled"
        budget = body.thinking.budget_tokens if body.thinking.type == "enabled" else None
    # An assistant's turn at the end is the beginning of the answer.
    is_begun = body.messages[-1].role == "assistant"
    return Conversation(
        parameters=parameters,
        messages=turns,
        tools=tools,
        tool_choice=check_tool_choice(_choice(choice), tools),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        template_kwargs=kwargs,
        thinking_budget=budget,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        prefix="msg_",
    )


def _tool(tool: MessagesTool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"tools[{index}].type = {show(tool.type)}: only tools of type custom can be called here.",
            param=f"tools[{index}].type",
            code="unsupported_parameter",
        )
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: MessagesToolChoice | None) -> Any:
    """Their tool_choice in OpenAI's words."""
    if choice is None:
        return None
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.name is None:
        raise InvalidRequest("tool_choice.name is required with type = tool.", param="tool_choice.name",
                             code="missing_required_parameter")  # fmt: skip
    return {"type": "function", "function": {"name": choice.name}}


def _turns(turn: Turn, where: str) -> list[dict[str, Any]]:
    """One of their turns as turns of a chat template: results of tools are turns of their own there."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(turn.content):
        here = f"{where}.content[{index}]"
        kind = block.get("type")
        if kind == "text":
            texts.append(_string(block, "text", here))
        elif kind == "tool_result" and turn.role == "user":
            content = block.get("content") or ""
            text = _texts(content, f"{here}.content") if isinstance(content, str | list) else _wrong(content, here)
            call_id = _string(block, "tool_use_id", here)
            turns.append(check_calls({"role": "tool", "tool_call_id": call_id, "content": text}, here))
        elif kind == "tool_use" and turn.role == "assistant":
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            function = {"name": _string(block, "name", here), "arguments": arguments}
            calls.append({"id": _string(block, "id", here), "type": "function", "function": function})
        elif kind == "thinking" and turn.role == "assistant":
            thoughts.append(_string(block, "thinking", here))
        elif kind == "redacted_thinking" and turn.role == "assistant":
            continue
        else:
            raise InvalidRequest(
                f"{here}.type = {show(kind)}: cannot be read here in a turn of the {turn.role}.",
                param=f"{here}.type",
                code="unsupported_content",
            )
    spoken: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
    if thoughts:
        spoken["reasoning_content"] = "\n".join(thoughts)
    if calls:
        spoken["tool_calls"] = calls
    if texts or calls or not turns:
        turns.append(check_calls(spoken, where))
    return turns


def _texts(content: str | list[dict[str, Any]], where: str) -> str:
    """Text, or text blocks joined."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        here = f"{where}[{index}]"
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else block
            raise InvalidRequest(f"{here}.type = {show(kind)}: this model reads text only.", param=f"{here}.type",
                                 code="unsupported_content")  # fmt: skip
        texts.append(_string(block, "text", here))
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    return value if isinstance(value, str) else _wrong(value, f"{where}.{name}")


def _wrong(value: Any, where: str) -> str:
    raise InvalidRequest(f"{where} = {show(value)}: expected a string.", param=where, code="invalid_type")


# --- the way back ----------------------------------------------------------------------------------------------------


class MessageAnswer:
    """Frames and whole body of one request: blocks of text, thinking and calls, one after the other."""

    def __init__(self, job: Job, reader: Reader) -> None:
        self._job = job
        self._reader = reader
        self._index = -1  # of the open block
        self._open: PartKind | None = None  # what it holds
        self._head = b""  # of a delta of the open block, up to its text

    def opening(self) -> bytes:
        """The message without content."""
        message = MessagesAnswer(
            id=self._job.id, model=self._job.model, content=[], stop_reason=None, usage=self._usage()
        )
        return event("message_start", {"type": "message_start", "message": message}) + event("ping", {"type": "ping"})

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """The next piece of the open block, or of the one it opens."""
        if self._reader.is_plain and self._open is PartKind.CONTENT:
            return self._head + encode_json(text) + b"}}\n\n"
        return b"".join([self._part(part) for part in self._reader.push(index, text)])

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Pieces of blocks, and how it all ended."""
        parts, reason = self._reader.read(delta)
        frames = b"".join([self._part(part) for part in parts])
        if delta.finish_reason is None:
            return frames
        frames += self._close()
        stop_reason, stop_sequence = _stop(reason, delta.stop_reason)
        end = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return frames + event("message_delta", {"type": "message_delta", "delta": end, "usage": self._usage()})

    def closing(self) -> bytes:
        """The last word."""
        return event("message_stop", {"type": "message_stop"})

    def failing(self, error: AsyncLLMError) -> bytes:
        """An error after the status line."""
        return event("error", error_body(error))

    def _part(self, part: Part) -> bytes:
        if part.kind is PartKind.CALL_BEGIN:
            return self._begin(part.kind, {"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
        if part.kind is PartKind.CALL_ARGUMENTS:
            return self._head + encode_json(part.text) + b"}}\n\n"
        frames = b""
        if self._open is not part.kind:
            is_text = part.kind is PartKind.CONTENT
            block = {"type": "text", "text": ""} if is_text else {"type": "thinking", "thinking": "", "signature": ""}
            frames = self._begin(part.kind, block)
        return frames + self._head + encode_json(part.text) + b"}}\n\n"

    def _begin(self, kind: PartKind, block: dict[str, Any]) -> bytes:
        frames = self._close()
        self._index, self._open = self._index + 1, kind
        delta, field = DELTAS[kind]
        self._head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (self._index, delta, field)
        )
        begin = {"type": "content_block_start", "index": self._index, "content_block": block}
        return frames + event("content_block_start", begin)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def whole(self, choices: list[Delta]) -> MessagesAnswer:
        """The whole answer."""
        (choice,) = choices
        answer = self._reader.whole(choice)
        content: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
        if answer.reasoning:
            content.append(ThinkingBlock(answer.reasoning))
        if answer.content:
            content.append(TextBlock(answer.content))
        content += [ToolUseBlock(call.id, call.name, _input(call.arguments)) for call in answer.calls]
        stop_reason, stop_sequence = _stop(answer.finish_reason, choice.stop_reason)
        return MessagesAnswer(
            id=self._job.id,
            model=self._job.model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessagesUsage:
        usage = self._job.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cache_read_input_tokens=cached)


DELTAS = {
    PartKind.CONTENT: (b"text_delta", b"text"),
    PartKind.REASONING: (b"thinking_delta", b"thinking"),
    PartKind.CALL_BEGIN: (b"input_json_delta", b"partial_json"),
}


def _stop(finish_reason: str, stop_reason: str | int | None) -> tuple[str, str | None]:
    """stop_reason and stop_sequence."""
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return "stop_sequence", stop_reason
    return STOP_REASONS.get(finish_reason, "max_tokens"), None


def _input(arguments: str) -> Any:
    """The arguments of a whole call; those of one that was cut stay text."""
    try:
        return msgspec.json.decode(arguments or NO_INPUT)
    except msgspec.DecodeError:
        return {"_partial": arguments}
