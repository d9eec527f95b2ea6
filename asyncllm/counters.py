"""Numbers that add up: histograms, counters by label, and the pauses of the garbage collector.

No locks: each has one writer at a time. Knows nothing of what is counted or who reads it.
"""

import time
from bisect import bisect_left


class Histogram:
    """Counts per bucket and a sum; `bounds` are inclusive upper bounds in ascending order."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:  # hot
        """Count `value` `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative (le, count) pairs, ending in +Inf."""
        running, rows = 0, []
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            running += count
            rows.append((bound, float(running)))
        return rows


class LabelledCounter:
    """A counter per tuple of label values."""

    __slots__ = ("labels", "values")

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self.values: dict[tuple[str, ...], int] = {}

    def add(self, *key: str, count: int = 1) -> None:
        """Count once more for these label values."""
        self.values[key] = self.values.get(key, 0) + count


class GcPauses:
    """How long the garbage collector held the process up, by generation; an entry of `gc.callbacks`.

    Any thread: whichever allocates too much runs the collector. It never runs twice at a time, callbacks included, so a
    single start time will do, and nobody waits for a lock.
    """

    __slots__ = ("_started_s", "generations")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.generations = tuple(Histogram(bounds) for _ in range(3))
        self._started_s = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """The collector starts or stops."""
        if phase == "start":
            self._started_s = time.perf_counter()
        elif self._started_s:  # not where it was running as this callback came in
            self.generations[info["generation"]].observe(time.perf_counter() - self._started_s)
            self._started_s = 0.0
