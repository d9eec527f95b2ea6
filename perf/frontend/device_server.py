"""The server under test: the real command over `SleepingExecutor`, with a few clock readings on the board.

Configured as any server, by ASYNCLLM_ variables; FRONTEND_BOARD is the path of the board. Weights are never opened.
"""

import os
import sys
from collections.abc import Callable

from asyncllm.cli import main
from asyncllm.config import Config
from asyncllm.engine.engine import Engine
from asyncllm.executor import build
from asyncllm.server import lifecycle
from asyncllm.types import Capacity, EngineOutput, StepOutput, Submit
from asyncllm.weights.base import Checkpoint
from perf.frontend import board as at
from perf.frontend.board import Board
from perf.frontend.sleeping_executor import SleepingExecutor, ordinary_token_ids


class WatchedEngine(Engine):
    """The engine's handle, which notes when requests go in and steps come out. Loop thread."""

    board: Board
    executor: SleepingExecutor
    _awaited = 0  # the request that came last, until its first token was noted; 0 = none

    def submit(self, command: Submit) -> bool:
        """See `Engine`; notes when the request was in the ring."""
        taken = super().submit(command)
        cells = self.board.cells
        number = int(cells[at.NUM_SUBMITS])
        cells[at.SUBMITS_AT + number % at.TRACE_ROWS] = self._clock()
        cells[at.NUM_SUBMITS] = number + 1
        self._awaited = command.request_id
        return taken

    def pop_output(self) -> EngineOutput | None:  # hot: once per step and once more
        """See `Engine`; lets a paced device go on, and notes the time of the commit: half a microsecond per step."""
        output = super().pop_output()
        cells = self.board.cells
        if output is None:
            if cells[at.PACED]:
                self.executor.drained.set()
        elif type(output) is StepOutput and output.token_ids:
            self._note(output)
        return output

    def _note(self, output: StepOutput) -> None:
        cells = self.board.cells
        number = int(cells[at.NUM_COMMITS])
        cells[at.COMMITS_AT + number % at.TRACE_ROWS] = output.committed_s
        cells[at.NUM_COMMITS] = number + 1
        if self._awaited and self._awaited in output.request_ids:
            number = int(cells[at.NUM_FIRSTS])
            cells[at.FIRSTS_AT + number % at.TRACE_ROWS] = output.committed_s
            cells[at.NUM_FIRSTS] = number + 1
            self._awaited = 0


def build_executor(config: Config, checkpoint: Checkpoint, report: Callable[[str], None]) -> SleepingExecutor:
    """Takes the place of `asyncllm.executor.build.build_executor`."""
    capacity = Capacity(
        num_blocks=config.cache.num_blocks,
        block_size=config.cache.block_size,
        max_sequences=config.scheduler.max_sequences,
        max_context_length=config.model.max_context_length,
        vocab_size=checkpoint.architecture.vocab_size,
    )
    executor = SleepingExecutor(capacity, ordinary_token_ids(checkpoint.tokenizer()), WatchedEngine.board)
    WatchedEngine.executor = executor
    return executor


if __name__ == "__main__":
    WatchedEngine.board = Board(os.environ[at.VARIABLE])
    build.build_executor = build_executor
    lifecycle.Engine = WatchedEngine  # type: ignore[misc]
    sys.exit(main())
