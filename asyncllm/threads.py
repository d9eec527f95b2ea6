"""Which CPU cores a thread runs on: lists of cores as people write them, and pinning.

Knows the operating system's threads; nothing of what they do. Only Linux can pin a thread, and elsewhere a list of
cores is refused. Any thread.
"""

import os
import re
from collections.abc import Collection

from asyncllm.errors import ConfigError, show


def available_cores() -> frozenset[int]:
    """Cores the calling thread may run on; empty where the system has no say in it."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def parse_cores(text: str, key: str) -> frozenset[int]:
    """The cores of a list such as "2,4-7"; empty text = none.

    Raises ConfigError, which names `key`, for what is no such list and for cores this process may not use.
    """
    if not text.strip():
        return frozenset()
    available = available_cores()
    if not available:
        raise ConfigError(f"{key} = {show(text)}: this system cannot pin threads to cores; leave it empty")
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        if match is None:
            raise ConfigError(f"{key} = {show(text)}: expected cores such as 2 or 2,4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{key} = {show(text)}: the range {first}-{last} is empty")
        missing = last if last > max(available) else next((c for c in range(first, last + 1) if c not in available), -1)
        if missing >= 0:
            usable = show_cores(available)
            raise ConfigError(f"{key} = {show(text)}: this process may not use core {missing}; it may use {usable}")
        cores.update(range(first, last + 1))
    return frozenset(cores)


def show_cores(cores: Collection[int]) -> str:
    """Cores as `parse_cores` reads them, in the shortest way: "0-2,5"."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def pin(cores: Collection[int]) -> None:
    """Let the calling thread run on these cores only; threads it starts later inherit them."""
    os.sched_setaffinity(0, cores)  # 0 is the calling thread, not the process
