"""Conversations to token ids, through the model's own Jinja template.

Rendering follows `transformers.apply_chat_template`, with limits on time and size (`template_sandbox`), and with the
law that text inside a message never becomes a special token (`special_text`). Any thread.
"""

import logging
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2.sandbox import SecurityError

from asyncllm.errors import InvalidRequest, StartupError, show
from asyncllm.router.special_text import SpecialText, strings_in, unused_noncharacters
from asyncllm.router.template_functions import LimitExceeded, RenderTimeout
from asyncllm.router.template_sandbox import MAX_RENDER_S, CompiledTemplate
from asyncllm.router.tokenizer import ContextLimit, Tokenizer, count_bytes
from asyncllm.weights.base import TextFacts

RESERVED = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
WITH_TOOLS = "tool_use"  # the name of the template that checkpoints with several mean for conversations with tools
PROBE = "zqprobe"

log = logging.getLogger("asyncllm.router")


class RenderingTakesLong(InvalidRequest):
    """The template did not come to an end in the time it was given."""


class Form:
    """One template, compiled, and what it takes for content."""

    def __init__(self, source: str, origin: str, tokens: dict[str, str]) -> None:
        """`origin`: where it stands, for errors. Raises StartupError for a template that does not parse."""
        self.source = source
        try:
            self.compiled = CompiledTemplate(source)
        except (jinja2.TemplateSyntaxError, SyntaxError) as error:
            message = error.message if isinstance(error, jinja2.TemplateSyntaxError) else error.msg
            raise StartupError(f"{origin}: the chat template is broken in line {error.lineno}: {message}") from None
        except RecursionError:
            raise StartupError(f"{origin}: the chat template is nested too deeply") from None
        # Templates differ in what a message's content may be; asking this one is surer than reading its source.
        self.takes_strings = self._shows_probe(PROBE, tokens)
        self.takes_parts = self._shows_probe([{"type": "text", "text": PROBE}], tokens)

    def _shows_probe(self, content: str | list[dict[str, str]], tokens: dict[str, str]) -> bool:
        """Whether the template shows this content as text, rather than failing or printing Python."""
        messages = [{"role": "user", "content": content}]
        values = {**tokens, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            rendered = self.compiled.render(values)
        except Exception:  # whatever it is, it is not shown
            return False
        return PROBE in rendered and "'text'" not in rendered and '"text"' not in rendered


class ChatTemplate:
    """The model's chat template, compiled once; where the checkpoint has another one for tools, both."""

    def __init__(self, text: TextFacts, tokenizer: Tokenizer) -> None:
        """Raises StartupError for a template that does not parse."""
        self._tokenizer = tokenizer
        self._special_text = SpecialText(tokenizer)
        named = {"bos_token": text.bos_token, "eos_token": text.eos_token, **text.named_tokens}
        self._tokens = {name: token for name, token in named.items() if token is not None}
        sources = (text.chat_template, text.named_templates.get(WITH_TOOLS))
        self._form, self._form_with_tools = (
            None if source is None else Form(source, text.template_origin, self._tokens) for source in sources
        )
        self._source = "\n".join(source for source in sources if source is not None)
        self._complaints: set[str] = set()

    @property
    def source(self) -> str:
        """The template's text; empty where the model has none."""
        return self._source

    def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: ContextLimit | None = None,
        limit_s: float = MAX_RENDER_S,
    ) -> list[int]:
        """Token ids of the rendered conversation.

        Raises as `render` does, and ContextLengthExceeded where the text cannot fit.
        """
        given = [messages, tools, template_kwargs]
        try:
            # Before rendering: copying megabytes about holds the GIL. No template leaves out most of what it is given.
            self._tokenizer.check_bytes(sum(map(count_bytes, _texts(messages))), limit)
            strings = [self._source, *strings_in(given)]
            marker = None
            if any(self._special_text.looks_special(text) for text in strings[1:]):
                (marker,) = unused_noncharacters(strings, 1)
                messages, tools, template_kwargs = self._special_text.mark(given, marker)
        except RecursionError:
            raise InvalidRequest("messages are nested too deeply.", param="messages") from None
        rendered = self.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            limit_s=limit_s,
        )
        return self._special_text.encode(rendered, marker, limit)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit_s: float = MAX_RENDER_S,
    ) -> str:
        """The conversation as one text, special tokens of messages and template alike.

        Raises InvalidRequest where there is no template or it refuses the messages, RenderingTakesLong where it is not
        done after `limit_s`.
        """
        form = self._form if tools is None else self._form_with_tools or self._form
        if form is None:
            raise InvalidRequest(
                "This model has no chat template: use completions, or name one in the configuration as "
                "model.chat_template.",
                param="messages",
            )
        kwargs = template_kwargs or {}
        if reserved := sorted((RESERVED | self._tokens.keys()) & kwargs.keys()):
            raise InvalidRequest(
                f"chat_template_kwargs may not set {', '.join(reserved)}.", param="chat_template_kwargs"
            )
        messages = [_adapt(message, index, form) for index, message in enumerate(messages)]
        end = ""
        if continue_final_message:
            (end,) = unused_noncharacters([self._source, *strings_in([messages, tools, kwargs])], 1)
            messages[-1] = _append_to_content(messages[-1], end + " ")
        values = {"documents": None, **kwargs, **self._tokens, "messages": messages, "tools": tools}
        values["add_generation_prompt"] = add_generation_prompt
        rendered = self._run(form, values, limit_s)
        return _cut_at(rendered, end) if continue_final_message else rendered

    def _run(self, form: Form, values: dict[str, Any], limit_s: float) -> str:
        try:
            return form.compiled.render(values, limit_s)
        except LimitExceeded as error:
            kind = RenderingTakesLong if isinstance(error, RenderTimeout) else InvalidRequest
            raise self._stopped(kind, error) from error
        except SecurityError as error:
            raise self._stopped(InvalidRequest, error) from error
        except jinja2.TemplateError as error:  # raise_exception, with a sentence for the client
            raise InvalidRequest(
                f"The chat template refused the messages: {show(str(error))}", param="messages"
            ) from error
        except RecursionError as error:
            raise InvalidRequest(
                "The chat template cannot render these messages: it calls itself too deeply.", param="messages"
            ) from error
        except Exception as error:  # the template met data that its author did not think of
            reason = show(str(error)) or type(error).__name__
            raise InvalidRequest(
                f"The chat template cannot render these messages: {reason}", param="messages"
            ) from error

    def _stopped(self, kind: type[InvalidRequest], error: Exception) -> InvalidRequest:
        """What the client is told; whoever runs the server hears of it as well, once: clients could fill the log."""
        if (name := type(error).__name__) not in self._complaints:
            self._complaints.add(name)
            log.warning("the chat template was stopped: %s; said once", show(str(error)))
        return kind(f"The chat template was stopped: {show(str(error))}", param="messages")


def _adapt(message: dict[str, Any], index: int, form: Form) -> dict[str, Any]:
    """A message as this template takes it."""
    for name in REASONING_FIELDS:  # templates read the first, or gpt-oss' the second
        if (reasoning := message.get(name)) is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
            break
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        wants_parts = form.takes_parts and not form.takes_strings
        return {**message, "content": [{"type": "text", "text": content}]} if wants_parts else message
    if form.takes_parts:
        return message
    for position, part in enumerate(content):
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"messages[{index}].content[{position}] = {show(part)}: this model reads text only.",
                param=f"messages[{index}].content[{position}]",
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}  # as in vLLM


def _texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of all messages."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (part["text"] for part in content if isinstance(part.get("text"), str))


def _append_to_content(message: dict[str, Any], tail: str) -> dict[str, Any]:
    """The message with a tail behind its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + tail}
    last = max((i for i, part in enumerate(content) if isinstance(part.get("text"), str)), default=None)
    if last is None:
        raise InvalidRequest("continue_final_message: the last message has no text.", param="continue_final_message")
    parts = [{**part, "text": part["text"] + tail} if i == last else part for i, part in enumerate(content)]
    return {**message, "content": parts}


def _cut_at(rendered: str, end: str) -> str:
    """The text up to the end of the last message, without whatever the template puts behind a finished one."""
    position = rendered.rfind(end)
    if position < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not show the last message.", param="continue_final_message"
        )
    # The space behind the mark is gone where the template trims content: then the text was to be trimmed, too.
    is_trimmed = rendered[position + len(end) : position + len(end) + 1] != " "
    return rendered[:position].rstrip() if is_trimmed else rendered[:position]
