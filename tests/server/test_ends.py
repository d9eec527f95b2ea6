"""How requests end when not by themselves: clients that leave, aborts, deadlines, full queues, a dying engine."""

import asyncio
import json
import threading

from asyncllm.types import Capacity
from tests.server.harness import CAPACITY, Server, check_error, running


async def send(server: Server, body: dict, path: str = "/v1/completions") -> tuple:
    """A request on a socket of its own: reader and writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    return reader, writer


async def let_the_loop_see_it(server: Server, num_streams: int) -> None:
    router = server.serving.router
    await server.until(lambda: router.num_streams == num_streams)


async def test_a_client_that_leaves_frees_its_blocks_within_one_step() -> None:
    for stream in (True, False):
        gate = threading.Semaphore(3)
        async with running(gate=gate) as server:
            stats = lambda: server.serving.metrics.stats  # noqa: E731
            _, writer = await send(server, {"prompt": "abc", "max_tokens": 400, "stream": stream})
            await server.until(lambda: stats().num_steps == 3)  # noqa: B023
            assert stats().num_used_blocks > 0
            writer.transport.abort()
            await let_the_loop_see_it(server, 0)
            # The engine is held in step 4. It ends; the next look at the commands finds the abort.
            gate.release()
            await server.until(lambda: stats().num_used_blocks == 0)  # noqa: B023
            assert stats().num_steps == 4
            assert server.executor.num_steps == 4, "nothing was computed for it afterwards"


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    gate = threading.Semaphore(1)
    one_slot = Capacity(257, 4, 1, 512, CAPACITY.vocab_size)
    async with running(gate=gate, capacity=one_slot) as server:
        stats = lambda: server.serving.metrics.stats  # noqa: E731
        _, first = await send(server, {"prompt": "abc", "max_tokens": 400, "stream": True})
        await let_the_loop_see_it(server, 1)
        _, second = await send(server, {"prompt": "xyz", "max_tokens": 400, "stream": True})
        await let_the_loop_see_it(server, 2)
        gate.release(2)
        await server.until(lambda: stats().num_waiting == 1)
        second.transport.abort()
        await let_the_loop_see_it(server, 1)
        gate.release(2)  # the step that was planned before the abort came, and the one behind it
        await server.until(lambda: stats().num_waiting == 0)
        assert stats().num_running == 1
        first.close()


async def test_a_request_is_aborted_by_its_id_and_keeps_its_text() -> None:
    gate = threading.Semaphore(4)
    async with running(gate=gate) as server:
        options = {"headers": {"x-request-id": "mine"}}
        pending = asyncio.create_task(server.post("/v1/completions", {"prompt": "abc", "max_tokens": 400}, **options))
        await server.until(lambda: server.serving.metrics.stats.num_steps == 4)
        status, answer = await server.post("/abort", {"request_id": "mine"})
        assert (status, answer) == (200, {"aborted": ["cmpl-mine"]})
        status, answer = await pending
        assert status == 200
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("defg", "abort")
        gate.release()
        await server.until_idle()
        status, answer = await server.post("/abort", {"request_id": "mine"})
        check_error(status, answer, 404, param="request_id")


async def test_a_deadline_keeps_the_text_so_far() -> None:
    gate = threading.Semaphore(2)
    async with running(gate=gate) as server:
        status, answer = await server.post("/v1/completions", {"prompt": "abc", "max_tokens": 400, "timeout": 0.2})
        assert status == 200
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("de", "timeout")


async def test_a_deadline_before_anything_was_generated_is_a_504() -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate) as server:
        headers = {"X-Request-Timeout": "0.05"}
        status, answer = await server.post("/v1/completions", {"prompt": "abc"}, headers=headers)
        check_error(status, answer, 504, code="timeout")


async def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    gate = threading.Semaphore(0)
    one_slot = Capacity(257, 4, 1, 512, CAPACITY.vocab_size)
    limits = {"max_sequences": 1, "max_queued": 2}
    async with running(gate=gate, capacity=one_slot, scheduler=limits) as server:
        pending = [asyncio.create_task(server.post("/v1/completions", {"prompt": "abc", "max_tokens": 2}))]
        await let_the_loop_see_it(server, 1)
        pending.append(asyncio.create_task(server.post("/v1/completions", {"prompt": "abc", "max_tokens": 2})))
        await let_the_loop_see_it(server, 2)
        status, answer, headers = await server.call("POST", "/v1/completions", {"prompt": "abc", "n": 2})
        error = check_error(status, answer, 429, code="server_overloaded")
        assert error["type"] == "rate_limit_error"
        assert int(headers["Retry-After"]) >= 1 and int(headers["retry-after-ms"]) >= 1000
        gate.release(100)
        for status, answer in await asyncio.gather(*pending):
            assert status == 200, answer


async def test_a_dying_engine_ends_every_stream_with_an_error_event_and_turns_probes_red() -> None:
    gate = threading.Semaphore(3)
    async with running(gate=gate, fail_launch_at=4) as server:
        reader, writer = await send(server, {"prompt": "abc", "max_tokens": 400, "stream": True})
        whole = asyncio.create_task(server.post("/v1/completions", {"prompt": "xyz", "max_tokens": 400}))
        raw = b""
        while b"[DONE]" not in raw:
            raw += await reader.readline()
        events = [line.removeprefix(b"data: ") for line in raw.split(b"\n") if line.startswith(b"data: {")]
        error = json.loads(events[-1])["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")
        check_error(*await whole, 503, code="engine_dead")
        for path in ("/livez", "/readyz", "/health"):
            status, _ = await server.get(path)
            assert status == 503, path
        check_error(*await server.post("/v1/completions", {"prompt": "a"}), 503, code="engine_dead")
        writer.close()


async def test_nothing_is_taken_before_the_engine_is_ready_or_while_it_drains() -> None:
    hold = threading.Event()
    from tests.fakes import FakeExecutor

    def slow(report):
        report("load weights")
        hold.wait()
        return FakeExecutor(CAPACITY)

    async with running(make_executor=slow, wait_ready=False) as server:
        await server.until(lambda: "load weights" in server.serving.startup.phases)
        for path in ("/readyz", "/startupz"):
            status, answer, headers = await server.call("GET", path)
            assert (status, answer["phase"], headers["Retry-After"]) == (503, "load weights", "1")
        status, answer, headers = await server.call("POST", "/v1/completions", {"prompt": "a"})
        error = check_error(status, answer, 503, code="not_ready")
        assert "load weights" in error["message"] and headers["Retry-After"] == "1"
        assert (await server.get("/livez"))[0] == 200
        hold.set()
        await server.serving.router.wait_ready()
        assert (await server.get("/readyz"))[0] == (await server.get("/startupz"))[0] == 200
        server.serving.router.begin_drain()
        assert (await server.get("/readyz"))[1]["status"] == "draining"
        check_error(*await server.post("/v1/completions", {"prompt": "a"}), 503, code="shutting_down")


async def test_a_silent_stream_gets_a_comment_line() -> None:
    gate = threading.Semaphore(1)
    async with running(gate=gate, api={"sse_keep_alive_s": 0.05}) as server:
        reader, writer = await send(server, {"prompt": "abc", "max_tokens": 2, "stream": True})
        raw = b""
        while b": keep-alive\n\n" not in raw:
            raw += await reader.readline()
        gate.release(10)
        while b"[DONE]" not in raw:
            raw += await reader.readline()
        assert raw.count(b'"finish_reason":"length"') == 1
        writer.close()


async def test_a_client_that_reads_nothing_holds_up_nobody() -> None:
    async with running() as server:
        _, writer = await send(server, {"prompt": "abc", "max_tokens": 500, "stream": True, "n": 8})
        for _ in range(3):
            assert (await server.complete(prompt="abc", max_tokens=3))["choices"][0]["text"] == "def"
        writer.transport.abort()
        await let_the_loop_see_it(server, 0)
        await server.until_idle()
