"""The examples, run for real: Python's against the server, JavaScript's in Node, fed with every split there is."""

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.client.raw import raw_server, refusal, stream
from tests.client.test_events import EVENTS, STREAM
from tests.server.harness import running, says

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT = EXAMPLES / "javascript" / "chat.mjs"
NODE = shutil.which("node")
TEXT = "Grüße, 世界 🌍\r\n\ndata: [DONE]"

needs_node = pytest.mark.skipif(NODE is None, reason="node (18 or later) is not installed")


async def run(*command: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8"
    )


async def node(program: str, *arguments: str) -> Any:
    """What a module that imports the example as `chat` prints, as JSON."""
    assert NODE is not None
    source = f"const chat = await import({json.dumps(CHAT.as_uri())});\n{program}"
    done = await run(NODE, "--input-type=module", "--eval", source, "--", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


COLLECT = """
const [baseUrl, options] = process.argv.slice(1);
const chunks = [];
let error = null;
try {
  const messages = [{ role: "user", content: "hi" }];
  for await (const chunk of chat.streamChat({ baseUrl, messages, ...JSON.parse(options ?? "{}") })) chunks.push(chunk);
} catch (caught) {
  error = { name: caught.name, ...caught, message: caught.message };
}
const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
console.log(JSON.stringify({ text, chunks, error }));
"""


async def test_the_python_example_runs() -> None:
    async with running(says("It is Paris.")) as server:
        done = await run(sys.executable, str(EXAMPLES / "python_client.py"), server.base)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0] == "whole:    'It is Paris.', 13 tokens"
        assert lines[1] == "streamed: It is Paris."
        assert [line.split(":")[0] for line in lines[2:]] == ["together"] * 3 + ["left", "refused"]
        assert "temperature" in lines[-1]
        await server.until_idle()


@needs_node
async def test_javascript_reads_events_as_the_standard_says_whatever_the_split() -> None:
    program = """
    const bytes = Buffer.from(process.argv[1], "base64");
    const read = async (...pieces) => {
      const body = new ReadableStream({ start(c) { pieces.forEach((piece) => c.enqueue(piece)); c.close(); } });
      const events = [];
      for await (const event of chat.readEvents(body)) events.push(event);
      return JSON.stringify(events);
    };
    const whole = await read(bytes), others = [];
    for (let size = 1; size < 12; size++) {
      const pieces = [];
      for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.subarray(at, at + size));
      others.push(await read(...pieces));
    }
    for (let at = 0; at <= bytes.length; at++) {
      others.push(await read(bytes.subarray(0, at), new Uint8Array(0), bytes.subarray(at)));
    }
    const same = others.every((other) => other === whole);
    console.log(JSON.stringify({ whole: JSON.parse(whole), num_others: others.length, same }));
    """
    answer = await node(program, base64.b64encode(STREAM).decode())
    assert answer["whole"] == [{"event": event, "data": data.decode()} for event, data in EVENTS]
    assert answer["num_others"] == 11 + len(STREAM) + 1 and answer["same"]


@needs_node
async def test_javascript_streams_a_chat_of_the_real_server() -> None:
    async with running(says(TEXT)) as server:
        options = {"stream_options": {"include_usage": True}, "max_tokens": 100}
        answer = await node(COLLECT, server.base, json.dumps(options))
    assert answer["error"] is None and answer["text"] == TEXT
    assert answer["chunks"][-1]["usage"]["completion_tokens"] == len(TEXT.encode()) + 1


@needs_node
async def test_javascript_reads_a_server_that_splits_at_every_byte() -> None:
    events = (
        b": hello\r\n\r\n"
        + 'data: {"choices":[{"index":0,"delta":{"content":"Grüße, 世界 🌍"}}]}\r\n\r\n'.encode()
        + b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"!"}}]}\n\ndata: [DONE]\r\n\r\n'
    )
    async with raw_server(stream(events)) as raw:
        answer = await node(COLLECT, raw.base, json.dumps({"apiKey": "k"}))
    assert answer["error"] is None and answer["text"] == "Grüße, 世界 🌍!"
    (_, headers, body) = raw.requests[0]
    assert headers["authorization"] == "Bearer k"
    assert json.loads(body) == {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@needs_node
async def test_javascript_throws_refusals_errors_within_the_stream_and_broken_streams() -> None:
    text = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    error = b'data: {"error":{"message":"gone","type":"server_error","param":null,"code":"engine_dead"}}\n\n'
    async with raw_server(
        refusal(429, "rate_limit_error", "server_overloaded", "later", x_request_id="r"),
        stream(text + error + b"data: [DONE]\n\n"),
        stream(text),
    ) as raw:
        refused, failed, cut = [await node(COLLECT, raw.base) for _ in range(3)]
    assert refused["error"] == {
        "name": "ApiError", "message": "later", "type": "rate_limit_error", "code": "server_overloaded", "param": None,
        "status": 429, "requestId": "r",
    }  # fmt: skip
    assert failed["text"] == "a" and failed["error"]["code"] == "engine_dead" and failed["error"]["status"] is None
    assert cut["text"] == "a" and "broke off" in cut["error"]["message"]


@needs_node
@pytest.mark.parametrize("leave", ["break;", "stop.abort();"])
async def test_javascript_that_leaves_or_aborts_frees_the_request(leave: str) -> None:
    program = """
    const stop = new AbortController();
    let end = "left";
    try {
      for await (const chunk of chat.streamChat({
        baseUrl: process.argv[1], messages: [{ role: "user", content: "hi" }], signal: stop.signal,
      })) {
        if (chunk.choices[0].delta.content) { LEAVE }
      }
    } catch (error) { end = error.name; }
    console.log(JSON.stringify(end));
    """.replace("LEAVE", leave)
    gate = threading.Semaphore(3)
    async with running(gate=gate) as server:
        assert await node(program, server.base) == ("left" if leave == "break;" else "AbortError")
        await server.until(lambda: server.serving.router.num_streams == 0)
        gate.release(2)
        await server.until_idle()


@needs_node
async def test_the_javascript_example_runs_as_a_program() -> None:
    assert NODE is not None
    async with running(says("It is Paris.")) as server:
        done = await run(NODE, str(CHAT), "Where?", server.base)
        assert (done.returncode, done.stdout, done.stderr) == (0, "It is Paris.\n", "")
    done = await run(NODE, str(CHAT), "Where?", server.base)
    assert done.returncode == 1 and "ECONNREFUSED" in done.stderr, "the reason, not only that it failed"
