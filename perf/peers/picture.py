"""Throughput and time to first token over the number of streams, one line a server. Knows matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf.peers.lineup import CONTENDERS


def curves(medians: Mapping[str, Mapping[str, Mapping[str, Any]]], figure: str) -> dict[str, list[tuple[int, float]]]:
    """(streams, figure) of each server in the workloads `streams_N`, by N; without those that failed requests."""
    found: dict[str, list[tuple[int, float]]] = {}
    for server, workloads in medians.items():
        points = sorted(
            (int(figures["concurrency"]), float(figures[figure]))
            for name, figures in workloads.items()
            if name.startswith("streams_") and not figures["num_failed"] and figures[figure]
        )
        if points:
            found[server] = points
    return found


def draw(medians: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str, path: Path) -> None:
    """Write the picture as PNG. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")  # files alone: a bench has no screen
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, ScalarFormatter

    panels = {"output_tokens_per_s": "output tokens/s", "ttft_p50_s": "time to first token, s (median)"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.5))
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        streams: set[int] = set()
        for server, points in curves(medians, name).items():
            is_ours = CONTENDERS[server].is_ours
            x, y = zip(*points, strict=True)
            axis.plot(
                x, y, marker="o", label=server, linewidth=2.5 if is_ours else 1.2, linestyle="-" if is_ours else "--"
            )
            streams.update(x)
        axis.set(xscale="log", yscale="log", xlabel="streams at once", ylabel=label)
        axis.set_xticks(sorted(streams), labels=[str(count) for count in sorted(streams)])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
