"""What the cells come down to: medians by workload, the ratios that are goals, a table, the JSON line.

Pure: knows results, starts nothing. A server that failed a request of a workload has no say in that workload's ratios.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from perf import facts
from perf.peers.lineup import CONTENDERS, Weights
from perf.report import NOISY_CORES, Cell, median_cell
from perf.stats import median, ratio

MEGABYTE = 1_000_000
FOOT = """~: others kept more than a tenth of a core busy.
q4_1 is the file as shipped, bf16 the same matrices rounded to bfloat16. Figures are speed alone: llama.cpp multiplies
Q4_1 by activations of 8 bits, and its answers from this file were nonsense on some machines; `texts` in the JSON file
shows what each server said here."""


class WorkloadCell(Cell, frozen=True):
    """One server under one workload in one round."""

    workload: str


class PeerFacts(msgspec.Struct):
    """What a server is and costs beside its speed."""

    skipped: str = ""  # why it was not measured; empty = it was
    versions: dict[str, str] = {}
    note: str = ""  # about its build
    ready_s: float | None = None  # process start to readiness
    start_s: float | None = None  # process start to the end of a first answer of one token
    idle_cores: float | None = None  # cores it keeps busy when nobody asks
    memory_start: facts.Memory | None = None  # behind its first answer
    memory_end: facts.Memory | None = None  # behind all cells
    texts: list[str | None] = []  # greedy, one a prompt

    @property
    def rss_mb(self) -> float | None:
        """Resident memory in the end, when all of its cache was used; in millions of bytes."""
        return round(self.memory_end.rss_bytes / MEGABYTE, 1) if self.memory_end else None


class Ratio(msgspec.Struct, frozen=True):
    """Our best server in one figure over the best peer in it."""

    workload: str
    figure: str  # of `medians`
    goal: float
    less_is_better: bool = False
    weights: Weights | None = None  # only servers with these; None = all


RATIOS = {
    "q4_1_1_stream": Ratio("streams_1", "output_tokens_per_s", 1.2, weights="q4_1"),
    "bf16_1_stream": Ratio("streams_1", "output_tokens_per_s", 1.2, weights="bf16"),
    "best_8_streams": Ratio("streams_8", "output_tokens_per_s", 2.0),
    "best_32_streams": Ratio("streams_32", "output_tokens_per_s", 2.0),
    "ttft_32_streams": Ratio("streams_32", "ttft_p50_s", 0.5, less_is_better=True),
    "ttft_1500_tokens": Ratio("tokens_1500", "ttft_p50_s", 0.8, less_is_better=True),
    "shared_prefix": Ratio("shared_prefix", "requests_per_s", 2.0),
}


def medians(cells: Sequence[WorkloadCell]) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians over the rounds, by server and workload."""
    groups: dict[tuple[str, str], list[WorkloadCell]] = {}
    for cell in cells:
        groups.setdefault((cell.server, cell.workload), []).append(cell)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (server, workload), group in groups.items():
        requests_per_s = median(cell.result.requests_per_s for cell in group)
        figures = {"concurrency": group[0].concurrency, "requests_per_s": round(requests_per_s or 0.0, 4)}
        found.setdefault(server, {})[workload] = figures | median_cell(group)
    return found


def compared(wanted: Ratio, figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[str | None, str | None]:
    """The names of our best server and of the best peer in the figure of a ratio; None where there is none."""
    by_side: dict[bool, dict[float, str]] = {True: {}, False: {}}
    for name, workloads in figures.items():
        contender = CONTENDERS[name]
        median_figures = workloads.get(wanted.workload, {"num_failed": 1})
        if median_figures["num_failed"] or wanted.weights not in (None, contender.weights):
            continue
        value = median_figures[wanted.figure]
        if value:
            by_side[contender.is_ours].setdefault(value, name)
    best = min if wanted.less_is_better else max
    ours, peers = (side[best(side)] if side else None for side in (by_side[True], by_side[False]))
    return ours, peers


def ratios(cells: Sequence[WorkloadCell]) -> dict[str, tuple[float | None, str | None, str | None]]:
    """Every ratio with the two servers it is of: (ours over the peer's, our server, the peer)."""
    figures = medians(cells)
    found = {}
    for name, wanted in RATIOS.items():
        ours, peer = compared(wanted, figures)
        values = [figures[server][wanted.workload][wanted.figure] if server else None for server in (ours, peer)]
        found[name] = (ratio(*values), ours, peer)
    return found


def ratios_to_each(cells: Sequence[WorkloadCell]) -> dict[str, dict[str, float | None]]:
    """The same ratios to every single peer, for goals that name one."""
    peers = sorted({cell.server for cell in cells if not CONTENDERS[cell.server].is_ours})
    return {
        peer: {
            name: value
            for name, (value, _, of) in ratios(
                [cell for cell in cells if cell.server == peer or CONTENDERS[cell.server].is_ours]
            ).items()
            if of is not None
        }
        for peer in peers
    }


def equal_texts(servers: Mapping[str, PeerFacts]) -> dict[str, tuple[str, int, int]]:
    """By peer: our server with the same weights, how many of its texts equal ours, of how many."""
    found = {}
    for name, fact in servers.items():
        if CONTENDERS[name].is_ours or not fact.texts:
            continue
        for ours, our_fact in servers.items():
            if our_fact.texts and CONTENDERS[ours].is_ours and CONTENDERS[ours].weights == CONTENDERS[name].weights:
                pairs = list(zip(fact.texts, our_fact.texts, strict=True))
                found[name] = (ours, sum(text is not None and text == our for text, our in pairs), len(pairs))
    return found


class Report:
    """A bench, as far as it came."""

    __slots__ = ("cells", "parameters", "prompts", "servers")

    def __init__(
        self,
        parameters: Mapping[str, Any],
        cells: list[WorkloadCell],
        servers: Mapping[str, PeerFacts],
        prompts: Sequence[str],
    ) -> None:
        self.parameters = parameters
        self.cells = cells
        self.servers = servers
        self.prompts = prompts

    @property
    def num_failed(self) -> int:
        """Requests that ours failed; a peer's failures are its own."""
        return sum(cell.result.num_failed for cell in self.cells if CONTENDERS[cell.server].is_ours)

    @property
    def num_rounds(self) -> int:
        """Rounds that were measured."""
        return 1 + max((cell.turn for cell in self.cells), default=-1)

    def to_json(self) -> dict[str, Any]:
        """The line that ends the bench."""
        found = ratios(self.cells)
        figures = medians(self.cells)
        ours = next((fact for name, fact in self.servers.items() if CONTENDERS[name].is_ours), PeerFacts())
        return {
            "bench": "peers",
            "ratios": {name: value for name, (value, _, _) in found.items()},
            "ratio_of": {name: servers for name, (_, *servers) in found.items()},
            "ratios_to_each": ratios_to_each(self.cells),
            "rss_mb": ours.rss_mb,
            "start_s": ours.start_s,
            "equal_texts": equal_texts(self.servers),
            "servers": {name: _facts_json(fact) | figures.get(name, {}) for name, fact in self.servers.items()},
            "skipped": {name: fact.skipped for name, fact in self.servers.items() if fact.skipped},
            "max_foreign_cores": max((round(cell.foreign_cores, 3) for cell in self.cells), default=None),
            "num_failed": self.num_failed,
            "num_rounds": self.num_rounds,
            "machine": msgspec.to_builtins(facts.machine()),
            "versions": facts.versions() | {name: fact.versions for name, fact in self.servers.items()},
            "parameters": dict(self.parameters),
        }

    def texts_json(self) -> list[dict[str, str | None]]:
        """The greedy texts side by side: one entry a prompt, one key a server."""
        answered = {name: fact.texts for name, fact in self.servers.items() if fact.texts}
        return [
            {"prompt": prompt, **{name: texts[index] for name, texts in answered.items()}}
            for index, prompt in enumerate(self.prompts)
        ]

    def table(self) -> str:
        """Medians for a reader."""
        lines = [
            f"{'workload':<15}{'server':<17}{'tok/s':>8}{'req/s':>8}{'TTFT p50':>11}{'ITL p50':>10}{'foreign':>9}",
        ]
        figures = medians(self.cells)
        for workload in dict.fromkeys(cell.workload for cell in self.cells):
            lines += [
                _cell_line(workload, name, workloads[workload])
                for name, workloads in figures.items()
                if workload in workloads
            ]
        lines += ["", f"{'server':<17}{'1st answer':>11}{'RSS':>10}{'idle':>8}  equal texts, versions"]
        equal = equal_texts(self.servers)
        lines += [_server_line(name, fact, equal.get(name)) for name, fact in self.servers.items()]
        lines += ["", f"{'ours over the best peer':<24}{'ratio':>7}{'goal':>7}"]
        lines += [_ratio_line(name, *found) for name, found in ratios(self.cells).items()]
        lines += ["", f"Medians of {self.num_rounds} rounds. {FOOT}"]
        return "\n".join(lines)


def _facts_json(fact: PeerFacts) -> dict[str, Any]:
    return {
        "skipped": fact.skipped or None,
        "note": fact.note,
        "ready_s": fact.ready_s,
        "start_s": fact.start_s,
        "rss_mb": fact.rss_mb,
        "idle_cores": fact.idle_cores,
        "memory_start": msgspec.to_builtins(fact.memory_start),
        "memory_end": msgspec.to_builtins(fact.memory_end),
    }


def _cell_line(workload: str, name: str, figures: Mapping[str, Any]) -> str:
    return (
        f"{workload:<15}{name:<17}{figures['output_tokens_per_s']:>8.1f}{figures['requests_per_s']:>8.2f}"
        f"{_ms(figures['ttft_p50_s']):>11}{_ms(figures['itl_p50_s']):>10}{figures['foreign_cores']:>9.2f}"
        f"{' ~' if figures['foreign_cores'] > NOISY_CORES else ''}"
        f"{' FAILED ' + str(figures['num_failed']) if figures['num_failed'] else ''}"
    )


def _server_line(name: str, fact: PeerFacts, equal: tuple[str, int, int] | None) -> str:
    if fact.skipped:
        return f"{name:<17}skipped, {fact.skipped}"
    costs = f"{_or_dash(fact.start_s, '.2f', ' s'):>11}{_or_dash(fact.rss_mb, '.0f', ' MB'):>10}"
    costs += f"{_or_dash(fact.idle_cores, '.3f'):>8}"
    told = [f"{equal[1]} of {equal[2]} as {equal[0]}"] if equal else []
    told += [f"{package} {version}" for package, version in fact.versions.items()]
    told += [fact.note] if fact.note else []
    return f"{name:<17}{costs}  {', '.join(told)}"


def _ratio_line(name: str, value: float | None, ours: str | None, peer: str | None) -> str:
    wanted = RATIOS[name]
    goal = f"{'<=' if wanted.less_is_better else '>='} {wanted.goal:g}"
    return f"{name:<24}{_or_dash(value, '.2f'):>7}{goal:>7}  {ours or 'none of ours'} over {peer or 'no peer'}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
