"""The specification of the API, OpenAPI 3.1: made from the table of routes and the structs that decode and encode.

What msgspec says of a struct is kept; only its spelling changes, so that people can read it.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from asyncllm import __version__
from asyncllm.server.messages import messages_error
from asyncllm.server.replies import ErrorBody, ErrorDetail, encode_json
from asyncllm.server.routes import Access, Route, routes_of
from asyncllm.server.states import HONOURED, note, state

Json = dict[str, Any]

REF = "#/components/schemas/{name}"
SECURITY = {Access.USER: "user", Access.ADMIN: "admin"}
READING_BODY = (400, 408, 413, 415)

# Status -> what it means, and an example's message, type, param and code.
ERRORS = {
    400: (
        "The request is wrong: `param` names the field, the message the value and the rule.",
        ErrorDetail("temperature = 3: expected float <= 2.0.", "invalid_request_error", "temperature", "invalid_value"),
    ),
    401: (
        "There is no valid key.",
        ErrorDetail("This server asks for a key.", "authentication_error", None, "invalid_api_key"),
    ),
    403: (
        "The key does not reach this far.",
        ErrorDetail("This key is not an administrator's.", "permission_error", None, "insufficient_scope"),
    ),
    404: (
        "There is no such thing, or no such model.",
        ErrorDetail("The model 'gpt-9' does not exist.", "not_found_error", "model", "model_not_found"),
    ),
    408: (
        "The body stood still.",
        ErrorDetail("The request body stood still for 30 s.", "server_error", None, "body_timeout"),
    ),
    413: (
        "The body is too large.",
        ErrorDetail("The request body is too large.", "invalid_request_error", None, "request_too_large"),
    ),
    415: (
        "The body's type or encoding is not one that is read here.",
        ErrorDetail("Send application/json.", "invalid_request_error", None, "unsupported_media_type"),
    ),
    429: (
        "Too much work is waiting, or a limit is reached; `Retry-After` says when to come back.",
        ErrorDetail("1024 requests are waiting.", "rate_limit_error", None, "server_overloaded"),
    ),
    500: (
        "The server failed.",
        ErrorDetail("The server failed to answer this request.", "server_error", None, "internal_error"),
    ),
    503: (
        "The model is loading, the server is shutting down, or its engine died.",
        ErrorDetail("The model is loading: load weights.", "server_error", None, "not_ready"),
    ),
    504: (
        "Nothing was generated within the request's timeout.",
        ErrorDetail("Nothing was generated in time.", "server_error", "timeout", "timeout"),
    ),
}
RETRIED = (429, 503)

HEADERS: Json = {
    "x-request-id": {
        "description": "The client's own, where it sent one of 1 to 128 characters of `[A-Za-z0-9._-]`.",
        "required": True,
        "schema": {"type": "string"},
    },
    "x-ignored-params": {
        "description": "Fields of the body that nobody knows, where there are any.",
        "schema": {"type": "string"},
    },
    "Server-Timing": {
        "description": "Milliseconds of queue, prefill and decode; of a stream, until it was admitted.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    "retry-after-ms": {"description": "Milliseconds.", "schema": {"type": "integer", "minimum": 1}},
}
LOCATION: Json = {
    "description": "Relative to this route, whatever prefix it is behind.",
    "required": True,
    "schema": {"type": "string"},
}
INFO = """\
One model, served to the clients of several APIs. Errors have the same shape everywhere. A field that nobody knows is
accepted and named in the header `x-ignored-params`, or refused where the server is strict (`[api] strict = true`).
`null` means that a field was left out."""


@functools.cache
def encoded(*, metrics: bool, strict: bool) -> bytes:
    """The specification of a server with or without /metrics. Made once: it takes 50 ms."""
    return encode_json(document(routes_of(metrics=metrics), strict=strict))


def document(routes: Iterable[Route], *, strict: bool = False) -> Json:
    """The whole specification. `strict`: unknown fields are refused."""
    routes = tuple(routes)
    return {
        "openapi": "3.1.0",
        "info": {"title": "asyncllm", "version": __version__, "description": INFO, "license": {"name": "MIT"}},
        "servers": [{"url": "./"}],  # beside this document, whatever prefix it is behind
        "tags": [{"name": name} for name in dict.fromkeys(route.tag for route in routes) if name],
        "paths": paths(routes),
        "components": {
            "schemas": schemas(routes, strict),
            "responses": {str(status): error_response(status, ErrorBody) for status in ERRORS},
            "headers": HEADERS,
            "securitySchemes": {
                "user": {"type": "http", "scheme": "bearer", "description": "A key, where the server asks for one."},
                "admin": {"type": "http", "scheme": "bearer", "description": "A key that may do more than generate."},
            },
        },
    }


def paths(routes: Iterable[Route]) -> Json:
    """The operations by path and method."""
    made: Json = {}
    for route in routes:
        made.setdefault(route.template, {})[route.method.lower()] = operation(route)
    return made


def operation(route: Route) -> Json:
    """What there is to say of one route."""
    made: Json = {
        "tags": [route.tag],
        "summary": route.summary,
        "operationId": "_".join(part for part in (route.method.lower(), *_words(route.template)) if part),
        "responses": responses(route),
    }
    if route.description:
        made["description"] = route.description
    if route.access in SECURITY:
        made["security"] = [{SECURITY[route.access]: []}, {}]
    if route.path_parameters:
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": what, "schema": {"type": "string"}}
            for name, what in route.path_parameters.items()
        ]
    if route.body is not None:
        examples = {_slug(name): {"summary": name, "value": body} for name, body in route.examples.items()}
        content = {"schema": _schema(route.body), "examples": examples}
        made["requestBody"] = {"required": True, "content": {"application/json": content}}
    return made


def responses(route: Route) -> Json:
    """A route's answers by status."""
    headers = {"x-request-id": _header("x-request-id")}
    if route.body is not None:
        headers |= {"x-ignored-params": _header("x-ignored-params")}
    if 504 in route.errors:
        headers |= {"Server-Timing": _header("Server-Timing")}
    made: Json = {"200": {"description": "The answer.", "headers": headers, "content": content(route)}}
    if route.leads_to:
        made = {"302": {"description": f"Leads to {route.leads_to}.", "headers": headers | {"Location": LOCATION}}}
    if route.unwell:
        retry = {name: _header(name) for name in ("x-request-id", "Retry-After")}
        told = {"schema": _schema(route.answer), "example": msgspec.to_builtins(route.unwell_example)}
        made[str(route.unwell)] = {"description": "Not now.", "headers": retry, "content": {route.media_type: told}}
    for status in sorted(errors(route)):
        shared = {"$ref": f"#/components/responses/{status}"}
        made[str(status)] = shared if route.error is ErrorBody else error_response(status, route.error)
    return made


def errors(route: Route) -> set[int]:
    """The statuses that come with the error object."""
    made = {*route.errors, 500}
    if route.body is not None:
        made.update(READING_BODY)
    if route.access in SECURITY:
        made.update((401, 403))
    return made


def content(route: Route) -> Json:
    """The media types of a good answer."""
    made: Json = {}
    if route.answer is bytes:
        made[route.media_type] = {}
    elif route.answer is not None:
        made[route.media_type] = {"schema": _schema(route.answer)}
        if route.example is not None:
            made[route.media_type]["example"] = msgspec.to_builtins(route.example)
    if route.streamed is not None:
        made["text/event-stream"] = {"schema": event(route), "example": route.streamed.events}
    return made


def event(route: Route) -> Json:
    """The schema of each event of a stream, which is how clients are made from it: OpenAPI 3.1 has no other word."""
    streamed = route.streamed
    assert streamed is not None
    payload = {"anyOf": [_schema(streamed.event), _schema(route.error)]}
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": payload}
    if streamed.last:
        data = {"anyOf": [{"const": streamed.last, "description": "the end of the stream"}, data]}
    return {
        "description": f"A Server-Sent Event, {streamed.when}. After an error there is no other event.",
        "type": "object",
        "properties": {"data": data},
        "required": ["data"],
    }


def error_response(status: int, body: type[msgspec.Struct]) -> Json:
    """The response of one status."""
    names = ("x-request-id", "Retry-After", "retry-after-ms") if status in RETRIED else ("x-request-id",)
    meaning, example = ERRORS[status]
    shown = ErrorBody(example) if body is ErrorBody else messages_error(status, example.message)
    content = {"schema": _schema(body), "example": msgspec.to_builtins(shown)}
    return {
        "description": meaning,
        "headers": {name: _header(name) for name in names},
        "content": {"application/json": content},
    }


# --- schemas ---------------------------------------------------------------------------------------------------------


def schemas(routes: Iterable[Route], strict: bool) -> Json:
    """Every struct by name. Asked-for fields may be left out and say what happens then; told ones are always there."""
    routes = tuple(routes)
    bodies = {route.body for route in routes if route.body is not None}
    asked = structs(bodies)
    told = [route.answer for route in routes if route.answer not in (None, bytes)]
    told += [route.streamed.event for route in routes if route.streamed is not None]
    told += [ErrorBody, *(route.error for route in routes)]
    _, made = msgspec.json.schema_components([*asked.values(), *told], ref_template=REF)
    for name, schema in made.items():
        schema.pop("title", None)
        struct = asked.get(name)
        if struct is None:
            _told(schema)
        else:
            _asked(struct, schema)
            schema["additionalProperties"] = not (strict and struct in bodies)
    return {name: made[name] for name in sorted(made)}


def structs(bodies: Iterable[type[msgspec.Struct]]) -> dict[str, type[msgspec.Struct]]:
    """These structs and those inside them, by name."""
    return {kind.__name__: kind for body in bodies for kind in _within(msgspec.inspect.type_info(body))}


def _within(info: Any) -> Iterator[type[msgspec.Struct]]:
    """The structs in msgspec's description of a type. None of ours holds itself."""
    if isinstance(info, msgspec.inspect.StructType):
        yield info.cls
    for name in info.__struct_fields__ if isinstance(info, msgspec.Struct) else ():
        value = getattr(info, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, msgspec.inspect.Type | msgspec.inspect.Field):
                yield from _within(part)


def _asked(struct: type[msgspec.Struct], schema: Json) -> None:
    """null stands for a field that was left out, so it is nobody's default."""
    for name, field in schema["properties"].items():
        field.pop("default", None)
        if "x-default" in field:
            field["default"] = field.pop("x-default")
        said = _description(field) or note(struct, name)
        became = state(struct, name)
        field["description"] = said if became == HONOURED else f"{said} ({became})".strip()
        _plain(field)


def _description(field: Json) -> str:
    """What a type says of itself, or the first of those it may be."""
    options: list[Json] = [field, *field.get("anyOf", ())]
    return next((option.pop("description") for option in options if "description" in option), "")


def _told(schema: Json) -> None:
    """Every field of an answer is there, null where empty, but for those that may be unset: they have no default."""
    properties = schema.get("properties", {})
    optional = {name for name, field in properties.items() if "default" not in field and name not in schema["required"]}
    if properties:
        schema["required"] = [name for name in properties if name not in optional]
    for field in properties.values():
        field.pop("default", None)
        _plain(field)


def _plain(field: Json) -> None:
    """`X or null` in one schema where X is a plain type."""
    options = field.get("anyOf", [])
    if len(options) == 2 and options[1] == {"type": "null"} and "type" in options[0]:
        del field["anyOf"]
        field.update(options[0], type=[options[0]["type"], "null"])


def _schema(kind: Any) -> Json:
    """How others refer to a type."""
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


def _header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}


def _words(path: str) -> list[str]:
    return [part.strip("{}").replace(".", "_").replace("-", "_") for part in path.split("/")]


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name)
