"""The shape of a JSON schema (draft 2020-12): every keyword has the type it must have, every $ref leads somewhere.

Says nothing of which keywords can be enforced; that is the grammar's matter. Any thread.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from asyncllm.errors import InvalidRequest, show

MAX_DEPTH = 64
MAX_LEVELS = 192  # of braces and brackets: a schema in a schema takes up to three
MAX_PATTERN = 4096  # characters
MAX_UNITS = 16_384  # of a request's schemas: one a schema, one a keyword
PATTERN_UNITS = 32  # of a regular expression, beside its length

TYPES = dict.fromkeys(("string", "number", "integer", "boolean", "object", "array", "null"))
SCHEMAS = ("additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "contains",
           "not", "if", "then", "else", "additionalItems")  # fmt: skip
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "$defs", "definitions", "dependentSchemas")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
          "maxContains")  # fmt: skip
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
STRINGS = ("title", "description", "format", "contentEncoding", "contentMediaType", "$schema", "$id", "$comment",
           "$anchor")  # fmt: skip
FLAGS = ("uniqueItems", "deprecated", "readOnly", "writeOnly")


# A place: the field, or a place and the name or the index in it. Written out only where something is wrong.
Where = str | tuple["Where", str | int]


class Budget:
    """How much more schema a request may hold, in units of at most 0.7 us of checking."""

    __slots__ = ("num_left", "patterns")

    def __init__(self, num_units: int) -> None:
        self.num_left = num_units
        self.patterns: set[str] = set()  # that were paid for

    def spend(self, num_units: int, where: Where) -> None:
        """Raises InvalidRequest where it is used up."""
        self.num_left -= num_units
        if self.num_left < 0:
            place = written(where)
            raise InvalidRequest(f"{place}: the schemas are too large.", param=place)


def check_schema(schema: Any, param: str, budget: Budget | None = None) -> None:
    """Raises InvalidRequest naming the place of what is no JSON schema, too deep, or too much."""
    budget = budget or Budget(MAX_UNITS)
    level: list[Any] = [schema]
    for _ in range(MAX_LEVELS + 1):  # a default or an example may be anything
        level = [item for item in level if isinstance(item, (dict, list))]
        budget.spend(sum(map(len, level)) // 2, param)
        level = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
    if level:
        raise InvalidRequest(f"{param} is nested more than {MAX_LEVELS} deep.", param=param)
    _Check(schema, budget).schema(schema, param, 0)


def is_shallow(value: dict[str, Any], num_levels: int) -> bool:
    """Whether it is nested so deep at most; level by level, since recursion has its limit, too."""
    level: list[Any] = [value]
    for _ in range(num_levels):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return True
    return False


class _Check:
    """One schema, and its root for the references in it."""

    def __init__(self, root: Any, budget: Budget) -> None:
        self._root = root
        self._budget = budget
        self._found: set[str] = set()  # references that lead somewhere

    def schema(self, schema: Any, where: Where, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{written(where)}: schemas are nested more than {MAX_DEPTH} deep.",
                                 param=written(where))  # fmt: skip
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _wrong(where, schema, "a JSON schema (an object, true or false)")
        self._budget.spend(1 + len(schema), where)
        for keyword, value in schema.items():
            check = _CHECKS.get(keyword)
            if check is not None:
                check(self, value, (where, keyword), depth)

    def items(self, value: Any, where: Where, depth: int) -> None:
        if isinstance(value, list):  # as drafts before 2020-12 have it
            self.list_of_schemas(value, where, depth)
        else:
            self.one_schema(value, where, depth)

    def one_schema(self, value: Any, where: Where, depth: int) -> None:
        self.schema(value, where, depth + 1)

    def list_of_schemas(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise _wrong(where, value, "a list of schemas that is not empty")
        for index, item in enumerate(value):
            self.schema(item, (where, index), depth + 1)

    def map_of_schemas(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object of schemas")
        for key, item in value.items():
            self.schema(item, (where, key), depth + 1)

    def pattern_properties(self, value: Any, where: Where, depth: int) -> None:
        self.map_of_schemas(value, where, depth)
        for key in value:
            self.pattern(key, where, depth)

    def type(self, value: Any, where: Where, depth: int) -> None:
        if isinstance(value, str) and value in TYPES:
            return
        types = value if isinstance(value, list) else [value]
        is_right = all(isinstance(item, str) for item in types) and set(types) <= TYPES.keys()
        if not types or not is_right or len(set(types)) < len(types):
            raise _wrong(where, value, f"one of {', '.join(TYPES)}, or a list of them without repeats")

    def required(self, value: Any, where: Where, depth: int) -> None:
        is_right = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not is_right or len(set(value)) < len(value):
            raise _wrong(where, value, "a list of names without repeats")

    def dependent_required(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object of lists of names")
        self._budget.spend(len(value), where)
        for key, item in value.items():
            self.required(item, (where, key), depth)

    def enum(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise _wrong(where, value, "a list of values that is not empty")

    def pattern(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, str):
            raise _wrong(where, value, "a regular expression")
        if len(value) > MAX_PATTERN:
            raise _wrong(where, value, f"a regular expression of at most {MAX_PATTERN} characters")
        if value not in self._budget.patterns:
            self._budget.patterns.add(value)
            self._budget.spend(PATTERN_UNITS + len(value) // 4, where)
        if (fault := _fault(value)) is not None:
            place = written(where)
            raise InvalidRequest(f"{place} = {show(value)}: not a regular expression: {fault}.", param=place)

    def ref(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, str):
            raise _wrong(where, value, "a string")
        if not value.startswith("#"):
            raise _wrong(where, value, "a reference into this schema (#/…); other documents are never fetched")
        if value in self._found:
            return
        self._budget.spend(2 + len(value) // 16, where)
        if not self._leads_somewhere(value[1:]):
            raise InvalidRequest(f"{written(where)} = {show(value)}: nothing is there.", param=written(where))
        self._found.add(value)

    def _leads_somewhere(self, pointer: str) -> bool:
        if pointer and not pointer.startswith("/"):
            return False
        place = self._root
        for raw in pointer.split("/")[1:]:
            step = raw.replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict) and step in place:
                place = place[step]
            elif isinstance(place, list) and re.fullmatch("[0-9]{1,9}", step) and int(step) < len(place):
                place = place[int(step)]
            else:
                return False
        return isinstance(place, (dict, bool))

    def count(self, value: Any, where: Where, depth: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(where, value, "an integer >= 0")

    def number(self, value: Any, where: Where, depth: int) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(where, value, "a number")

    def multiple_of(self, value: Any, where: Where, depth: int) -> None:
        self.number(value, where, depth)
        if value <= 0:
            raise _wrong(where, value, "a number above 0")

    def string(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, str):
            raise _wrong(where, value, "a string")

    def flag(self, value: Any, where: Where, depth: int) -> None:
        if not isinstance(value, bool):
            raise _wrong(where, value, "true or false")


_CHECKS: dict[str, Callable[[_Check, Any, Where, int], None]] = {
    "type": _Check.type,
    "required": _Check.required,
    "dependentRequired": _Check.dependent_required,
    "enum": _Check.enum,
    "pattern": _Check.pattern,
    "$ref": _Check.ref,
    "items": _Check.items,
    "patternProperties": _Check.pattern_properties,
    "multipleOf": _Check.multiple_of,
    **dict.fromkeys(SCHEMAS, _Check.one_schema),
    **dict.fromkeys(LISTS, _Check.list_of_schemas),
    **dict.fromkeys(MAPS, _Check.map_of_schemas),
    **dict.fromkeys(COUNTS, _Check.count),
    **dict.fromkeys(NUMBERS, _Check.number),
    **dict.fromkeys(STRINGS, _Check.string),
    **dict.fromkeys(FLAGS, _Check.flag),
}


@lru_cache(maxsize=1024)  # agents send the same tools with every turn
def _fault(pattern: str) -> str | None:
    """What is wrong with a regular expression."""
    try:
        re.compile(_in_python(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return show(str(error))
    return None


def _in_python(pattern: str) -> str:
    """An ECMA-262 expression as Python reads it without a warning; near enough to say whether it is one."""
    pattern = re.sub(r"\\[pP]\{[^{}]*\}", r"\\w", pattern)
    pattern = re.sub(r"\\u\{[0-9a-fA-F]{1,6}\}|\\c[A-Za-z]", "x", pattern)
    pattern = re.sub(r"([-&~|])\1+", r"\1", re.sub(r"(\[\^?)\[", r"\1\\[", pattern))
    return re.sub(r"\(\?<(?![=!])", "(?P<", pattern)


def _wrong(where: Where, value: Any, expected: str) -> InvalidRequest:
    place = written(where)
    return InvalidRequest(f"{place} = {show(value)}: expected {expected}.", param=place)


def written(where: Where) -> str:
    """A place as clients read it: `tools[0].function.parameters.properties.a`."""
    steps: list[str] = []
    while not isinstance(where, str):
        where, step = where
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return where + "".join(reversed(steps))
