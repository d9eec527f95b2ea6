"""The hand-off between the loop thread and the engine thread: two bounded rings and a bell.

No lock is taken by both threads. `SpscRing` is right for exactly one producer thread and one consumer thread, under the
GIL and in free-threaded CPython alike; `tests/test_ring.py` hammers it.
"""

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class SpscRing(Generic[T]):
    """Bounded queue for one producer thread and one consumer thread, without a lock.

    The producer stores the item, then advances `_tail`; the consumer reads `_tail`, then the item, clears the cell,
    then advances `_head`. Each index has one writer and only grows, so a stale read errs on the safe side: the
    producer may see a full ring that just got room, the consumer an empty one that just got an item.
    """

    __slots__ = ("_cells", "_head", "_mask", "_tail")

    def __init__(self, capacity: int) -> None:
        """`capacity`: items, a power of two."""
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"ring capacity must be a power of two, got {capacity}")
        self._cells: list[T | None] = [None] * capacity
        self._mask = capacity - 1
        self._head = 0  # written by the consumer only
        self._tail = 0  # written by the producer only

    def try_push(self, item: T) -> bool:  # hot
        """Append, or False when full. Producer thread only."""
        tail = self._tail
        if tail - self._head > self._mask:
            return False
        self._cells[tail & self._mask] = item
        self._tail = tail + 1
        return True

    def try_pop(self) -> T | None:  # hot
        """The oldest item, or None when empty. Consumer thread only."""
        head = self._head
        if head == self._tail:
            return None
        index = head & self._mask
        item = self._cells[index]
        self._cells[index] = None
        self._head = head + 1
        return item

    def __len__(self) -> int:
        """Items inside; a snapshot when read from a third thread."""
        return self._tail - self._head

    @property
    def capacity(self) -> int:
        """Items it can hold."""
        return self._mask + 1


class Bell:
    """Wakes the engine thread when it is parked.

    `ring` is called after every push, whether or not anybody sleeps: asking first ("is it parked?") would need a full
    fence between two plain stores, which free-threaded Python does not promise. The event's own lock is uncontended.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> None:
        """Wake the sleeper, or let its next `wait` return at once. Any thread."""
        self._event.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until rung. Consumer thread only; check the ring again afterwards."""
        self._event.wait(timeout_s)

    def clear(self) -> None:
        """Forget earlier rings: clear, then look at the ring, then wait, or a push in between is slept over."""
        self._event.clear()
