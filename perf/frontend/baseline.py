"""Yardstick (b), the ordinary design: FastAPI and uvicorn, a queue per request, `json.dumps` per token.

    python -m perf.frontend.baseline PORT FRAME_FILE

A producer thread stands in for the engine: per step and request, one `call_soon_threadsafe` puts a text into the
request's `asyncio.Queue`; the request's generator takes it out, makes the same event as FRAME_FILE holds, and yields it
to a `StreamingResponse`. No tokenizer, no stop strings, no metrics. The board holds the step time; PACED, the producer
stays at most two steps ahead of what was sent, which is the best case for this design: without that, it drowns in its
own queues.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from perf.frontend import board as at
from perf.frontend.board import Board

MAX_STEPS_AHEAD = 2
POLL_S = 0.0001


class Producer:
    """The thread that makes tokens for whoever is there."""

    def __init__(self, board: Board, text: str) -> None:
        self._cells = board.cells
        self._text = text
        self._loop: asyncio.AbstractEventLoop
        self._queues: list[asyncio.Queue[str]] = []
        self.num_sent = 0  # by the generators, since the last request left
        self._num_made = 0

    def start(self) -> None:
        """Called on the loop."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="producer", daemon=True).start()

    def enter(self) -> asyncio.Queue[str]:
        """A request begins."""
        queue = asyncio.Queue[str]()
        self._queues = [*self._queues, queue]
        return queue

    def leave(self, queue: asyncio.Queue[str]) -> None:
        """A request ended; what it did not take is nobody's, so the count begins anew."""
        self._queues = [other for other in self._queues if other is not queue]
        self.num_sent = self._num_made = 0

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            queues = self._queues
            due_s = max(due_s + self._cells[at.STEP_S], time.monotonic())
            time.sleep(max(due_s - time.monotonic(), 0.0 if queues else 0.001))
            while self._cells[at.PACED] and self._num_made - self.num_sent > (MAX_STEPS_AHEAD - 1) * len(queues):
                time.sleep(POLL_S)
                queues = self._queues
            for queue in queues:
                self._loop.call_soon_threadsafe(queue.put_nowait, self._text)
            self._num_made += len(queues)


def create_app(board: Board, frame: bytes) -> FastAPI:
    """The application."""
    event = json.loads(frame[frame.index(b"{") : frame.rindex(b"}") + 1])
    producer = Producer(board, event["choices"][0]["text"])

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        producer.start()
        yield

    app = FastAPI(lifespan=lifespan)

    async def events() -> AsyncIterator[str]:
        queue = producer.enter()
        try:
            while True:
                text = await queue.get()
                choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
                yield f"data: {json.dumps(event | {'choices': [choice]})}\n\n"
                producer.num_sent += 1
        finally:
            producer.leave(queue)

    @app.get("/")
    async def ready() -> dict[str, str]:
        """Welcome."""
        return {}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        """A stream without end."""
        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    application = create_app(Board(os.environ[at.VARIABLE]), Path(sys.argv[2]).read_bytes())
    uvicorn.run(application, port=int(sys.argv[1]), loop="uvloop", log_level="warning", access_log=False)
