"""Where and with what a figure was measured, and what else the machine did meanwhile. Linux: reads /proc.

Knows processes by their id; knows nothing of servers or requests.
"""

import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import msgspec

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Machine(msgspec.Struct, frozen=True):
    """The machine, in what decides its speed."""

    cpu: str
    cores: int  # that this process may run on
    memory_bytes: int
    kernel: str


def machine() -> Machine:
    """This machine."""
    models = [
        line for line in (PROC / "cpuinfo").read_text().splitlines() if line.startswith(("model name", "Hardware"))
    ]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cpu, len(os.sched_getaffinity(0)), memory_bytes, platform.release())


def cpu_flags() -> frozenset[str]:
    """The instruction sets this machine's processor names; empty where it names none."""
    for line in (PROC / "cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def versions() -> dict[str, str | None]:
    """The versions a figure depends on; None for what is not installed here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "asyncllm", "aiohttp"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class Memory(msgspec.Struct, frozen=True):
    """Resident memory of a process and its children."""

    rss_bytes: int  # VmRSS: anonymous pages, and file pages such as mapped weights and libraries
    anonymous_bytes: int  # RssAnon: what the process allocated itself
    peak_bytes: int  # VmHWM: the largest VmRSS so far


def process_tree(pid: int) -> list[int]:
    """The process and all its living descendants."""
    pids = [pid]
    for parent in pids:  # grows while it is walked
        for task in (PROC / str(parent) / "task").glob("*/children"):
            pids += [int(child) for child in _read(task).split()]
    return pids


def memory(pid: int) -> Memory:
    """Resident memory of `pid` with its children, now."""
    totals = {"VmRSS": 0, "RssAnon": 0, "VmHWM": 0}
    for member in process_tree(pid):
        for line in _read(PROC / str(member) / "status").splitlines():
            name, _, value = line.partition(":")
            if name in totals:
                totals[name] += int(value.split()[0]) * 1024
    return Memory(totals["VmRSS"], totals["RssAnon"], totals["VmHWM"])


def cpu_seconds(pid: int) -> float:
    """Processor time one process has used in all its threads; zero once it is gone."""
    # The name in parentheses may hold spaces; fields are counted behind it. utime and stime.
    fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def _read(path: Path) -> str:
    """A file of /proc, empty where its process or thread ended since it was listed."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def machine_busy_seconds() -> float:
    """Processor time the whole machine has spent on anything, with what its host took away (steal)."""
    fields = [int(field) for field in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


class CpuClock:
    """Splits the machine's processor time since its making into ours and foreign."""

    __slots__ = ("_busy_s", "_own_s", "_pids", "_start_s")

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._start_s = time.monotonic()
        self._own_s = [cpu_seconds(pid) for pid in self._pids]
        self._busy_s = machine_busy_seconds()

    def own_cores(self) -> list[float]:
        """Cores each of the processes kept busy on average."""
        wall_s = self._wall_s()
        return [(cpu_seconds(pid) - before) / wall_s for pid, before in zip(self._pids, self._own_s, strict=True)]

    def foreign_cores(self) -> float:
        """Cores kept busy on average by everything else: the noise beside a figure. Never below zero (10 ms ticks)."""
        own_s = sum(cpu_seconds(pid) for pid in self._pids) - sum(self._own_s)
        return max(0.0, machine_busy_seconds() - self._busy_s - own_s) / self._wall_s()

    def _wall_s(self) -> float:
        return max(time.monotonic() - self._start_s, 1 / TICKS_PER_S)
