"""One cell: a server thawed, loaded by the clients' process, settled and frozen again; what it showed, from all sides.

Knows nothing of rounds or medians.
"""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import msgspec

from perf import facts
from perf.frontend import board as at
from perf.frontend import lab
from perf.frontend.clients import Cell, Outcome
from perf.frontend.cpu import reset_peak
from perf.frontend.lab import Subject
from perf.gpu_check import scrape

CLIENT_TIMEOUT_S = 120.0  # beyond ramp and window
SETTLE_TIMEOUT_S = 20.0
POLL_S = 0.02

Figures = tuple[dict[str, float], dict[str, dict[float, float]]]  # samples and histograms by name


class CellError(Exception):
    """A cell gave no figures; the message holds what the processes said."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How one server is loaded in one cell."""

    num_streams: int
    step_s: float
    window_s: float
    num_tokens: int  # of each request; the clients leave before
    ramp_s: float = 0.5
    streamed: bool = True
    traced: bool = False  # the outcome holds when each event arrived
    paced: bool = False  # the device waits for those who write


class Seen(msgspec.Struct, frozen=True):
    """What one cell showed."""

    plan: Plan
    outcome: Outcome
    steps: list[tuple[float, ...]]  # rows of the board, of the window
    commits_s: list[float]  # of the window, and some before
    buckets: dict[str, dict[float, float]]  # growth of the server's histograms over the whole cell
    peak_rss_bytes: int
    beside: Any = None  # what `meanwhile` returned


def run(subject: Subject, plan: Plan, meanwhile: Callable[[Subject], Any] | None = None) -> Seen:
    """Measure. `meanwhile` runs in this process once all streams are open. Raises CellError."""
    cells = subject.board.cells
    cells[at.STEP_S], cells[at.PACED] = plan.step_s, plan.paced
    subject.server.resume()
    try:
        before = _figures(subject)
        reset_peak(subject.pid)
        outcome, beside = _clients(subject, plan, meanwhile)
        # Before the rings come round again.
        steps = subject.board.steps(outcome.first_step, outcome.last_step)
        commits_s = subject.board.ring(at.COMMITS_AT, max(0, outcome.first_commit - 512), outcome.last_commit)
        peak_bytes = facts.memory(subject.pid).peak_bytes
        if steps and steps[-1][at.ROWS] < plan.num_streams:
            raise CellError(f"{subject.name}: answers of {plan.num_tokens} tokens ended before the window did")
        after = _settled(subject)
    finally:
        subject.server.pause()
    buckets = {
        name: {bound: count - before[1].get(name, {}).get(bound, 0.0) for bound, count in counts.items()}
        for name, counts in after[1].items()
    }
    return Seen(plan, outcome, steps, commits_s, buckets, peak_bytes, beside)


def _clients(subject: Subject, plan: Plan, meanwhile: Callable[[Subject], Any] | None) -> tuple[Outcome, Any]:
    cell = Cell(
        port=subject.server.port,
        pid=subject.pid,
        board=subject.board.path,
        num_streams=plan.num_streams,
        path=lab.PATH,
        body=lab.body(plan.num_tokens, plan.streamed),
        ramp_s=plan.ramp_s,
        window_s=plan.window_s,
        streamed=plan.streamed,
        traced=plan.traced,
    )
    num_submits, beside = subject.board.count(at.NUM_SUBMITS), None
    client = subprocess.Popen(
        [sys.executable, "-m", "perf.frontend.clients", msgspec.json.encode(cell).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        if meanwhile is not None:
            while subject.board.count(at.NUM_SUBMITS) < num_submits + plan.num_streams and client.poll() is None:
                time.sleep(POLL_S)
            time.sleep(plan.ramp_s)
            beside = meanwhile(subject)
        output, errors = client.communicate(timeout=plan.ramp_s + plan.window_s + CLIENT_TIMEOUT_S)
    finally:
        if client.poll() is None:
            client.kill()
            client.communicate()
    if client.returncode:
        words = f"{subject.name}, {plan.num_streams} streams: {errors.decode()}"
        raise CellError(words + subject.server.log_tail())
    return msgspec.json.decode(output, type=Outcome), beside


def _settled(subject: Subject) -> Figures:
    """The server's own figures once its clients are gone, and all of theirs with them."""
    end_s = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < end_s:
        samples, buckets = _figures(subject)
        left = ("num_requests_running", "num_requests_waiting", "streams_open")
        if not any(samples.get(name) for name in left):
            return samples, buckets
        time.sleep(POLL_S)
    raise CellError("requests are left behind though their clients are gone")


def _figures(subject: Subject) -> Figures:
    if not subject.is_ours:
        return {}, {}
    with urllib.request.urlopen(f"{subject.server.url}/metrics", timeout=10) as response:
        return scrape.parse(response.read().decode())
