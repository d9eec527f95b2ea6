"""A server process whose device breaks at the tenth step: the real command over a fake executor, for test_process.

DYING names what breaks: the launch or the wait of the step, or its launch and then the closing of the device.
"""

import ctypes
import os
import signal
import sys
import threading
import time

from asyncllm.cli import main
from asyncllm.executor import build
from tests.fakes import FakeExecutor, small_capacity


def until_signal() -> threading.Semaphore:
    """A gate that lets nine steps pass, and the others at SIGUSR1."""
    gate = threading.Semaphore(9)
    signal.signal(signal.SIGUSR1, lambda *_: gate.release(1000))
    return gate


FAULTS = {
    "nothing": {},
    "launch": {"fail_launch_at": 10},
    "wait": {"fail_wait_at": 10},
    "wait at a signal": {"fail_wait_at": 10, "gate": until_signal()},
    "close raises": {"fail_launch_at": 10, "on_close": lambda: 1 // 0},
    "close hangs": {"fail_launch_at": 10, "on_close": lambda: time.sleep(3600)},
    # As above, but holding the GIL: not one Python instruction runs in this process from then on.
    "close hangs with the GIL": {"fail_launch_at": 10, "on_close": lambda: ctypes.PyDLL(None).sleep(3600)},
    "close hangs after a signal": {"on_close": lambda: time.sleep(3600)},
}


def build_executor(config, checkpoint, report):
    """An executor that writes the letter a."""
    capacity = small_capacity(num_blocks=257, max_context_length=512, vocab_size=checkpoint.architecture.vocab_size)
    letter = checkpoint.tokenizer().token_to_id("a")
    return FakeExecutor(capacity, depth=2, next_token=lambda tokens: letter, **FAULTS[os.environ["DYING"]])


if __name__ == "__main__":
    build.build_executor = build_executor
    sys.exit(main())
