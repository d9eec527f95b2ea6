"""A completion server in a few lines, on a real socket: says one word per token, as strictly as it is told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer


class SseServer:
    """What it was asked, and how it shall answer."""

    def __init__(
        self,
        *,
        with_usage: bool = True,
        refuse_ignore_eos: bool = False,
        fail_every: int = 0,  # every so-many-th request gets a 500
        cut_streams: bool = False,  # streams end without a word about why
        error_in_stream: bool = False,
        wait_for: int = 0,  # answer nobody until so many requests are open
    ) -> None:
        self.with_usage = with_usage
        self.refuse_ignore_eos = refuse_ignore_eos
        self.fail_every = fail_every
        self.cut_streams = cut_streams
        self.error_in_stream = error_in_stream
        self.bodies: list[dict[str, Any]] = []
        self.ports: set[int] = set()  # of the clients: one a connection
        self.url = ""
        self._barrier = asyncio.Barrier(wait_for) if wait_for else None

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["SseServer"]:
        """Listen until the block ends."""
        async with TestServer(self.app()) as server:
            self.url = str(server.make_url("")).rstrip("/")
            yield self

    def app(self) -> web.Application:
        """Its routes, to be served by whoever wants it in a process of its own."""
        app = web.Application()
        app.router.add_get("/health", _is_well)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.bodies.append(body)
        assert request.transport is not None
        self.ports.add(request.transport.get_extra_info("peername")[1])
        if self.refuse_ignore_eos and "ignore_eos" in body:
            return web.json_response({"detail": "Unexpected fields in the request: {'ignore_eos'}"}, status=422)
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            return web.json_response({"error": {"message": "out of luck"}}, status=500)
        if self._barrier is not None:
            await self._barrier.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = request.path.startswith("/v1/chat")
        for event in self._events(body["max_tokens"], is_chat):
            await response.write(b"data: " + event + b"\n\n")
        return response

    def _events(self, num_tokens: int, is_chat: bool) -> list[bytes]:
        """The data of each event of a stream."""
        words: list[dict[str, Any]] = [{"text": " word"}] * num_tokens
        if is_chat:
            words = [{"delta": {"role": "assistant", "content": ""}}, *[{"delta": {"content": " word"}}] * num_tokens]
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, **word}], "usage": None} for word in words]
        return [*map(msgspec.json.encode, events + self._ending(num_tokens, is_chat)), b"[DONE]"]

    def _ending(self, num_tokens: int, is_chat: bool) -> list[dict[str, Any]]:
        if self.error_in_stream:
            return [{"error": {"message": "the engine died"}}]
        if self.cut_streams:
            return []
        last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        finish = {"choices": [{"index": 0, **last, "finish_reason": "length"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": num_tokens}}
        return [finish, usage] if self.with_usage else [finish]


async def _is_well(_: web.Request) -> web.Response:
    return web.Response()
