"""asyncllm beside `transformers serve`, same weights, same machine, in turns: `python -m perf.compare`.

Starts the servers, keeps all but the measured one frozen, runs the cells (server x concurrency) interleaved over some
rounds, and reports medians. Ends in one JSON line; exits with 1 if a request failed, 2 if it could not begin. Knows
nothing of HTTP (`perf.load`) and nothing of processes beyond starting and freezing them (`perf.servers`).
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from perf import load, servers
from perf.checkpoint import embedded_gguf, safetensors_directory
from perf.client import Endpoint, RequestOptions
from perf.report import Cell, Report, ServerFacts, soak_table, summary, table
from perf.servers import Server, ServerError, ServerSpec
from perf.soak import SOAK_CONCURRENCY, SoakResult, soak, soak_blocks
from perf.turns import first_answer_s, in_turns, progress, timed, unwind_on_sigterm

SERVERS = ("asyncllm", "transformers", "transformers_cb")
MIN_REQUESTS = 8  # of a cell: a median of fewer is a draw


class CompareParams(msgspec.Struct, frozen=True):
    """One comparison."""

    model: str  # directory of safetensors, the same for all servers
    servers: tuple[str, ...] = SERVERS
    concurrency: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    starts: int = 3  # times each server is started to measure the start
    requests_per_stream: int = 2
    input_tokens: int = 128
    output_tokens: int = 64
    endpoint: Endpoint = "completions"
    device: str = "cpu"
    dtype: str = "bfloat16"
    transformers_cb_arguments: tuple[str, ...] = ()
    memory_soak: int = 0  # requests; 0 = none
    start_timeout_s: float = 300.0
    request_timeout_s: float = 900.0

    def num_requests(self, concurrency: int) -> int:
        """Requests of a cell."""
        return max(MIN_REQUESTS, self.requests_per_stream * concurrency)

    def load(self, server: Server, num_requests: int, concurrency: int, seed: int) -> load.LoadParams:
        """The load of one cell on one server."""
        request = RequestOptions(
            self.endpoint,
            output_tokens=self.output_tokens,
            fixed_length=server.spec.takes_ignore_eos,
            extra_body=server.spec.extra_body,
        )
        return load.LoadParams(
            url=server.url,
            request=request,
            num_requests=num_requests,
            concurrency=concurrency,
            num_warmup=1,
            input_tokens=self.input_tokens,
            seed=seed,
            timeout_s=self.request_timeout_s,
        )


class Bench:
    """Starts servers into an exit stack that stops them whatever happens."""

    __slots__ = ("_directory", "_num_started", "_stack", "params")

    def __init__(self, params: CompareParams, stack: contextlib.ExitStack, directory: Path) -> None:
        self.params = params
        self._stack = stack
        self._directory = directory  # configurations and logs
        self._num_started = 0

    def start(self, name: str, num_blocks: int = 0) -> Server:
        """Start a server by its name and wait until it is ready."""
        port = servers.free_port()
        self._num_started += 1
        log_path = self._directory / f"{self._num_started}-{name}.log"
        server = self._stack.enter_context(Server(self._spec(name, port, num_blocks), port, log_path))
        server.wait_ready(self.params.start_timeout_s)
        return server

    def _spec(self, name: str, port: int, num_blocks: int) -> ServerSpec:
        params = self.params
        if name == "asyncllm":
            return servers.asyncllm(params.model, port, self._directory, params.device, params.dtype, num_blocks)
        return servers.transformers(
            params.model,
            port,
            params.device,
            params.dtype,
            continuous_batching=name == "transformers_cb",
            arguments=list(params.transformers_cb_arguments),
        )

    def start_all(self) -> tuple[dict[str, Server], dict[str, ServerFacts]]:
        """Start every server `starts` times in turns; the last of each stays, frozen."""
        running: dict[str, Server] = {}
        known = {name: ServerFacts() for name in self.params.servers}
        for turn in range(self.params.starts):
            for name in self.params.servers:
                server = self.start(name)
                fact = known[name]
                fact.start_s.append(round(server.ready_s or 0.0, 3))
                fact.memory_start = server.memory()
                first = self.params.load(server, num_requests=1, concurrency=1, seed=-1)
                fact.first_answer_s.append(first_answer_s(server, first))
                progress(f"start {turn + 1}  {name:<16} ready {fact.start_s[-1]:6.2f} s")
                if turn + 1 < self.params.starts:
                    server.stop()
                    continue
                server.pause()
                running[name] = server
        return running, known

    def measure(self, running: dict[str, Server]) -> list[Cell]:
        """All cells, round after round; within a round the servers take turns at each concurrency."""
        cells = []
        for turn in range(self.params.rounds):
            for concurrency in self.params.concurrency:
                for name in in_turns(running, turn):
                    # The seed is new in every round: a prompt seen before would be served from a prefix cache.
                    cell = self._cell(running[name], concurrency, turn, seed=1 + turn * 1000 + concurrency)
                    progress(summary(cell))
                    cells.append(cell)
        return cells

    def _cell(self, server: Server, concurrency: int, turn: int, seed: int) -> Cell:
        params = self.params.load(server, self.params.num_requests(concurrency), concurrency, seed)
        result, cores = timed(server, params)
        return Cell(server.spec.name, concurrency, turn, result, cores.foreign, cores.client, cores.server)


def compare(params: CompareParams) -> Report:
    """The whole bench. Raises ServerError where a server does not start."""
    with tempfile.TemporaryDirectory(prefix="asyncllm-bench-") as directory, contextlib.ExitStack() as stack:
        bench = Bench(params, stack, Path(directory))
        cells: list[Cell] = []
        known: dict[str, ServerFacts] = {}
        if params.rounds:
            running, known = bench.start_all()
            cells = bench.measure(running)
            for name, server in running.items():
                known[name].memory_end = server.memory()
                server.stop()
        soaked = run_soak(bench) if params.memory_soak else None
    return Report(params, cells, known, soaked)


def run_soak(bench: Bench) -> SoakResult:
    """The memory of a fresh asyncllm over many requests."""
    params = bench.params
    server = bench.start("asyncllm", num_blocks=soak_blocks(params.input_tokens, params.output_tokens))
    result = soak(server, params.load(server, params.memory_soak, SOAK_CONCURRENCY, seed=0), progress)
    server.stop()
    return result


def parse_arguments(argv: Sequence[str] | None) -> tuple[CompareParams, Path | None]:
    """The command line, and where the JSON goes beside standard output."""
    defaults = CompareParams("")
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description="asyncllm beside transformers serve.")
    parser.add_argument("--model", type=Path, help="GGUF file or directory of safetensors; default: the embedded one")
    parser.add_argument("--servers", default=",".join(SERVERS), help="which of %(default)s")
    parser.add_argument("--concurrency", default="1,8,32", help="streams at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="0 = no comparison, the soak alone")
    parser.add_argument("--starts", type=int, default=defaults.starts, help="times each server is started")
    parser.add_argument("--requests-per-stream", type=int, default=defaults.requests_per_stream)
    parser.add_argument("--input-tokens", type=int, default=defaults.input_tokens)
    parser.add_argument("--output-tokens", type=int, default=defaults.output_tokens)
    parser.add_argument("--endpoint", choices=("completions", "chat"), default=defaults.endpoint)
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda")
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--transformers-cb-arguments", default="", help="such as '--cb-max-batch-tokens 512'")
    parser.add_argument("--memory-soak", type=int, default=0, metavar="N", help="then N requests, watching memory")
    parser.add_argument("--json-out", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    names = tuple(args.servers.split(","))
    if unknown := set(names) - set(SERVERS):
        parser.error(f"--servers: unknown {', '.join(sorted(unknown))}; known: {', '.join(SERVERS)}")
    if min(args.starts, args.requests_per_stream) < 1 or args.rounds < 0:
        parser.error("--starts and --requests-per-stream are at least 1, --rounds at least 0")
    missing = servers.missing_for_transformers()
    if missing and args.rounds and any(name.startswith("transformers") for name in names):
        parser.error(f"transformers serve needs {', '.join(missing)}: pip install 'asyncllm[bench]'")
    try:
        concurrency = tuple(int(part) for part in args.concurrency.split(","))
        model = str(safetensors_directory(args.model or embedded_gguf()).resolve())
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    params = CompareParams(
        model,
        names,
        concurrency,
        args.rounds,
        args.starts,
        args.requests_per_stream,
        args.input_tokens,
        args.output_tokens,
        args.endpoint,
        args.device,
        args.dtype,
        tuple(args.transformers_cb_arguments.split()),
        args.memory_soak,
    )
    return params, args.json_out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    unwind_on_sigterm()
    params, json_out = parse_arguments(argv)
    try:
        report = compare(params)
    except ServerError as error:
        progress(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    if report.cells:
        print(table(report.cells, report.servers))
    if report.soak is not None:
        print(soak_table(report.soak))
    line = msgspec.json.encode(report.to_json()).decode()
    print(line)
    if json_out is not None:
        json_out.write_text(line + "\n")
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
