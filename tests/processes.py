"""Real server processes for tests: started on a free port with the embedded model, always stopped."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARIS = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 32,
}
DEADLINE_S = 60.0  # for things that take a second or two


class Process:
    """A server process on a free port, and what it printed."""

    def __init__(self, log: Path, *arguments: str, module: str = "asyncllm", **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = {"ASYNCLLM_SERVER__PORT": str(self.port), "ASYNCLLM_CACHE__NUM_BLOCKS": "512"} | environment
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env=os.environ | settings, stdout=output, stderr=output
            )

    def get(self, path: str, body: dict | None = None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def until(self, condition) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, self.log.read_text()

    def until_ready(self) -> set[str]:
        """Wait for readiness; returns the phases that /readyz named meanwhile."""
        phases = set()

        def ready() -> bool:
            assert self.popen.poll() is None, self.log.read_text()
            try:
                status, raw = self.get("/readyz")
            except urllib.error.URLError:
                return False
            phases.add(json.loads(raw).get("phase"))
            return status == 200

        self.until(ready)
        return phases

    def stream(self, body: dict) -> socket.socket:
        """A streamed chat request on a socket of its own, once its first bytes came."""
        raw = json.dumps(body | {"stream": True}).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + raw)
        self.first = connection.recv(65536)
        return connection

    def wait(self) -> int:
        return self.popen.wait(DEADLINE_S)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_all(connection: socket.socket) -> bytes:
    raw = b""
    with connection:
        while chunk := connection.recv(65536):
            raw += chunk
            if b"data: [DONE]" in raw:
                break
    return raw


@contextmanager
def processes(directory: Path) -> Iterator:
    """A function that starts servers; whatever still runs at the end is killed."""
    started: list[Process] = []

    def start(*arguments: str, module: str = "asyncllm", **environment: str) -> Process:
        process = Process(directory / f"log{len(started)}", *arguments, module=module, **environment)
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()


@contextmanager
def ready_process(directory: Path) -> Iterator[Process]:
    """One server that answers."""
    with processes(directory) as start:
        process = start()
        process.until_ready()
        yield process
