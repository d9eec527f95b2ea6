"""POST /v1/responses: OpenAI's Responses, stateless, on the conversation that all chat APIs share."""

import secrets
import time
from typing import Any

from aiohttp import web

from asyncllm.errors import AsyncLLMError, InvalidRequest, show
from asyncllm.router.answers import Reader
from asyncllm.router.output.history import check_calls
from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.output.tools import check_tool_choice, check_tools
from asyncllm.router.stream import Delta
from asyncllm.server import params
from asyncllm.server.conversation import Conversation, converse
from asyncllm.server.job import Job, prepare
from asyncllm.server.replies import Usage, encode_json
from asyncllm.server.respond import respond
from asyncllm.server.responses_wire import (
    FunctionCallItem,
    IncompleteDetails,
    InputDetails,
    Item,
    OutputDetails,
    OutputMessage,
    OutputText,
    ReasoningConfig,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponsesUsage,
    TextConfig,
    TextFormat,
)
from asyncllm.server.structured import Wanted, of_schema, of_type
from asyncllm.server.wire import GenerationRequest

STATEFUL = ("previous_response_id", "conversation", "prompt", "background")


async def responses(request: web.Request) -> web.StreamResponse:
    """Generate the next items of a conversation, in the shapes of OpenAI's Responses."""
    arrived = await prepare(request, ResponsesRequest)
    body = arrived.body
    job, reader = await converse(request, arrived, conversation_of(body))
    answer = ResponseAnswer(job, reader, body)
    return await respond(request, job, answer, answer.whole)


# --- the way in ------------------------------------------------------------------------------------------------------


def conversation_of(body: ResponsesRequest) -> Conversation:
    """The request in no API's words. Raises InvalidRequest for items that this server cannot read."""
    for name in STATEFUL:
        if value := getattr(body, name):
            raise InvalidRequest(
                f"{name} = {show(value)}: this server stores nothing; send the whole conversation as input.",
                param=name,
                code="unsupported_parameter",
            )
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        turns.append({"role": "user", "content": body.input})
    else:
        turns += turns_of(body.input)
    tools = check_tools([_tool(tool) for tool in body.tools]) if body.tools else []
    effort = body.reasoning.effort if body.reasoning is not None else None
    return Conversation(
        parameters=GenerationRequest(
            model=body.model,
            temperature=body.temperature,
            top_p=body.top_p,
            stream=body.stream,
            seed=body.seed,
            priority=body.priority,
            cache_salt=body.cache_salt,
            timeout=body.timeout,
        ),
        messages=turns,
        tools=tools,
        tool_choice=check_tool_choice(_choice(body.tool_choice), tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        wanted=_wanted(body.text.format if body.text is not None else None),
        template_kwargs=params.template_kwargs(None, effort),
        max_tokens=body.max_output_tokens,
        prefix="resp_",
        param="input",
    )


def _wanted(format_: TextFormat | None) -> Wanted | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return of_type("json_object", "text.format")
    if format_.schema is None:
        raise InvalidRequest(
            "text.format.schema is required with type = json_schema.",
            param="text.format.schema",
            code="missing_required_parameter",
        )
    return of_schema(format_.schema, "text.format.schema")


def _tool(tool: Any) -> Any:
    """A function of this API, which is flat, in the shape of chat completions."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any] | None) -> Any:
    """tool_choice in the shape of chat completions."""
    if not isinstance(choice, dict) or "function" in choice:
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = {"mode": choice.get("mode", "auto"), "tools": [_choice(tool) for tool in choice["tools"]]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def turns_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as turns of a chat template: thinking and calls belong to the assistant's turn beside them."""
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message":
            turns.append(_message(item, where))
        elif kind == "function_call":
            function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
            call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _texts(output, f"{where}.output")
            turns.append({"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": content})
        elif kind == "reasoning":
            thought = _texts(item.get("content") or item.get("summary") or [], f"{where}.content")
            turns.append({"role": "assistant", "content": "", "reasoning_content": thought})
        else:
            raise InvalidRequest(f"{where}.type = {show(kind)}: cannot be read here.", param=f"{where}.type",
                                 code="unsupported_content")  # fmt: skip
    return [check_calls(turn, f"input turn {index}") for index, turn in enumerate(turns)]


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that is being put together."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise InvalidRequest(
            f"{where}.role = {show(role)}: expected user, assistant, system or developer.", param=f"{where}.role"
        )
    content = item.get("content")
    text = content if isinstance(content, str) else _texts(content, f"{where}.content")
    return {"role": params.ROLES.get(role, role), "content": text}


def _texts(parts: Any, where: str) -> str:
    """The text of content parts."""
    if not isinstance(parts, list):
        raise InvalidRequest(f"{where} = {show(parts)}: expected a string or a list of parts.", param=where,
                             code="invalid_type")  # fmt: skip
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal"):
            raise InvalidRequest(f"{where}[{index}].type = {show(kind)}: this model reads text only.",
                                 param=f"{where}[{index}].type", code="unsupported_content")  # fmt: skip
        texts.append(_string(part, "refusal" if kind == "refusal" else "text", f"{where}[{index}]"))
    return "\n".join(texts)


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} = {show(value)}: expected a string.", param=f"{where}.{name}",
                             code="invalid_type")  # fmt: skip
    return value


# --- the way back ----------------------------------------------------------------------------------------------------


class ResponseAnswer:
    """Events and whole body of one request: the response grows item by item, and every event says by what."""

    def __init__(self, job: Job, reader: Reader, body: ResponsesRequest) -> None:
        self._job = job
        self._reader = reader
        self._sequence = 0  # of the next event
        self._response = Response(
            id=job.id,
            created_at=job.created,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=job.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning or ReasoningConfig(),
            temperature=job.choices[0].params.temperature,
            text=body.text or TextConfig(TextFormat("text")),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=job.choices[0].params.top_p,
            metadata=body.metadata or {},
            user=body.user,
        )
        self._item: Item | None = None  # the one that grows
        self._pieces: list[str] = []  # of its text
        self._head = b""  # of the next delta, up to its sequence number
        self._middle = b""  # from there up to its text

    # --- streamed ----------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The response without items."""
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def text(self, index: int, text: str) -> bytes:  # hot: once per token
        """The next piece of the item that grows, or of the one it begins."""
        if self._reader.is_plain and type(self._item) is OutputMessage:
            return self._piece(text)
        return b"".join([self._part(part) for part in self._reader.push(index, text)])

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Pieces of items; the response as a whole where it ended."""
        parts, reason = self._reader.read(delta)
        frames = b"".join([self._part(part) for part in parts])
        if delta.finish_reason is None:
            return frames
        is_complete = reason in ("stop", "tool_calls")
        frames += self._end_item("completed" if is_complete else "incomplete")
        self._finish(reason)
        return frames + self._event(f"response.{self._response.status}", response=self._response)

    def closing(self) -> bytes:
        """Nothing: the last event says so itself."""
        return b""

    def failing(self, error: AsyncLLMError) -> bytes:
        """An error after the status line."""
        self._response.status = "failed"
        self._response.error = ResponseError(error.code or "server_error", error.message)
        plain = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **plain) + self._event("response.failed", response=self._response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = encode_json({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    def _part(self, part: Part) -> bytes:
        if part.kind is PartKind.CALL_BEGIN:
            call = FunctionCallItem(id=_new_id("fc"), call_id=part.id, name=part.name)
            return self._begin_item(call, "response.function_call_arguments.delta")
        if part.kind is PartKind.CALL_ARGUMENTS:
            return self._piece(part.text)
        frames = b""
        if part.kind is PartKind.CONTENT and type(self._item) is not OutputMessage:
            frames = self._begin_item(OutputMessage(id=_new_id("msg")), "response.output_text.delta")
            frames += self._event("response.content_part.added", part=OutputText(""), **self._place())
        elif part.kind is PartKind.REASONING and type(self._item) is not ReasoningItem:
            frames = self._begin_item(ReasoningItem(id=_new_id("rs")), "response.reasoning_text.delta")
            frames += self._event("response.content_part.added", part=ReasoningText(""), **self._place())
        return frames + self._piece(part.text)

    def _piece(self, text: str) -> bytes:  # hot: once per token
        self._pieces.append(text)
        frame = self._head + b"%d" % self._sequence + self._middle + encode_json(text) + b"}\n\n"
        self._sequence += 1
        return frame

    def _begin_item(self, item: Item, delta: str) -> bytes:
        frames = self._end_item("completed")
        self._item, self._pieces = item, []
        self._response.output.append(item)
        place = self._place()
        self._head = b'event: %b\ndata: {"type":"%b","sequence_number":' % (delta.encode(), delta.encode())
        extra = b',"logprobs":[]' if type(item) is OutputMessage else b""
        self._middle = b"," + encode_json(place)[1:-1] + extra + b',"delta":'
        return frames + self._event("response.output_item.added", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        """Where the text of the growing item belongs."""
        item = self._item
        assert item is not None
        place: dict[str, Any] = {"item_id": item.id, "output_index": len(self._response.output) - 1}
        return place if type(item) is FunctionCallItem else place | {"content_index": 0}

    def _end_item(self, status: str) -> bytes:
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return b""
        place = self._place()
        item.status = status
        if type(item) is FunctionCallItem:
            item.arguments = text
            frames = self._event("response.function_call_arguments.done", name=item.name, arguments=text, **place)
        elif type(item) is ReasoningItem:
            item.content = [ReasoningText(text)]
            frames = self._event("response.reasoning_text.done", text=text, **place)
            frames += self._event("response.content_part.done", part=item.content[0], **place)
        else:
            assert type(item) is OutputMessage
            item.content = [OutputText(text)]
            frames = self._event("response.output_text.done", text=text, logprobs=[], **place)
            frames += self._event("response.content_part.done", part=item.content[0], **place)
        self._item = None
        return frames + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    # --- both --------------------------------------------------------------------------------------------------------

    def whole(self, choices: list[Delta]) -> Response:
        """The whole answer."""
        (choice,) = choices
        answer = self._reader.whole(choice)
        status = "completed" if answer.finish_reason in ("stop", "tool_calls") else "incomplete"
        output = self._response.output
        if answer.reasoning:
            output.append(ReasoningItem(id=_new_id("rs"), status=status, content=[ReasoningText(answer.reasoning)]))
        if answer.content or not answer.calls:
            output.append(OutputMessage(id=_new_id("msg"), status=status, content=[OutputText(answer.content)]))
        output += [
            FunctionCallItem(id=_new_id("fc"), call_id=call.id, name=call.name, arguments=call.arguments, status=status)
            for call in answer.calls
        ]
        self._finish(answer.finish_reason)
        return self._response

    def _finish(self, reason: str) -> None:
        response = self._response
        response.status = "completed" if reason in ("stop", "tool_calls") else "incomplete"
        if response.status == "completed":
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = IncompleteDetails("max_output_tokens" if reason == "length" else reason)
        usage = self._job.usage()
        response.usage = ResponsesUsage(
            usage.prompt_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputDetails(usage.completion_tokens_details.reasoning_tokens),
            usage.total_tokens,
        )


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
