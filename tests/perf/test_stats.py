"""Percentiles and medians."""

import math
import random

import numpy as np
import pytest

from perf.stats import Summary, median, percentile, ratio


@pytest.mark.parametrize("seed", range(20))
def test_percentiles_are_numpys(seed: int) -> None:
    rng = random.Random(seed)
    samples = [rng.expovariate(3) for _ in range(rng.randint(1, 200))]
    for q in (0, 50, 90, 99, 100):
        assert percentile(samples, q) == pytest.approx(np.percentile(samples, q))


def test_a_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 50))


def test_a_summary_of_nothing_is_null_and_not_nan() -> None:
    assert Summary.of([]) == Summary(0, None, None, None, None)


def test_a_summary_names_mean_and_percentiles() -> None:
    summary = Summary.of([1.0, 2.0, 3.0, 10.0])

    assert (summary.count, summary.mean, summary.p50) == (4, 4.0, 2.5)
    assert (summary.p90, summary.p99) == (pytest.approx(7.9), pytest.approx(9.79))


def test_a_median_leaves_out_what_is_unknown() -> None:
    assert median([None, 3.0, 1.0, None, 8.0]) == 3.0
    assert median([None]) is None


def test_a_ratio_to_nothing_is_unknown() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, 0.0) is None
    assert ratio(None, 2.0) is None
    assert ratio(0.0, 2.0) == 0.0
