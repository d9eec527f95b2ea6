"""What the process counts about itself, as plain numbers, and their Prometheus form.

Everything here is owned by the loop thread: the engine's counters arrive inside `StepStats`, so no lock is needed and
an observation is a bisection. `Metrics.render` turns the numbers into text when somebody scrapes, not before.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncllm.counters import GcPauses, Histogram, LabelledCounter
from asyncllm.types import StepStats

# Histograms reach well below 10 ms: a small model on a good GPU makes a token in half a millisecond.
# fmt: off
SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)
# fmt: on
FINE_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
# What should be next to nothing: the device's gap between two graphs is good at 15 µs and bad at 100.
FINEST_SECONDS = (0.000005, 0.00001, 0.000015, 0.000025, *FINE_SECONDS)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
STEP_ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

LABELLED_HELP = {
    "request_success": "Finished choices",
    "admission_rejections": "Requests refused before the queue",
    "http_requests": "HTTP responses",
    "http_errors": "Error responses",
}
STEP_PHASES = ("schedule", "launch", "wait", "commit", "device")


class Metrics:
    """All numbers of this process. Loop thread only, but for `gc_pauses`."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.prefix = prefix
        self.model_name = model_name
        self.stats = StepStats()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.ring_depth = {"requests": 0, "outputs": 0}
        self.startup_seconds: dict[str, float] = {}
        self.streams_open = 0
        self.finished = LabelledCounter("finished_reason")
        self.rejected = LabelledCounter("reason")
        self.http_requests = LabelledCounter("route", "method", "status")
        self.errors = LabelledCounter("status", "code")
        self.ignored_parameters = 0
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token = Histogram(FINE_SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.prompt_length = Histogram(TOKENS)
        self.generation_length = Histogram(TOKENS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.step_rows = Histogram(STEP_ROWS)
        self.step_gap = Histogram(FINEST_SECONDS)
        self.engine_wake = Histogram(FINEST_SECONDS)
        self.engine_abort = Histogram(FINEST_SECONDS)
        self.gc_pauses = GcPauses(FINEST_SECONDS)
        self.step_phases = {phase: Histogram(FINE_SECONDS) for phase in STEP_PHASES}
        self.loop_lag = Histogram(FINE_SECONDS)
        self.wakeup = Histogram(FINE_SECONDS)
        self.started_s = time.time()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(_Exporter(self))

    # --- observations: called by the router and the server -----------------------------------------------------------

    def observe_step(self, stats: StepStats) -> None:  # hot: once per step
        """Take over a step's figures."""
        stepped = stats.num_steps != self.stats.num_steps
        self.stats = stats
        for seconds in stats.wakes_s or ():
            self.engine_wake.observe(seconds)
        for seconds in stats.aborts_s or ():
            self.engine_abort.observe(seconds)
        if not stepped:  # the state changed without a step: an abort, an idle report
            return
        self.step_tokens.observe(stats.num_scheduled_tokens)
        self.step_rows.observe(stats.num_decode_rows)
        if stats.gap_s is not None:
            self.step_gap.observe(stats.gap_s)
        phases = self.step_phases
        phases["schedule"].observe(stats.schedule_s)
        phases["launch"].observe(stats.launch_s)
        phases["wait"].observe(stats.wait_s)
        phases["commit"].observe(stats.commit_s)
        if stats.device_s:
            phases["device"].observe(stats.device_s)

    def observe_queue(self, seconds: float) -> None:
        """A request left the queue."""
        self.queue.observe(seconds)

    def observe_first_token(self, seconds: float) -> None:
        """A choice's first token arrived at the loop, `seconds` after its request."""
        self.generation_tokens += 1
        self.time_to_first_token.observe(seconds)

    def observe_inter_token(self, seconds: float, count: int = 1) -> None:  # hot: once per token
        """`count` tokens came, each `seconds` after the one before."""
        self.generation_tokens += count
        self.inter_token.observe(seconds, count)

    def observe_finished(
        self,
        reason: str,
        e2e_s: float,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        prefill_s: float,
        decode_s: float,
    ) -> None:
        """A choice ended."""
        self.finished.add(reason)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.end_to_end.observe(e2e_s)
        self.prefill.observe(prefill_s)
        self.decode.observe(decode_s)
        self.inference.observe(prefill_s + decode_s)
        self.prompt_length.observe(prompt_tokens)
        self.generation_length.observe(output_tokens)

    def count_rejected(self, reason: str) -> None:
        """A request was refused before it entered the queue."""
        self.rejected.add(reason)

    def observe_wakeup(self, seconds: float) -> None:  # hot: once per step
        """Time from the engine's commit to the loop's drain."""
        self.wakeup.observe(seconds)

    def set_ring_depth(self, requests: int, outputs: int) -> None:
        """Items in the two rings at the last drain."""
        self.ring_depth["requests"] = requests
        self.ring_depth["outputs"] = outputs

    def labelled_counters(self) -> list[tuple[str, LabelledCounter]]:
        """Counters by label values, with their names."""
        return [
            ("request_success", self.finished),
            ("admission_rejections", self.rejected),
            ("http_requests", self.http_requests),
            ("http_errors", self.errors),
        ]

    # --- the way out ------------------------------------------------------------------------------------------------

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks held by sequences, 0..1."""
        usable = self.stats.num_blocks - 1
        return self.stats.num_used_blocks / usable if usable > 0 else 0.0

    @property
    def graph_hit_ratio(self) -> float:
        """Share of steps that a captured graph computed, 0..1."""
        return self.stats.num_graph_steps / self.stats.num_steps if self.stats.num_steps else 0.0

    def families(self) -> Iterator[bytes]:
        """The Prometheus text format, one metric at a time: all of them take 2 ms, and 8 on a busy machine."""
        for family in self._registry.collect():
            yield generate_latest(_One(family))


class _One(CollectorRegistry):
    """A registry of one metric that was collected already."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class _Exporter(Collector):
    """Turns the numbers into metric families at scrape time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        metrics, stats = self._metrics, self._metrics.stats
        rows: list[tuple[str, str, float]] = [
            ("num_requests_running", "Sequences in the running batch", stats.num_running),
            ("num_requests_waiting", "Sequences waiting to be scheduled", stats.num_waiting),
            ("num_waiting_tokens", "Prompt tokens waiting to be scheduled", stats.num_waiting_tokens),
            ("kv_cache_usage_perc", "KV blocks held by sequences, 1 = all", metrics.kv_usage),
            ("num_kv_blocks", "KV blocks in all, the null block included", stats.num_blocks),
            ("num_cached_kv_blocks", "Free KV blocks whose prefix can still be found", stats.num_cached_blocks),
            ("streams_open", "Server-Sent Event streams open", metrics.streams_open),
            ("graph_hit_ratio", "Share of steps replayed from a captured graph, 1 = all", metrics.graph_hit_ratio),
        ]
        for name, help_text, value in rows:
            yield self._family(GaugeMetricFamily, name, help_text, {(): value}, ())
        yield self._family(
            GaugeMetricFamily,
            "ring_depth",
            "Items in a ring",
            {(k,): v for k, v in metrics.ring_depth.items()},
            ("ring",),
        )
        phases = {(phase,): seconds for phase, seconds in metrics.startup_seconds.items()}
        yield self._family(GaugeMetricFamily, "startup_seconds", "Start-up time by phase", phases, ("phase",))

    def _counters(self) -> Iterator[Metric]:
        metrics, stats = self._metrics, self._metrics.stats
        rows: list[tuple[str, str, float]] = [
            ("prompt_tokens", "Prompt tokens of finished requests", metrics.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the prefix cache", metrics.cached_tokens),
            ("generation_tokens", "Tokens generated", metrics.generation_tokens),
            ("num_preemptions", "Sequences preempted to free KV blocks", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
            ("spec_decode_num_drafts", "Rows with draft tokens to verify", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Draft tokens verified", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Draft tokens that were right", sum(stats.num_accepted_tokens)),
            ("output_stalls", "Times the engine waited for room in the outputs ring", stats.num_output_stalls),
            ("graph_steps", "Steps replayed from a captured graph", stats.num_graph_steps),
            ("steps", "Steps in all", stats.num_steps),
            ("device_busy_seconds", "Time the device computed steps, where it is measured", stats.device_busy_s),
            ("device_gap_seconds", "Time the device waited for the next step of work at hand", stats.device_gap_s),
            ("ignored_parameters", "Unknown request fields that were ignored", metrics.ignored_parameters),
        ]
        for name, help_text, value in rows:
            yield self._family(CounterMetricFamily, name, help_text, {(): value}, ())
        by_place = {(str(place),): count for place, count in enumerate(stats.num_accepted_tokens)}
        name, help_text = "spec_decode_num_accepted_tokens_per_pos", "Draft tokens that were right, by place"
        yield self._family(CounterMetricFamily, name, help_text, by_place, ("position",))
        for name, counter in metrics.labelled_counters():
            help_text = LABELLED_HELP[name]
            yield self._family(CounterMetricFamily, name, help_text, counter.values, counter.labels)

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._metrics
        rows = [
            ("time_to_first_token_seconds", "Request received to first token", metrics.time_to_first_token),
            ("inter_token_latency_seconds", "Time between two tokens of a choice", metrics.inter_token),
            ("e2e_request_latency_seconds", "Request received to last token", metrics.end_to_end),
            ("request_queue_time_seconds", "Time in the queue", metrics.queue),
            ("request_prefill_time_seconds", "Scheduled to first token", metrics.prefill),
            ("request_decode_time_seconds", "First to last token", metrics.decode),
            ("request_inference_time_seconds", "Scheduled to last token", metrics.inference),
            ("request_prompt_tokens", "Prompt tokens of a finished choice", metrics.prompt_length),
            ("request_generation_tokens", "Tokens generated for a finished choice", metrics.generation_length),
            ("iteration_tokens_total", "Query tokens in a step", metrics.step_tokens),
            ("step_decode_rows", "Decode rows in a step", metrics.step_rows),
            ("step_gap_seconds", "Idle time of the device between two steps of work at hand", metrics.step_gap),
            ("engine_wake_seconds", "Request or abort pushed to picked up by the engine", metrics.engine_wake),
            ("engine_abort_seconds", "Abort sent to KV blocks freed", metrics.engine_abort),
            ("event_loop_lag_seconds", "How late the event loop woke from a timer", metrics.loop_lag),
            ("wakeup_latency_seconds", "Engine commit to event-loop drain", metrics.wakeup),
        ]
        for name, help_text, histogram in rows:
            yield self._histogram(name, help_text, {(): histogram}, ())
        phases = {(phase,): histogram for phase, histogram in metrics.step_phases.items()}
        yield self._histogram("step_seconds", "Engine step time by phase", phases, ("phase",))
        pauses = {(str(number),): histogram for number, histogram in enumerate(metrics.gc_pauses.generations)}
        help_text = "Time a garbage collection held both threads up"
        yield self._histogram("gc_pause_seconds", help_text, pauses, ("generation",))

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help_text: str,
        values: Mapping[Any, float],  # by the tuple of its label values
        labels: tuple[str, ...],
    ) -> Metric:
        family = kind(f"{self._metrics.prefix}:{name}", help_text, labels=("model_name", *labels))
        for key, value in values.items():
            family.add_metric((self._metrics.model_name, *key), value)
        return family

    def _histogram(self, name: str, help_text: str, histograms: dict, labels: tuple[str, ...]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"{self._metrics.prefix}:{name}", help_text, labels=("model_name", *labels))
        for key, histogram in histograms.items():
            family.add_metric((self._metrics.model_name, *key), histogram.buckets(), histogram.total)
        return family


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `asyncllm/metrics.py` by `python -m asyncllm.metrics`; a test holds it to that.",
        "",
        "`GET /metrics` speaks the Prometheus text format. Names start with `asyncllm:`; `[metrics] prefix` changes",
        'that, and `prefix = "vllm"` gives vLLM\'s names where both have the figure. Counters get `_total` at the end.',
        "Every sample has the label `model_name`. The process's CPU, memory and file descriptors come as `process_*`.",
        "",
        "| name | type | labels | what it is |",
        "|---|---|---|---|",
    ]
    labels = {
        "ring_depth": "ring", "startup_seconds": "phase", "step_seconds": "phase", "gc_pause_seconds": "generation",
        "spec_decode_num_accepted_tokens_per_pos": "position",
    }  # fmt: skip
    metrics = Metrics("asyncllm", "")
    for name, counter in metrics.labelled_counters():
        labels[name] = ", ".join(counter.labels)
    for family in _Exporter(metrics).collect():
        label = labels.get(family.name.removeprefix("asyncllm:"), "")
        lines.append(f"| `{family.name}` | {family.type} | {label} | {family.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
