"""The command line of a process that measures one turn of `perf.peers.shapes`: same flags, one JSON line.

Standard library only: one of these processes runs in a peer's environment.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

WARM_STEPS = 3  # before those that count


def main(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]], argv: Sequence[str] | None
) -> int:
    """Print what `measure` finds with the parsed flags, of which `rows` is a list of numbers."""
    parser.add_argument("--rows", type=_numbers, default=[1, 8, 32], help="of a decode step, comma-separated")
    parser.add_argument("--context", type=int, default=200, help="tokens a row attends to (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="default %(default)s")
    print(json.dumps(measure(parser.parse_args(argv))))
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
