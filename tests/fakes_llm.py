"""The parts of an `AsyncLLM` over a fake device: byte tokenizer, alphabet, no torch. Everything between is real."""

import threading
from typing import Any

import pytest

from asyncllm.executor import build
from asyncllm.models.config import ModelArchitecture
from asyncllm.server import lifecycle
from tests.fakes import FakeExecutor
from tests.server import harness

OPTIONS: dict[str, Any] = {"path": harness.MODEL, "max_sequences": 8}


class FakeCheckpoint:
    """The text side of the harness's model."""

    text = harness.FACTS
    architecture = ModelArchitecture(
        family="llama",
        vocab_size=harness.VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position=harness.CAPACITY.max_context_length,
        tie_word_embeddings=True,
    )

    def tokenizer(self) -> Any:
        return harness.byte_tokenizer()


class Devices:
    """What the next engines run on, and the executors of those that did."""

    def __init__(self) -> None:
        self.executors: list[FakeExecutor] = []
        self.next_token = harness.alphabet
        self.capacity = harness.CAPACITY
        self.gate: threading.Semaphore | None = None
        self.options: dict[str, Any] = {}

    def build(self, config: Any, checkpoint: Any, report: Any) -> FakeExecutor:
        executor = FakeExecutor(self.capacity, 1, self.next_token, gate=self.gate, **self.options)
        self.executors.append(executor)
        return executor


def fake_devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Engines started from now on run on a fake."""
    devices = Devices()
    monkeypatch.setattr(lifecycle, "open_checkpoint", lambda *_: FakeCheckpoint())
    monkeypatch.setattr(build, "build_executor", devices.build)
    return devices
