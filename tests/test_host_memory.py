"""Memory whose pages are got ahead, read from this process's own maps."""

import ctypes
import gc
import logging
import mmap
import os
import threading
from pathlib import Path

import pytest

from asyncllm import host_memory
from asyncllm.executor import host
from asyncllm.host_memory import CHUNK_BYTES, LEAST_BYTES, pending_bytes, zeros

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux")
MANY = LEAST_BYTES + 3 * CHUNK_BYTES + 5 * mmap.PAGESIZE


def resident_bytes(memory: mmap.mmap) -> int:
    """Of these bytes, as /proc/self/smaps has their mapping."""
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first < begin + len(memory) and begin < last
        elif inside and name == "Rss:":
            found += int(rest[0]) * 1024
    return found


def join() -> None:
    for thread in threading.enumerate():
        if thread.name == "memory":
            thread.join()


def test_all_pages_come_without_being_touched_and_what_is_written_meanwhile_stays() -> None:
    memory = zeros(MANY)
    for place in range(0, MANY, MANY // 100):
        assert memory[place] == 0
        memory[place] = 7
    join()
    assert resident_bytes(memory) >= MANY
    assert all(memory[place] == 7 for place in range(0, MANY, MANY // 100))
    assert pending_bytes() == 0


@pytest.mark.parametrize("num_bytes", [0, 1, mmap.PAGESIZE, CHUNK_BYTES + 1, LEAST_BYTES - mmap.PAGESIZE])
def test_a_little_is_there_at_once(num_bytes: int) -> None:
    memory = zeros(num_bytes)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory"]
    assert len(memory) == max(num_bytes, 1) and memory.find(b"\1") == -1
    assert resident_bytes(memory) >= len(memory)


def test_a_system_that_knows_no_such_request_gets_zeros_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "POPULATE_WRITE", 1 << 20)  # EINVAL, as before Linux 5.14
    memory = zeros(MANY)
    assert resident_bytes(memory) >= MANY and pending_bytes() == 0


class Paused:
    """`madvise` that waits before each of the thread's chunks, and may refuse them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.error, self._madvise = threading.Semaphore(0), 0, host_memory._madvise
        self.num_chunks = 0
        monkeypatch.setattr(host_memory, "_madvise", self)

    def __call__(self, address: int, num_bytes: int, advice: int) -> int:
        if threading.current_thread().name != "memory":
            return self._madvise(address, num_bytes, advice)
        self.go.acquire()
        self.num_chunks += 1
        return self.error or self._madvise(address, num_bytes, advice)


def test_what_is_still_to_come_does_not_count_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = Paused(monkeypatch)
    memory = zeros(MANY)
    assert pending_bytes() == MANY - CHUNK_BYTES
    monkeypatch.setattr(host, "_meminfo_available", lambda root: 10 * MANY)
    monkeypatch.setattr(host, "_memory_groups", lambda root: [])
    assert host.available_memory_bytes() == 9 * MANY + CHUNK_BYTES
    paused.go.release(100)
    join()
    assert host.available_memory_bytes() == 10 * MANY
    assert len(memory) == MANY


def test_memory_that_is_let_go_is_not_asked_for_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = Paused(monkeypatch)
    memory = zeros(MANY)
    del memory
    gc.collect()
    paused.go.release(100)
    join()
    assert paused.num_chunks <= 1 and pending_bytes() == 0


def test_a_system_that_refuses_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paused = Paused(monkeypatch)
    paused.error = 12
    paused.go.release(100)
    with caplog.at_level(logging.WARNING):
        memory = zeros(MANY)
        join()
    why = os.strerror(12)
    assert caplog.messages == [f"pages come when they are touched, as the system gives none ahead: {why}"]
    assert pending_bytes() == 0 and memory[MANY - 1] == 0
