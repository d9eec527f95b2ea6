"""Grammars that force tool calls: Lark source in llguidance's dialect, where `%json` takes a JSON schema.

Whitespace is that of Python's `json.dumps`, which is how chat templates show calls to a model. Any thread.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from asyncllm.errors import InvalidRequest, show
from asyncllm.router.json_schema import ANNOTATIONS, FORMAT_PATTERNS
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.tools import Tool
from asyncllm.router.output.value_types import referred

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ARGUMENT_NAME = re.compile(r"[^\s=(),:{}\[\]<>|\"'\\]+")
DEFINITIONS = ("$defs", "definitions")
SILENT = ANNOTATIONS | set(DEFINITIONS)
ANY_TEXT = "(?s:.*)"
ANY_NAME = "[A-Za-z_][A-Za-z0-9_-]*"
# Of a schema whose properties are written one by one, as keyword arguments.
KEYWORD_SCHEMA = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema", "$id",
                  "$defs", "definitions", "$comment", "default", "examples"}  # fmt: skip


class Lark:
    """Collects rules; what its methods return stands for a rule inside others."""

    def __init__(self, model: ModelMarkers) -> None:
        self._model = model
        self._rules: list[str] = []

    def text(self, text: str) -> str:
        """This text."""
        return json.dumps(text, ensure_ascii=False)

    def token(self, marker: str) -> str:
        """A marker: its token where it has one, otherwise its text."""
        token_id = self._model.token_ids.get(marker)
        return self.text(marker) if token_id is None else f"<[{token_id}]>"

    def until(self, end: str) -> str:
        """Any text up to the first `end`, and with it."""
        name = f"text_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: /{ANY_TEXT}{_escaped(end)}/")
        return name

    def matching(self, patterns: Sequence[str], gap: str, end: str) -> str:
        """A text without `end` that all of these patterns match, then `gap` and `end`."""
        name = f"TEXT_{len(self._rules)}"
        inside = "".join(f"/{pattern}/ & " for pattern in patterns)
        self._rules.append(f"{name}: ({inside}~/{ANY_TEXT}{_escaped(end)}{ANY_TEXT}/) {self.text(gap + end)}")
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that is valid against a schema."""
        return self.rule("json", "%json " + json.dumps({**schema, "x-guidance": SPACING}))

    def any_of(self, rules: Sequence[str]) -> str:
        """One of these."""
        return rules[0] if len(rules) == 1 else f"({' | '.join(rules)})"

    def sequence(self, rule: str, *, separator: str, is_one: bool) -> str:
        """One, or one and more."""
        if is_one:
            return rule
        again = f"{self.text(separator)} {rule}" if separator else rule
        return f"{rule} ({again})*"

    def rule(self, name: str, *pieces: str) -> str:
        """A new rule: these pieces behind each other."""
        name = f"{name}_{len(self._rules)}"
        self._rules.append(f"{name}: {' '.join(pieces)}")
        return name

    def source(self, rule: str, *, separator: str = "", is_one: bool) -> str:
        """The grammar of a text that is this rule, once or more."""
        start = f"start: {self.sequence(rule, separator=separator, is_one=is_one)}"
        return "\n".join(["%llguidance {}", start, *self._rules, ""])


def _escaped(text: str) -> str:
    """A pattern of this text, for Lark."""
    return re.escape(text).replace("/", "\\/")


def parameters(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments; a function without parameters takes an empty object."""
    schema = {"type": "object", **(tool.parameters or {})}
    if not schema.keys() - KEYWORD_SCHEMA and not schema.get("properties"):
        schema.setdefault("additionalProperties", False)
    return schema


def arguments(lark: Lark, tool: Tool) -> str:
    """A tool's arguments as a JSON object."""
    return lark.json(parameters(tool))


def json_call(lark: Lark, tool: Tool, key: str) -> str:
    """A call as a JSON object."""
    return lark.rule(
        "call",
        lark.text(f'{{"name": "{tool.name}", "{key}": '),
        arguments(lark, tool),
        lark.text("}"),
    )


def loosened(tool: Tool) -> Tool:
    """The tool with any arguments."""
    return msgspec.structs.replace(tool, parameters={"type": "object", "additionalProperties": True})


def keyword_arguments(lark: Lark, tool: Tool, *, assign: str, separator: str) -> str:
    """A tool's arguments one by one, each value as JSON; see `each_argument`."""

    def write(name: str | None, schema: dict[str, Any]) -> str:
        key = lark.text(name + assign) if name is not None else f"/{ANY_NAME}{assign}/"
        return f"{key} {lark.json(schema)}"

    return each_argument(lark, tool, write, separator=separator)


def each_argument(
    lark: Lark, tool: Tool, write: Callable[[str | None, dict[str, Any]], str], *, separator: str = ""
) -> str:
    """A tool's arguments one by one; those that may be left out come last.

    `write` makes the rule of an argument of this name and schema; None: of any name. A schema that says nothing of its
    properties allows any. Raises InvalidRequest where it says more than which arguments there are.
    """
    schema = parameters(tool)
    where = f"tools: the parameters of {tool.name}"
    if odd := sorted(schema.keys() - KEYWORD_SCHEMA):
        raise InvalidRequest(f"{where} use {odd[0]} beside properties, which this model's calls cannot be forced to "
                             "obey.", param="tools")  # fmt: skip
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if unknown := [name for name in required if properties.get(name, False) is False]:
        raise InvalidRequest(f"{where} require {show(unknown[0])}, which properties do not allow.", param="tools")
    gap = lark.text(separator) if separator else ""
    shared: dict[str, Any] = {key: schema[key] for key in DEFINITIONS if key in schema}
    if not properties and (others := schema["additionalProperties"]) is not False:
        _check_references(others, where)
        piece = write(None, {**shared, **({} if others is True else others)})
        return f"({piece} ({gap} {piece})*)?"
    pieces: dict[str, str] = {}
    for name, value in properties.items():
        if not ARGUMENT_NAME.fullmatch(name):
            raise InvalidRequest(f"{where} include {show(name)}, a name that this model's calls cannot be forced to "
                                 "write.", param="tools")  # fmt: skip
        _check_references(value, where)
        if value is False:  # the argument may not be given
            continue
        pieces[name] = write(name, {**shared, **({} if value is True else value)})
    first = [pieces[name] for name in pieces if name in required]
    rest = [pieces[name] for name in pieces if name not in required]
    if first:
        return " ".join([f" {gap} ".join(first), *(f"({gap} {piece})?" for piece in rest)])
    if not rest:
        return lark.text("")
    # Whichever comes first has no separator in front of it.
    tails = [" ".join([piece, *(f"({gap} {later})?" for later in rest[i + 1 :])]) for i, piece in enumerate(rest)]
    return f"({' | '.join(tails)})?"


def text_value(lark: Lark, schema: dict[str, Any], gap: str, end: str, where: str) -> str:
    """A string of this schema as bare text, then `gap` and `end`; text that may be any goes up to the first `end`.

    Raises InvalidRequest, naming `where`, for a rule that bare text cannot be forced to obey.
    """
    found, seen = schema, set[str]()
    while "$ref" in found and not found.keys() - {"$ref", *SILENT} and found["$ref"] not in seen:
        seen.add(found["$ref"])
        target = referred(schema, found["$ref"])
        found = target if isinstance(target, dict) else {} if target else {"not": {}}
    rules = {name: rule for name, rule in found.items() if name != "type" and name not in SILENT}
    if not rules:
        return lark.until(end)
    patterns: list[str] = []
    for name, rule in rules.items():
        if name in ("enum", "const") and len(rules) == 1:
            texts = rule if name == "enum" else [rule]
            if not any(end in text for text in texts):
                return lark.any_of([lark.text(text + gap + end) for text in texts])
        if name == "minLength":
            patterns.append(f"(?s:.{{{rule},}})")
        elif name == "maxLength":
            patterns.append(f"(?s:.{{0,{rule}}})")
        elif name == "pattern":
            patterns.append(_whole(rule))
        elif name == "format" and rule in FORMAT_PATTERNS:
            patterns.append(_whole(FORMAT_PATTERNS[rule]))
        else:
            raise InvalidRequest(f"{where} use {name} = {show(rule)} for a string, which this model's calls cannot be "
                                 "forced to obey.", param="tools")  # fmt: skip
    return lark.matching(patterns, gap, end)


def _whole(pattern: str) -> str:
    """A pattern (ECMA 262) for Lark, of whole texts in which it is found, though maybe not of all of them."""
    body = pattern.removeprefix("^")
    before = ANY_TEXT if body == pattern else ""
    is_closed = re.search(r"(?<!\\)(\\\\)*\$\Z", body) is not None
    behind, body = ("", body[:-1]) if is_closed else (ANY_TEXT, body)
    body = re.sub(r"\\.|/|\n", lambda piece: {"/": "\\/", "\n": "\\n"}.get(piece[0], piece[0]), body)
    return f"{before}(?:{body}){behind}"


def _check_references(schema: Any, where: str) -> None:
    """A value stands alone in the grammar, so it may only refer to shared definitions."""
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
            raise InvalidRequest(f"{where} use $ref = {show(reference)}: this model's calls can only be forced to obey "
                                 "references to $defs.", param="tools")  # fmt: skip
        for value in schema.values():
            _check_references(value, where)
    elif isinstance(schema, list):
        for value in schema:
            _check_references(value, where)
