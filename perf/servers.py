"""Server processes under test: how each is started, made ready, frozen while another is measured, and stopped.

Knows command lines, ports and signals; knows nothing of load. A server lives in a process group of its own, so that a
Ctrl-C in the terminal reaches the bench alone, which then stops what it started. Linux.
"""

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import msgspec

from perf import facts

HOST = "127.0.0.1"
POLL_S = 0.05  # between two looks at a server that is starting; the resolution of start-up seconds
STOP_TIMEOUT_S = 15.0  # between SIGTERM and SIGKILL
LOG_TAIL_CHARS = 4000
# What `transformers serve` imports beyond transformers itself; psutil sizes the cache of its continuous batching.
TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "pydantic", "openai", "accelerate", "psutil", "rich")


class ServerError(Exception):
    """A server did not start; the message holds the end of its log."""


class ServerSpec(msgspec.Struct, frozen=True):
    """How to start one server and how to ask it for answers of a fixed length."""

    name: str
    command: list[str]
    ready_path: str  # answers 200 once requests are welcome
    environment: dict[str, str] = {}
    takes_ignore_eos: bool = True
    extra_body: dict[str, Any] = {}


def asyncllm(model: str, port: int, directory: Path, device: str, dtype: str, num_blocks: int = 0) -> ServerSpec:
    """asyncllm-server with its defaults; the configuration is written into `directory`.

    Variables such as ASYNCLLM_EXECUTOR__THREADS in the bench's own environment reach it.
    """
    config = directory / f"asyncllm-{port}.toml"
    config.write_text(
        f"[model]\npath = {json.dumps(model)}\ndtype = {json.dumps(dtype)}\ndevice = {json.dumps(device)}\n"
        f"[cache]\nnum_blocks = {num_blocks}\n"
    )
    return ServerSpec(
        "asyncllm",
        [sys.executable, "-m", "asyncllm", str(config)],
        "/readyz",
        {"ASYNCLLM_SERVER__HOST": HOST, "ASYNCLLM_SERVER__PORT": str(port)},
    )


def transformers(
    model: str,
    port: int,
    device: str,
    dtype: str,
    continuous_batching: bool,
    arguments: list[str],
    python: str = sys.executable,
) -> ServerSpec:
    """`transformers serve`, plain (one generate() after the other) or with continuous batching."""
    command = [python, "-m", "transformers.cli.transformers", "serve", model, "--host", HOST]
    command += ["--port", str(port), "--device", device, "--dtype", dtype]
    if continuous_batching:
        command += ["--continuous-batching", *arguments]
    # It answers 422 to ignore_eos, but takes a whole GenerationConfig: an end token that no token equals is the same.
    generation_config = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return ServerSpec(
        "transformers_cb" if continuous_batching else "transformers",
        command,
        "/health",
        takes_ignore_eos=False,
        extra_body={"generation_config": json.dumps(generation_config)},
    )


def missing_for_transformers() -> list[str]:
    """Packages that `transformers serve` needs and that are not installed."""
    return [name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """One running server process with its children. A context manager: it never outlives the block."""

    __slots__ = ("_log", "_process", "port", "ready_s", "spec", "started_at_s")

    def __init__(self, spec: ServerSpec, port: int, log_path: Path) -> None:
        """Start the process; its output goes to `log_path`."""
        self.spec = spec
        self.port = port
        self.ready_s: float | None = None  # seconds from start to readiness
        self._log: IO[bytes] = log_path.open("wb+")
        # The hub is never asked: all servers load local files, and a look-up would count as start-up time.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **spec.environment}
        self.started_at_s = time.perf_counter()
        self._process = subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def pids(self) -> list[int]:
        """The process and its children."""
        return facts.process_tree(self._process.pid)

    def memory(self) -> facts.Memory:
        """Resident memory now."""
        return facts.memory(self._process.pid)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once it is ready. Raises ServerError where it exits first or takes too long."""
        while not self._is_ready():
            if (code := self._process.poll()) is not None:
                raise ServerError(f"{self.spec.name} exited with {code} before it was ready:\n{self.log_tail()}")
            if time.perf_counter() - self.started_at_s > timeout_s:
                raise ServerError(f"{self.spec.name} was not ready within {timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(POLL_S)
        self.ready_s = time.perf_counter() - self.started_at_s

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", self.spec.ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False  # not listening yet
        finally:
            connection.close()

    def log_tail(self) -> str:
        """The end of what the process has printed."""
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")[-LOG_TAIL_CHARS:]

    def pause(self) -> None:
        """Freeze it: it keeps its memory and its port and takes no processor time."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it: politely, then by force. Harmless if it already ended."""
        self.resume()  # a frozen process would not see SIGTERM
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        # Its group has its pid. Not after it was reaped: the number may belong to someone else by then.
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
