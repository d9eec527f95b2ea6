"""What the server answers, as structs. Fields this client does not know are ignored, so newer servers can be read.

Only what tells one answer from another is required; the rest has defaults.
"""

import base64
import sys
from array import array
from typing import Any

import msgspec


class Answer(msgspec.Struct, kw_only=True):
    """What every whole answer has: the id under which the server's log knows the call, and `abort` finds it."""

    request_id: str | None = None


class PromptTokensDetails(msgspec.Struct):
    """Part of usage."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Part of usage."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """What a call cost, in tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


# --- /v1/chat/completions --------------------------------------------------------------------------------------------


class Function(msgspec.Struct, omit_defaults=True):
    """The function of a tool call; `arguments` is JSON text, in a stream a piece of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, omit_defaults=True):
    """A call the model asks for. In a stream `index` tells which call the piece belongs to."""

    function: Function
    id: str | None = None
    type: str | None = None
    index: int | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """A turn. Fits into `messages` of the next call as it is."""

    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(msgspec.Struct):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(msgspec.Struct):
    """One generated token."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct):
    """The log-probabilities of a choice, or of a chunk of it."""

    content: list[ChatLogprob] | None = None


class ChatChoice(msgspec.Struct):
    """One answer of `n`."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None


PromptLogprobs = list[dict[str, Any] | None]


class ChatCompletion(Answer, kw_only=True):
    """A chat answer, whole."""

    choices: list[ChatChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return (self.choices[0].message.content or "") if self.choices else ""


class ChatChunkChoice(msgspec.Struct):
    """What happened to a choice: new text, or its end."""

    index: int
    delta: ChatMessage
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream. With `stream_options.include_usage` the last one has no choices, but the usage."""

    choices: list[ChatChunkChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    usage: Usage | None = None

    @property
    def index(self) -> int:
        """The choice this chunk is about."""
        return self.choices[0].index if self.choices else 0

    @property
    def text(self) -> str:
        """Its new text, empty where there is none."""
        return (self.choices[0].delta.content or "") if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the choice ended, once it has."""
        return self.choices[0].finish_reason if self.choices else None


# --- /v1/completions -------------------------------------------------------------------------------------------------


class CompletionLogprobs(msgspec.Struct):
    """The log-probabilities of a choice, in columns."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class CompletionChoice(msgspec.Struct):
    """One continuation, or in a stream a piece of it."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer, kw_only=True):
    """A completion, whole or one event of its stream."""

    choices: list[CompletionChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    usage: Usage | None = None

    @property
    def index(self) -> int:
        """The choice a chunk is about."""
        return self.choices[0].index if self.choices else 0

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended, once it has."""
        return self.choices[0].finish_reason if self.choices else None


# --- /v1/embeddings, /v1/models, tokens ------------------------------------------------------------------------------


class Embedding(msgspec.Struct):
    """One vector, as numbers or as base64 of little-endian float32."""

    index: int
    embedding: list[float] | str

    @property
    def vector(self) -> list[float]:
        """The numbers, in whichever form they came."""
        if not isinstance(self.embedding, str):
            return self.embedding
        numbers = array("f", base64.b64decode(self.embedding))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tolist()


class Embeddings(Answer, kw_only=True):
    """One vector per input, in their order."""

    data: list[Embedding]
    model: str = ""
    usage: Usage | None = None
    pooling: str = ""  # which hidden states: last or mean

    @property
    def vectors(self) -> list[list[float]]:
        """The numbers only."""
        return [entry.vector for entry in self.data]


class Model(msgspec.Struct):
    """A served name."""

    id: str
    created: int = 0
    owned_by: str = ""
    max_model_len: int | None = None  # tokens; null while the model loads
    parent: str | None = None  # of an adapter: the model it changes


class Models(msgspec.Struct):
    """The list of them."""

    data: list[Model]


class Tokenized(Answer, kw_only=True):
    """A text, or a conversation behind its template, as token ids."""

    tokens: list[int]
    count: int
    max_model_len: int | None = None
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """Token ids as text."""

    prompt: str


class Aborted(msgspec.Struct):
    """The public ids of what was ended."""

    aborted: list[str]


# --- the native API --------------------------------------------------------------------------------------------------


class Timings(msgspec.Struct):
    """Where a request's time went, in seconds."""

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


class Generation(Answer, kw_only=True):
    """A native answer to one prompt. `generation_time` is in seconds."""

    text: str
    tokens_generated: int
    generation_time: float
    finish_reason: str | None = None
    tokens_per_second: float | None = None
    metadata: dict[str, Any] | None = None
    timings: Timings | None = None


class GenerationChunk(msgspec.Struct, kw_only=True):
    """One event of a native stream; of many prompts, `index` tells which. `final` is its prompt's last."""

    text: str
    reasoning: str = ""  # thinking, told apart from the text
    request_id: str | None = None
    tokens_generated: int = 0
    index: int = 0
    finish_reason: str | None = None
    final: bool = False


class NativeChat(Answer, kw_only=True):
    """A native answer to a conversation."""

    message: ChatMessage | str
    tokens_generated: int
    generation_time: float
    finish_reason: str | None = None
    metadata: dict[str, Any] | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        return self.message if isinstance(self.message, str) else self.message.content or ""


class Stats(Answer, kw_only=True):
    """Counters since the server started; times in seconds. `scheduler` and `kv_cache` hold what the server reports."""

    is_loaded: bool
    is_ready: bool
    backend_type: str
    request_count: int
    total_tokens_generated: int
    total_inference_time: float
    avg_tokens_per_request: float
    avg_time_per_request: float
    avg_tokens_per_second: float
    uptime: float
    scheduler: dict[str, Any] = {}
    kv_cache: dict[str, Any] = {}


class Health(Answer, kw_only=True):
    """Liveness with details; `status` is healthy, starting, draining or unhealthy."""

    status: str
    timestamp: float | None = None
    backend: str | None = None
    model: str | None = None
    device: str | None = None
    memory: dict[str, Any] = {}

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served."""
        return self.status == "healthy"
