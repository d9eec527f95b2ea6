"""What many samples come down to: mean, percentiles, medians over rounds."""

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest ranks, as numpy's default; NaN of nothing."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


class Summary(msgspec.Struct, frozen=True):
    """A distribution on one line of a table; all None where there were no samples, since JSON knows no NaN."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """Summarise samples, in their unit."""
        if not samples:
            return cls(0)
        return cls(len(samples), statistics.fmean(samples), *(percentile(samples, q) for q in (50, 90, 99)))


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known, or None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """A quotient rounded to three digits, or None where a side is missing or zero."""
    return round(numerator / denominator, 3) if numerator is not None and denominator else None
