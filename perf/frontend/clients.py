"""All clients of one cell in one process of its own: opens the streams, counts events, and reads the clocks.

    python -m perf.frontend.clients CELL    both `Cell` and the `Outcome` it prints are JSON

It shares the cores with the server, so it stays below asyncio: one epoll loop, one read and one `count` per event, and
times by the kernel's stamps, so that it may read late. As it sees every byte, it also begins and ends the measuring
window, and reads the server's clocks at exactly these moments.
"""

import gc
import json
import select
import socket
import sys
import time
from typing import Any

import msgspec

from perf import facts
from perf.frontend import board as at
from perf.frontend.board import Board
from perf.frontend.cpu import thread_ns
from perf.frontend.kernel_time import StampedReader
from perf.stats import Summary

EVENT = b"data: {"  # the comment that opens a stream and the [DONE] that ends it are no events
RECEIVE_BYTES = 1 << 16
NAP_S = 0.0005  # between two looks at the sockets
MAX_READY = 4096
MAX_SHOWN_BYTES = 1000
OPEN_TIMEOUT_S = 30.0
now = time.monotonic


class Cell(msgspec.Struct, frozen=True):
    """What to measure."""

    port: int
    pid: int  # of the server
    board: str
    num_streams: int
    path: str
    body: dict[str, Any]
    ramp_s: float  # between the last stream's first event and the window
    window_s: float
    streamed: bool = True  # False: answers come whole, long behind the window, and are never read
    traced: bool = False  # report when each event arrived


class Outcome(msgspec.Struct, frozen=True):
    """What was seen in the window. Seconds on CLOCK_MONOTONIC."""

    begin_s: float
    end_s: float
    num_events: int
    loop_ns: int  # processor time of the server's main thread
    engine_ns: int  # of its engine thread; 0 where it has none
    first_step: int
    last_step: int
    first_commit: int  # steps whose tokens the loop had taken
    last_commit: int
    num_bytes: int
    client_ns: int
    foreign_cores: float  # kept busy by anybody but server and client
    ttft_s: Summary
    itl_s: Summary
    arrivals_s: list[list[float]]  # by stream, of each event in the window, if traced


class Look(msgspec.Struct, frozen=True):
    """All clocks and counters at one moment."""

    now_s: float
    loop_ns: int
    engine_ns: int
    num_steps: int
    num_commits: int
    own_ns: int
    server_s: float  # all threads
    busy_s: float  # the whole machine


class ClientError(Exception):
    """A server broke off, refused or fell silent."""


class Clients:
    """The connections of a cell."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._board = Board(cell.board)
        self._sockets: list[socket.socket] = []
        self._epoll = select.epoll()
        self._index: dict[int, int] = {}  # file descriptor -> stream
        self._sent_s: list[float] = []
        self._last_s: list[float] = []  # of each stream, when its last event was read; 0 = none was yet
        self._greeted = [False] * cell.num_streams
        self._num_silent = cell.num_streams
        self._num_events = 0
        self._num_bytes = 0
        self._ttfts_s: list[float] = []
        self._gaps_s: list[float] = []
        self._reader = StampedReader(RECEIVE_BYTES)
        self._arrivals_s: list[list[float]] = [[] for _ in range(cell.num_streams if cell.traced else 0)]

    def open(self) -> None:
        """Connect all, then send all requests."""
        cell = self._cell
        body = json.dumps(cell.body).encode()
        head = (
            f"POST {cell.path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        request = head.encode() + b"\r\n\r\n" + body
        for index in range(cell.num_streams):
            connection = socket.create_connection(("127.0.0.1", cell.port), timeout=30)
            connection.setblocking(False)
            self._reader.prepare(connection)
            self._sockets.append(connection)
            self._index[connection.fileno()] = index
            self._epoll.register(connection, select.EPOLLIN)
        for connection in self._sockets:
            self._sent_s.append(now())
            connection.sendall(request)
        self._last_s = [0.0] * cell.num_streams

    def run(self) -> Outcome:
        """The ramp, then the window."""
        cell = self._cell
        deadline_s = now() + OPEN_TIMEOUT_S
        while not self._all_run():
            self._read_until(now() + 0.05)
            if now() > deadline_s:
                raise ClientError(f"not all of {cell.num_streams} streams run; {self._num_silent} sent no event")
        self._read_until(now() + cell.ramp_s)
        self._gaps_s.clear()
        for arrivals_s in self._arrivals_s:
            arrivals_s.clear()
        first, num_events, num_bytes = self._look(), self._num_events, self._num_bytes
        self._read_until(first.now_s + cell.window_s)
        last = self._look()
        others_s = (last.busy_s - first.busy_s) - (last.server_s - first.server_s) - (last.own_ns - first.own_ns) / 1e9
        return Outcome(
            begin_s=first.now_s,
            end_s=last.now_s,
            num_events=self._num_events - num_events,
            loop_ns=last.loop_ns - first.loop_ns,
            engine_ns=last.engine_ns - first.engine_ns,
            first_step=first.num_steps,
            last_step=last.num_steps,
            first_commit=first.num_commits,
            last_commit=last.num_commits,
            num_bytes=self._num_bytes - num_bytes,
            client_ns=last.own_ns - first.own_ns,
            foreign_cores=max(0.0, others_s) / (last.now_s - first.now_s),
            ttft_s=Summary.of(self._ttfts_s),
            itl_s=Summary.of(self._gaps_s),
            arrivals_s=self._arrivals_s,
        )

    def _all_run(self) -> bool:
        if self._cell.streamed:
            return not self._num_silent
        step = self._board.count(at.NUM_STEPS)
        return step > 0 and self._board.steps(step - 1, step)[0][at.ROWS] >= self._cell.num_streams

    def _greet(self, index: int, num_bytes: int) -> None:
        """Look at the status line."""
        if not self._reader.buffer.startswith(b"HTTP/1.1 200 "):
            raise ClientError(bytes(self._reader.buffer[: min(num_bytes, MAX_SHOWN_BYTES)]).decode(errors="replace"))
        self._greeted[index] = True

    def _look(self) -> Look:
        board, pid = self._board, self._cell.pid
        engine = board.count(at.ENGINE_TID)
        return Look(
            now_s=now(),
            loop_ns=thread_ns(pid, pid),
            engine_ns=thread_ns(pid, engine) if engine else 0,
            num_steps=board.count(at.NUM_STEPS),
            num_commits=board.count(at.NUM_COMMITS),
            own_ns=time.process_time_ns(),
            server_s=facts.cpu_seconds(pid),
            busy_s=facts.machine_busy_seconds(),
        )

    def _read_until(self, end_s: float) -> None:  # hot
        poll, index_of, sockets, reader = self._epoll.poll, self._index, self._sockets, self._reader
        last_s, gaps_s, arrivals_s, buffer = self._last_s, self._gaps_s, self._arrivals_s, self._reader.buffer
        while now() < end_s:
            # Not a poll that waits: a client that sleeps there has to be woken by the server's `send`, which costs the
            # server some 3 us per event, unless events come so fast that the client never gets to sleep.
            time.sleep(NAP_S)
            for fd, _ in poll(0, MAX_READY):
                index = index_of[fd]
                num_bytes = reader.read(sockets[index])
                if not num_bytes:
                    raise ClientError("the server closed a stream")
                if not self._greeted[index]:
                    self._greet(index, num_bytes)
                self._num_bytes += num_bytes
                num_events = buffer.count(EVENT, 0, num_bytes)
                if not num_events:
                    continue
                self._num_events += num_events
                stamp_s = reader.stamp_s
                before_s = last_s[index]
                last_s[index] = stamp_s
                if before_s:
                    gaps_s.append(stamp_s - before_s)
                    if num_events > 1:
                        gaps_s += [0.0] * (num_events - 1)
                else:
                    self._num_silent -= 1
                    self._ttfts_s.append(stamp_s - self._sent_s[index])
                if arrivals_s:
                    arrivals_s[index] += [stamp_s] * num_events

    def close(self) -> None:
        """Leave; the server ends the requests by itself."""
        for connection in self._sockets:
            connection.close()
        self._epoll.close()


def main() -> int:
    """One cell."""
    cell = msgspec.json.decode(sys.argv[1], type=Cell)
    gc.disable()
    clients = Clients(cell)
    try:
        clients.open()
        outcome = clients.run()
    except (ClientError, OSError) as error:
        print(f"clients: {error}", file=sys.stderr)
        return 1
    finally:
        clients.close()
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
