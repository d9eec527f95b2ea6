"""The real command with the real model: start, answer, bad starts, drain, exit codes. Real sockets, real signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncllm.threads import show_cores
from tests.processes import PARIS, Process, processes, read_all

EXIT_LIMIT_S = 15.0  # 4 s at most on a machine with nothing else to do


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    with processes(tmp_path) as start:
        yield start


def test_the_embedded_model_answers_drains_and_exits_with_zero(start) -> None:
    server = start(ASYNCLLM_SERVER__DRAIN_TIMEOUT_S="60")
    phases = server.until_ready()
    assert phases & {"open model", "load tokenizer", "import torch", "load weights", "allocate kv cache", "warm up"}
    status, raw = server.get("/v1/chat/completions", PARIS)
    answer = json.loads(raw)
    assert status == 200 and "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"

    idle_from = server.cpu_seconds()
    select = time.monotonic() + 1.0
    while time.monotonic() < select:
        os.sched_yield()
    assert server.cpu_seconds() - idle_from <= 0.05, "idle costs no CPU"

    # A stream that runs when SIGTERM comes is finished, new work is refused.
    connection = server.stream(PARIS | {"max_tokens": 60, "ignore_eos": True})
    server.popen.send_signal(signal.SIGTERM)
    server.until(lambda: server.get("/readyz")[0] == 503)
    assert server.get("/v1/chat/completions", PARIS)[0] == 503
    raw = server.first + read_all(connection)
    assert raw.count(b'"finish_reason":"length"') == 1
    assert server.wait() == 0
    log = server.log.read_text()
    assert re.search(r"ready in \d+\.\d+ s: open model .*warm up", log)
    assert "Traceback" not in log


def test_a_second_signal_aborts_what_runs(start) -> None:
    server = start()
    server.until_ready()
    connection = server.stream(PARIS | {"max_tokens": 4000, "ignore_eos": True})
    server.popen.send_signal(signal.SIGINT)
    server.until(lambda: server.get("/readyz")[0] == 503)
    server.popen.send_signal(signal.SIGINT)
    raw = server.first + read_all(connection)
    assert raw.count(b'"finish_reason":"abort"') == 1 and b"[DONE]" in raw
    assert server.wait() == 1
    assert "aborting 1 requests" in server.log.read_text()


def test_a_unix_socket_serves_as_well(start, tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    server = start(ASYNCLLM_SERVER__UNIX_SOCKET=str(path))
    with socket.socket(socket.AF_UNIX) as connection:
        # The file is there a moment before anyone listens.
        server.until(lambda: connection.connect_ex(str(path)) == 0 or server.popen.poll() is not None)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in connection.recv(65536)
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ASYNCLLM_MODEL__PATH": "no-such-model"}, "no-such-model"),
        ({"ASYNCLLM_MODEL__PATH": "{broken}"}, "broken.gguf"),
        ({"ASYNCLLM_CACHE__MEMORY_GIB": "100000", "ASYNCLLM_CACHE__NUM_BLOCKS": "0"}, "memory_gib"),
        ({"ASYNCLLM_MODEL__DEVICE": "cuda:7"}, "cuda:7"),
        ({"ASYNCLLM_SERVER__HOST": "203.0.113.1"}, "cannot listen on 203.0.113.1"),
    ],
)
def test_a_start_that_cannot_succeed_is_one_clear_line(start, tmp_path: Path, environment: dict, said: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00 and nothing more")
    server = start(**{name: value.format(broken=broken) for name, value in environment.items()})
    assert server.wait() == 1
    log = server.log.read_text()
    lines = [line for line in log.splitlines() if line.startswith("asyncllm-server: ")]
    assert len(lines) == 1 and said in lines[0], log
    assert "Traceback" not in log


def test_a_taken_port_is_one_clear_line(start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start(ASYNCLLM_SERVER__PORT=str(taken.getsockname()[1]))
        assert server.wait() == 1
        assert re.search(r"^asyncllm-server: cannot listen on .*in use", server.log.read_text(), re.MULTILINE)


def test_the_configuration_can_be_checked_and_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "asyncllm"]
    printed = subprocess.run([*command, "--print-default"], capture_output=True, text=True, check=True).stdout
    file = tmp_path / "config.toml"
    file.write_text(printed)
    checked = subprocess.run([*command, "--check", str(file)], capture_output=True, text=True, check=True).stdout
    assert json.loads(checked)["server"]["port"] == 8000
    file.write_text("[server]\nprot = 1\n")
    wrong = subprocess.run([*command, "--check", str(file)], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == f"asyncllm-server: {file}:2: unknown key server.prot; did you mean 'port'?\n"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is nothing to choose from")
@pytest.mark.parametrize("pins_engine", [True, False])
def test_event_loop_and_engine_keep_to_their_cores_and_an_unpinned_engine_to_none(start, pins_engine: bool) -> None:
    available = os.sched_getaffinity(0)
    first, last = min(available), max(available)
    cores = {"ASYNCLLM_EXECUTOR__LOOP_CORES": str(first)}
    if pins_engine:
        cores["ASYNCLLM_EXECUTOR__ENGINE_CORES"] = str(last)
    server = start(module="tests.dying_server", DYING="nothing", **cores)
    server.until_ready()
    ids = [int(task.name) for task in Path(f"/proc/{server.popen.pid}/task").iterdir()]
    tasks = {thread_id: os.sched_getaffinity(thread_id) for thread_id in ids}
    assert tasks.pop(server.popen.pid) == {first}, "the main thread runs the loop"
    assert ({last} if pins_engine else available) in tasks.values()
    said = f"engine on cores {last if pins_engine else show_cores(available)}, event loop on cores {first}"
    server.until(lambda: said in server.log.read_text())


def is_red(server: Process, probe: str) -> bool:
    """Whether a probe fails; on a machine that is slow enough, nobody answers it any more."""
    try:
        return server.get(probe)[0] == 503
    except OSError:
        return True


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("launch", "the kernel did not launch"),
        ("wait", "the device fell off the bus"),
        ("close raises", "closing the executor failed"),
        ("close hangs", "the engine thread did not end within 1 s"),
        ("close hangs with the GIL", "Timeout (0:00:04)!"),
    ],
)
def test_a_device_that_breaks_ends_the_stream_with_an_error_and_the_process_with_one(
    start, fault: str, said: str
) -> None:
    server = start(module="tests.dying_server", DYING=fault)
    server.until_ready()
    connection = server.stream({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400})
    raw = server.first + (b"" if b"[DONE]" in server.first else read_all(connection))
    died_s = time.monotonic()
    connection.close()
    if fault == "close hangs":  # for a second
        assert is_red(server, "/readyz") and is_red(server, "/livez")
    assert server.popen.wait(EXIT_LIMIT_S) == 1
    print(f"{fault}: exit {time.monotonic() - died_s:.2f} s after the last event")  # shown by pytest -s
    text = b"".join(re.findall(rb'"content":"(a*)"', raw))  # deltas merge where the loop is late
    assert text == b"a" * (9 if fault == "wait" else 8), "a launch takes the step in flight before it along"
    assert b'"code":"engine_dead"' in raw and b"data: [DONE]" in raw
    [public_id] = set(re.findall(r'"id":"(chatcmpl-[^"]*)"', raw.decode()))
    log = server.log.read_text()
    phase = "wait" if fault == "wait" else "launch"
    assert f"RuntimeError in {phase} of step 10; 1 requests were in flight: {public_id}\n" in log
    assert "the engine died: the engine stopped: RuntimeError" in log and said in log


def test_a_device_that_breaks_while_the_server_drains_is_a_failure_all_the_same(start) -> None:
    server = start(module="tests.dying_server", DYING="wait at a signal")
    server.until_ready()
    connection = server.stream({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400})
    server.popen.send_signal(signal.SIGTERM)
    server.until(lambda: "stopping: 1 requests" in server.log.read_text())
    server.popen.send_signal(signal.SIGUSR1)
    assert b'"code":"engine_dead"' in server.first + read_all(connection)
    assert server.wait() == 1
    assert "the engine died: the engine stopped: RuntimeError" in server.log.read_text()


def test_a_device_that_hangs_while_it_is_closed_does_not_keep_the_process(start) -> None:
    server = start(module="tests.dying_server", DYING="close hangs after a signal")
    server.until_ready()
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "the engine thread did not end within 5 s" in server.log.read_text()


def test_the_server_starts_without_torch() -> None:
    program = "import sys, asyncllm.server.lifecycle, tests.server.harness; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", "torch is the engine thread's to import"
