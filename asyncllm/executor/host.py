"""What the machine offers: memory that may still be taken, CPU time, bfloat16 instructions.

Reads /proc and cgroup files below `root`, which tests replace. Torch-free; called once at start-up.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from asyncllm.host_memory import pending_bytes

_SYSTEM = Path("/")
# Processor flags, x86 and Arm, under which bfloat16 matrix products run in hardware.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def available_memory_bytes(root: Path = _SYSTEM) -> int:
    """Bytes this process can still take without swapping or meeting the limit of a container around it."""
    available = [_meminfo_available(root)]
    for group in _memory_groups(root):
        limit = _read_int(group / "memory.max", group / "memory.limit_in_bytes")
        used = _read_int(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            # Page cache counts as used, but is given back under pressure: a freshly read checkpoint is mostly that.
            available.append(limit - used + _inactive_file_bytes(group))
    return max(0, min(available) - pending_bytes())


def cpu_quota(root: Path = _SYSTEM) -> int | None:
    """CPUs' worth of time a container may use, rounded up; None without a limit."""
    for group in _groups(root, "cpu"):
        text = _read(group / "cpu.max")  # "200000 100000" or "max 100000"
        if text and not text.startswith("max"):
            quota, period = map(int, text.split())
            return max(1, -(-quota // period))
        old_quota, old_period = _read_int(group / "cpu.cfs_quota_us"), _read_int(group / "cpu.cfs_period_us")
        if old_quota and old_period and old_quota > 0:
            return max(1, -(-old_quota // old_period))
    return None


def cpu_has_bfloat16(root: Path = _SYSTEM) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this processor."""
    return not _BFLOAT16_FLAGS.isdisjoint(cpu_flags(root))


@cache
def cpu_flags(root: Path = _SYSTEM) -> frozenset[str]:
    """What the processor can do, in Linux's words, and whose it is; empty where the kernel does not tell."""
    words = f"{_cpu_fact('vendor_id', root)} {_cpu_fact('flags', root) or _cpu_fact('Features', root)}"
    return frozenset(words.split())


def cpu_name(root: Path = _SYSTEM) -> str:
    """The processor's marketing name, or "" where the kernel does not tell."""
    return _cpu_fact("model name", root)


def _cpu_fact(name: str, root: Path) -> str:
    """Of the first processor that has it."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def has_nvidia_driver(root: Path = _SYSTEM) -> bool:
    """Whether an NVIDIA kernel driver is loaded, usable or not."""
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()


def _meminfo_available(root: Path) -> int:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # No /proc: half of the memory is as good a guess as any other.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _memory_groups(root: Path) -> Iterator[Path]:
    return _groups(root, "memory")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the process's cgroup and its ancestors, version 2 or 1; any of them may hold a limit."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        relative = Path(path.lstrip("/"))
        yield from (top / part for part in (relative, *relative.parents))


def _inactive_file_bytes(group: Path) -> int:
    for line in (_read(group / "memory.stat") or "").splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _read_int(*paths: Path) -> int | None:
    """The number in the first of the files that exists; None for "max" or no file."""
    for path in paths:
        text = _read(path)
        if text is not None:
            return None if text.startswith("max") else int(text)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
