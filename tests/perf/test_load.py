"""The load generator against a real socket: what it sends, what it counts, what it prints."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from perf import load
from perf.client import Completion, RequestOptions
from perf.sse import decode_chunk
from tests.perf.sse_server import SseServer


def make_params(server: SseServer, **changes: object) -> load.LoadParams:
    request = RequestOptions(output_tokens=5)
    params = load.LoadParams(server.url, request, num_requests=6, concurrency=3, num_warmup=1, input_tokens=16)
    return msgspec.structs.replace(params, **changes)


async def run_main(argv: Sequence[str]) -> int:
    """The command line in a thread of its own, since it brings its own event loop."""
    return await asyncio.to_thread(load.main, argv)


@pytest.mark.parametrize(("new_connections", "expected"), [(False, 3), (True, 7)])
async def test_connections_are_kept_or_new_for_each_request(new_connections: bool, expected: int) -> None:
    async with SseServer().serve() as server:
        await load.run(make_params(server, new_connections=new_connections))

    assert len(server.ports) == expected


async def test_tokens_are_counted_from_the_servers_usage() -> None:
    async with SseServer().serve() as server:
        result = await load.run(make_params(server))

    assert (result.num_ok, result.num_failed, result.failures) == (6, 0, {})
    assert (result.output_tokens, result.prompt_tokens, result.tokens_counted_by) == (30, 30, "usage")
    assert (result.num_full_length, result.tokens_per_chunk) == (6, 1.0)
    assert (result.ttft_s.count, result.itl_s.count, result.tpot_s.count, result.e2e_s.count) == (6, 24, 6, 6)


async def test_tokens_are_counted_by_chunks_where_the_server_gives_no_usage() -> None:
    async with SseServer(with_usage=False).serve() as server:
        result = await load.run(make_params(server))

    assert (result.output_tokens, result.tokens_counted_by) == (30, "chunks")


async def test_the_chat_role_chunk_is_no_token() -> None:
    async with SseServer(with_usage=False).serve() as server:
        result = await load.run(make_params(server, request=RequestOptions("chat", output_tokens=5)))

    assert result.output_tokens == 30
    assert server.bodies[-1]["messages"][0]["role"] == "user"


async def test_requests_ask_for_a_fixed_length_and_for_usage() -> None:
    async with SseServer().serve() as server:
        await load.run(make_params(server))

    body = server.bodies[-1]
    assert body.items() >= {"max_tokens": 5, "min_tokens": 5, "ignore_eos": True, "stream": True}.items()
    assert body["stream_options"] == {"include_usage": True}
    assert "model" not in body


async def test_no_prompt_is_sent_twice_not_even_by_the_warm_up() -> None:
    async with SseServer().serve() as server:
        await load.run(make_params(server))

    assert len({body["prompt"] for body in server.bodies}) == len(server.bodies) == 7


async def test_ignore_eos_is_dropped_where_the_server_refuses_it() -> None:
    async with SseServer(refuse_ignore_eos=True).serve() as server:
        result = await load.run(make_params(server))

    assert (result.num_ok, result.num_failed, result.fixed_length) == (6, 0, False)


async def test_the_extra_body_wins_over_all_other_fields() -> None:
    async with SseServer().serve() as server:
        request = RequestOptions(output_tokens=5, extra_body={"temperature": 0.7, "top_k": 3})
        await load.run(make_params(server, request=request))

    assert server.bodies[-1].items() >= {"temperature": 0.7, "top_k": 3}.items()


async def test_refused_requests_are_counted_and_kept_out_of_the_throughput() -> None:
    async with SseServer(fail_every=3).serve() as server:
        result = await load.run(make_params(server, num_warmup=0))

    assert (result.num_ok, result.num_failed, result.output_tokens) == (4, 2, 20)
    assert result.failures == {'HTTP 500: {"error": {"message": "out of luck"}}': 2}


async def test_a_stream_that_never_says_why_it_ended_is_a_failure() -> None:
    async with SseServer(cut_streams=True).serve() as server:
        result = await load.run(make_params(server))

    assert result.failures == {"stream ended without a finish_reason": 6}


async def test_an_error_inside_a_stream_is_a_failure() -> None:
    async with SseServer(error_in_stream=True).serve() as server:
        result = await load.run(make_params(server))

    assert result.failures == {"error in the stream: the engine died": 6}


async def test_a_server_that_is_not_there_is_a_failure_of_every_request() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        params = load.LoadParams(f"http://127.0.0.1:{taken.getsockname()[1]}", num_requests=3)
        result = await load.run(params)

    assert (result.num_ok, result.num_failed) == (0, 3)
    assert all("ClientConnectorError" in failure for failure in result.failures)


async def test_the_closed_loop_keeps_exactly_the_asked_number_of_streams_open() -> None:
    # The server answers nobody before three are there: fewer would hang, more would show in the peak.
    async with SseServer(wait_for=3).serve() as server:
        result = await load.run(make_params(server, num_warmup=0))

    assert (result.num_ok, result.peak_concurrency) == (6, 3)


async def test_the_open_loop_does_not_wait_for_answers() -> None:
    async with SseServer(wait_for=6).serve() as server:
        result = await load.run(make_params(server, num_warmup=0, concurrency=1, rate=1e6))

    assert (result.num_ok, result.peak_concurrency) == (6, 6)


def test_arrivals_are_a_poisson_process_of_the_asked_rate() -> None:
    params = load.LoadParams("", num_requests=5000, rate=20.0, seed=11)
    times = list(load.arrivals(params))

    assert times == sorted(times) == list(load.arrivals(params))
    assert times[-1] == pytest.approx(5000 / 20.0, rel=0.05)


def test_latencies_are_taken_from_the_clock_of_the_chunks() -> None:
    completion = Completion(start_s=10.0)
    for at_s in (10.5, 10.6, 10.6, 11.1):
        completion.add(decode_chunk(b'{"choices":[{"text":" word"}]}'), at_s)
    completion.add(decode_chunk(b'{"choices":[{"text":"","finish_reason":"length"}]}'), 11.2)
    completion.add(decode_chunk(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}'), 11.2)
    completion.close(11.3)

    assert completion.failure is None
    assert completion.ttft_s == pytest.approx(0.5)
    assert completion.text_gaps_s == pytest.approx([0.1, 0.0, 0.5])
    assert completion.tpot_s == pytest.approx(0.6 / 6)
    assert completion.e2e_s == pytest.approx(1.3)


async def test_the_command_ends_in_one_json_line_that_names_machine_versions_and_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load.json"
    async with SseServer().serve() as server:
        code = await run_main(["--url", server.url, "--requests", "4", "--output-tokens", "3", "--json-out", str(out)])

    *table, line = capsys.readouterr().out.splitlines()
    figures = msgspec.json.decode(line)
    assert code == 0
    assert any(row.startswith("TTFT") for row in table)
    assert figures["bench"] == "load"
    assert figures["output_tokens"] == 12
    assert figures["machine"]["cores"] >= 1
    assert set(figures["versions"]) >= {"python", "torch", "transformers", "asyncllm"}
    assert figures["parameters"]["request"]["output_tokens"] == 3
    assert out.read_text() == line + "\n"


async def test_the_command_fails_and_says_why_when_a_request_failed(capsys: pytest.CaptureFixture[str]) -> None:
    async with SseServer(fail_every=2).serve() as server:
        code = await run_main(["--url", server.url, "--requests", "4", "--warmup", "0"])

    assert code == 1
    assert "failed 2 x HTTP 500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "0 is below 1"),
        (["--extra-body", "[1]"], "not a JSON object"),
        (["--input-tokens", "20", "--shared-prefix-tokens", "19"], "needs 3 tokens of its own"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load.main(["--url", "http://localhost", *arguments])

    assert message in capsys.readouterr().err
