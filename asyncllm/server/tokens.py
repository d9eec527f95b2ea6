"""POST /tokenize, /detokenize and /apply-template: the model's own tokenizer and chat template, in vLLM's shapes.

What these answer is what generation would see: the same way from text to tokens, but nothing is generated, and a text
may be longer than the context, since how much longer is what people come to ask.
"""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from asyncllm.errors import ContextLengthExceeded, InvalidRequest, show
from asyncllm.router.output.tools import check_tool_choice, check_tools
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import params
from asyncllm.server.conversation import Conversation, render, render_text, starts_turn
from asyncllm.server.job import prepare
from asyncllm.server.replies import json_response
from asyncllm.server.serving import SERVING
from asyncllm.server.wire import GenerationRequest, Message, ModelRequest, TokenId, about

# Both bound what holds the loop: making a list of ids, and writing text as JSON (18 ms where it is all escapes).
MAX_TOKENS = 131_072
MAX_ANSWER_CHARS = 768 * 1024

Messages = Annotated[list[Message], Meta(min_length=1, max_length=params.MAX_MESSAGES)]


class TemplateRequest(ModelRequest, kw_only=True):
    """What a chat template is given."""

    messages: Annotated[Messages | None, about("a conversation")] = None
    add_generation_prompt: Annotated[bool | None, about("start the assistant's turn", True)] = None
    continue_final_message: Annotated[bool | None, about("leave the last turn open", False)] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, about("variables for the chat template")] = None
    reasoning_effort: Annotated[str | None, about("handed to the chat template; none turns thinking off")] = None
    tools: Annotated[list[dict[str, Any]] | None, about("functions that the model may call")] = None
    tool_choice: Annotated[str | dict[str, Any] | None, about("as for chat completions")] = None


TEMPLATE_FIELDS = [name for name in TemplateRequest.__struct_fields__ if name not in ModelRequest.__struct_fields__]


class TokenizeRequest(TemplateRequest, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    prompt: Annotated[str | None, about("text")] = None
    add_special_tokens: Annotated[bool | None, about("of prompt: with the model's special tokens", True)] = None
    return_token_strs: Annotated[bool | None, about("tell the text of each token, too", False)] = None


class Tokenized(msgspec.Struct):
    """POST /tokenize"""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None  # text; half a character shows as U+FFFD


class DetokenizeRequest(ModelRequest, kw_only=True):
    """POST /detokenize"""

    tokens: Annotated[list[TokenId], about(f"token ids of the vocabulary, at most {MAX_TOKENS:,}")]


class ApplyTemplateRequest(TemplateRequest, kw_only=True):
    """POST /apply-template"""

    messages: Annotated[Messages, Meta(description="a conversation")]


class Prompt(msgspec.Struct):
    """POST /detokenize and POST /apply-template"""

    prompt: str


class CountLimit(ContextLimit, frozen=True):
    """How many tokens may be counted in one request; never less than the context."""

    def exceeded(self, what: str, index: int = 0) -> ContextLengthExceeded:
        """The error; `what` says how long the text is."""
        return ContextLengthExceeded(
            f"At most {self.num_tokens} tokens are counted in one request. However, {what}.", param=self.param
        )


async def tokenize(request: web.Request) -> web.Response:
    """Tell the token ids of a text or a conversation, and how many there are."""
    router = request.app[SERVING].router
    arrived = await prepare(request, TokenizeRequest)
    body, context = arrived.body, arrived.capacity.max_context_length
    limit = CountLimit(max(MAX_TOKENS, context), "prompt" if body.messages is None else "messages")
    check_tokenize(body)
    if body.messages is not None:
        tokens = await render(router, conversation_of(body, body.messages), arrived.num_bytes, limit)
    else:
        (tokens,) = await router.encode_prompts(
            [body.prompt or ""],
            num_bytes=arrived.num_bytes,
            add_special_tokens=body.add_special_tokens is not False,
            limit=limit,
        )
    token_strs = await router.token_texts(tokens) if body.return_token_strs else None
    check_length(sum(map(len, token_strs or ())), limit.param)
    return json_response(Tokenized(len(tokens), context, list(tokens), token_strs), headers=arrived.headers)


async def detokenize(request: web.Request) -> web.Response:
    """Tell the text of token ids, special tokens included."""
    router = request.app[SERVING].router
    arrived = await prepare(request, DetokenizeRequest)
    tokens, vocab_size = arrived.body.tokens, arrived.capacity.vocab_size
    if len(tokens) > MAX_TOKENS:
        raise InvalidRequest(f"tokens holds {len(tokens)} ids: at most {MAX_TOKENS} in one request.", param="tokens")
    if tokens and max(tokens) >= vocab_size:
        index = next(index for index, token in enumerate(tokens) if token >= vocab_size)
        raise InvalidRequest(
            f"tokens[{index}] = {show(tokens[index])}: the vocabulary has ids 0 … {vocab_size - 1}.",
            param=f"tokens[{index}]",
        )
    text = await router.decode(tokens, num_bytes=arrived.num_bytes)
    check_length(len(text), "tokens")
    return json_response(Prompt(text), headers=arrived.headers)


async def apply_template(request: web.Request) -> web.Response:
    """Tell what the chat template makes of a conversation, as text."""
    router = request.app[SERVING].router
    arrived = await prepare(request, ApplyTemplateRequest)
    body = arrived.body
    text = await render_text(router, conversation_of(body, body.messages), arrived.num_bytes)
    check_length(len(text), "messages")
    return json_response(Prompt(text), headers=arrived.headers)


def check_length(num_chars: int, param: str) -> None:
    """Refuse to answer with more text than the loop can write at once."""
    if num_chars > MAX_ANSWER_CHARS:
        raise InvalidRequest(
            f"{param}: the answer would hold {num_chars} characters of text; at most {MAX_ANSWER_CHARS} at once.",
            param=param,
        )


def check_tokenize(body: TokenizeRequest) -> None:
    """Rules between the fields: each goes with one of prompt and messages."""
    if body.prompt is not None and body.messages is not None:
        raise InvalidRequest("prompt and messages exclude each other.", param="messages")
    if body.messages is not None:
        if body.add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens = true: a conversation has those of its chat template; leave it out.",
                param="add_special_tokens",
                code="unsupported_parameter",
            )
        return
    if body.prompt is None:
        raise InvalidRequest("prompt or messages is required.", param="prompt", code="missing_required_parameter")
    for name in TEMPLATE_FIELDS:
        if getattr(body, name) is not None:
            raise InvalidRequest(f"{name} needs messages.", param=name)


def conversation_of(body: TemplateRequest, messages: list[Message]) -> Conversation:
    """The request in no API's words. Raises InvalidRequest."""
    tools = check_tools(body.tools) if body.tools is not None else []
    return Conversation(
        parameters=GenerationRequest(),
        messages=params.chat_messages(messages),
        tools=tools,
        tool_choice=check_tool_choice(body.tool_choice, tools),
        template_kwargs=params.template_kwargs(body.chat_template_kwargs, body.reasoning_effort),
        add_generation_prompt=starts_turn(body.add_generation_prompt, body.continue_final_message),
        continue_final_message=bool(body.continue_final_message),
    )
