"""What the server adds to the time to a first token: from a request's bytes to the ring, from the commit to the socket.

Sends chat requests one after the other, each on a connection of its own, while other clients' streams run. The rest of
a TTFT, the queue and the device, is the engine's and is left out.
"""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from perf.frontend import board as at
from perf.frontend.board import Board
from perf.frontend.kernel_time import StampedReader
from perf.prompts import make_prompt
from perf.sse import SseReader, decode_chunk

PATH = "/v1/chat/completions"
MAX_TOKENS = 4
TIMEOUT_S = 30.0
SEED = 4


class Overhead(msgspec.Struct, frozen=True):
    """Of one request."""

    before_s: float  # its bytes sent -> its Submit in the ring
    behind_s: float  # its first token committed -> its first text in the socket


def overheads(
    port: int, board: Board, seconds: float, num_prompt_tokens: int, prompts: Iterator[int]
) -> list[Overhead]:
    """Probe for so long, at least once; `prompts` numbers them, so that no two are alike."""
    end_s = time.monotonic() + seconds
    found: list[Overhead] = []
    while not found or time.monotonic() < end_s:
        prompt = make_prompt(next(prompts), num_prompt_tokens, SEED)
        num_submits, num_firsts = board.count(at.NUM_SUBMITS), board.count(at.NUM_FIRSTS)
        sent_s, arrived_s = _first_text(port, prompt)
        assert board.count(at.NUM_SUBMITS) == num_submits + 1, "somebody else sent a request"
        assert board.count(at.NUM_FIRSTS) == num_firsts + 1, "a first token that nobody waited for"
        submitted_s = board.ring(at.SUBMITS_AT, num_submits, num_submits + 1)[0]
        committed_s = board.ring(at.FIRSTS_AT, num_firsts, num_firsts + 1)[0]
        found.append(Overhead(submitted_s - sent_s, arrived_s - committed_s))
    return found


def _first_text(port: int, prompt: str) -> tuple[float, float]:
    """When the request was sent, and when its first text was in the socket."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS}
    raw = json.dumps(body | {"ignore_eos": True, "temperature": 0, "stream": True}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    reader, events = StampedReader(1 << 16), SseReader()
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        reader.prepare(connection)
        time.sleep(0.001)  # the server takes the connection
        sent_s = time.monotonic()
        connection.sendall(head.encode() + raw)
        while num_bytes := reader.read(connection):
            for data in events.feed(bytes(reader.buffer[:num_bytes])):
                if data != b"[DONE]" and any(choice.has_text for choice in decode_chunk(data).choices):
                    return sent_s, reader.stamp_s
    raise ConnectionError("the server closed a probe's stream")
