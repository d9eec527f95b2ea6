"""Connections before they are requests: how many there may be, and how long their first headers may take.

aiohttp bounds neither, so a client could hold the server with sockets alone.
"""

import asyncio
import logging
from collections import Counter
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from asyncllm.config import ServerConfig
from asyncllm.errors import AsyncLLMError, InvalidRequest
from asyncllm.server.replies import error_response

SHUTDOWN_TIMEOUT_S = 2.0  # for the last bytes of what was cut off

log = logging.getLogger("asyncllm.server")


class Connection(RequestHandler):
    """An HTTP connection whose protocol errors (a broken request line, a huge header) are JSON like all others."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP request; nothing of it is echoed, or logged but in debug."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was under way; the connection can only be closed")
        if status >= 500:
            log.error("answering a request failed", exc_info=exc)
            error = AsyncLLMError("The server failed to answer this request.")
        else:
            log.debug("not HTTP: %r", exc)
            error = InvalidRequest(f"This is not a valid HTTP request: {type(exc).__name__}.", code="bad_request")
            error.status = status
        response = error_response(error)
        response.force_close()
        return response


class GuardedServer(web.Server):
    """An aiohttp server that counts its connections and closes those that send nothing."""

    def __init__(self, handler: Any, config: ServerConfig, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self._config = config
        self._per_client: Counter[str] = Counter()
        self._clients: dict[RequestHandler, str] = {}
        self._header_timers: dict[RequestHandler, asyncio.TimerHandle] = {}
        make_request = self.request_factory

        def first_headers_arrived(message: Any, payload: Any, protocol: Any, *rest: Any) -> Any:
            self._stop_timer(protocol)
            return make_request(message, payload, protocol, *rest)

        self.request_factory = first_headers_arrived

    def __call__(self) -> RequestHandler:
        """A new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection, or close it where there are too many."""
        super().connection_made(handler, transport)
        peer = transport.get_extra_info("peername")
        client = peer[0] if isinstance(peer, tuple) and peer else ""  # Unix sockets have no address: one client each
        limits = self._config
        too_many = len(self._clients) >= limits.max_connections
        if too_many or (client and self._per_client[client] >= limits.max_connections_per_client):
            transport.abort()
            return
        self._clients[handler] = client
        self._per_client[client] += 1
        if limits.header_timeout_s:
            loop = asyncio.get_running_loop()
            self._header_timers[handler] = loop.call_later(limits.header_timeout_s, transport.abort)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        self._stop_timer(handler)
        client = self._clients.pop(handler, None)
        if client is not None:
            self._per_client[client] -= 1
            if not self._per_client[client]:
                del self._per_client[client]
        super().connection_lost(handler, exc)

    def _stop_timer(self, handler: RequestHandler) -> None:
        timer = self._header_timers.pop(handler, None)
        if timer is not None:
            timer.cancel()


class GuardedRunner(web.AppRunner):
    """An AppRunner whose server is guarded. Handlers are cancelled when their client goes away."""

    __slots__ = ("_config",)

    def __init__(self, app: web.Application, config: ServerConfig) -> None:
        # aiohttp would wait 60 s, twice, for a client that does not read; whoever had a reason to wait did so in drain.
        super().__init__(app, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._config = config

    async def _make_server(self) -> web.Server:
        # The runner offers no way to choose the server's class, so its own is made and replaced.
        plain = await super()._make_server()
        return GuardedServer(
            plain.request_handler,
            self._config,
            request_factory=plain.request_factory,
            handler_cancellation=True,
            keepalive_timeout=self._config.keep_alive_s,
            access_log=None,
        )
