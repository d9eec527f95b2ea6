"""The life of the process: bind, load, serve, drain, exit. `load`, `drain` and `close` serve other programs too.

The port is bound first, so that probes are answered while the model loads. The process ends by itself where the engine
thread does, and within seconds of a dead engine whatever hangs: its supervisor can start the next one. Loop thread.
"""

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NoReturn

from aiohttp import web

from asyncllm import __version__
from asyncllm.config import Config
from asyncllm.engine.engine import Engine
from asyncllm.errors import StartupError
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.router import Router
from asyncllm.router.template_choice import choose_template
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.server.app import create_app
from asyncllm.server.connections import GuardedRunner
from asyncllm.server.serving import Serving
from asyncllm.threads import available_cores, parse_cores, pin, show_cores
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.rope import stretched

if TYPE_CHECKING:
    from asyncllm.executor.base import Executor

CLOSE_TIMEOUT_S = 5.0  # for the engine thread to end
# After the engine's death. Nothing it leaves behind is worth a wait, and all of it together must stay below 5 s.
DEAD_CLOSE_TIMEOUT_S = 1.0
DEAD_CLEANUP_TIMEOUT_S = 1.5  # for clients to take their last event
DEAD_LIMIT_S = 4.0  # then the process is ended from a thread that needs no GIL
# New objects that live until the collector looks at them, and rounds until it looks at older ones. In 22,000 steps of
# 256 sequences over a fake device, Python's own (700, 10, 10) made 165 collections, 196 ms of CPU in all, the longest
# 117 ms; these and a frozen start-up make 6, 15 ms and 4 ms, at the same resident memory. The oldest objects are left
# to `collect_when_idle`: looking at all of them took 15 to 49 ms beside prompts of 100,000 tokens.
GC_THRESHOLDS = (10_000, 10, 1_000)
IDLE_CHECK_S = 5.0

log = logging.getLogger("asyncllm")


async def serve(config: Config) -> int:
    """Run the server; returns the process's exit code.

    Raises StartupError where it cannot begin: a taken port, a missing or broken model, too little memory. Does not
    return where the engine thread hangs: then the process ends here.
    """
    sys.setswitchinterval(config.executor.switch_interval_us / 1e6)
    if config.executor.gc_freeze:
        gc.set_threshold(*GC_THRESHOLDS)
    engine_cores = place_threads(config)
    signals = Signals()
    serving = Serving(config)
    gc.callbacks.append(serving.metrics.gc_pauses)
    runner = GuardedRunner(create_app(serving), config.server)
    await runner.setup()
    ended = True
    try:
        where = await bind(runner, config)
        log.info("asyncllm %s: loading %s, listening on %s", __version__, config.model.path, where)
        code = await live(serving, engine_cores, signals)
    finally:
        signals.close()
        ended = await close(serving)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEAD_CLEANUP_TIMEOUT_S if serving.state == "dead" else None):
                await runner.cleanup()
        gc.callbacks.remove(serving.metrics.gc_pauses)
    if not ended:
        leave(code)
    return code


async def live(serving: Serving, engine_cores: Collection[int], signals: "Signals") -> int:
    """Load, then serve until a signal or the engine's death; returns the process's exit code."""
    loading = asyncio.create_task(load(serving, engine_cores))
    stop = asyncio.create_task(signals.first.wait())
    tasks = [loading, stop]
    try:
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("told to stop while loading")
            return 0
        router, code = loading.result(), 0
        settle(serving.config, engine_cores)
        dead = asyncio.create_task(router.wait_dead())
        tasks.append(dead)
        if serving.config.executor.gc_freeze:
            tasks.append(asyncio.create_task(collect_when_idle(router)))
        await asyncio.wait((dead, stop), return_when=asyncio.FIRST_COMPLETED)
        if serving.state != "dead":
            running, timeout_s = router.num_streams, serving.config.server.drain_timeout_s
            log.info("stopping: %d requests get up to %g s to finish; a second signal aborts them", running, timeout_s)
            cut = await drain(router, timeout_s, signals.second)
            code = 1 if signals.second.is_set() and cut else 0
        if serving.state == "dead":  # perhaps while it drained
            faulthandler.dump_traceback_later(DEAD_LIMIT_S, exit=True)
            log.error("the engine died: %s", await dead)
            code = 1
        return code
    finally:
        for task in tasks:
            task.cancel()


async def load(serving: Serving, engine_cores: Collection[int]) -> Router:
    """Open the model, start the engine, wait until it takes work. Raises StartupError; `close` is due then as well."""
    config, started_s = serving.config, time.perf_counter()
    with phase(serving, "open model"):
        model = config.model
        checkpoint = await asyncio.to_thread(
            open_checkpoint, model.path, model.revision, model.load_format, model.generation_config
        )
        checkpoint.architecture = stretched(checkpoint.architecture, model.rope_scaling, model.max_context_length)
    with phase(serving, "load tokenizer"):
        backend = await asyncio.to_thread(checkpoint.tokenizer)
        text = choose_template(checkpoint.text, model.chat_template, backend)
        tokenizer = await asyncio.to_thread(Tokenizer, backend, text)
    template = ChatTemplate(text, tokenizer)

    def make_executor(report: Callable[[str], None]) -> "Executor":
        report("import torch")
        from asyncllm.executor.build import build_executor  # on the engine thread: the loop stays free meanwhile

        return build_executor(config, checkpoint, report)

    engine = Engine(make_executor, config.scheduler, config.cache, speculative=config.speculative, cores=engine_cores)
    router = Router(engine, tokenizer, template, config, serving.metrics, serving.startup.phases)
    serving.attach(router)
    router.start()
    await router.wait_ready()
    serving.metrics.startup_seconds = {name: seconds or 0.0 for name, seconds in serving.startup.phases.items()}
    phases = ", ".join(f"{name} {seconds or 0:.2f}" for name, seconds in serving.startup.phases.items())
    log.info("ready in %.2f s: %s", time.perf_counter() - started_s, phases)
    facts = dict(router.facts)
    kv = facts.pop("kv", "")
    log.info("%s", ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    if kv:
        log.info("%s", kv)
    return router


async def collect_when_idle(router: Router) -> None:
    """Collect what became garbage late, while nobody waits for an answer and something was done since the last time."""
    num_collected = 0
    while True:
        await asyncio.sleep(IDLE_CHECK_S)
        num_young = gc.get_stats()[0]["collections"]
        if num_young != num_collected and not router.num_streams:
            gc.collect()
            num_collected = gc.get_stats()[0]["collections"]


def settle(config: Config, engine_cores: Collection[int]) -> None:
    """Start-up is over, in a process of our own."""
    if config.executor.gc_freeze:
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection needs to look at it again
    log.info(
        "switch interval %.0f µs, gc thresholds %s with %d objects frozen, engine on cores %s, event loop on cores %s",
        sys.getswitchinterval() * 1e6,
        gc.get_threshold(),
        gc.get_freeze_count(),
        show_cores(engine_cores or available_cores()) or "any",
        show_cores(available_cores()) or "any",
    )


def place_threads(config: Config) -> Collection[int]:
    """Pin this thread to the event loop's cores; returns those of the engine thread, none = those it inherits."""
    engine_cores = parse_cores(config.executor.engine_cores, "executor.engine_cores")
    loop_cores = parse_cores(config.executor.loop_cores, "executor.loop_cores")
    if loop_cores:
        engine_cores = engine_cores or available_cores()  # not the loop's, which the engine thread would inherit
        pin(loop_cores)
    return engine_cores


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


async def drain(router: Router, timeout_s: float, hurry: asyncio.Event) -> int:
    """Refuse new work and let requests finish; `hurry` or the timeout cuts off the rest, whose number is returned."""
    router.begin_drain()
    idle = asyncio.create_task(router.wait_idle())
    again = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait((idle, again), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (idle, again):
            task.cancel()
    if cut := router.num_streams:
        log.warning("aborting %d requests: %s", cut, ", ".join(router.stream_ids()[:20]))
        router.abort_all()
    return cut


async def close(serving: Serving) -> bool:
    """Stop the engine thread, if there is one; False where it did not end in time."""
    timeout_s = DEAD_CLOSE_TIMEOUT_S if serving.state == "dead" else CLOSE_TIMEOUT_S
    ended = not serving.attached or await serving.router.close(timeout_s)
    if not ended:
        log.warning("the engine thread did not end within %g s", timeout_s)
    return ended


def leave(code: int) -> NoReturn:
    """End the process at once: where a thread hangs in a driver, the exit hooks of the driver may hang as well."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
