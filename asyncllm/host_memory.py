"""The system's memory: pages of 2 MiB where a lot is read in every step, and pages got before they are needed.

With larger pages there are fewer address translations to look up: on two Zen 4 cores reading 256 MiB rose from 25.3 to
27.6 GB/s. And whoever touches a page first waits for it, in a virtual machine also for the host: there a fresh GiB took
3 s, which nobody who starts a server has to wait for. Only Linux knows such requests; elsewhere pages come when they
are touched. Any thread.
"""

import ctypes
import logging
import mmap
import os
import threading
import weakref
from time import monotonic

logger = logging.getLogger(__name__)

POPULATE_WRITE = 23  # of madvise, since Linux 5.14: gets pages as writing would, and changes nothing in them
CHUNK_BYTES = 4 << 20  # asked for at a time: 13 ms in a virtual machine, while which no other thread can map memory
LEAST_BYTES = 64 << 20  # that are worth a thread

_lock = threading.Lock()
_pending_bytes = 0


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Of memory that nobody has touched yet; a request only."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)


def zeros(num_bytes: int) -> mmap.mmap:
    """Memory of zeros whose pages a thread gets from here on, so that what is resident is final soon after.

    A few bytes, and all of them where the system knows no better way, are written before this returns.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(num_bytes, 1), **private)
    address = _address(memory)
    advise_huge_pages(address, len(memory))
    first = min(CHUNK_BYTES, len(memory))
    if not hasattr(mmap, "MADV_HUGEPAGE") or _madvise(address, first, POPULATE_WRITE) != 0:
        ctypes.memset(address, 0, len(memory))
    elif len(memory) < LEAST_BYTES:
        _madvise(address, len(memory), POPULATE_WRITE)
    else:
        _count(len(memory) - first)
        arguments = (weakref.ref(memory), first, len(memory))
        threading.Thread(target=_populate, args=arguments, name="memory", daemon=True).start()
    return memory


def pending_bytes() -> int:
    """Bytes of all `zeros` that the system still counts as available."""
    return _pending_bytes


def _populate(reference: "weakref.ref[mmap.mmap]", begin: int, end: int) -> None:
    """Stops where nobody holds the memory any more."""
    num_bytes, since = end - begin, monotonic()
    while begin < end and (memory := reference()) is not None:
        chunk_bytes = min(CHUNK_BYTES, end - begin)
        if error := _madvise(_address(memory) + begin, chunk_bytes, POPULATE_WRITE):
            logger.warning("pages come when they are touched, as the system gives none ahead: %s", os.strerror(error))
            break
        del memory
        begin += chunk_bytes
        _count(-chunk_bytes)
    _count(begin - end)
    logger.debug("%.2f GiB of memory got in %.1f s", num_bytes / 2**30, monotonic() - since)


def _count(num_bytes: int) -> None:
    global _pending_bytes
    with _lock:
        _pending_bytes += num_bytes


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _madvise(address: int, num_bytes: int, advice: int) -> int:
    """0, or the error's number."""
    system = ctypes.CDLL(None, use_errno=True)
    failed = system.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice)
    return ctypes.get_errno() if failed else 0
