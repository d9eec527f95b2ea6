"""The table of routes: what there is, who may call it, what goes in and what comes out.

Who may call a route must be said to build one; for the rest of what the documentation needs, a test asks.
"""

import enum
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from asyncllm.server import docs_page, example_answers, examples, native, probe_wire, probes, tokens
from asyncllm.server.chat import chat_completions
from asyncllm.server.completions import completions
from asyncllm.server.embeddings import embeddings
from asyncllm.server.embeddings_wire import Embeddings, EmbeddingsRequest
from asyncllm.server.event_wire import (
    ChatChunk,
    CompletionChunk,
    MessagesError,
    MessagesEvent,
    NativeEvent,
    ResponsesEvent,
)
from asyncllm.server.messages import count_tokens, messages
from asyncllm.server.messages_wire import CountTokensRequest, MessagesAnswer, MessagesRequest, TokenCount
from asyncllm.server.native_wire import (
    GeneratedMessage,
    GeneratedText,
    GenerateRequest,
    NativeChatRequest,
    NativeModels,
    Stats,
)
from asyncllm.server.replies import ChatCompletion, Completion, ErrorBody
from asyncllm.server.responses import responses
from asyncllm.server.responses_wire import Response, ResponsesRequest
from asyncllm.server.wire import AbortRequest, ChatCompletionRequest, CompletionRequest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access(enum.Enum):
    """Who may call a route. Authentication will read this; a route cannot be built without it."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


class Streamed(msgspec.Struct, frozen=True):
    """Server-Sent Events: when they are the answer, what each one's data is, and a whole stream of them."""

    when: str
    event: type[msgspec.Struct]
    events: str
    last: str = ""  # data that is no event but ends the stream


class Route(msgspec.Struct, frozen=True):
    """One line of the table."""

    method: str
    path: str
    handler: Handler
    access: Access
    quiet: bool = False  # left out of the access log
    tag: str = ""  # the chapter of the documentation
    body: type[msgspec.Struct] | None = None
    answer: Any = None  # the type of a whole answer
    media_type: str = "application/json"  # of a whole answer
    leads_to: str = ""  # the route to which it redirects, which is all of its answer
    streamed: Streamed | None = None
    errors: tuple[int, ...] = ()  # beside those of every route with such a body and such an access
    error: type[msgspec.Struct] = ErrorBody
    unwell: int = 0  # a status with the same kind of body that says "not now"
    examples: Mapping[str, Mapping[str, Any]] = {}  # of a body, by what they show
    example: Any = None  # of a whole answer, to the first of these
    unwell_example: Any = None
    path_parameters: Mapping[str, str] = {}  # name -> what it is

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it: without patterns."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)

    @property
    def summary(self) -> str:
        """What the route does: the handler's first sentence."""
        return (inspect.getdoc(self.handler) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """What else the handler says."""
        return (inspect.getdoc(self.handler) or "").partition("\n")[2].strip()


ON_REQUEST = "with `stream: true`"
CHAT_STREAM = Streamed(ON_REQUEST, ChatChunk, examples.CHAT_EVENTS, "[DONE]")
COMPLETION_STREAM = Streamed(ON_REQUEST, CompletionChunk, examples.COMPLETION_EVENTS, "[DONE]")
RESPONSES_STREAM = Streamed(ON_REQUEST, ResponsesEvent, examples.RESPONSES_EVENTS)
MESSAGES_STREAM = Streamed(ON_REQUEST, MessagesEvent, examples.MESSAGES_EVENTS)
NATIVE_STREAM = Streamed(ON_REQUEST, NativeEvent, examples.NATIVE_EVENTS)
GENERATING = (404, 429, 503, 504)
READING = (404, 429, 503)  # the model's text side alone

# fmt: off
ROUTES = (
    Route("POST", "/v1/chat/completions", chat_completions, Access.USER, tag="OpenAI",
          body=ChatCompletionRequest, answer=ChatCompletion, streamed=CHAT_STREAM,
          errors=GENERATING, examples=examples.CHAT, example=example_answers.CHAT),
    Route("POST", "/v1/completions", completions, Access.USER, tag="OpenAI",
          body=CompletionRequest, answer=Completion, streamed=COMPLETION_STREAM,
          errors=GENERATING, examples=examples.COMPLETION, example=example_answers.COMPLETION),
    Route("POST", "/v1/responses", responses, Access.USER, tag="OpenAI",
          body=ResponsesRequest, answer=Response, streamed=RESPONSES_STREAM,
          errors=GENERATING, examples=examples.RESPONSES, example=example_answers.RESPONSE),
    Route("POST", "/v1/messages", messages, Access.USER, tag="Anthropic",
          body=MessagesRequest, answer=MessagesAnswer, streamed=MESSAGES_STREAM,
          errors=GENERATING, error=MessagesError, examples=examples.MESSAGES, example=example_answers.MESSAGE),
    Route("POST", "/v1/messages/count_tokens", count_tokens, Access.USER, tag="Anthropic",
          body=CountTokensRequest, answer=TokenCount, errors=READING, error=MessagesError,
          examples=examples.COUNT_TOKENS, example=example_answers.TOKEN_COUNT),
    Route("POST", "/v1/embeddings", embeddings, Access.USER, tag="OpenAI",
          body=EmbeddingsRequest, answer=Embeddings, errors=GENERATING, examples=examples.EMBEDDINGS,
          example=example_answers.EMBEDDINGS),
    Route("GET", "/v1/models", probes.models, Access.USER, tag="OpenAI",
          answer=probe_wire.ModelList, errors=(503,), example=example_answers.MODEL_LIST),
    Route("GET", "/v1/models/{id:.+}", probes.model, Access.USER, tag="OpenAI",
          answer=probe_wire.ModelCard, errors=(404, 503), path_parameters={"id": "a served name"},
          example=example_answers.MODEL_CARD),

    Route("POST", "/generate", native.generate, Access.USER, tag="native",
          body=GenerateRequest, answer=GeneratedText | list[GeneratedText],
          streamed=NATIVE_STREAM, errors=GENERATING, examples=examples.GENERATE, example=example_answers.GENERATED),
    Route("POST", "/generate_stream", native.generate_stream, Access.USER, tag="native",
          body=GenerateRequest, streamed=Streamed("always", NativeEvent, examples.NATIVE_EVENTS),
          errors=GENERATING, examples=examples.GENERATE_STREAM),
    Route("POST", "/basic_generate", native.basic_generate, Access.USER, tag="native",
          body=GenerateRequest, answer=list[str], errors=GENERATING, examples=examples.BASIC_GENERATE,
          example=example_answers.TEXTS),
    Route("POST", "/chat", native.chat, Access.USER, tag="native",
          body=NativeChatRequest, answer=GeneratedMessage, streamed=NATIVE_STREAM,
          errors=GENERATING, examples=examples.NATIVE_CHAT, example=example_answers.NATIVE_CHAT),
    Route("GET", "/models", native.models, Access.USER, tag="native", answer=NativeModels,
          example=example_answers.NATIVE_MODELS),
    Route("GET", "/stats", native.stats, Access.USER, tag="native", answer=Stats, example=example_answers.STATS),

    Route("POST", "/tokenize", tokens.tokenize, Access.USER, tag="text",
          body=tokens.TokenizeRequest, answer=tokens.Tokenized, errors=READING, examples=examples.TOKENIZE,
          example=example_answers.TOKENIZED),
    Route("POST", "/detokenize", tokens.detokenize, Access.USER, tag="text",
          body=tokens.DetokenizeRequest, answer=tokens.Prompt, errors=READING, examples=examples.DETOKENIZE,
          example=example_answers.TEXT),
    Route("POST", "/apply-template", tokens.apply_template, Access.USER, tag="text",
          body=tokens.ApplyTemplateRequest, answer=tokens.Prompt, errors=READING, examples=examples.APPLY_TEMPLATE,
          example=example_answers.RENDERED),

    Route("POST", "/abort", probes.abort, Access.ADMIN, tag="operation",
          body=AbortRequest, answer=probe_wire.Aborted, errors=(404, 503), examples=examples.ABORT,
          example=example_answers.ABORTED),
    Route("GET", "/load", probes.load, Access.USER, tag="operation", answer=probe_wire.Load,
          example=example_answers.LOAD),
    Route("GET", "/version", probes.version, Access.PUBLIC, tag="operation", answer=probe_wire.Version,
          example=example_answers.VERSION),
    Route("GET", "/health", probes.health, Access.PUBLIC, quiet=True, tag="operation",
          answer=probe_wire.Health, unwell=503,
          example=example_answers.HEALTH, unwell_example=example_answers.UNHEALTHY),
    Route("GET", "/livez", probes.livez, Access.PUBLIC, quiet=True, tag="operation",
          answer=probe_wire.Liveness, unwell=503, example=example_answers.ALIVE, unwell_example=example_answers.DEAD),
    Route("GET", "/readyz", probes.readyz, Access.PUBLIC, quiet=True, tag="operation",
          answer=probe_wire.Readiness, unwell=503,
          example=example_answers.READY, unwell_example=example_answers.NOT_READY),
    Route("GET", "/startupz", probes.startupz, Access.PUBLIC, quiet=True, tag="operation",
          answer=probe_wire.StartupProgress, unwell=503,
          example=example_answers.STARTED, unwell_example=example_answers.STARTING),
    Route("GET", "/metrics", probes.metrics, Access.PUBLIC, quiet=True, tag="operation",
          answer=str, media_type="text/plain", example=example_answers.METRICS),

    Route("GET", "/", docs_page.home, Access.PUBLIC, tag="documentation", leads_to="/docs"),
    Route("GET", "/openapi.json", docs_page.openapi_json, Access.PUBLIC, tag="documentation", answer=dict[str, Any]),
    Route("GET", "/docs", docs_page.docs, Access.PUBLIC, tag="documentation", answer=str, media_type="text/html",
          example=docs_page.PAGE),
    Route("GET", "/docs/{file}", docs_page.docs_file, Access.PUBLIC, quiet=True, tag="documentation",
          answer=bytes, media_type="*/*", errors=(404,), path_parameters={"file": "a file that the page asks for"}),
)
# fmt: on


def routes_of(*, metrics: bool) -> tuple[Route, ...]:
    """The table, without /metrics where that is switched off."""
    return tuple(route for route in ROUTES if metrics or route.path != "/metrics")
