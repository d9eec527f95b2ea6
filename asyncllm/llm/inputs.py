"""Prompts and conversations as programs write them: one or many, text or token ids, told apart and made alike.

Whether one is fit for the model is asked later, one by one, so that a bad one does not lose the others. Any thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from asyncllm.errors import InvalidRequest, show
from asyncllm.router.output.tools import check_tool_choice, check_tools
from asyncllm.server import params
from asyncllm.server.conversation import starts_turn
from asyncllm.server.wire import Message

Prompt = str | Sequence[int]  # text or token ids
Messages = Sequence[Mapping[str, Any]]  # a conversation: {"role": …, "content": …}, …


def prompts_of(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as many. Raises InvalidRequest for what is neither."""
    if isinstance(given, str):
        return [given]
    if not _is_list(given):
        raise _wrong_type("prompts", given, "a string, a list of strings or a list of lists of token ids")
    if given and all(type(token) is int for token in given):
        return [given]  # type: ignore[list-item]
    for prompt in given:
        if not isinstance(prompt, str) and not _is_list(prompt):
            raise _wrong_type("prompts", prompt, "every prompt a string or a list of token ids")
    return list(given)  # type: ignore[arg-type]


def conversations_of(given: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation or many, as many. Raises InvalidRequest for what is neither."""
    if not _is_list(given):
        raise _wrong_type("messages", given, "a list of messages or a list of such lists")
    if any(isinstance(item, Mapping) for item in given):
        return [given]  # type: ignore[list-item]
    for conversation in given:
        if not _is_list(conversation):
            raise _wrong_type("messages", conversation, "every conversation a list of messages")
    return list(given)  # type: ignore[arg-type]


def checked_prompt(prompt: Prompt, vocab_size: int) -> Prompt:
    """A prompt that can be tokenized, or ids of the vocabulary. Raises InvalidRequest."""
    given = prompt if isinstance(prompt, str) else list(prompt)
    if isinstance(given, list) and not all(type(token) is int for token in given):
        raise _wrong_type("prompt", given, "a string or a list of token ids")
    [checked] = params.prompts_of(given, vocab_size)  # type: ignore[arg-type]  # list is invariant
    return checked


def checked_turns(messages: Messages) -> list[dict[str, Any]]:
    """A conversation as chat templates read it. Raises InvalidRequest."""
    if not messages:
        raise InvalidRequest("messages is empty: at least one message is needed.", param="messages")
    try:
        return params.chat_messages(msgspec.convert(list(messages), list[Message]))
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"messages = {show(messages)}: {error}.", param="messages") from None


def template_options(
    add_generation_prompt: bool | None, continue_final_message: bool, template_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """How the template is used, as fields of the server's `Conversation`. Raises InvalidRequest."""
    return {
        "add_generation_prompt": starts_turn(add_generation_prompt, continue_final_message),
        "continue_final_message": continue_final_message,
        "template_kwargs": template_kwargs or {},
    }


def tool_options(
    tools: list[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None, parallel_tool_calls: bool
) -> dict[str, Any]:
    """What may be called, as fields of the server's `Conversation`. Raises InvalidRequest."""
    checked = check_tools(tools) if tools is not None else []
    return {
        "tools": checked,
        "tool_choice": check_tool_choice(tool_choice, checked),
        "parallel_tool_calls": parallel_tool_calls,
    }


def num_bytes(text: str, param: str) -> int:
    """Of a text in UTF-8. Raises InvalidRequest for what no text can be."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds half of a surrogate pair: not Unicode text.", param=param) from None


def _is_list(given: object) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)


def _wrong_type(name: str, given: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name} = {show(given)}: expected {expected}.", param=name, code="invalid_type")
