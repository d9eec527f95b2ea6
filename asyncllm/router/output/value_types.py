"""Which types of JSON value a schema allows, and which of them a value is. Any thread."""

from typing import Any


def types_of(schema: Any, root: Any) -> set[str]:
    """The types that a schema speaks of; "string" where it speaks of none. `root`: where its references lead to."""
    return _types(schema, root, {}) or {"string"}


def _types(schema: Any, root: Any, known: dict[str, set[str]]) -> set[str]:
    """`known`: those of references that were followed; of one that is being followed, nothing more is to be learnt."""
    if not isinstance(schema, dict):
        return {"string"}
    if "enum" in schema or "const" in schema:
        return {type_of(value) for value in schema.get("enum", [schema.get("const")])}
    if (named := schema.get("type")) is not None:
        return {named} if isinstance(named, str) else set(named)
    if (reference := schema.get("$ref")) is not None:
        if reference not in known:
            known[reference] = set()
            known[reference] = _types(referred(root, reference), root, known)
        return known[reference]
    if (options := schema.get("anyOf") or schema.get("oneOf")) is not None:
        return set().union(*(_types(option, root, known) for option in options))
    for part in schema.get("allOf", ()):
        if (found := _types(part, root, known)) != {"string"}:
            return found
    return {kind for kind, word in (("object", "properties"), ("array", "items")) if word in schema} or {"string"}


def referred(root: Any, reference: str) -> Any:
    """What a reference into `root`, which was checked, leads to."""
    place = root
    for step in reference.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        place = place[int(step)] if isinstance(place, list) else place[step]
    return place


def fits(value: Any, types: set[str]) -> bool:
    """Whether a decoded value has one of these types."""
    kind = type_of(value)
    return kind in types or (kind == "integer" and "number" in types)


def type_of(value: Any) -> str:
    """The type of a decoded value. A number without a fraction is an integer."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value % 1 == 0 else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
