"""Memory that the bench, its servers and its client all map: knobs one way, clock readings the other, no messages.

A store or a load costs some 50 ns and wakes nobody, so watching does not change what is watched. All cells are doubles.
Each ring has one writer, which advances its counter after the row is complete. Any process, any thread.
"""

import mmap
import os
from typing import Any

VARIABLE = "FRONTEND_BOARD"  # of the environment: the path to map

# Knobs, set by the bench.
STEP_S, PACED = 0, 1  # seconds of a step; whether the device waits for those who write
# Facts and counters, set by a server.
ENGINE_TID, NUM_STEPS, NUM_COMMITS, NUM_SUBMITS, NUM_FIRSTS = 8, 9, 10, 11, 12
HEADER_CELLS = 16

STEP_ROWS = 1 << 16
STEP_CELLS = 4  # when it was launched, when the device was done with the one before, when with this one; its rows
LAUNCHED_S, FREE_S, DUE_S, ROWS = range(STEP_CELLS)
TRACE_ROWS = 1 << 14

STEPS_AT = HEADER_CELLS
COMMITS_AT = STEPS_AT + STEP_ROWS * STEP_CELLS  # when each step's tokens were committed
SUBMITS_AT = COMMITS_AT + TRACE_ROWS  # when each Submit was in the ring
FIRSTS_AT = SUBMITS_AT + TRACE_ROWS  # when each of these requests' first token was committed
NUM_CELLS = FIRSTS_AT + TRACE_ROWS


class Board:
    """The mapped memory. `cells` is a flat view of doubles; hot code indexes it itself."""

    __slots__ = ("_descriptor", "cells", "path")

    def __init__(self, path: str, descriptor: int | None = None) -> None:
        """Map what `create` made, in this process or another."""
        self.path = path
        self._descriptor = descriptor
        with open(path, "r+b") as file:
            self.cells: Any = memoryview(mmap.mmap(file.fileno(), NUM_CELLS * 8)).cast("d")

    @classmethod
    def create(cls) -> "Board":
        """A new one, all zeros; others can map it by `path` until it is closed.

        Memory without a file: writing a page back to a disk could hold up the thread that stores into it.
        """
        descriptor = os.memfd_create("board")
        os.ftruncate(descriptor, NUM_CELLS * 8)
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", descriptor)

    def close(self) -> None:
        """Nobody else needs to map it any more; what is mapped stays so."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def count(self, counter: int) -> int:
        """A counter's value."""
        return int(self.cells[counter])

    def steps(self, first: int, last: int) -> list[tuple[float, ...]]:
        """Rows of the steps numbered from `first` up to `last`, which is left out."""
        cells = self.cells
        rows = ((STEPS_AT + (number % STEP_ROWS) * STEP_CELLS) for number in range(max(first, last - STEP_ROWS), last))
        return [tuple(cells[at : at + STEP_CELLS]) for at in rows]

    def ring(self, at: int, first: int, last: int) -> list[float]:
        """Entries of one of the rings of single values."""
        return [self.cells[at + number % TRACE_ROWS] for number in range(max(first, last - TRACE_ROWS), last)]
