"""The aiohttp application: the routes, and what every answer has in common.

Errors take their shape here: handlers raise, `answer` writes API.md's error object, whatever went wrong.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator

from aiohttp import web

from asyncllm.errors import AsyncLLMError, InvalidRequest, MethodNotAllowed, NotFound, RequestTooLarge, show
from asyncllm.server import openapi
from asyncllm.server.docs_page import DOCUMENT
from asyncllm.server.replies import error_response
from asyncllm.server.routes import ROUTES, Handler, routes_of
from asyncllm.server.serving import ERROR_BODY, REQUEST_ID, SERVING, Serving

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LAG_INTERVAL_S = 0.5

log = logging.getLogger("asyncllm.server")
access_log = logging.getLogger("asyncllm.access")


def create_app(serving: Serving) -> web.Application:
    """The application over one served model."""
    # Bodies are read by `body.read_body`, which has its own limit.
    app = web.Application(middlewares=[answer], client_max_size=serving.config.api.max_body_bytes)
    app[SERVING] = serving
    app[PATHS] = {}
    metrics = serving.config.metrics.enabled
    app[DOCUMENT] = openapi.encoded(metrics=metrics, strict=serving.config.api.strict)
    for route in routes_of(metrics=metrics):
        if route.method == "GET":
            added = app.router.add_get(route.path, route.handler)  # HEAD too
        else:
            added = app.router.add_route(route.method, route.path, route.handler)
        assert added.resource is not None
        app[PATHS][added.resource] = added.resource.canonical
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(background)
    return app


# Each resource's path, without the prefix under which another application may have mounted this one.
PATHS = web.AppKey("paths", dict[web.AbstractResource, str])
_QUIET = {route.path for route in ROUTES if route.quiet}


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run a handler; turn what it raises into the error object; count and log the outcome."""
    serving = request.app[SERVING]
    started_s = time.perf_counter()
    request[REQUEST_ID] = request_id(request)
    status = 499  # what is counted where the client goes away first
    try:
        if request.method == "OPTIONS" and serving.config.api.cors_origins:
            response: web.StreamResponse = web.Response(status=204)
        else:
            response = await handler(request)
        status = response.status
        return response
    except (AsyncLLMError, web.HTTPException) as raised:
        error = raised if isinstance(raised, AsyncLLMError) else from_http(request, raised)
        status = error.status
        response = refuse(request, error)
        if isinstance(raised, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(raised.allowed_methods))
        return response
    except ConnectionResetError:  # the client is gone; there is nobody to answer
        raise
    except Exception:
        log.exception("request %s failed", request[REQUEST_ID])
        status = 500
        return refuse(request, AsyncLLMError("The server failed to answer this request."))
    finally:
        resource = request.match_info.route.resource
        route = request.app[PATHS].get(resource, "unknown") if resource is not None else "unknown"
        serving.metrics.http_requests.add(route, known_method(request.method), str(status))
        if serving.config.logging.access and route not in _QUIET:
            duration_ms = (time.perf_counter() - started_s) * 1000
            access_log.info("%s %s %d %.1f ms %s", request.method, route, status, duration_ms, request[REQUEST_ID])


def refuse(request: web.Request, error: AsyncLLMError) -> web.Response:
    """An error response in the words of the request's API, counted."""
    request.app[SERVING].metrics.errors.add(str(error.status), error.code or "none")
    make_body = request.get(ERROR_BODY)
    return error_response(error, make_body(error) if make_body is not None else None)


def known_method(method: str) -> str:
    """A metric label must not be a client's free text."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"


def from_http(request: web.Request, raised: web.HTTPException) -> AsyncLLMError:
    """aiohttp's own refusals in our words."""
    if isinstance(raised, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(raised.allowed_methods))
        return MethodNotAllowed(f"{show(request.method)} is not allowed on {show(request.path)}; use {allowed}.")
    if raised.status == 404:
        return NotFound(f"There is nothing at {show(request.path)}.")
    if isinstance(raised, web.HTTPRequestEntityTooLarge):
        return RequestTooLarge("The request body is too large.")
    if 400 <= raised.status < 500:
        error: AsyncLLMError = InvalidRequest(show(raised.text or raised.reason), code="bad_request")
        error.status = raised.status
        return error
    return AsyncLLMError("The server failed to answer this request.")


def request_id(request: web.Request) -> str:
    """The client's x-request-id where it sent a sane one."""
    given = request.headers.get("x-request-id", "")
    return given if SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every response."""
    serving = request.app[SERVING]
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    response.headers["Server"] = "asyncllm"
    origin, allowed = request.headers.get("Origin"), serving.config.api.cors_origins
    if origin and allowed and ("*" in allowed or origin in allowed):
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
        response.headers["Access-Control-Expose-Headers"] = "x-request-id, x-ignored-params, Server-Timing, Retry-After"
        response.headers.add("Vary", "Origin")
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Access-Control-Allow-Headers"] = request.headers.get(
                "Access-Control-Request-Headers", "authorization, content-type"
            )
            response.headers["Access-Control-Max-Age"] = "600"


async def background(app: web.Application) -> AsyncIterator[None]:
    """Tasks that live as long as the app."""
    serving = app[SERVING]
    tasks = [
        asyncio.create_task(serving.streams.keep_alive_forever()),
        asyncio.create_task(measure_lag(serving)),
    ]
    yield
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def measure_lag(serving: Serving) -> None:
    """How late a timer fires is how long something held the event loop."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        serving.metrics.loop_lag.observe(max(0.0, loop.time() - due_s))
