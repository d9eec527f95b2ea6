"""`make gpu-check`: proof on any CUDA machine, without network and without a checkpoint.

    python -m perf.gpu_check [--parts correct,decode,workload,http] [--out FILE] [--peer NAME=COMMAND] [--rehearse]

Runs the parts one after the other, each in a process of its own, and keeps one JSON file up to date while they run, so
that whatever ends this leaves the figures behind. Prints a table, and the headline as one JSON line last. Exits with 1
if a check failed or a section broke, with 2 where there is no CUDA device. Imports torch only to look for one.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from asyncllm import __version__
from perf import facts
from perf.gpu_check import report
from perf.gpu_check.findings import progress, write_json
from perf.gpu_check.setup import PARTS, Setup

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE_S = 15.0  # that a part may be late before it is killed
POLL_S = 0.5
PACKAGES = ("triton", "numpy", "msgspec", "uvloop", "tokenizers", "nvidia-cublas")


class Run:
    """One run: its settings, and the file that always holds what is known so far."""

    def __init__(self, setup: Setup, out: Path, commit: str) -> None:
        self.setup = setup
        self.out = out
        self.parts: dict[str, Any] = {}
        self._started_s = time.monotonic()
        self._facts = {
            "bench": "gpu_check",
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "rehearsal": setup.rehearse,
            "machine": msgspec.to_builtins(facts.machine()),
            "versions": facts.versions() | {"asyncllm": __version__} | _versions(),
            "config": msgspec.to_builtins(setup.config()),
            "scale": msgspec.to_builtins(setup.scale),
        }

    def save(self) -> None:
        """Write all of it."""
        seconds = round(time.monotonic() - self._started_s, 1)
        headline = report.headline(self.setup, self.parts)
        write_json(self.out, headline | self._facts | {"seconds": seconds, "parts": self.parts})

    def part(self, name: str, setup_file: Path) -> None:
        """Run one part to its end, or until it is far beyond its time; keep whatever it found."""
        found_file = Path(self.setup.directory) / f"{name}.json"
        command, limit_s = self.command(name, setup_file, found_file), self.limit_s(name)
        started_s = time.monotonic()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        killed = ""
        try:
            while process.poll() is None:
                if time.monotonic() - started_s > limit_s:
                    killed = f"still running after {limit_s:g} s"
                    progress(f"{name}: {killed}: killed")
                    break
                time.sleep(POLL_S)
                self._take(name, found_file)
        finally:
            kill_tree(process)
        self._take(name, found_file)
        found = self.parts.setdefault(name, {})
        found["part_seconds"] = round(time.monotonic() - started_s, 1)
        if process.returncode < 0 and not killed:
            killed = f"died by {signal.Signals(-process.returncode).name}"
        if killed:
            found["killed"] = killed
        self.save()

    def command(self, name: str, setup_file: Path, found_file: Path) -> list[str]:
        """The process of a part."""
        return [sys.executable, "-m", "perf.gpu_check.part", name, str(setup_file), str(found_file)]

    def limit_s(self, name: str) -> float:
        """Seconds after which a part is killed: it should long have stopped by itself."""
        return self.setup.part_seconds(name) + GRACE_S

    def _take(self, name: str, found_file: Path) -> None:
        """The part's file as it is now: it is written after every section."""
        if found_file.exists():
            found = json.loads(found_file.read_text())
            if found != self.parts.get(name):
                self.parts[name] = found
                self.save()

    @property
    def is_clean(self) -> bool:
        """Whether nothing failed, broke or was killed."""
        broken = any(found.get("errors") or found.get("killed") for found in self.parts.values())
        return not broken and report.is_correct(self.parts) is not False


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process with all its descendants, those in sessions of their own too."""
    if process.poll() is not None:
        return
    for pid in reversed(facts.process_tree(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit_of(repository: Path) -> str:
    """The commit that is checked out, short; "unknown" where there is no repository."""
    command = ["git", "-C", str(repository), "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu_check", description="Proof on a GPU.")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, help="the JSON file; default: perf/results/gpu-<date>-<commit>.json")
    parser.add_argument(
        "--peer", type=_peer, action="append", default=[], metavar="NAME=COMMAND", help="another engine on the workload"
    )
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton", help="executor.attention_backend")
    parser.add_argument("--commit", default="", help="where there is no repository; the variable COMMIT does the same")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, with tiny shapes")
    return parser.parse_args(argv)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return names


def _peer(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not (name and equals and command.strip()) or name in ("asyncllm", "transformers"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=COMMAND with a name of its own")
    return name, command


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parse_arguments(argv)
    if args.rehearse:
        # Before anything imports torch or Triton: a rehearsal is the same on a machine with a GPU.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    elif not _has_cuda():
        print("gpu-check needs a CUDA device and finds none; --rehearse runs everything on a CPU", file=sys.stderr)
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, _terminate)  # so that parts and their servers end with this process
    commit = args.commit or os.environ.get("COMMIT", "") or commit_of(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        setup = Setup(directory, args.rehearse, args.backend, dict(args.peer))
        setup_file = Path(directory) / "setup.json"
        setup_file.write_bytes(msgspec.json.encode(setup))
        run = Run(setup, args.out or _default_out(args.rehearse, commit), commit)
        run.out.parent.mkdir(parents=True, exist_ok=True)
        run.save()
        for name in args.parts:
            run.part(name, setup_file)
    print(report.table(setup, run.parts))
    print(f"written to {run.out}", file=sys.stderr)
    print(json.dumps(report.headline(setup, run.parts)))
    return 0 if run.is_clean else 1


def _default_out(rehearse: bool, commit: str) -> Path:
    """Figures of a rehearsal are no results."""
    if rehearse:
        return Path(tempfile.gettempdir()) / "gpu-check-rehearsal.json"
    return REPOSITORY / "perf" / "results" / f"gpu-{datetime.date.today().isoformat()}-{commit}.json"


if __name__ == "__main__":
    sys.exit(main())
