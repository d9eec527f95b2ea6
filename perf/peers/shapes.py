"""Our executor beside llama.cpp's and transformers' on the shape of a larger model: `python -m perf.peers.shapes`.

Random weights, no server and no text: decode steps of many rows, and a prompt. Each turn is a process of its own, and
nothing else runs meanwhile. Prints a table, then one JSON line; exits with 2 if ours did not run. What cannot be had is
skipped by name.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perf import facts
from perf.client import cut
from perf.gpu_check.models import ARCHITECTURES, architecture, hugging_face_config
from perf.peers import recipes
from perf.peers.lineup import llama_cpp_program
from perf.peers.recipes import InstallError
from perf.peers.shape_files import KINDS, shape_file
from perf.servers import ServerError
from perf.stats import median, ratio
from perf.turns import in_turns, progress, unwind_on_sigterm

ROOT = Path(__file__).parents[2]
DEFAULT_PEERS = ("llama.cpp", "transformers")


class ShapeParams(msgspec.Struct, frozen=True):
    """One comparison."""

    shape: str = "qwen3-0.6b"  # of perf.gpu_check.models
    tiny: bool = False  # a model of the same family that is computed in milliseconds
    kinds: tuple[str, ...] = ("bf16", "q4_0")  # of the matrices in the files
    peers: tuple[str, ...] = DEFAULT_PEERS
    rows: tuple[int, ...] = (1, 8, 32)
    context: int = 200  # tokens that a decode row attends to, on average
    steps: int = 16
    prompt_tokens: int = 512
    rounds: int = 3

    @property
    def flags(self) -> list[str]:
        """For the processes that measure."""
        rows = ",".join(map(str, self.rows))
        flags = {
            "--rows": rows,
            "--context": self.context,
            "--steps": self.steps,
            "--prompt-tokens": self.prompt_tokens,
        }
        return [str(part) for flag in flags.items() for part in flag]


class Speed(msgspec.Struct, frozen=True):
    """Tokens a second of one turn."""

    decode: dict[int, float]  # by rows
    prompt: float


class Turn(msgspec.Struct, frozen=True):
    """One contender in one round."""

    name: str
    speed: Speed
    foreign_cores: float  # kept busy by anybody else meanwhile


class MeasureError(Exception):
    """A contender did not run; the message is the reason in a line."""


Measure = Callable[[], Speed]


class Lineup(msgspec.Struct):
    """Who takes part, in the order of the table, and who does not."""

    measures: dict[str, Measure]
    versions: dict[str, dict[str, str]]  # by peer
    skipped: dict[str, str]  # by peer or contender: why


def run(lineup: Lineup, rounds: int) -> list[Turn]:
    """All turns; who fails one has no more of them, and is skipped. Raises MeasureError where ours does not run."""
    turns: list[Turn] = []
    for number in range(rounds):
        for name in in_turns(lineup.measures, number):
            if name in lineup.skipped:
                continue
            try:
                turns.append(_turn(name, lineup.measures[name]))
            except MeasureError as error:
                if name.startswith("asyncllm"):
                    raise
                lineup.skipped[name] = str(error)
                progress(f"skip {name}: {error}")
    return turns


def contenders(params: ShapeParams, room: Path = recipes.ROOM) -> Lineup:
    """Ours and every peer that can be had, on files that are written where they are missing."""
    shapes = architecture(params.shape, params.tiny)
    name = f"{params.shape}-tiny" if params.tiny else params.shape
    files = {kind: shape_file(name, shapes, kind) for kind in params.kinds}
    measures: dict[str, Measure] = {f"asyncllm-{kind}": _ours(params, file) for kind, file in files.items()}
    lineup = Lineup(measures, {}, {})
    known = recipes.recipes()
    for peer in params.peers:
        try:
            python = recipes.install(known[peer], room)
            lineup.versions[peer] = recipes.versions(known[peer], python)
            if peer == "llama.cpp":
                program = llama_cpp_program(python)
                measures |= {f"{peer}-{kind}": _llama_cpp(params, program, file) for kind, file in files.items()}
            elif "bf16" in files:
                measures[f"{peer}-bf16"] = _transformers(params, python, hugging_face_config(shapes))
        except (InstallError, ServerError) as error:
            lineup.skipped[peer] = cut(f"not installed: {error}")
            progress(f"skip {peer}, {lineup.skipped[peer]}")
    return lineup


def _turn(name: str, measure: Measure) -> Turn:
    clock, start_s, before_s = facts.CpuClock([os.getpid()]), time.monotonic(), _children_s()
    try:
        speed = measure()
    except (IndexError, KeyError, TypeError, ValueError) as error:  # msgspec's are ValueErrors
        raise MeasureError(f"printed other figures than expected: {error!r}") from error
    own_cores = (_children_s() - before_s) / (time.monotonic() - start_s)
    turn = Turn(name, speed, max(0.0, clock.foreign_cores() - own_cores))
    decode = "  ".join(f"{rows} rows {tokens_per_s:7.1f}" for rows, tokens_per_s in speed.decode.items())
    progress(f"{name:<18} tok/s: {decode}  prompt {speed.prompt:7.1f}  foreign {turn.foreign_cores:.2f} cores")
    return turn


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ours(params: ShapeParams, file: Path) -> Measure:
    command = [sys.executable, "-m", "perf.peers.shape_ours", str(file), *params.flags]
    return lambda: msgspec.json.decode(_output(command).splitlines()[-1], type=Speed)


def _transformers(params: ShapeParams, python: Path, config: Mapping[str, Any]) -> Measure:
    command = [str(python), "-m", "perf.peers.shape_transformers", *params.flags]
    return lambda: msgspec.json.decode(_output(command, json.dumps(config)).splitlines()[-1], type=Speed)


def _llama_cpp(params: ShapeParams, server: Path, file: Path) -> Measure:
    bench = [str(server.with_name("llama-bench")), "--model", str(file), "--output", "json", "--repetitions", "1"]
    begun = max(1, params.context - params.steps // 2)  # tokens each row has in the first step
    several = [rows for rows in params.rows if rows > 1]
    batched = [str(server.with_name("llama-batched-bench")), "--model", str(file), "--output-format", "jsonl"]
    # Every row continues one prompt that is computed once, as in the other two.
    batched += ["-pps", "-npp", str(begun), "-ntg", str(params.steps), "-npl", ",".join(map(str, several))]
    batched += ["--ctx-size", str(max(params.rows) * (begun + params.steps))]

    def measure() -> Speed:
        decode: dict[int, float] = {}
        if 1 in params.rows:
            asked = ["--n-prompt", "0", "--n-gen", str(params.steps), "--n-depth", str(begun)]
            decode[1] = bench_speed(_output([*bench, *asked]))
        if several:
            decode |= batched_speeds(_output(batched))
        return Speed(decode, bench_speed(_output([*bench, "--n-prompt", str(params.prompt_tokens), "--n-gen", "0"])))

    return measure


def bench_speed(output: str) -> float:
    """Tokens a second of the only test that llama-bench was asked for."""
    (test,) = msgspec.json.decode(output)
    return float(test["avg_ts"])


def batched_speeds(output: str) -> dict[int, float]:
    """Tokens a second of all rows together, by rows, from llama-batched-bench's JSON lines."""
    lines = [msgspec.json.decode(line) for line in output.splitlines() if line.startswith("{")]
    return {int(line["pl"]): float(line["speed_tg"]) for line in lines}


def _output(command: list[str], stdin: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise MeasureError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise MeasureError(f"exited with {done.returncode}: {recipes.reason(done.stderr)}")
    return done.stdout


def medians(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Tokens a second over the rounds, by contender: `decode_N` and `prompt`."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(turn.name for turn in turns):
        own = [turn.speed for turn in turns if turn.name == name]
        decode = {f"decode_{rows}": median(speed.decode.get(rows) for speed in own) for rows in own[0].decode}
        figures = decode | {"prompt": median(speed.prompt for speed in own)}
        found[name] = {figure: round(value, 2) for figure, value in figures.items() if value is not None}
    return found


def ratios(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, tuple[float | None, str]]]:
    """By kind and figure: ours over the best peer with the same kind of weights, and that peer's name."""
    found: dict[str, dict[str, tuple[float | None, str]]] = {}
    for ours, values in figures.items():
        name, _, kind = ours.rpartition("-")
        peers = {peer: by_figure for peer, by_figure in figures.items() if peer != ours and peer.endswith(f"-{kind}")}
        if name != "asyncllm" or not peers:
            continue
        best = {figure: max(peers, key=lambda peer: peers[peer].get(figure, 0.0)) for figure in values}
        found[kind] = {
            figure: (ratio(values[figure], peers[best[figure]].get(figure)), best[figure]) for figure in values
        }
    return found


def table(figures: Mapping[str, Mapping[str, float]], skipped: Mapping[str, str]) -> str:
    """Tokens a second, one line a contender; below, ours over the best peer of the same kind."""
    names = list(next(iter(figures.values()), {}))
    lines = [f"{'tokens/s':<20}" + "".join(f"{name:>12}" for name in names)]
    for contender, values in figures.items():
        lines.append(
            f"{contender:<20}" + "".join(f"{values[name]:>12.1f}" if name in values else f"{'-':>12}" for name in names)
        )
    for kind, by_figure in ratios(figures).items():
        cells = [f"{by_figure[name][0] or 0:>12.2f}" for name in names]
        lines.append(f"{f'{kind}, ours / best':<20}" + "".join(cells))
    return "\n".join([*lines, *(f"{name} skipped, {why}" for name, why in skipped.items())])


def parse_arguments(argv: Sequence[str] | None) -> ShapeParams:
    """The command line."""
    default = ShapeParams()
    parser = argparse.ArgumentParser(
        prog="python -m perf.peers.shapes", description="Engines alone on a model's shape."
    )
    parser.add_argument("--shape", default=default.shape, choices=tuple(ARCHITECTURES), help="default %(default)s")
    parser.add_argument("--kinds", default=",".join(default.kinds), help=f"weights, of {', '.join(KINDS)}")
    parser.add_argument("--peers", default=",".join(default.peers), help="default %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, default.rows)), help="of a decode step (%(default)s)")
    parser.add_argument("--context", type=int, default=default.context, help="tokens a row attends to (%(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="decode steps of a turn (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="turns of each contender (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights: does it run?")
    args = parser.parse_args(argv)
    kinds, peers = (tuple(name for name in part.split(",") if name) for part in (args.kinds, args.peers))
    if not kinds or (unknown := set(kinds) - set(KINDS)):
        parser.error(
            f"--kinds: unknown {', '.join(sorted(unknown)) if kinds else 'nothing'}; known: {', '.join(KINDS)}"
        )
    if unknown := set(peers) - set(DEFAULT_PEERS):
        parser.error(f"--peers: unknown {', '.join(sorted(unknown))}; known: {', '.join(DEFAULT_PEERS)}")
    try:
        rows = tuple(int(part) for part in args.rows.split(","))
    except ValueError:
        parser.error(f"--rows: {args.rows} is no list of numbers")
    if min(*rows, args.context, args.steps, args.prompt_tokens, args.rounds) < 1:
        parser.error("--rows, --context, --steps, --prompt-tokens and --rounds are at least 1")
    return ShapeParams(
        args.shape, args.tiny, kinds, peers, rows, args.context, args.steps, args.prompt_tokens, args.rounds
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    unwind_on_sigterm()
    params = parse_arguments(argv)
    try:
        lineup = contenders(params)
        turns = run(lineup, params.rounds)
    except MeasureError as error:
        progress(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    figures = medians(turns)
    print(table(figures, lineup.skipped))
    by_kind = ratios(figures)
    result = {
        "bench": "shapes",
        "tokens_per_s": figures,
        "ratios": {kind: {name: value for name, (value, _) in found.items()} for kind, found in by_kind.items()},
        "ratio_of": {kind: {name: peer for name, (_, peer) in found.items()} for kind, found in by_kind.items()},
        "skipped": lineup.skipped,
        "max_foreign_cores": max((round(turn.foreign_cores, 3) for turn in turns), default=None),
        "machine": facts.machine(),
        "versions": facts.versions() | {"peers": lineup.versions},
        "parameters": params,
    }
    print(msgspec.json.encode(result).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
