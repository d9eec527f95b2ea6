"""Tool calls and their results in a conversation so far. Any thread."""

from typing import Any

import msgspec

from asyncllm.errors import InvalidRequest, show
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.schema import MAX_DEPTH, is_shallow

MAX_CALLS = 128  # in one message


def check_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with its calls as templates take them; the others as they are. `where`: `messages[3]`.

    Templates want arguments as objects, clients send JSON text: it is decoded, unless it is no object (a model may have
    written it so) or nested deeper than 64. Raises InvalidRequest naming what is wrong.
    """
    role = message.get("role")
    calls = message.get("tool_calls")
    checked = {key: value for key, value in message.items() if key != "tool_calls"}
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            place = f"{where}.tool_call_id"
            raise InvalidRequest(
                f"{place} = {show(call_id)}: a tool's result needs the id of its call.",
                param=place,
                code="missing_required_parameter" if call_id is None else None,
            )
    if calls is None or calls == []:
        return checked
    where = f"{where}.tool_calls"
    if role != "assistant":
        raise InvalidRequest(f"{where}: only the assistant calls tools.", param=where)
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{where} = {show(calls)}: expected a list of at most {MAX_CALLS} calls.", param=where)
    return {**checked, "tool_calls": [_check_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]}


def adapt_ids(messages: list[dict[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Messages, checked, with ids as the format's templates take them."""
    return [_adapt_ids(message, tool_format) for message in messages]


def _adapt_ids(message: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    if isinstance(call_id := message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": tool_format.history_id(call_id)}
    if calls := message.get("tool_calls"):
        message = {**message, "tool_calls": [{**call, "id": tool_format.history_id(call["id"])} for call in calls]}
    return message


def _check_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise InvalidRequest(f"{where} = {show(call)}: expected an object.", param=where)
    kind = call.get("type", "function")
    if kind != "function":
        raise InvalidRequest(f'{where}.type = {show(kind)}: expected "function".', param=f"{where}.type")
    call_id = call.get("id")
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequest(f"{where}.id = {show(call_id)}: expected a string.", param=f"{where}.id")
    function = call.get("function")
    where = f"{where}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where} = {show(function)}: expected an object.", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where}.name = {show(name)}: expected a string.", param=f"{where}.name")
    arguments = _decoded(function.get("arguments"), f"{where}.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _decoded(arguments: Any, where: str) -> dict[str, Any] | str:
    if isinstance(arguments, dict):  # some clients send it so
        if not is_shallow(arguments, MAX_DEPTH):
            raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep.", param=where)
        return arguments
    if not isinstance(arguments, str):
        raise InvalidRequest(f"{where} = {show(arguments)}: expected a string of JSON.", param=where)
    if not arguments.strip():
        return {}
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return arguments
    return decoded if isinstance(decoded, dict) and is_shallow(decoded, MAX_DEPTH) else arguments
