"""What a typical event of the server looks like on the wire, for the yardsticks to write the same bytes."""

import json
import socket

from perf import servers
from perf.frontend import board as at
from perf.frontend import lab

NUM_TOKENS = 200
TIMEOUT_S = 30.0


def typical_frame(ours: lab.Subject) -> bytes:
    """One event of a stream with its chunk's framing, of the length nearest to the mean of many."""
    ours.board.cells[at.STEP_S] = 0.002
    ours.server.resume()
    try:
        raw = _whole_stream(ours.server.port)
    finally:
        ours.server.pause()
    chunks = cut_chunks(raw.partition(b"\r\n\r\n")[2])
    events = [chunk for chunk in chunks if chunk.count(b"data: {") == 1 and b'"finish_reason":null' in chunk]
    mean = sum(map(len, events)) / len(events)
    return min(events, key=lambda event: abs(len(event) - mean))


def cut_chunks(raw: bytes) -> list[bytes]:
    """The chunks of a chunked body, framing included."""
    chunks, at_byte = [], 0
    while at_byte < len(raw):
        line_end = raw.index(b"\r\n", at_byte)
        end = line_end + 2 + int(raw[at_byte:line_end], 16) + 2
        chunks.append(raw[at_byte:end])
        at_byte = end
    return chunks


def _whole_stream(port: int) -> bytes:
    body = json.dumps(lab.body(NUM_TOKENS)).encode()
    head = f"POST {lab.PATH} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((servers.HOST, port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + body)
        pieces = []
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)
