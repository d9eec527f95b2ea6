"""Plain numbers in, Prometheus text out; and the documented names."""

from pathlib import Path

import pytest

from asyncllm import metrics
from asyncllm.metrics import Histogram, Metrics
from asyncllm.types import StepStats

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def test_a_histogram_counts_at_and_below_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, count=3)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)]
    assert histogram.total == pytest.approx(18.0)


def test_a_report_without_a_step_changes_gauges_and_counts_no_step() -> None:
    taken = Metrics("asyncllm", "m")
    taken.observe_step(StepStats(num_running=3, num_steps=1, num_scheduled_tokens=7, num_blocks=11, num_used_blocks=5))
    taken.observe_step(StepStats(num_running=0, num_steps=1, num_blocks=11))
    text = taken.render().decode()
    assert 'asyncllm:num_requests_running{model_name="m"} 0.0' in text
    assert 'asyncllm:iteration_tokens_total_count{model_name="m"} 1.0' in text
    assert taken.kv_usage == 0.0


def test_the_documented_metrics_are_the_metrics_of_the_code() -> None:
    assert DOCS.read_text() == metrics.markdown(), "run make docs"
