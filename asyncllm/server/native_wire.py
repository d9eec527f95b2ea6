"""The bodies of the native API: what is asked, beside the generation parameters of all APIs, and what is answered."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from asyncllm.server.params import MAX_MESSAGES
from asyncllm.server.wire import Choices, Count, GenerationRequest, Message, Stop, about

# Whoever leaves it out tries the server by hand: enough for an answer, not so much that a base model rambles on.
DEFAULT_MAX_TOKENS = 256

Text = Annotated[str, Meta(min_length=1)]
Turns = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES, description="the conversation so far")]


class NativeRequest(GenerationRequest, kw_only=True):
    """What all of its generating routes take."""

    max_tokens: Annotated[Count | None, about("tokens to generate", DEFAULT_MAX_TOKENS)] = None
    max_completion_tokens: Annotated[Count | None, about("synonym of max_tokens; both must agree")] = None
    stop_sequences: Annotated[Stop | None, about("synonym of stop; both must agree")] = None
    n: Annotated[Choices | None, about("only 1: to get more, repeat the prompt in prompts", 1)] = None
    metadata: Annotated[dict[str, Any] | None, about("comes back with the answer; at most 16 KiB")] = None


class GenerateRequest(NativeRequest, kw_only=True):
    """POST /generate, /generate_stream and /basic_generate: either `prompt` or `prompts`."""

    prompt: Annotated[Text | None, about("text to continue")] = None
    prompts: Annotated[Annotated[list[Text], Meta(min_length=1)] | None, about("texts to continue")] = None


class NativeChatRequest(NativeRequest, kw_only=True):
    """POST /chat"""

    messages: Turns


class Timings(msgspec.Struct, frozen=True):
    """Where the time of one text went, in seconds."""

    queue_s: float
    prefill_s: float
    decode_s: float


class Generated(msgspec.Struct, kw_only=True):
    """What is told of every generated text."""

    request_id: str
    tokens_generated: int
    generation_time: float  # seconds of prefill and decode
    tokens_per_second: float
    finish_reason: str
    timings: Timings | None  # None where it never left the queue
    metadata: dict[str, Any]


class GeneratedText(Generated, kw_only=True):
    """POST /generate: the answer, or one of the list for many prompts."""

    text: str


class NativeMessage(msgspec.Struct):
    """The answer's turn."""

    content: str
    role: str = "assistant"
    reasoning: str | msgspec.UnsetType = msgspec.UNSET  # what the model thought in front of it


class GeneratedMessage(Generated, kw_only=True):
    """POST /chat"""

    message: NativeMessage


class NativeModel(msgspec.Struct):
    """One line of GET /models."""

    name: str
    type: str
    parameters: int | None  # None until the model is loaded
    context_length: int | None  # tokens; None until the model is loaded
    loaded: bool
    backend: str
    parent: str | None = None  # of an adapter: the model it changes


class NativeModels(msgspec.Struct):
    """GET /models"""

    models: list[NativeModel]
    default_model: str


class SchedulerStats(msgspec.Struct):
    """What runs and what waits now; counts since the start below."""

    running: int
    waiting: int
    waiting_tokens: int
    max_sequences: int | None  # None until the model is loaded
    streams_open: int
    steps: int
    graph_steps: int
    preemptions: int


class CacheStats(msgspec.Struct):
    """The KV cache, in blocks; how often a prefix was found, in prompt tokens since the start."""

    num_blocks: int | None  # None until the model is loaded
    block_size: int | None  # tokens
    used_blocks: int
    cached_blocks: int  # free, but findable by their prefix
    usage: float  # used share, 0 … 1
    prefix_queried_tokens: int
    prefix_hit_tokens: int


class Stats(msgspec.Struct):
    """GET /stats: sums and means over finished texts; times in seconds."""

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
    scheduler: SchedulerStats
    kv_cache: CacheStats
