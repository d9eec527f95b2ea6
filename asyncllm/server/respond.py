"""The answer to an admitted request, whole or streamed, the same for every API: what differs is its `Frames`.

However an answer ends (done, error, client gone), nothing of its request stays behind.
"""

import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from asyncllm.errors import AsyncLLMError, Timeout
from asyncllm.router.stream import Delta, RequestStream
from asyncllm.server.job import Job
from asyncllm.server.replies import json_response
from asyncllm.server.serving import SERVING
from asyncllm.server.sse import HEADERS, Frames, FrameSink

OPEN = b": ok\n\n"  # a comment: the headers leave with the first bytes of the body

Whole = Callable[[list[Delta]], msgspec.Struct | Sequence[msgspec.Struct | str]]


async def respond(request: web.Request, job: Job, frames: Frames, whole: Whole) -> web.StreamResponse:
    """Wait for the generated text and send it. `whole` makes the body of an answer that is not streamed."""
    try:
        return await (_stream(request, job, frames) if job.streamed else _collect(job, whole))
    finally:
        job.stream.abort()  # nothing to do where it finished


async def _collect(job: Job, whole: Whole) -> web.Response:
    choices = await job.stream.collect()
    if all(choice.finish_reason == "timeout" for choice in choices) and not job.usage().completion_tokens:
        raise Timeout("Nothing was generated within the request's timeout.", param="timeout")
    return json_response(whole(choices), headers=job.headers | {"Server-Timing": server_timing(job.stream)})


async def _stream(request: web.Request, job: Job, frames: Frames) -> web.StreamResponse:
    """Headers and the first chunk at once; then one write per wake-up; errors become an event.

    While the client keeps up, news goes from the router to the socket without this coroutine; it wakes for the end, and
    to wait where the socket is full.
    """
    serving = request.app[SERVING]
    response = web.StreamResponse(headers=HEADERS | job.headers | {"Server-Timing": server_timing(job.stream)})
    await response.prepare(request)

    with serving.streams.opened(request, response) as sse:
        serving.metrics.streams_open = len(serving.streams)
        try:
            await sse.write(frames.opening() or OPEN)
            sink = FrameSink(sse, frames, job.usage if job.continuous_usage else None)
            job.stream.attach(sink)
            while deltas := await job.stream.get():
                if chunk := sink.framed(deltas):
                    await sse.write(chunk)
            await sse.write(frames.closing())
        except AsyncLLMError as error:
            serving.metrics.errors.add(str(error.status), error.code or "none")
            await sse.write(frames.failing(error))
        finally:
            serving.metrics.streams_open = len(serving.streams) - 1
        await response.write_eof()
    return response


def server_timing(stream: RequestStream) -> str:
    """Milliseconds of queue, prefill and decode as far as they are known: the slowest choice of each.

    A stream's headers leave before any of these; it reports the time to admission only.
    """
    timings = [timing for choice in stream.choices if (timing := choice.timings()) is not None]
    if not timings:
        return f"admit;dur={(time.monotonic() - stream.arrival_s) * 1000:.2f}"
    queue, prefill, decode_s = (max(column) * 1000 for column in zip(*timings))
    return f"queue;dur={queue:.2f}, prefill;dur={prefill:.2f}, decode;dur={decode_s:.2f}"
