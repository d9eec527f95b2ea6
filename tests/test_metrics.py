"""Plain numbers in, Prometheus text out; and the documented names."""

import gc
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncllm import metrics
from asyncllm.counters import GcPauses, Histogram
from asyncllm.metrics import Metrics
from asyncllm.types import StepStats

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"


def test_a_histogram_counts_at_and_below_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, count=3)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)]
    assert histogram.total == pytest.approx(18.0)


def samples(taken: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, `model_name` left out."""
    found = {}
    for family in text_string_to_metric_families(b"".join(taken.families()).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")
            found[f"{sample.name.removeprefix('asyncllm:')}{{{labels}}}"] = sample.value
    return found


def test_a_report_without_a_step_changes_gauges_and_counts_no_step() -> None:
    taken = Metrics("asyncllm", "m")
    taken.observe_step(StepStats(num_running=3, num_steps=1, num_scheduled_tokens=7, num_blocks=11, num_used_blocks=5))
    taken.observe_step(StepStats(num_running=0, num_steps=1, num_blocks=11))
    text = b"".join(taken.families()).decode()
    assert 'asyncllm:num_requests_running{model_name="m"} 0.0' in text
    assert 'asyncllm:iteration_tokens_total_count{model_name="m"} 1.0' in text
    assert taken.kv_usage == 0.0


def test_what_the_device_measured_is_shown_and_what_it_did_not_is_left_out() -> None:
    taken = Metrics("asyncllm", "m")
    taken.observe_step(StepStats(num_steps=1, num_decode_rows=3))
    taken.observe_step(
        StepStats(
            num_steps=2, num_graph_steps=1, device_s=0.002, gap_s=0.000012, device_busy_s=0.002, device_gap_s=1e-5
        )
    )
    shown = samples(taken)
    assert shown["step_seconds_count{phase=device}"] == 1 and shown["step_seconds_count{phase=wait}"] == 2
    assert shown["step_gap_seconds_count{}"] == 1
    assert (shown["step_gap_seconds_bucket{le=1e-05}"], shown["step_gap_seconds_bucket{le=1.5e-05}"]) == (0, 1)
    assert (shown["device_busy_seconds_total{}"], shown["device_gap_seconds_total{}"]) == (0.002, 1e-5)
    assert (shown["graph_steps_total{}"], shown["graph_hit_ratio{}"]) == (1, 0.5)
    assert (shown["step_decode_rows_bucket{le=2.0}"], shown["step_decode_rows_bucket{le=4.0}"]) == (1, 2)


def test_no_step_has_no_graph_hits() -> None:
    assert Metrics("asyncllm", "m").graph_hit_ratio == 0.0


def test_a_gap_of_nothing_is_a_gap_and_an_unknown_one_is_none() -> None:
    taken = Metrics("asyncllm", "m")
    taken.observe_step(StepStats(num_steps=1, gap_s=None))
    taken.observe_step(StepStats(num_steps=2, gap_s=0.0))
    assert samples(taken)["step_gap_seconds_count{}"] == 1


def test_waits_for_the_engine_are_counted_also_where_no_step_came_of_them() -> None:
    taken = Metrics("asyncllm", "m")
    taken.observe_step(StepStats(wakes_s=[0.00001, 2.0], aborts_s=[0.5]))
    taken.observe_step(StepStats(num_steps=1))
    shown = samples(taken)
    assert (shown["engine_wake_seconds_count{}"], shown["engine_wake_seconds_bucket{le=1.0}"]) == (2, 1)
    assert (shown["engine_abort_seconds_count{}"], shown["engine_abort_seconds_sum{}"]) == (1, 0.5)


def test_every_garbage_collection_is_timed_on_whichever_thread_it_runs() -> None:
    taken = Metrics("asyncllm", "m")
    gc.callbacks.append(taken.gc_pauses)
    try:
        before = samples(taken)
        gc.collect(1)
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    finally:
        gc.callbacks.remove(taken.gc_pauses)
    after = samples(taken)
    for generation in (1, 2):
        name = f"gc_pause_seconds_count{{generation={generation}}}"
        assert after[name] >= before[name] + 1
    assert after["gc_pause_seconds_sum{generation=2}"] > 0


def test_a_collection_that_began_before_anybody_looked_is_not_counted() -> None:
    pauses = GcPauses((1.0,))
    pauses("stop", {"generation": 2})
    assert pauses.generations[2].counts == [0, 0]


def test_the_documented_metrics_are_the_metrics_of_the_code() -> None:
    assert DOCS.read_text() == metrics.markdown(), "run make docs"
