"""What a run comes to: the headline figures, their place between floor and goal, and one table.

Pure: takes what the parts found, starts and measures nothing. Goals are those of one H200 and Qwen3-0.6B in bf16.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from perf.gpu_check.models import architecture
from perf.gpu_check.requests import make_workload
from perf.gpu_check.roofline import Ceilings, ideal_workload_s
from perf.gpu_check.setup import CHECKS, MAIN_MODEL, Setup
from perf.stats import ratio

Parts = Mapping[str, Any]


class Goal(msgspec.Struct, frozen=True):
    """One line of the table: where its figure is found, and what it should be."""

    label: str
    path: tuple[str, ...]  # into the parts
    unit: str = ""
    must: float | None = None
    ambitious: float | None = None
    higher_is_better: bool = False
    factor: float = 1.0  # from the figure's unit to the table's
    headline: str = ""  # its top-level key in the JSON


def _decode(setup: Setup, batch: int) -> tuple[str, ...]:
    return ("decode", MAIN_MODEL, "greedy", f"b{batch}_c{setup.scale.main_context}")


def goals(setup: Setup) -> list[Goal]:
    """The table's lines."""
    context, streams, ours = setup.scale.main_context, ("http", "streams"), ("workload", "asyncllm", "greedy")
    steps = {1: (1.1, 0.60), 8: (1.35, 0.85), 32: (2.1, 1.55), 64: (None, None), 128: (5.4, 4.5), 256: (10.0, 8.7)}
    lines = [
        Goal(
            f"decode step, batch {batch}, context {context}",
            (*_decode(setup, batch), "ms"),
            "ms",
            must,
            ambitious,
            headline="" if batch == 64 else f"decode_ms_b{batch}",
        )
        for batch, (must, ambitious) in steps.items()
    ]
    idle = ("http", "idle")
    attention = ("decode", "attention", f"b{max(setup.scale.attention_batches)}_c{context}", "of_bandwidth")
    model_1b, model_8b = (("decode", name, f"b1_c{context}", "ms") for name in ("llama-3.2-1b", "llama-3.1-8b"))
    mixture = [
        Goal(f"experts of Qwen3-30B-A3B, a layer, batch {rows}", ("decode", "experts", f"n{rows}", "us"), "µs")
        for rows in setup.scale.experts_rows
    ]
    return [
        *lines,
        Goal("device gap between steps, batch 1, p50", (*_decode(setup, 1), "gap_us_p50"), "µs", None, 15.0),
        Goal("attention alone, largest batch, of bandwidth", attention, "%", 80.0, 90.0, True, 100.0),
        Goal("Llama-3.2-1B decode step, batch 1", model_1b, "ms", 1.2, 0.85),
        Goal("Llama-3.1-8B decode step, batch 1", model_8b, "ms", 5.5, 4.3),
        *mixture,
        Goal("workload of 256 requests", ("workload", "asyncllm", "temperature_0.6", "tokens_per_s"), "tok/s",
             22_000.0, 28_000.0, True, headline="nano_vllm_tokens_per_s"),
        Goal("  the same, greedy", (*ours, "tokens_per_s"), "tok/s", 22_000.0, 28_000.0, True),
        Goal("  transformers continuous batching", ("workload", "transformers", "tokens_per_s"), "tok/s"),
        Goal("  device busy", (*ours, "device_busy_fraction"), "%", 90.0, 98.0, True, 100.0),
        Goal("  gap between steps p99, no clients", (*ours, "gap_s", "p99"), "µs", factor=1e6),
        Goal("HTTP, 40 streams", (*streams, "output_tokens_per_s"), "tok/s", 20_000.0, 32_000.0, True,
             headline="http_40_tokens_per_s"),
        Goal("  TTFT p50", (*streams, "ttft_s", "p50"), "ms", factor=1e3),
        Goal("  TTFT p99", (*streams, "ttft_s", "p99"), "ms", factor=1e3),
        Goal("  inter-token latency p50", (*streams, "itl_s", "p50"), "ms", factor=1e3),
        Goal("  inter-token latency p99", (*streams, "itl_s", "p99"), "ms", factor=1e3),
        Goal("  TTFT p50, idle server", (*idle, "ttft_s", "p50"), "ms", 10.0, 4.0, factor=1e3),
        Goal("  TTFT p99, idle server", (*idle, "ttft_s", "p99"), "ms", 15.0, 6.0, factor=1e3),
        Goal("  device busy", (*streams, "device_busy_fraction"), "%", 90.0, 98.0, True, 100.0),
        Goal("  gap between steps p99, with clients", (*streams, "step_gap_s_p99"), "µs", factor=1e6),
        Goal("  event loop's CPU per token", (*streams, "loop_cpu_us_per_token"), "µs", 25.0, 8.0),
    ]  # fmt: skip


def find(parts: Parts, path: tuple[str, ...]) -> float | None:
    """A figure by its path, or None where anything on the way is missing."""
    value: Any = parts
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def verdict(goal: Goal, value: float | None) -> str:
    """Where a figure, in the table's unit, stands between what is least and what is hoped for."""
    if value is None:
        return "not measured"
    for name, bound in (("ambitious", goal.ambitious), ("must", goal.must)):
        if bound is not None and (value >= bound if goal.higher_is_better else value <= bound):
            return name
    return "below must" if goal.must is not None else "below ambitious" if goal.ambitious is not None else ""


def is_correct(parts: Parts) -> bool | None:
    """Whether every check of part 1 ran and passed; None where the part was not asked for."""
    if "correct" not in parts:
        return None
    found = parts["correct"]
    return not found.get("errors") and all(found.get(name, {}).get("passed") is True for name in CHECKS)


def headline(setup: Setup, parts: Parts) -> dict[str, Any]:
    """The top-level figures; None for what was not measured."""
    figures = {goal.headline: find(parts, goal.path) for goal in goals(setup) if goal.headline}
    return {"correct": is_correct(parts), **figures}


def roofline_share(setup: Setup, parts: Parts, goal: Goal) -> float | None:
    """What part of the possible a figure is."""
    if goal.path[:2] == ("workload", "asyncllm") and goal.path[-1] == "tokens_per_s":
        return _workload_share(setup, parts, find(parts, goal.path))
    return find(parts, (*goal.path[:-1], "of_roofline")) if goal.path[-1] in ("ms", "us") else None


def _workload_share(setup: Setup, parts: Parts, tokens_per_s: float | None) -> float | None:
    """Against the ceilings of the decode part of the same run."""
    measured = [find(parts, ("decode", "ceilings", key)) for key in ("copy_gb_per_s", "read_gb_per_s", "gemm_tflops")]
    copied, read, gemm = measured
    if not copied or not read or not gemm or tokens_per_s is None:
        return None
    workload = make_workload(setup.scale)
    lengths = [(len(prompt), output) for prompt, output in zip(workload.prompts, workload.max_tokens, strict=True)]
    ceilings = Ceilings(copied * 1e9, read * 1e9, gemm * 1e12)
    ideal_s = ideal_workload_s(architecture(MAIN_MODEL, setup.rehearse), setup.scale.dtype, lengths, ceilings)
    return ratio(tokens_per_s, sum(workload.max_tokens) / ideal_s)


def table(setup: Setup, parts: Parts) -> str:
    """Every goal with its figure, then what failed."""
    lines = [f"{'figure':<46}{'value':>12} {'unit':<6}{'roofline':>9}{'must':>9}{'ambitious':>11}  verdict"]
    for goal in goals(setup):
        raw = find(parts, goal.path)
        value = None if raw is None else raw * goal.factor
        lines.append(
            f"{goal.label:<46}{_number(value):>12} {goal.unit:<6}{_percent(roofline_share(setup, parts, goal)):>9}"
            f"{_number(goal.must):>9}{_number(goal.ambitious):>11}  {verdict(goal, value)}"
        )
    lines.append("")
    for name in CHECKS if "correct" in parts else ():
        passed = parts["correct"].get(name, {}).get("passed")
        lines.append(f"correct: {name:<20} {'passed' if passed else 'FAILED' if passed is False else 'did not run'}")
    for part, found in parts.items():
        for section, error in found.get("errors", {}).items():
            lines.append(f"error in {part}, {section}: {error.strip().rpartition(chr(10))[2][:160]}")
        if found.get("out_of_time"):
            lines.append(f"out of time in {part}: {', '.join(found['out_of_time'])}")
        if found.get("killed"):
            lines.append(f"{part} was killed: {found['killed']}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
