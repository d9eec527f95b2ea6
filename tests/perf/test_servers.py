"""Server processes: ready, frozen, running again, gone. Real processes, which answer HTTP in a line of Python."""

import http.client
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import compare, facts, servers
from perf.servers import HOST, Server, ServerError, ServerSpec

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


def start(tmp_path: Path, script: str = SERVE) -> Server:
    port = servers.free_port()
    spec = ServerSpec("tiny", [sys.executable, "-c", script, HOST, str(port)], "/")
    return Server(spec, port, tmp_path / "tiny.log")


def state_of(pid: int) -> str:
    """R, S, T (stopped) … by the kernel, or nothing for a process that is gone."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else ""


def has_status(server: Server) -> int:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    connection.request("GET", "/")
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with start(tmp_path) as running:
        running.wait_ready(30)
        yield running


def test_readiness_is_timed_from_the_start_of_the_process(server: Server) -> None:
    assert server.ready_s is not None
    assert server.ready_s > 0


def test_a_server_is_gone_behind_its_block_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start(tmp_path) as running:
        running.wait_ready(30)
        pid = running.pids[0]
        raise KeyboardInterrupt

    assert state_of(pid) == ""


def test_a_frozen_server_is_stopped_as_well(server: Server) -> None:
    pid = server.pids[0]
    server.pause()
    server.stop()

    assert state_of(pid) == ""


def test_a_frozen_server_is_off_the_processor_and_answers_again_once_resumed(server: Server) -> None:
    server.pause()
    os.waitid(os.P_PID, server.pids[0], os.WSTOPPED | os.WNOWAIT)
    assert state_of(server.pids[0]) == "T"

    server.resume()
    assert has_status(server) == 200


def test_a_server_that_exits_before_it_is_ready_is_reported_with_its_log(tmp_path: Path) -> None:
    message = "tiny exited with 1 before it was ready:\nno such model"
    with start(tmp_path, "import sys; sys.exit('no such model')") as running, pytest.raises(ServerError, match=message):
        running.wait_ready(30)


def test_a_server_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    message = "was not ready within 0 s"
    with start(tmp_path, "import signal; signal.pause()") as running, pytest.raises(ServerError, match=message):
        running.wait_ready(0)


def test_memory_counts_the_process_with_its_peak(server: Server) -> None:
    memory = server.memory()

    assert memory.peak_bytes >= memory.rss_bytes > memory.anonymous_bytes > 0


def test_a_process_that_is_gone_costs_nothing(server: Server) -> None:
    pid = server.pids[0]
    server.stop()

    assert facts.cpu_seconds(pid) == 0.0
    assert facts.memory(pid) == facts.Memory(0, 0, 0)


def test_processor_time_splits_into_ours_and_foreign() -> None:
    clock = facts.CpuClock([os.getpid()])
    started_s = time.process_time()
    while time.process_time() < started_s + 0.05:  # work of ours, well above a tick of 10 ms
        pass

    (own_cores,) = clock.own_cores()
    assert own_cores > 0
    assert clock.foreign_cores() >= 0


def test_the_configuration_of_asyncllm_is_one_it_accepts(tmp_path: Path) -> None:
    from asyncllm import config

    spec = servers.asyncllm("some/model", 8123, tmp_path, "cpu", "bfloat16", num_blocks=900)
    loaded = config.load(spec.command[-1], spec.environment)

    assert (loaded.model.path, loaded.model.dtype, loaded.model.device) == ("some/model", "bfloat16", "cpu")
    assert (loaded.server.port, loaded.cache.num_blocks) == (8123, 900)


def test_an_unknown_server_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--servers", "asyncllm,triton"])

    assert "unknown triton; known: asyncllm, transformers, transformers_cb" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--servers", "asyncllm", "--model", str(tmp_path / "gone.gguf")])

    assert "no such model" in capsys.readouterr().err
