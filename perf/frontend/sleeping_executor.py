"""A device that computes nothing: a step takes its time, in C and without the GIL, and makes random tokens.

Two steps may be in flight, as on a GPU, and they run back to back: a step begins when it is launched and the one before
is done. Scheduler, blocks and slots are the real ones. Knows plans and the board; engine thread only.
"""

import ctypes
import sys
import threading
import time

import numpy as np
import tokenizers

from asyncllm.executor.base import GPU_BALANCE_TOKENS, StepPlan, StepResult
from asyncllm.router.token_bytes import ByteTable, byte_scheme
from asyncllm.types import Capacity
from perf.frontend import board as at
from perf.frontend.board import Board

NUM_DRAWS = 1 << 14  # then it begins again
PR_SET_TIMERSLACK = 29  # of <sys/prctl.h>: the kernel may wake a sleeper 50 µs late otherwise


def ordinary_token_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids whose bytes are text by themselves, so that every token makes an event."""
    scheme = byte_scheme(backend)
    assert scheme is not None, "the bench wants a tokenizer whose tokens are bytes"
    special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    table = ByteTable(backend, scheme, special)
    return [token_id for token_id in range(backend.get_vocab_size()) if _is_text(table[token_id])]


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


class SleepingHandle:
    """A step in flight."""

    __slots__ = ("_due_s", "_executor", "_result")

    def __init__(self, executor: "SleepingExecutor", due_s: float, result: StepResult) -> None:
        self._executor = executor
        self._due_s = due_s
        self._result = result

    def wait(self) -> StepResult:  # hot
        """Sleep until the device would be done; paced, until the event loop has taken all steps before."""
        left_s = self._due_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        if self._executor.cells[at.PACED]:
            self._executor.drained.wait(1.0)
            self._executor.drained.clear()
        return self._result


class SleepingExecutor:
    """Implements `asyncllm.executor.base.Executor`."""

    depth = 2
    balance_tokens = GPU_BALANCE_TOKENS
    most_prompt_tokens = sys.maxsize

    def __init__(self, capacity: Capacity, token_ids: list[int], board: Board, seed: int = 0) -> None:
        """`token_ids`: what to draw from. Built on the engine thread, whose id goes on the board."""
        self.capacity = capacity
        self.facts = {"device": "sleeping"}
        self.cells = board.cells
        self.drained = threading.Event()  # set by the event loop
        self.drained.set()
        # A list, so that a step's tokens are one slice: the fake must not cost what it stands in for does not.
        self._draws: list[int] = np.random.default_rng(seed).choice(token_ids, NUM_DRAWS).tolist()
        self._next_draw = 0
        self._free_s = 0.0  # when the device is through with all it was given
        board.cells[at.ENGINE_TID] = threading.get_native_id()
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)

    def launch(self, plan: StepPlan) -> SleepingHandle:  # hot
        """Book the step's time on the device."""
        now_s = time.monotonic()
        cells, free_s, num_rows = self.cells, self._free_s, len(plan.slots)
        due_s = self._free_s = (now_s if now_s > free_s else free_s) + cells[at.STEP_S]
        number = int(cells[at.NUM_STEPS])
        row = at.STEPS_AT + number % at.STEP_ROWS * at.STEP_CELLS
        cells[row + at.LAUNCHED_S] = now_s
        cells[row + at.FREE_S] = free_s
        cells[row + at.DUE_S] = due_s
        cells[row + at.ROWS] = num_rows
        cells[at.NUM_STEPS] = number + 1
        return SleepingHandle(self, due_s, StepResult(self._sample(plan, num_rows)))

    def _sample(self, plan: StepPlan, num_rows: int) -> list[int]:  # hot
        first = self._next_draw
        if first + num_rows > NUM_DRAWS:
            first = 0
        self._next_draw = first + num_rows
        tokens = self._draws[first : first + num_rows]
        if plan.num_decode_rows != num_rows:
            return [token if samples else -1 for token, samples in zip(tokens, plan.samples)]
        return tokens

    def improve(self) -> bool:
        """Nothing to improve."""
        return False

    def close(self) -> None:
        """Nothing to free."""


def cost_us(step_s: float, num_steps: int) -> float:
    """Processor time of a step of this device by itself: mostly the kernel's, for going to sleep and coming back."""
    found: list[float] = []

    def work() -> None:
        board = Board.create()
        board.cells[at.STEP_S] = step_s
        capacity = Capacity(num_blocks=2, block_size=1, max_sequences=1, max_context_length=1, vocab_size=1)
        executor = SleepingExecutor(capacity, [0], board)
        plan = StepPlan([0], [1], [0], [True], 1, [], [], [], {}, {}, {})
        begin_ns = time.thread_time_ns()
        for _ in range(num_steps):
            executor.launch(plan).wait()
        found.append((time.thread_time_ns() - begin_ns) / 1e3 / num_steps)
        board.close()

    thread = threading.Thread(target=work)  # of its own, as in the server: the timer slack is a thread's
    thread.start()
    thread.join()
    return found[0]
