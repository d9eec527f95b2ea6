"""What operators and load balancers ask: probes, models, load, version, metrics, abort."""

import os
import platform
import time

from aiohttp import web

from asyncllm import __version__
from asyncllm.errors import NotFound, show
from asyncllm.server.body import check_content_type, decode_body, read_body
from asyncllm.server.pause import Pause
from asyncllm.server.probe_wire import (
    Aborted,
    Health,
    Liveness,
    Load,
    Memory,
    ModelCard,
    ModelList,
    Readiness,
    StartupProgress,
    Version,
)
from asyncllm.server.replies import json_response
from asyncllm.server.serving import SERVING, Serving, version_of
from asyncllm.server.wire import AbortRequest

RETRY = {"Retry-After": "1"}
METRICS_PIECE_S = 0.004  # of writing them, before the loop looks at everybody else


async def livez(request: web.Request) -> web.Response:
    """The process answers and its engine has not died."""
    alive = request.app[SERVING].state != "dead"
    return json_response(Liveness("alive" if alive else "dead"), status=200 if alive else 503)


async def readyz(request: web.Request) -> web.Response:
    """Work is accepted; 503 with the reason where it is not."""
    serving = request.app[SERVING]
    if serving.state == "ready":
        return json_response(Readiness("ready"))
    return json_response(Readiness(serving.state, serving.startup.phase), status=503, headers=RETRY)


async def startupz(request: web.Request) -> web.Response:
    """Progress of start-up by phase, in seconds; null for the phase that runs. 503 until it is over."""
    serving = request.app[SERVING]
    started = serving.state in ("ready", "draining")
    answer = StartupProgress(
        status="started" if started else serving.state,
        phase=serving.startup.phase,
        phases={name: _rounded(seconds) for name, seconds in serving.startup.phases.items()},
        error=serving.startup.error,
    )
    return json_response(answer, status=200 if started else 503, headers=None if started else RETRY)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


async def health(request: web.Request) -> web.Response:
    """Liveness with details."""
    serving = request.app[SERVING]
    state = serving.state
    answer = Health(
        status={"ready": "healthy", "dead": "unhealthy"}.get(state, state),
        timestamp=time.time(),
        backend="torch",
        model=serving.model_name,
        device=serving.facts.get("device", "unknown"),
        memory=Memory(resident_bytes(), round(serving.metrics.kv_usage, 4)),
        details=serving.facts,
    )
    return json_response(answer, status=503 if state == "dead" else 200)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc is not to be had."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


async def load(request: web.Request) -> web.Response:
    """What runs, what waits and how full the KV cache is."""
    metrics = request.app[SERVING].metrics
    stats = metrics.stats
    return json_response(
        Load(
            running=stats.num_running,
            waiting=stats.num_waiting,
            waiting_tokens=stats.num_waiting_tokens,
            kv_cache_usage=round(metrics.kv_usage, 6),
            streams=metrics.streams_open,
        )
    )


async def version(request: web.Request) -> web.Response:
    """Version and build."""
    return json_response(
        Version(
            version=__version__,
            python=platform.python_version(),
            torch=version_of("torch"),
            transformers=version_of("transformers"),
            aiohttp=version_of("aiohttp"),
        )
    )


def _model_card(serving: Serving, name: str) -> ModelCard:
    router = serving.router
    context = router.capacity.max_context_length if router.capacity else None
    return ModelCard(
        id=name,
        created=serving.created,
        root=name if name in serving.adapters else serving.model_name,
        parent=serving.model_name if name in serving.adapters else None,
        max_model_len=context,
        context_length=context,
    )


async def models(request: web.Request) -> web.Response:
    """The served model under all its names, and its adapters."""
    serving = request.app[SERVING]
    return json_response(ModelList(data=[_model_card(serving, name) for name in serving.listed_names]))


async def model(request: web.Request) -> web.Response:
    """One model; 404 for a name that is not served."""
    serving = request.app[SERVING]
    name = request.match_info["id"]
    serving.check_model(name)
    return json_response(_model_card(serving, name))


async def abort(request: web.Request) -> web.Response:
    """End a request by the id of its answer or by the x-request-id it came with."""
    serving = request.app[SERVING]
    check_content_type(request)
    raw = await read_body(request, serving.config.api.max_body_bytes, serving.config.server.body_timeout_s)
    body, _ = await decode_body(raw, AbortRequest)
    prefixes = ("", "chatcmpl-", "cmpl-", "resp_", "msg_", "embd-", "gen-", "chat-")
    aborted = [p + body.request_id for p in prefixes if serving.router.abort(p + body.request_id)]
    if not aborted:
        raise NotFound(f"No request {show(body.request_id)!r} is running.", param="request_id")
    return json_response(Aborted(aborted))


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text format."""
    families, pause = [], Pause(METRICS_PIECE_S)
    for family in request.app[SERVING].metrics.families():
        families.append(family)
        await pause.when_due()
    return web.Response(body=b"".join(families), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
