"""The front-end bench: its arithmetic, its sleeping device, one quick run of all of it, and the guard it carries."""

import asyncio
import json
import socket
import statistics
import threading
import time
from pathlib import Path

import pytest

from asyncllm.executor.base import StepPlan
from perf.frontend import __main__ as command
from perf.frontend import board as at
from perf.frontend import cells, device_server, guard, lab, pressure, stages
from perf.frontend.board import Board
from perf.frontend.cells import Plan
from perf.frontend.commits import commit_to_socket_s
from perf.frontend.figures import largest_ms, num_tokens
from perf.frontend.frames import cut_chunks
from perf.frontend.kernel_time import StampedReader
from perf.frontend.measure import fitted, warm_up
from perf.frontend.report import worst
from perf.frontend.sleeping_executor import SleepingExecutor, ordinary_token_ids
from tests.fakes import small_capacity

pytestmark = pytest.mark.alone


def plan_of(num_rows: int, samples: bool = True) -> StepPlan:
    """A step of decode rows, or of prefill rows that do not sample."""
    num_decodes = num_rows if samples else 0
    rows = list(range(num_rows))
    return StepPlan(rows, [1] * num_rows, [5] * num_rows, [samples] * num_rows, num_decodes, [], [], [], {}, {}, {})


def sleeping(step_s: float) -> SleepingExecutor:
    board = Board.create()
    board.cells[at.STEP_S] = step_s
    board.close()
    return SleepingExecutor(small_capacity(), [7, 8, 9], board)


def test_a_step_begins_when_the_one_before_is_done() -> None:
    executor = sleeping(0.02)
    begin_s = time.monotonic()
    first, second = executor.launch(plan_of(1)), executor.launch(plan_of(2))
    assert len(first.wait().token_ids) == 1
    assert len(second.wait().token_ids) == 2

    assert time.monotonic() - begin_s >= 0.04
    (_, _, first_due_s, _), (_, second_free_s, second_due_s, rows) = executor_steps(executor)
    assert (second_free_s, rows) == (first_due_s, 2)
    assert second_due_s == pytest.approx(first_due_s + 0.02)


def executor_steps(executor: SleepingExecutor) -> list[tuple[float, ...]]:
    cells = executor.cells
    starts = [at.STEPS_AT + number * at.STEP_CELLS for number in range(int(cells[at.NUM_STEPS]))]
    return [tuple(cells[start : start + at.STEP_CELLS]) for start in starts]


def test_rows_that_do_not_sample_have_no_token() -> None:
    executor = sleeping(0.0)

    assert executor.launch(plan_of(2, samples=False)).wait().token_ids == [-1, -1]
    assert set(executor.launch(plan_of(40)).wait().token_ids) == {7, 8, 9}


def test_every_token_the_device_draws_from_is_text_by_itself(backend) -> None:
    token_ids = ordinary_token_ids(backend)

    assert len(token_ids) > 10_000
    texts = {token_id: backend.decode([token_id]) for token_id in token_ids}
    assert all(texts.values())
    # One token of this vocabulary is that character; of all others it would say that they are half a character.
    assert [token_id for token_id, text in texts.items() if "\ufffd" in text] == [backend.token_to_id("ï¿½")]


@pytest.fixture(scope="module")
def backend():
    from asyncllm.weights.checkpoint import open_checkpoint

    return open_checkpoint("smollm2-135m-instruct", "", "auto").tokenizer()


def test_what_one_process_writes_on_the_board_another_mapping_reads() -> None:
    writer = Board.create()
    reader = Board(writer.path)
    writer.cells[at.NUM_STEPS] = 3
    writer.cells[at.STEPS_AT + 2 * at.STEP_CELLS + at.ROWS] = 17

    assert reader.count(at.NUM_STEPS) == 3
    assert [row[at.ROWS] for row in reader.steps(0, 3)] == [0, 0, 17]
    writer.close()
    writer.cells[at.NUM_STEPS] = 4
    assert reader.count(at.NUM_STEPS) == 4


def test_events_find_the_commits_they_came_from() -> None:
    commits_s = [0.0, 0.1, 0.2, 0.3, 0.4]
    late = [0.21, 0.39, 0.41]  # the second one by almost a step

    assert commit_to_socket_s(commits_s, [late]) == pytest.approx([0.01, 0.09, 0.01])


def test_streams_without_events_in_the_window_count_for_nothing() -> None:
    assert commit_to_socket_s([0.0, 0.1], [[], []]) == []


def test_an_event_later_than_a_step_belongs_to_the_older_commit() -> None:
    commits_s = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    assert commit_to_socket_s(commits_s, [[0.11, 0.35, 0.36, 0.41]]) == pytest.approx([0.01, 0.15, 0.06, 0.01])


def test_a_chunked_body_is_cut_with_its_framing() -> None:
    assert cut_chunks(b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n") == [b"3\r\nabc\r\n", b"1\r\nd\r\n", b"0\r\n\r\n"]


def test_intercept_and_slope_of_the_engine_come_from_the_numbers_of_streams() -> None:
    assert fitted([(1, 50.5), (101, 100.5), (201, 150.5)]) == pytest.approx((50.0, 0.5))
    assert fitted([(1, 50.0)]) == (None, None)


def test_the_kernel_says_when_bytes_were_in_the_socket_however_late_they_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        reader = StampedReader(4096)
        reader.prepare(client)
        server.sendall(b"warm")  # stamps begin a little after they were asked for
        reader.read(client)
        time.sleep(0.05)
        before_s = time.monotonic()
        server.sendall(b"hello")
        after_s = time.monotonic()
        time.sleep(0.05)

        assert reader.read(client) == 5
        assert reader.buffer.startswith(b"hello")
        assert before_s - 0.001 <= reader.stamp_s <= after_s + 0.001


class Answers:
    """Sends these answers on one connection, a piece at a time; a float between pieces is a sleep."""

    def __init__(self, *answers: bytes | float) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._answers = answers
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            for answer in self._answers:
                if isinstance(answer, float):
                    time.sleep(answer)
                elif connection.recv(1 << 16):
                    connection.sendall(answer)


ALIVE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nalive"


def test_probes_that_were_due_while_one_waited_count_too() -> None:
    server = Answers(ALIVE, 0.2, ALIVE)
    begin_s = time.monotonic()
    seconds, first, last = pressure.probe(server.port, "/livez", begin_s, begin_s + 0.05)

    assert (first, last) == (b"alive", b"alive")
    stood_still = seconds[1:]
    assert len(stood_still) >= 9, "one every 20 ms"
    assert stood_still == sorted(stood_still, reverse=True)
    assert stood_still[0] > 0.15


@pytest.mark.parametrize(
    ("answer", "words"), [(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "/livez: HTTP/1.1 503"), (b"", "closed")]
)
def test_a_probe_that_is_not_answered_ends_the_cell(answer: bytes, words: str) -> None:
    with pytest.raises(pressure.PressureError, match=words):
        pressure.probe(Answers(answer).port, "/livez", time.monotonic(), time.monotonic() + 1.0)


def test_the_highest_bucket_with_a_count_is_the_largest_lag_that_is_known() -> None:
    infinity = float("inf")
    assert largest_ms({0.001: 2, 0.005: 9, 0.01: 9, infinity: 9}) == 5
    assert largest_ms({0.001: 2, 0.005: 8, infinity: 9}) == 5, "nothing is known beyond the last finite bound"
    assert largest_ms({0.001: 0, infinity: 0}) is None
    assert largest_ms({}) is None


def test_a_largest_figure_is_that_of_the_worst_round() -> None:
    assert worst([{"lag_max_ms": 5.0, "p99_ms": 9.0}, {"lag_max_ms": 25.0, "p99_ms": 1.0}]) == {"lag_max_ms": 25.0}
    assert worst([]) == {}


@pytest.mark.parametrize(("name", "module"), [("asyncio", "asyncio"), ("uvloop", "uvloop")])
def test_the_server_under_test_runs_on_the_loop_that_is_named(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, attribute in ((device_server.cli, "uvloop"), (device_server.build, "build_executor"),
                             (device_server.lifecycle, "Engine"), (device_server.app, "LAG_INTERVAL_S")):  # fmt: skip
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # put back what `main` changes
    monkeypatch.setattr(device_server.WatchedEngine, "board", None, raising=False)
    monkeypatch.setattr(device_server, "Board", lambda _: None)
    monkeypatch.setenv(at.VARIABLE, "")
    monkeypatch.setattr("sys.argv", ["device_server", "--loop", name, "--lag-interval-s", "0.02"])
    loops = []

    def serve(_: list[str]) -> int:
        loops.append(device_server.cli.uvloop.new_event_loop())
        return 0

    monkeypatch.setattr(device_server.cli, "main", serve)
    assert device_server.main() == 0
    loops[0].close()
    assert type(loops[0]).__module__.startswith(module)
    assert device_server.app.LAG_INTERVAL_S == 0.02


def test_the_server_under_test_puts_as_many_tokens_into_an_event_as_it_is_told(tmp_path: Path) -> None:
    plan = Plan(num_streams=8, step_s=0.004, window_s=0.5, ramp_s=0.1, num_tokens=2000)
    with lab.start_ours(tmp_path, plan.num_streams, plan.num_tokens, lab.Variant(stream_interval=4)) as ours:
        warm_up(ours)
        seen = cells.run(ours, plan)

    # At both ends of the window, a stream's event may hold tokens of the other side.
    assert seen.outcome.num_events == pytest.approx(num_tokens(seen) / 4, abs=plan.num_streams)


def test_the_bare_writer_writes_its_frame_to_every_stream(tmp_path: Path) -> None:
    async def first_bytes(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\n\r\n")
        raw = await reader.readuntil(b"frame!frame!")
        writer.close()
        return raw

    async def both(port: int) -> list[bytes]:
        return await asyncio.gather(first_bytes(port), first_bytes(port))

    with lab.start_yardstick("limit", tmp_path, b"frame!") as limit:
        limit.board.cells[at.STEP_S] = 0.002
        limit.server.resume()
        for raw in asyncio.run(both(limit.server.port)):
            assert raw.startswith(b"HTTP/1.1 200 OK")


def test_a_quick_run_ends_in_one_json_line_with_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "frontend.json"
    assert command.main(["--quick", "--streams", "2,8", "--seconds", "0.3", "--no-baseline", "--out", str(out)]) == 0

    last = capsys.readouterr().out.rstrip().rpartition("\n")[2]
    result = json.loads(last)
    assert json.loads(out.read_text()) == result
    assert (result["bench"], result["reference_streams"], list(result["streams"])) == ("frontend", 8, ["2", "8"])
    assert result["baseline_ratio"] is None
    for figures in (result, result["streams"]["8"]):
        for name in ("loop_us_per_token", "limit_ratio", "commit_to_socket_p50_ms", "ttft_overhead_p50_ms",
                     "engine_us_per_step", "delivered_tokens_per_s"):  # fmt: skip
            assert figures[name] > 0, name
        assert figures["step_late_p99_ms"] >= 0
    assert result["saturation"]["paced_tokens_per_s"] > 0
    pressed = result["pressure"]
    for name in ("livez_p50_ms", "livez_p99_ms", "metrics_p50_ms", "metrics_p99_ms", "loop_lag_p99_ms",
                 "loop_lag_max_ms", "delivered_tokens_per_s"):  # fmt: skip
        assert pressed[name] > 0, name
    assert pressed["num_long_prompts"] == 1
    assert pressed["long_prompt_tokens"] == pytest.approx(20_000, rel=0.05)
    assert result["parameters"]["rounds"] == 1


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--streams", "4,0"], ["--step-ms", "-1"], ["--stream-interval", "0"]]
)
def test_parameters_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse_arguments(arguments)
    assert "above 0" in capsys.readouterr().err


def test_a_token_costs_the_loop_no_third_more_than_it_did_beside_the_bare_writer(tmp_path: Path) -> None:
    found = []
    for attempt in ("first", "second"):  # once more, where something else disturbed the one and not the other
        directory = tmp_path / attempt
        directory.mkdir()
        found.append(statistics.median(guard.ratios(directory)))
        if found[-1] <= guard.LIMIT:
            return
    pytest.fail(
        f"loop CPU per token over that of a bare writer: {found}, at most {guard.LIMIT:.2f} (perf/frontend/guard.py)"
    )


def test_the_stages_of_a_token_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("NUM_STREAMS", 8), ("NUM_STEPS", 20), ("ROUNDS", 3)):
        monkeypatch.setattr(stages, name, value)
    stages.main()
    totals = list(json.loads(capsys.readouterr().out.splitlines()[-1])["us_per_token"].values())
    limit, to_text, books, to_frame, to_socket = totals
    assert 0 < to_text < to_frame < to_socket and books > to_text, "each does what the one before does, and more"
    assert limit > 0
