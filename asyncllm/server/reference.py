"""docs/api.md: every route and every parameter, from the specification. `python -m asyncllm.server.reference`."""

from typing import Any

import msgspec

from asyncllm.server import openapi
from asyncllm.server.openapi import Json
from asyncllm.server.routes import ROUTES, Access, Route
from asyncllm.server.states import note, state

NAMES = {"integer": "integer", "number": "number", "string": "string", "boolean": "boolean", "object": "object"}


def markdown() -> str:
    """docs/api.md."""
    return "\n".join([*_head(), *_routes(), *_parameters()]) + "\n"


def _head() -> list[str]:
    return [
        "# API",
        "",
        "Generated from `asyncllm/server/` by `python -m asyncllm.server.reference`; a test holds it to that. A server",
        "tells the same of itself: `GET /openapi.json` is its specification, `GET /docs` a page to try it on.",
    ]


def _routes() -> list[str]:
    lines = ["", "## Routes", ""]
    lines += ["| route | who | does | body | answer | errors |", "|---|---|---|---|---|---|"]
    for route in ROUTES:
        who = {Access.PUBLIC: "anybody", Access.USER: "users", Access.ADMIN: "administrators"}[route.access]
        body = f"[{route.body.__name__}](#{route.body.__name__.lower()})" if route.body is not None else ""
        errors = ", ".join(str(status) for status in sorted({*openapi.errors(route), route.unwell} - {0}))
        does = route.summary.removesuffix(".")
        lines.append(f"| `{route.method} {route.template}` | {who} | {does} | {body} | {_answer(route)} | {errors} |")
    return lines


def _answer(route: Route) -> str:
    whole = f"leads to `{route.leads_to}`" if route.leads_to else ""
    if route.media_type != "application/json":
        whole = route.media_type if route.answer is not bytes else "a file"
    elif route.answer is not None:
        whole = _type(next(iter(openapi.content(route).values()))["schema"])
    streamed = f"events, {route.streamed.when}" if route.streamed is not None else ""
    return "; ".join(part for part in (whole, streamed) if part)


def _parameters() -> list[str]:
    lines = ["", "## Parameters", ""]
    lines += [
        "Types are strict, and `null` means that a field was left out. A body has the parameters of its own table and",
        "of the one that it goes on from; where both have a name, its own counts.",
    ]
    described = openapi.schemas(ROUTES, strict=False)
    bodies = dict.fromkeys(route.body for route in ROUTES if route.body is not None)
    shown: dict[type[msgspec.Struct], None] = {}
    for struct in (*bodies, *openapi.structs(bodies).values()):
        shown |= dict.fromkeys(_family(struct)[::-1])
    for struct in shown:
        schema = described.get(struct.__name__) or _alone(struct)
        lines += ["", f"### {struct.__name__}", "", *_about(struct), ""]
        lines += ["| parameter | type | limits | default | state | what it is |", "|---|---|---|---|---|---|"]
        lines += [_row(struct, name, schema) for name in _own(struct)]
    return lines


def _family(struct: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """The struct and those it is made from, nearest first, as far as they have fields."""
    return [kind for kind in struct.__mro__ if issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct]


def _own(struct: type[msgspec.Struct]) -> list[str]:
    """The fields that a struct declares itself, and those that another state than its base's holds for."""
    base = _family(struct)[1:2]
    inherited = base[0].__struct_fields__ if base else ()
    changed = [name for name in inherited if state(struct, name) != state(base[0], name)]
    own = [name for name in struct.__struct_fields__ if name in struct.__annotations__]
    return own + [name for name in changed if name not in own]


def _alone(struct: type[msgspec.Struct]) -> Json:
    """The schema of a struct that is no body itself."""
    route = Route("POST", "/", _nothing, Access.USER, body=struct)
    schema: Json = openapi.schemas([route], strict=False)[struct.__name__]
    return schema


async def _nothing(request: Any) -> Any:
    """Nothing."""


def _about(struct: type[msgspec.Struct]) -> list[str]:
    text = (struct.__doc__ or "").strip().rstrip(".")
    base = _family(struct)[1:2]
    return [f"{text}." + (f" Goes on from [{base[0].__name__}](#{base[0].__name__.lower()})." if base else "")]


def _row(struct: type[msgspec.Struct], name: str, schema: Json) -> str:
    field = schema["properties"][name]
    became = state(struct, name)
    said = field["description"].removesuffix(f"({became})").strip() or note(struct, name)
    default = "required" if name in schema.get("required", ()) else ""
    if "default" in field:
        default = f"`{msgspec.json.encode(field['default']).decode()}`"
    return f"| `{name}` | {_type(field)} | {_limits(field)} | {default} | {became} | {said} |"


def _type(schema: Json) -> str:
    """The type in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"] if option != {"type": "null"})
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"] if value is not None)
    kinds = schema.get("type", "any")
    kind = next(kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null")
    if kind == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    return NAMES.get(kind, kind)


def _limits(schema: Json) -> str:
    """What the specification says of values and lengths, in words."""
    said = []
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high != 2**63 - 1:
        said.append(f"{low} … {high}")
    elif low is not None:
        said.append("64 bits" if low == -(2**63) else f"≥ {low}")
    elif high is not None:
        above = f"> {schema['exclusiveMinimum']}, " if "exclusiveMinimum" in schema else ""
        said.append(f"{above}≤ {high}")
    for least, most, what in (
        ("minLength", "maxLength", "characters"),
        ("minItems", "maxItems", "items"),
        ("minProperties", "maxProperties", "entries"),
    ):
        said += _span(schema.get(least), schema.get(most), what)
    said += [limits for option in schema.get("anyOf", ()) if (limits := _limits(option))]
    inner = schema.get("items") or schema.get("additionalProperties")
    if isinstance(inner, dict) and (limits := _limits(inner)):
        said.append(f"each {limits}")
    return "; ".join(dict.fromkeys(said))


def _span(least: int | None, most: int | None, what: str) -> list[str]:
    if least is not None and most is not None:
        return [f"{least} … {most} {what}"]
    if most is not None:
        return [f"≤ {most} {what}"]
    return [f"≥ {least} {what}"] if least is not None else []


if __name__ == "__main__":
    print(markdown(), end="")
