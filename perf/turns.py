"""Servers measured in turns: one runs, all others are frozen. What `perf.compare` and `perf.peers` have in common.

Knows running servers and loads; knows nothing of what is compared with what.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable
from types import FrameType
from typing import NamedTuple

import msgspec

from perf import facts, load
from perf.servers import Server, ServerError


class Cores(NamedTuple):
    """Cores kept busy on average while a cell was measured."""

    foreign: float  # by anybody else: the noise
    client: float
    server: float


def in_turns(names: Iterable[str], turn: int) -> list[str]:
    """The order of round `turn`; it rotates, so that nobody always runs behind the same neighbour."""
    order = list(names)
    shift = turn % max(1, len(order))
    return order[shift:] + order[:shift]


def timed(server: Server, params: load.LoadParams) -> tuple[load.LoadResult, Cores]:
    """Wake the server, run one load on it, freeze it again."""
    server.resume()
    clock = facts.CpuClock([os.getpid(), *server.pids])
    result = asyncio.run(load.run(params))
    client_cores, *server_cores = clock.own_cores()
    cores = Cores(clock.foreign_cores(), client_cores, sum(server_cores))
    server.pause()
    return result, cores


def first_answer_s(server: Server, params: load.LoadParams) -> float:
    """Seconds from process start to the end of a first answer of one token, rounded to milliseconds.

    What a server does at its first request counts as its start, too. Raises ServerError where the request fails.
    """
    request = msgspec.structs.replace(params.request, output_tokens=1)
    params = msgspec.structs.replace(params, request=request, num_requests=1, concurrency=1, num_warmup=0)
    result = asyncio.run(load.run(params))
    if result.num_failed:
        raise ServerError(f"{server.spec.name} failed its first request: {result.failures}\n{server.log_tail()}")
    return round(time.perf_counter() - server.started_at_s, 3)


def progress(line: str) -> None:
    """Tell whoever waits; standard output holds the results alone."""
    print(line, file=sys.stderr, flush=True)


def unwind_on_sigterm() -> None:
    """SIGTERM must unwind the stack as Ctrl-C does: the servers have no terminal to tell them."""
    signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
