"""The repository's own kernel tests, run natively on the device in a process beside the other checks."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perf.gpu_check.findings import Found
from perf.gpu_check.setup import Box, Setup

REPOSITORY = Path(__file__).resolve().parents[2]
TAIL_CHARS = 1500
POLL_S = 0.2
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|deselected)")


class KernelTests:
    """A pytest run in the background; a context manager that never leaves it behind."""

    def __init__(self, setup: Setup) -> None:
        self._paths = [path for path in setup.scale.kernel_tests if (REPOSITORY / path).exists()]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen[str] | None = None
        if self._paths and importlib.util.find_spec("pytest"):
            # No configuration: it names plugins that a borrowed machine need not have.
            command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(REPOSITORY), "-q"]
            command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short"]
            if not setup.rehearse and importlib.util.find_spec("xdist"):
                command += ["-n", "8"]  # what takes time is compiling kernels
            self._process = subprocess.Popen(
                [*command, *self._paths],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> "KernelTests":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its workers
            self._process.wait()
        self._output.close()

    def finish(self, box: Box, found: Found) -> None:
        """Wait for the run to end, and read its last line."""
        if self._process is None:
            found |= {"passed": False, "reason": "pytest or the tests are not here"}
            return
        while self._process.poll() is None and not box.is_over:
            time.sleep(POLL_S)
        self._output.seek(0)
        text = self._output.read()
        found |= parse_counts(text)
        found["paths"] = self._paths
        found["passed"] = self._process.returncode == 0 and found.get("num_passed", 0) > 0
        if not found["passed"]:
            found["tail"] = text[-TAIL_CHARS:]
            if self._process.returncode is None:
                found["reason"] = "did not end in time"


def parse_counts(output: str) -> dict[str, int]:
    """`3 passed, 1 failed in 2.00s`, the end of pytest's output, as numbers."""
    last = output.strip().rpartition("\n")[2]
    return {f"num_{'errors' if word == 'error' else word}": int(count) for count, word in COUNT.findall(last)}
