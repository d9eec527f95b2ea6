"""The specification, its examples against a real server, and the page that shows it."""

import json
import re
import threading
from typing import Any

import msgspec
import openapi_spec_validator
import pytest

from asyncllm.server import docs_page, examples, openapi
from asyncllm.server.routes import ROUTES, Access, Route
from asyncllm.server.states import NOTES, key
from tests.fakes import small_capacity
from tests.server.harness import VOCAB_SIZE, Server, check_error, running

DOCUMENT = openapi.document(ROUTES)
# Tools are told in words, and a token is a byte here.
ROOM = small_capacity(
    num_blocks=1025, block_size=4, max_sequences=8, max_context_length=2048, vocab_size=VOCAB_SIZE, hidden_size=64
)
GENERATED = [route for route in ROUTES if route.body is not None and route.path != "/abort"]


def operation(route: Route) -> dict[str, Any]:
    return DOCUMENT["paths"][route.template][route.method.lower()]


def test_the_specification_is_valid_openapi() -> None:
    openapi_spec_validator.validate(DOCUMENT, cls=openapi_spec_validator.OpenAPIV31SpecValidator)


def test_every_route_says_all_that_the_documentation_needs() -> None:
    silent = []
    for route in ROUTES:
        says = {
            "a docstring": route.summary,
            "tag": route.tag,
            "answer": route.answer is not None
            or (route.streamed is not None and route.streamed.when == "always")
            or route.leads_to in [other.path for other in ROUTES],
            "body": route.body is not None or route.method == "GET",
            "examples": bool(route.examples) == (route.body is not None),
            "path_parameters": set(route.path_parameters) == set(re.findall(r"\{(\w+)\}", route.template)),
            "an example": route.example is not None or route.answer in (None, bytes) or route.path == "/openapi.json",
            "an example of not now": (route.unwell_example is not None) == bool(route.unwell),
            "the meaning of its errors": openapi.errors(route) <= set(openapi.ERRORS),
        }
        silent += [f"{route.method} {route.path}: {what}" for what, said in says.items() if not said]
    assert not silent


def test_summaries_are_plain_text() -> None:
    # Swagger UI shows them as they are, and descriptions as Markdown.
    assert not [route.path for route in ROUTES if "`" in route.summary]


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation(route)["operationId"] for route in ROUTES]
    assert len(set(names)) == len(ROUTES) == len(names)


def test_every_field_of_every_body_has_a_description() -> None:
    asked = openapi.structs({route.body for route in ROUTES if route.body is not None})
    silent = [
        f"{name}.{field}"
        for name in asked
        for field, schema in DOCUMENT["components"]["schemas"][name]["properties"].items()
        if not schema["description"] or schema["description"].startswith("(")
    ]
    assert asked and not silent


def test_notes_stand_in_only_where_the_type_says_nothing() -> None:
    asked = openapi.structs({route.body for route in ROUTES if route.body is not None})
    used = set()
    for name, struct in asked.items():
        _, raw = msgspec.json.schema_components([struct])
        silent = [
            field
            for field, schema in raw[name]["properties"].items()
            if not any("description" in option for option in (schema, *schema.get("anyOf", ())))
        ]
        used |= {key(NOTES, struct, field) for field in silent}
    assert used == set(NOTES)


def test_only_bodies_of_a_strict_server_refuse_unknown_fields() -> None:
    strict = openapi.document(ROUTES, strict=True)["components"]["schemas"]
    assert strict["ChatCompletionRequest"]["additionalProperties"] is False
    assert strict["Message"]["additionalProperties"] is True
    assert DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is True


def test_answers_have_all_their_fields_but_those_that_may_be_unset() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert set(schemas["Usage"]["required"]) == set(schemas["Usage"]["properties"])
    assert schemas["Readiness"]["required"] == ["status"]
    assert schemas["ErrorDetail"]["required"] == ["message", "type", "param", "code"]


def test_keys_are_asked_for_where_the_table_says_so() -> None:
    for route in ROUTES:
        assert ("security" in operation(route)) == (route.access is not Access.PUBLIC)


async def send(server: Server, route: Route, body: dict[str, Any]) -> tuple[int, str, str]:
    """Status, content type and text."""
    async with server.session.post(server.base + route.path, json=body) as response:
        return response.status, response.content_type, await response.text()


@pytest.mark.parametrize(
    ("route", "name"),
    [
        pytest.param(route, name, id=f"{route.path} {name}".replace(" ", "-"))
        for route in GENERATED
        for name in route.examples
    ],
)
async def test_every_example_is_answered_as_documented(route: Route, name: str) -> None:
    async with running(capacity=ROOM) as server:
        status, content_type, text = await send(server, route, dict(route.examples[name]))
        assert status == 200, text
        assert content_type in operation(route)["responses"]["200"]["content"]
        streamed = route.streamed is not None and (
            route.streamed.when == "always" or route.examples[name].get("stream")
        )
        assert content_type == ("text/event-stream" if streamed else "application/json")


ANSWERED = [route for route in ROUTES if route.example is not None and route.media_type == "application/json"]
FREE = ("details", "phases", "metadata", "incomplete_details")  # no fields inside, or null in a complete answer


def outline(value: Any) -> Any:
    """Only the keys; of a list only its first item."""
    if isinstance(value, list):
        return [outline(item) for item in value[:1]]
    if isinstance(value, dict):
        return {name: name not in FREE and outline(inner) for name, inner in value.items()}
    return None


@pytest.mark.parametrize("route", ANSWERED, ids=lambda route: route.path)
def test_the_examples_of_answers_have_the_types_of_real_ones(route: Route) -> None:
    told = [shown for shown in (route.example, route.unwell_example) if shown is not None]
    assert [msgspec.convert(msgspec.to_builtins(shown), route.answer) for shown in told] == told


@pytest.mark.parametrize("route", [r for r in ANSWERED if r.path != "/abort"], ids=lambda route: route.path)
async def test_the_examples_of_answers_have_the_keys_of_real_ones(route: Route) -> None:
    async with running(capacity=ROOM) as server:
        path = route.template.format(id="fake")
        if route.body is None:
            status, answer = await server.get(path)
        else:
            (body, *_) = route.examples.values()
            status, answer = await server.post(path, dict(body))
        assert status == 200
        assert outline(msgspec.to_builtins(route.example)) == outline(answer)


async def test_the_example_of_abort_names_a_request() -> None:
    async with running() as server:
        check_error(*await server.post("/abort", examples.ABORT["an answer's id"]), 404, param="request_id")


def shapes(events: str) -> set[str]:
    """The keys of each event, of its choices and of their deltas, as text."""
    lines = [line.removeprefix("data: ") for line in events.split("\n") if line.startswith("data: ")]
    return {line if line == "[DONE]" else " ".join(keys(json.loads(line))) for line in lines}


def keys(event: dict[str, Any]) -> list[str]:
    inner = [name for choice in event.get("choices", ()) for name in [*choice, *choice.get("delta", ())]]
    return [*event, *inner]


@pytest.mark.parametrize("route", [route for route in ROUTES if route.streamed], ids=lambda route: route.path)
async def test_the_events_of_the_documentation_have_the_keys_of_real_ones(route: Route) -> None:
    assert route.streamed is not None
    gate = threading.Semaphore(1)  # one step, then the others: text comes before the end, not with it
    async with running(gate=gate) as server:
        (body, *_) = route.examples.values()
        body = {**body, "stream": True}
        async with server.session.post(server.base + route.path, json=body) as response:
            assert response.status == 200, await response.text()
            text = ""
            while not re.search(r'"(content|text|delta)":"[^"]', text):
                text += (await response.content.readuntil(b"\n\n")).decode()
            gate.release(100)
            text += await response.text()
        assert shapes(route.streamed.events) <= shapes(text)


async def test_the_specification_is_served_as_it_is_made() -> None:
    async with running() as server:
        status, served, headers = await server.call("GET", "/openapi.json")
        assert status == 200 and served == json.loads(json.dumps(DOCUMENT))
        assert headers["Content-Type"] == "application/json"
    async with running(metrics={"enabled": False}, api={"strict": True}) as server:
        _, served = await server.get("/openapi.json")
        assert "/metrics" not in served["paths"]
        assert served["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False


async def test_the_page_finds_all_its_files_and_asks_no_other_host() -> None:
    async with running() as server:
        status, page, headers = await server.call("GET", "/docs")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        files = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(files) == 4
        kinds = {"css": "text/css", "js": "text/javascript", "png": "image/png"}
        for file in files:
            async with server.session.get(f"{server.base}/{file}") as response:
                content = await response.read()
                assert response.status == 200 and len(content) > 50
                assert response.content_type == kinds[file.rsplit(".", 1)[1]]
                assert response.headers["Cache-Control"] == "public, max-age=86400"
                assert response.headers["Content-Security-Policy"] == headers["Content-Security-Policy"]
        policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert "http" not in headers["Content-Security-Policy"]


async def test_the_root_leads_to_the_page() -> None:
    async with running() as server:
        status, _, headers = await server.call("GET", "/", allow_redirects=False)
        assert (status, headers["Location"]) == (302, "docs")
        assert (await server.call("HEAD", "/", allow_redirects=False))[0] == 302
        assert await server.get("/") == await server.get("/docs")


async def test_a_file_that_did_not_change_is_not_sent_again() -> None:
    async with running() as server:
        _, _, headers = await server.call("GET", "/docs/swagger-ui.css")
        again, _, _ = await server.call("GET", "/docs/swagger-ui.css", headers={"If-None-Match": headers["ETag"]})
        assert again == 304


@pytest.mark.parametrize("name", ["index.html", "..%2fcore.py", "swagger-editor-bundle.js", "%00", ""])
async def test_other_files_of_the_package_are_not_served(name: str) -> None:
    async with running() as server:
        check_error(*await server.get(f"/docs/{name}"), 404)


async def test_without_the_package_the_files_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_page, "assets", lambda: None)
    async with running() as server:
        check_error(*await server.get("/docs/swagger-ui.css"), 404, code="not_found")
        assert (await server.get("/docs"))[0] == 200
