"""The events of streams, as structs: frames are put together from bytes, and these say what comes out of them."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from asyncllm.server.replies import ChatLogprobs, CompletionLogprobs, Usage


class ChatDelta(msgspec.Struct):
    """What is new of a turn: the role first, then text, at the end nothing."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """News of one choice; the last of it has a finish_reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """POST /v1/chat/completions, streamed. With include_usage, a last chunk without choices has the usage."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionChunkChoice(msgspec.Struct):
    """News of one choice; the last of it has a finish_reason."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class CompletionChunk(msgspec.Struct, kw_only=True):
    """POST /v1/completions, streamed. With include_usage, a last chunk without choices has the usage."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ResponsesEvent(msgspec.Struct):
    """POST /v1/responses, streamed: OpenAI's typed events, whose other fields depend on their type."""

    type: str
    sequence_number: int


class MessagesEvent(msgspec.Struct):
    """POST /v1/messages, streamed: Anthropic's typed events, whose other fields depend on their type."""

    type: str


class MessagesErrorDetail(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class MessagesError(msgspec.Struct):
    """Every error, in Anthropic's shape."""

    type: str
    error: MessagesErrorDetail


class NativeEvent(msgspec.Struct):
    """A native stream's event; the last of each prompt has a finish_reason and is final."""

    text: str
    request_id: str
    tokens_generated: int
    index: int | UnsetType = UNSET  # of the prompt, where many were asked
    finish_reason: str | UnsetType = UNSET
    final: bool | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET  # the next piece of a chat's thinking part; `text` is empty then
