"""What a stream is on the wire, byte by byte: tokens come one at a time, so most of it goes past aiohttp's writer."""

import asyncio
import json
import threading

import pytest

from tests.server.harness import Server, running

NUM_TOKENS = 6


async def raw_stream(server: Server, gate: threading.Semaphore, version: str) -> tuple[bytes, bytes]:
    """Head and body of a stream whose tokens are released one by one, each once the one before has arrived."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({"prompt": "hi", "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    raw = b""
    for number in range(NUM_TOKENS):
        gate.release()
        while raw.count(b'"text"') <= number:
            raw += await reader.read(1 << 16)
    gate.release(10)
    raw += await reader.read()
    writer.close()
    return answer, raw


def chunks(raw: bytes) -> list[bytes]:
    """The chunks of a chunked body, to its very end."""
    found = []
    while True:
        size, separator, raw = raw.partition(b"\r\n")
        assert separator and size == b"%x" % int(size, 16), size
        chunk, raw = raw[: int(size, 16)], raw[int(size, 16) :]
        assert len(chunk) == int(size, 16) and raw.startswith(b"\r\n")
        raw = raw[2:]
        if not chunk:
            assert raw == b""
            return found
        found.append(chunk)


def texts(events: bytes) -> list[str]:
    lines = events.decode().split("\n\n")
    datas = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return [json.loads(data)["choices"][0]["text"] for data in datas]


async def test_each_token_is_a_chunk_of_whole_events() -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate) as server:
        head, raw = await raw_stream(server, gate, "1.1")
    assert b"transfer-encoding: chunked" in head.lower()
    parts = chunks(raw)
    assert all(part.endswith(b"\n\n") for part in parts)
    assert b"".join(parts).endswith(b"data: [DONE]\n\n")
    assert "".join(texts(b"".join(parts))) == "jklmno"[:NUM_TOKENS]
    assert sum(bool(texts(part)) for part in parts) == NUM_TOKENS


async def test_a_client_of_http_1_0_gets_the_events_bare_until_the_connection_closes() -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate) as server:
        head, raw = await raw_stream(server, gate, "1.0")
    assert b"transfer-encoding" not in head.lower()
    assert raw.endswith(b"data: [DONE]\n\n") and "".join(texts(raw)) == "jklmno"[:NUM_TOKENS]
    assert all(line == "" or line.startswith((":", "data: ")) for line in raw.decode().split("\n\n"))


@pytest.mark.parametrize("with_usage", [False, True])
async def test_aiohttps_own_parser_agrees(with_usage: bool) -> None:
    async with running() as server:
        body = {"prompt": "hi", "max_tokens": 40, "stream_options": {"include_usage": with_usage}}
        events = await server.stream("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]).startswith("jklm")
