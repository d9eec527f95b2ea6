"""What the cells of a comparison come down to: medians, ratios, a table, and the one JSON line.

Pure: knows results, starts nothing and measures nothing but the name of the machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perf import facts
from perf.load import LoadResult
from perf.soak import SoakResult
from perf.stats import median, ratio

OURS = "asyncllm"
NOISY_CORES = 0.1  # a cell during which others used more than this is marked in the table
MIB = 2**20


class Cell(msgspec.Struct, frozen=True):
    """One server at one concurrency in one round."""

    server: str
    concurrency: int
    turn: int
    result: LoadResult
    foreign_cores: float  # cores kept busy by anybody else meanwhile
    client_cores: float
    server_cores: float


class ServerFacts(msgspec.Struct):
    """What a server costs beside its speed."""

    start_s: list[float] = []  # process start to readiness, once per start
    first_answer_s: list[float] = []  # process start to the end of a first answer of one token
    memory_start: facts.Memory | None = None  # when ready
    memory_end: facts.Memory | None = None  # when all cells were done


class Report:
    """A finished bench."""

    __slots__ = ("cells", "params", "servers", "soak")

    def __init__(
        self,
        params: msgspec.Struct,
        cells: Sequence[Cell],
        servers: Mapping[str, ServerFacts],
        soak: SoakResult | None,
    ) -> None:
        self.params = params
        self.cells = cells
        self.servers = servers
        self.soak = soak

    @property
    def num_failed(self) -> int:
        """Requests that failed in any cell or in the soak."""
        return sum(cell.result.num_failed for cell in self.cells) + (self.soak.num_failed if self.soak else 0)

    def to_json(self) -> dict[str, Any]:
        """The line that ends the bench."""
        ours = self.servers.get(OURS, ServerFacts())
        parameters = msgspec.to_builtins(self.params)
        return {
            "bench": "compare",
            **{name: medians(self.cells, name) for name in self.servers},
            **ratios(self.cells),
            "rss_start_bytes": ours.memory_start.rss_bytes if ours.memory_start else None,
            "rss_end_bytes": ours.memory_end.rss_bytes if ours.memory_end else None,
            "servers": {name: msgspec.to_builtins(fact) for name, fact in self.servers.items()},
            "memory_soak": msgspec.to_builtins(self.soak),
            "max_foreign_cores": max((round(cell.foreign_cores, 3) for cell in self.cells), default=None),
            "num_failed": self.num_failed,
            "machine": msgspec.to_builtins(facts.machine()),
            "versions": facts.versions(),
            # The model by name: a result that is committed must not say where it lay on one machine.
            "parameters": parameters | {"model": Path(parameters.get("model", "")).name},
        }


def medians(cells: Sequence[Cell], server: str) -> dict[str, dict[str, Any]]:
    """Medians over the rounds by concurrency, with each round's throughput so that the spread shows."""
    by_concurrency: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.server == server:
            by_concurrency.setdefault(cell.concurrency, []).append(cell)
    return {str(concurrency): median_cell(group) for concurrency, group in by_concurrency.items()}


def median_cell(group: Sequence[Cell]) -> dict[str, Any]:
    """Medians over cells of one kind, one a round."""
    results = [cell.result for cell in group]
    figures = {
        "output_tokens_per_s": median(r.output_tokens_per_s for r in results),
        "ttft_p50_s": median(r.ttft_s.p50 for r in results),
        "itl_p50_s": median(r.itl_s.p50 for r in results),
        "tpot_p50_s": median(r.tpot_s.p50 for r in results),
        "foreign_cores": median(cell.foreign_cores for cell in group),
        "client_cores": median(cell.client_cores for cell in group),
        "server_cores": median(cell.server_cores for cell in group),
    }
    return {
        **{name: None if figure is None else round(figure, 5) for name, figure in figures.items()},
        "output_tokens_per_s_by_round": [round(r.output_tokens_per_s, 2) for r in results],
        "output_tokens": sum(r.output_tokens for r in results),
        "num_ok": sum(r.num_ok for r in results),
        "num_failed": sum(r.num_failed for r in results),
        "num_full_length": sum(r.num_full_length for r in results),
    }


def ratios(cells: Sequence[Cell]) -> dict[str, float | None]:
    """`ratio_C`: our output tokens/s over the best other's at C streams; `scaling_C`: ours at C over ours at 1."""
    speed = {
        (name, int(concurrency)): figures["output_tokens_per_s"]
        for name in dict.fromkeys(cell.server for cell in cells)
        for concurrency, figures in medians(cells, name).items()
    }
    found: dict[str, float | None] = {}
    for concurrency in sorted({concurrency for _, concurrency in speed}):
        ours = speed.get((OURS, concurrency))
        others = [value for (name, at), value in speed.items() if at == concurrency and name != OURS]
        found[f"ratio_{concurrency}"] = ratio(ours, max(others, default=None))
        if concurrency > 1:
            found[f"scaling_{concurrency}"] = ratio(ours, speed.get((OURS, 1)))
    return found


def summary(cell: Cell) -> str:
    """One cell on one line, while the bench runs."""
    result = cell.result
    return (
        f"round {cell.turn + 1}  {cell.server:<16} x{cell.concurrency:<4} {result.output_tokens_per_s:8.1f} tok/s"
        f"  TTFT {_ms(result.ttft_s.p50)}  ITL {_ms(result.itl_s.p50)}  {result.num_failed} failed"
        f"  foreign {cell.foreign_cores:.2f} cores"
    )


def table(cells: Sequence[Cell], servers: Mapping[str, ServerFacts]) -> str:
    """Medians for a reader; `~` marks a cell beside which others kept more than a tenth of a core busy."""
    lines = [
        f"{'server':<17}{'streams':>7}{'tok/s':>10}{'min':>9}{'max':>9}{'TTFT p50':>12}{'ITL p50':>12}{'TPOT p50':>12}"
    ]
    for name in servers:
        for concurrency, figures in medians(cells, name).items():
            rounds = figures["output_tokens_per_s_by_round"]
            lines.append(
                f"{name:<17}{concurrency:>7}{figures['output_tokens_per_s']:>10.1f}{min(rounds):>9.1f}{max(rounds):>9.1f}"
                f"{_ms(figures['ttft_p50_s']):>12}{_ms(figures['itl_p50_s']):>12}{_ms(figures['tpot_p50_s']):>12}"
                f"{' ~' if figures['foreign_cores'] > NOISY_CORES else ''}"
                f"{' FAILED ' + str(figures['num_failed']) if figures['num_failed'] else ''}"
            )
    lines += ["", f"{'server':<17}{'ready':>9}{'1st answer':>12}{'RSS start':>13}{'RSS end':>13}{'peak':>13}"]
    lines += [_cost_line(name, fact) for name, fact in servers.items()]
    lines += ["", *(f"{name:<12} {'-' if value is None else value}" for name, value in ratios(cells).items())]
    return "\n".join(lines)


def _cost_line(name: str, fact: ServerFacts) -> str:
    start, end = fact.memory_start, fact.memory_end
    sizes = (start and start.rss_bytes, end and end.rss_bytes, end and end.peak_bytes)
    return f"{name:<17}{median(fact.start_s) or 0:>7.2f} s{median(fact.first_answer_s) or 0:>10.2f} s" + "".join(
        f"{(size or 0) / MIB:>9.0f} MiB" for size in sizes
    )


def soak_table(soak: SoakResult) -> str:
    """Memory by requests, for a reader."""
    lines = [f"{'requests':>9}{'RSS':>14}"]
    lines += [f"{n:>9}{rss / MIB:>10.1f} MiB" for n, rss in zip(soak.num_requests, soak.rss_bytes, strict=True)]
    growth = "-" if soak.growth_bytes is None else f"{soak.growth_bytes / MIB:+.2f} MiB"
    return "\n".join([*lines, f"growth behind the first step: {growth}, {soak.num_failed} failed"])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"
