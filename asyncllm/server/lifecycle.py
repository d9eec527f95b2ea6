"""The life of the process: bind, load, serve, drain, exit.

The port is bound first, so that probes are answered while the model loads. Loop thread.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from aiohttp import web

from asyncllm import __version__
from asyncllm.config import Config
from asyncllm.engine.engine import Engine
from asyncllm.errors import StartupError
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.router import Router
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.app import create_app
from asyncllm.server.connections import GuardedRunner
from asyncllm.server.serving import Serving
from asyncllm.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from asyncllm.executor.base import Executor

CLOSE_TIMEOUT_S = 5.0

log = logging.getLogger("asyncllm")


async def serve(config: Config) -> int:
    """Run the server; returns the process's exit code.

    Raises StartupError where it cannot begin: a taken port, a missing or broken model, too little memory.
    """
    sys.setswitchinterval(config.executor.switch_interval_us / 1e6)
    signals = Signals()
    serving = Serving(config)
    runner = GuardedRunner(create_app(serving), config.server)
    await runner.setup()
    try:
        where = await bind(runner, config)
        log.info("asyncllm %s: loading %s, listening on %s", __version__, config.model.path, where)
        return await live(serving, signals)
    finally:
        signals.close()
        await runner.cleanup()


async def live(serving: Serving, signals: "Signals") -> int:
    """Load, then serve until a signal or the engine's death."""
    loading = asyncio.create_task(load(serving))
    stop = asyncio.create_task(signals.first.wait())
    try:
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("told to stop while loading")
            return 0
        router = loading.result()
        dead = asyncio.create_task(router.wait_dead())
        await asyncio.wait((dead, stop), return_when=asyncio.FIRST_COMPLETED)
        if dead.done():
            log.error("the engine died: %s", dead.result())
            return 1
        dead.cancel()
        return await drain(router, serving.config.server.drain_timeout_s, signals)
    finally:
        loading.cancel()
        stop.cancel()
        await close(serving)


async def load(serving: Serving) -> Router:
    """Open the model, start the engine, wait until it takes work."""
    config, started_s = serving.config, time.perf_counter()
    with phase(serving, "open model"):
        checkpoint = await asyncio.to_thread(open_checkpoint, config.model.path, config.model.revision)
    with phase(serving, "load tokenizer"):
        tokenizer = await asyncio.to_thread(lambda: Tokenizer(checkpoint.tokenizer(), checkpoint.text))
    template = ChatTemplate(checkpoint.text, tokenizer)

    def make_executor(report: Callable[[str], None]) -> "Executor":
        report("import torch")
        from asyncllm.executor.build import build_executor  # on the engine thread: the loop stays free meanwhile

        return build_executor(config, checkpoint, report)

    engine = Engine(make_executor, config.scheduler, config.cache)
    router = Router(engine, tokenizer, template, config, serving.metrics, serving.startup.phases)
    serving.attach(router)
    router.start()
    await router.wait_ready()
    gc.collect()
    gc.freeze()  # what start-up made stays: no collection needs to look at it again
    serving.metrics.startup_seconds = {name: seconds or 0.0 for name, seconds in serving.startup.phases.items()}
    phases = ", ".join(f"{name} {seconds or 0:.2f}" for name, seconds in serving.startup.phases.items())
    log.info("ready in %.2f s: %s", time.perf_counter() - started_s, phases)
    facts = dict(router.facts)
    kv = facts.pop("kv", "")
    log.info("%s", ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    if kv:
        log.info("%s", kv)
    return router


@contextlib.contextmanager
def phase(serving: Serving, name: str) -> Iterator[None]:
    """Time a phase of start-up for /startupz."""
    phases, started_s = serving.startup.phases, time.perf_counter()
    phases[name] = None
    yield
    phases[name] = time.perf_counter() - started_s


async def bind(runner: web.BaseRunner, config: Config) -> str:
    """Listen; returns the address as a user would write it."""
    server = config.server
    try:
        if server.unix_socket:
            await web.UnixSite(runner, server.unix_socket).start()
            return f"unix:{server.unix_socket}"
        await web.TCPSite(runner, server.host, server.port).start()
    except OSError as error:
        target = server.unix_socket or f"{server.host}:{server.port}"
        reason = error.strerror or str(error)
        raise StartupError(
            f"cannot listen on {target}: {reason} (server.host, server.port, server.unix_socket)"
        ) from None
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"


async def drain(router: Router, timeout_s: float, signals: "Signals") -> int:
    """Refuse new work, let running requests finish; a second signal or the timeout cuts them off."""
    router.begin_drain()
    running = router.num_streams
    log.info("stopping: %d requests get up to %g s to finish; a second signal aborts them", running, timeout_s)
    idle = asyncio.create_task(router.wait_idle())
    again = asyncio.create_task(signals.second.wait())
    await asyncio.wait((idle, again), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (idle, again):
        task.cancel()
    if cut := router.num_streams:
        log.warning("aborting %d requests: %s", cut, ", ".join(router.stream_ids()[:20]))
        router.abort_all()
    return 1 if signals.second.is_set() and cut else 0


async def close(serving: Serving) -> None:
    """Stop the engine thread, if there is one."""
    if serving.attached and not await serving.router.close(CLOSE_TIMEOUT_S):
        log.warning("the engine thread did not end within %g s", CLOSE_TIMEOUT_S)


class Signals:
    """SIGTERM and SIGINT as two events: the first asks, the second insists."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def close(self) -> None:
        """Give the signals back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
