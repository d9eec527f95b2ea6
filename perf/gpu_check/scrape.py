"""What a running server says about itself: its Prometheus text, and the processor time of each of its threads.

Differences between two looks, so that a figure is of one run and not of the server's life. Linux.
"""

import re

import msgspec

from perf.facts import PROC, TICKS_PER_S
from perf.stats import ratio

SAMPLE = re.compile(r"^(?:[a-zA-Z_]\w*:)?(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")
LE = re.compile(r'le="([^"]+)"')


class Look(msgspec.Struct, frozen=True):
    """One look: sample name -> sum over its labels, histogram -> cumulative counts, thread -> seconds."""

    samples: dict[str, float]
    buckets: dict[str, dict[float, float]]  # name -> upper bound -> observations up to it
    loop_s: float  # of the event loop, which is the main thread
    other_s: float  # of all other threads


def parse(text: str) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """Samples and histogram buckets of the Prometheus text format, prefixes cut off."""
    samples: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match is None:
            continue
        name, value = match["name"], float(match["value"])
        bound = LE.search(match["labels"] or "")
        if name.endswith("_bucket") and bound:
            counts = buckets.setdefault(name.removesuffix("_bucket"), {})
            counts[float(bound[1])] = counts.get(float(bound[1]), 0.0) + value
        else:
            samples[name] = samples.get(name, 0.0) + value
    return samples, buckets


def thread_seconds(pid: int) -> dict[int, float]:
    """Processor time by thread id."""
    seconds = {}
    for stat in (PROC / str(pid) / "task").glob("*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        seconds[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return seconds


def look(pid: int, metrics: str) -> Look:
    """The server's state now, from its process id and the text of /metrics."""
    samples, buckets = parse(metrics)
    threads = thread_seconds(pid)
    loop_s = threads.pop(pid, 0.0)
    return Look(samples, buckets, loop_s, sum(threads.values()))


def quantile(before: dict[float, float], after: dict[float, float], q: float) -> float | None:
    """The q-th quantile (0 to 1) of what was observed in between, linear within its bucket; None of nothing."""
    bounds = sorted(after)
    counts = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    if not counts or counts[-1] <= 0:
        return None
    wanted = q * counts[-1]
    low, below = 0.0, 0.0
    for bound, count in zip(bounds, counts):
        if count >= wanted:
            # Nothing is known beyond the last finite bound.
            return low if bound == float("inf") else low + (bound - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = bound, count
    return low


def differences(before: Look, after: Look, num_tokens: int) -> dict[str, float | None]:
    """What a run of `num_tokens` streamed tokens cost, and how well the device was fed meanwhile."""

    def grown(name: str) -> float:
        return after.samples.get(name, 0.0) - before.samples.get(name, 0.0)

    busy_s, gap_s = grown("device_busy_seconds_total"), grown("device_gap_seconds_total")
    gaps_before, gaps_after = (side.buckets.get("step_gap_seconds", {}) for side in (before, after))
    return {
        "device_busy_fraction": ratio(busy_s, busy_s + gap_s),
        "step_gap_s_p50": quantile(gaps_before, gaps_after, 0.5),
        "step_gap_s_p99": quantile(gaps_before, gaps_after, 0.99),
        "loop_cpu_us_per_token": ratio((after.loop_s - before.loop_s) * 1e6, num_tokens),
        "other_threads_cpu_us_per_token": ratio((after.other_s - before.other_s) * 1e6, num_tokens),
    }
