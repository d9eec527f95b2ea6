"""The tools of a request: what a client may say, checked before anything is generated. Any thread."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from asyncllm.errors import InvalidRequest, show
from asyncllm.router.output.schema import MAX_UNITS, Budget, check_schema

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None  # a JSON schema of an object; None: it takes none
    strict: bool
    source: dict[str, Any]  # as chat templates take it


class ToolChoice(msgspec.Struct, frozen=True):
    """What the client wants to be called."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None  # None: all tools
    is_named: bool = False  # exactly one call, of the one name

    @property
    def is_forced(self) -> bool:
        """The answer has to be calls."""
        return self.mode == "required"

    def allows(self, name: str) -> bool:
        """Whether this function may be called."""
        return self.mode != "none" and (self.names is None or name in self.names)

    def chosen(self, tools: Sequence[Tool]) -> list[Tool]:
        """Those of the tools that may be called."""
        return [tool for tool in tools if self.allows(tool.name)]


def check_tools(tools: Any, param: str = "tools") -> list[Tool]:
    """The request's tools. Raises InvalidRequest naming the exact place of what is wrong."""
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise InvalidRequest(f"{param} = {show(tools)}: expected a list of 1 … {MAX_TOOLS} tools.", param=param)
    budget = Budget(MAX_UNITS)
    checked: list[Tool] = []
    names: set[str] = set()
    for index, value in enumerate(tools):
        where = f"{param}[{index}]"
        tool = _check_tool(value, where, budget)
        if tool.name in names:
            place = f"{where}.function.name"
            raise InvalidRequest(f"{place} = {show(tool.name)}: another tool has this name.", param=place)
        names.add(tool.name)
        checked.append(tool)
    return checked


def check_tool_choice(value: Any, tools: Sequence[Tool], param: str = "tool_choice") -> ToolChoice:
    """The request's choice; without one it is auto, or none where there are no tools. Raises InvalidRequest."""
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if value == "none":
        return ToolChoice("none")
    if not tools:
        raise InvalidRequest(f"{param} = {show(value)}: needs tools.", param=param)
    if value in ("auto", "required"):
        return ToolChoice(value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        name = _reference(value, tools, param)
        return ToolChoice("required", (name,), is_named=True)
    if kind == "allowed_tools":
        return _allowed_tools(value.get("allowed_tools"), tools, f"{param}.allowed_tools")
    raise InvalidRequest(
        f'{param} = {show(value)}: expected "none", "auto", "required", {{"type": "function", "function": '
        f'{{"name": …}}}} or {{"type": "allowed_tools", "allowed_tools": {{"mode": …, "tools": […]}}}}.',
        param=param,
    )


def _check_tool(value: Any, where: str, budget: Budget) -> Tool:
    function = _object(value, where)
    kind = value.get("type")
    if kind != "function":
        raise InvalidRequest(f'{where}.type = {show(kind)}: expected "function".', param=f"{where}.type")
    where = f"{where}.function"
    function = _object(value.get("function"), where)
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.name = {show(name)}: expected 1 … 64 of A-Z, a-z, 0-9, _ and -.", param=f"{where}.name"
        )
    description, strict = function.get("description"), function.get("strict")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(
            f"{where}.description = {show(description)}: expected a string.", param=f"{where}.description"
        )
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequest(f"{where}.strict = {show(strict)}: expected true or false.", param=f"{where}.strict")
    parameters = function.get("parameters")
    if parameters is not None:
        _check_parameters(parameters, f"{where}.parameters", budget)
    # Templates read tool.function.parameters without asking whether it is there.
    shown = {**function, "parameters": parameters or {"type": "object", "properties": {}}}
    shown = {key: item for key, item in shown.items() if item is not None}
    return Tool(name, description, parameters, bool(strict), {"type": "function", "function": shown})


def _check_parameters(parameters: Any, where: str, budget: Budget) -> None:
    _object(parameters, where)
    if parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f'{where}.type = {show(parameters["type"])}: expected "object", since arguments have names.',
            param=f"{where}.type",
        )
    check_schema(parameters, where, budget)


def _allowed_tools(value: Any, tools: Sequence[Tool], where: str) -> ToolChoice:
    mode = _object(value, where).get("mode")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f'{where}.mode = {show(mode)}: expected "auto" or "required".', param=f"{where}.mode")
    allowed = value.get("tools")
    if not isinstance(allowed, list) or not allowed:
        raise InvalidRequest(f"{where}.tools = {show(allowed)}: expected a list of tools.", param=f"{where}.tools")
    names = [_reference(item, tools, f"{where}.tools[{index}]") for index, item in enumerate(allowed)]
    return ToolChoice(mode, tuple(dict.fromkeys(names)))


def _reference(value: Any, tools: Sequence[Tool], where: str) -> str:
    """The name in `{"type": "function", "function": {"name": …}}`, which one of the tools must have."""
    kind = _object(value, where).get("type")
    if kind != "function":
        raise InvalidRequest(f'{where}.type = {show(kind)}: expected "function".', param=f"{where}.type")
    function = _object(value.get("function"), f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or all(tool.name != name for tool in tools):
        place = f"{where}.function.name"
        raise InvalidRequest(f"{place} = {show(name)}: no tool has this name.", param=place)
    return name


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} = {show(value)}: expected an object.", param=where)
    return value
