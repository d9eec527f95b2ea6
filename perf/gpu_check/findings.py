"""What one part of the check has found, on disk after every section: a killed part leaves its figures behind."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perf.gpu_check.setup import Box

Found = dict[str, Any]
TRACEBACK_CHARS = 2000  # its end, where the error stands


def progress(message: str) -> None:
    """A line for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half a file, whenever the writer was killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


class Findings:
    """Sections of a part, each with its seconds; a section that fails is recorded, and the next one runs."""

    def __init__(self, part: str, path: Path, box: Box) -> None:
        self.part = part
        self.box = box
        self._path = path
        self.sections: dict[str, Found] = {}
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        self.out_of_time: list[str] = []  # not begun, or ended early

    def run(self, name: str, body: Callable[[Found], None]) -> Found:
        """Let `body` fill a section; what it wrote before an error or the end of its time is kept."""
        found = self.sections[name] = {}
        if self.box.is_over:
            self.out_of_time.append(name)
            progress(f"{self.part}: {name}: skipped, out of time")
        else:
            progress(f"{self.part}: {name}")
            started_s = time.monotonic()
            try:
                body(found)
            except Exception as error:  # a visit to a GPU is precious: whatever went wrong, the rest goes on
                self.errors[name] = traceback.format_exc()[-TRACEBACK_CHARS:]
                progress(f"{self.part}: {name}: {type(error).__name__}: {str(error)[:200]}")
            self.seconds[name] = round(time.monotonic() - started_s, 2)
            self.late(name)
        self.save()
        return found

    def late(self, name: str) -> bool:
        """Whether the part's time is over; if so, notes that section `name` was cut short."""
        if self.box.is_over and name not in self.out_of_time:
            self.out_of_time.append(name)
            progress(f"{self.part}: {name}: cut short, out of time")
        return self.box.is_over

    def save(self) -> None:
        """Write everything found so far."""
        write_json(
            self._path,
            {**self.sections, "seconds": self.seconds, "errors": self.errors, "out_of_time": self.out_of_time},
        )
