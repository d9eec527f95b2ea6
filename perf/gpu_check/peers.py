"""Other engines on the same workload, each a command in a process of its own.

A peer finds the workload in the file named by the variable WORKLOAD and ends its output with one JSON line that has
`tokens_per_s`. Knows commands; knows no engine.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from perf.gpu_check.findings import Found
from perf.gpu_check.setup import Box

TRANSFORMERS_COMMAND = f"{shlex.quote(sys.executable)} -m perf.gpu_check.transformers_peer"
TAIL_CHARS = 1500


class PeerError(Exception):
    """A peer gave no figure; the message says why and ends with what it printed."""


def run_peer(command: str, workload: Path, box: Box, found: Found) -> None:
    """Run the command until it ends or the box is over, and keep its figures. Raises PeerError."""
    environment = os.environ | {"WORKLOAD": str(workload)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(box.left_s)
        except subprocess.TimeoutExpired:
            ending = "did not end in time"
        else:
            ending = f"exited with {process.returncode}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever the shell started
                process.wait()
        output.seek(0)
        text = output.read()
    figures = last_figures(text)
    if figures is None:
        raise PeerError(f"the peer {ending} without a JSON line that has tokens_per_s:\n{text[-TAIL_CHARS:]}")
    found |= figures


def last_figures(output: str) -> dict[str, Any] | None:
    """The last line that is a JSON object with `tokens_per_s`."""
    for line in reversed(output.splitlines()):
        if not line.startswith("{"):
            continue
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("tokens_per_s"), int | float):
            return value
    return None
