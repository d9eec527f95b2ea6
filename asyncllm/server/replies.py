"""The bodies of answers, as structs in the order OpenAI writes them; and JSON responses.

Every field that OpenAI's published schemas require is here, null where empty.
"""

from typing import Any

import msgspec
from aiohttp import web

from asyncllm.errors import AsyncLLMError
from asyncllm.types import TokenLogprobs

encode_json = msgspec.json.Encoder().encode

# -inf has no JSON form; this is what vLLM sends and its clients expect.
LOWEST_LOGPROB = -9999.0


class PromptTokensDetails(msgspec.Struct):
    """Part of usage."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Part of usage."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(msgspec.Struct):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct):
    """One generated token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """choices[].logprobs of a chat answer."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """A function and the JSON text of its arguments."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """One call of the answer's turn."""

    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """The answer's turn."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None


PromptLogprobs = list[dict[str, Any] | None]


class ChatCompletion(msgspec.Struct, kw_only=True):
    """POST /v1/chat/completions, whole."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(msgspec.Struct):
    """choices[].logprobs of a completion."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = []
    text_offset: list[int] = []


class CompletionChoice(msgspec.Struct):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(msgspec.Struct, kw_only=True):
    """POST /v1/completions, whole."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ErrorDetail(msgspec.Struct):
    """What went wrong: `param` names the field of the request, where it was one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """Every error."""

    error: ErrorDetail


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int) -> Usage:
    """Usage with its sum; cached tokens are the prompt's, reasoning tokens the completion's."""
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
        CompletionTokensDetails(reasoning_tokens),
    )


def finite(logprob: float) -> float:
    """A log-probability JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)


def prompt_logprobs(entries: list[TokenLogprobs], token_text: Any) -> PromptLogprobs:
    """vLLM's shape: null for the first token, then {token id: {logprob, rank, decoded_token}} per position."""
    positions: PromptLogprobs = [None]
    for entry in entries:
        here = {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(token)}
            for rank, (token, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs), 1)
        }
        here[str(entry.token_id)] = {
            "logprob": finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": token_text(entry.token_id),
        }
        positions.append(here)
    return positions


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Any struct or plain value as JSON."""
    return web.Response(body=encode_json(value), status=status, content_type="application/json", headers=headers)


def error_body(error: AsyncLLMError) -> dict[str, Any]:
    """The error object of API.md: all four keys, always."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: AsyncLLMError, body: dict[str, Any] | None = None) -> web.Response:
    """An error as this body, OpenAI's if none is given, and Retry-After in both spellings where waiting helps."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    return json_response(body or error_body(error), status=error.status, headers=headers)
