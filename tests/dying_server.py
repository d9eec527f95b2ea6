"""A server process whose device fails at the tenth step: the real command over a fake executor, for test_process."""

import sys

from asyncllm.cli import main
from asyncllm.executor import build
from tests.fakes import FakeExecutor, small_capacity


def build_executor(config, checkpoint, report):
    """An executor that writes the letter a, ten times."""
    capacity = small_capacity(num_blocks=257, max_context_length=512, vocab_size=checkpoint.architecture.vocab_size)
    letter = checkpoint.tokenizer().token_to_id("a")
    return FakeExecutor(capacity, next_token=lambda tokens: letter, fail_launch_at=10)


if __name__ == "__main__":
    build.build_executor = build_executor
    sys.exit(main())
