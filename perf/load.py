"""Load on an OpenAI-compatible server, and what a client sees of it: `python -m perf.load --url http://127.0.0.1:8000`.

Closed loop (so many streams at all times) or open loop (Poisson arrivals). Prints a table, ends in one JSON line, and
exits with 1 if any request failed. Knows nothing of server processes: `perf.compare` starts those.
"""

import argparse
import asyncio
import collections
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from perf import facts
from perf.client import Completion, Prompt, RequestOptions, complete, open_session
from perf.prompts import make_prompt, make_token_prompt
from perf.stats import Summary, ratio

REFUSED = ("HTTP 400", "HTTP 422")  # what servers answer to a field they do not know


class LoadParams(msgspec.Struct, frozen=True):
    """One run."""

    url: str
    request: RequestOptions = RequestOptions()
    num_requests: int = 32
    concurrency: int = 8  # streams at once; the open loop has no such limit
    rate: float = 0.0  # requests per second on average; 0 = closed loop
    num_warmup: int = 2
    input_tokens: int = 128
    shared_prefix_tokens: int = 0
    vocab_size: int = 0  # prompts are random token ids below it; 0 = words
    seed: int = 0
    timeout_s: float = 600.0  # of one request
    new_connections: bool = False  # one for each request, instead of kept-alive ones


class LoadResult(msgspec.Struct, frozen=True):
    """What came of it. Rates and latencies are of the requests that went well; times in seconds."""

    num_ok: int
    num_failed: int
    failures: dict[str, int]  # in words -> how often
    duration_s: float  # first request due -> last stream closed
    prompt_tokens: int
    output_tokens: int
    tokens_counted_by: str  # usage, chunks, or both of them
    num_full_length: int  # answers that ran to the asked output_tokens
    fixed_length: bool  # whether the server took ignore_eos
    tokens_per_chunk: float | None
    output_tokens_per_s: float
    requests_per_s: float
    peak_concurrency: int
    ttft_s: Summary
    itl_s: Summary
    tpot_s: Summary
    e2e_s: Summary


async def run(params: LoadParams) -> LoadResult:
    """Warm the server up, learn whether it takes `ignore_eos`, then measure."""
    async with open_session(params.timeout_s, params.new_connections) as session:
        options = await _warm_up(session, params)
        flight = _Flight(session, params, options)
        start_s = time.perf_counter()
        await (_open_loop(flight, start_s) if params.rate > 0 else _closed_loop(flight))
    return summarise(flight.completions, options, flight.peak)


async def _warm_up(session: aiohttp.ClientSession, params: LoadParams) -> RequestOptions:
    """Send the warm-up requests one by one; drop `ignore_eos` where the server refuses it.

    A failed warm-up is no reason to stop: the same failure is counted on the measured requests.
    """
    options = params.request
    for index in range(params.num_warmup):
        # Behind the indices of the measured prompts, so that these stay unseen.
        prompt = _prompt(params, params.num_requests + index)
        completion = await complete(session, params.url, options, prompt)
        if options.fixed_length and (completion.failure or "").startswith(REFUSED):
            options = msgspec.structs.replace(options, fixed_length=False)
            await complete(session, params.url, options, prompt)
    return options


def _prompt(params: LoadParams, index: int) -> Prompt:
    if params.vocab_size:
        return make_token_prompt(index, params.input_tokens, params.vocab_size, params.seed)
    return make_prompt(index, params.input_tokens, params.seed, params.shared_prefix_tokens)


class _Flight:
    """The requests of a run that are under way or done. Event loop only."""

    __slots__ = ("_num_running", "_options", "_prompts", "_session", "completions", "params", "peak")

    def __init__(self, session: aiohttp.ClientSession, params: LoadParams, options: RequestOptions) -> None:
        self._session = session
        self._options = options
        # Made before the clock starts: building a prompt must not delay a request.
        self._prompts = [_prompt(params, index) for index in range(params.num_requests)]
        self._num_running = 0
        self.params = params
        self.peak = 0
        self.completions: list[Completion] = []

    async def send(self, index: int, due_s: float | None = None) -> None:
        """Run request `index` to its end."""
        self._num_running += 1
        self.peak = max(self.peak, self._num_running)
        self.completions.append(
            await complete(self._session, self.params.url, self._options, self._prompts[index], due_s)
        )
        self._num_running -= 1


async def _closed_loop(flight: _Flight) -> None:
    """Keep `concurrency` streams open until the requests run out."""
    indices = iter(range(flight.params.num_requests))

    async def stream() -> None:
        for index in indices:  # shared by all streams
            await flight.send(index)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(flight.params.concurrency, flight.params.num_requests)):
            group.create_task(stream())


async def _open_loop(flight: _Flight, start_s: float) -> None:
    """Send requests when they are due, however many are still running."""
    async with asyncio.TaskGroup() as group:
        for index, offset_s in enumerate(arrivals(flight.params)):
            due_s = start_s + offset_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(flight.send(index, due_s))


def arrivals(params: LoadParams) -> Iterator[float]:
    """Seconds after the start at which each request is due: a Poisson process, the same for the same seed."""
    rng = random.Random(f"{params.seed}/arrivals")
    at_s = 0.0
    for _ in range(params.num_requests):
        yield at_s
        at_s += rng.expovariate(params.rate)


def summarise(completions: Sequence[Completion], options: RequestOptions, peak: int) -> LoadResult:
    """Figures of a run; a failed request counts as failed and in nothing else but the duration."""
    ok = [c for c in completions if c.failure is None]
    failures = collections.Counter(c.failure for c in completions if c.failure is not None)
    duration_s = max((c.end_s for c in completions), default=0.0) - min((c.start_s for c in completions), default=0.0)
    output_tokens = sum(c.output_tokens for c in ok)
    return LoadResult(
        num_ok=len(ok),
        num_failed=len(completions) - len(ok),
        failures=dict(failures.most_common()),
        duration_s=duration_s,
        prompt_tokens=sum(c.usage[0] for c in ok if c.usage),
        output_tokens=output_tokens,
        tokens_counted_by=" and ".join(sorted({"usage" if c.usage else "chunks" for c in ok}, reverse=True))
        or "nothing",
        num_full_length=sum(c.output_tokens >= options.output_tokens for c in ok),
        fixed_length=options.fixed_length,
        tokens_per_chunk=ratio(output_tokens, sum(c.num_chunks for c in ok)),
        output_tokens_per_s=output_tokens / duration_s if duration_s else 0.0,
        requests_per_s=len(ok) / duration_s if duration_s else 0.0,
        peak_concurrency=peak,
        ttft_s=Summary.of([c.ttft_s for c in ok if c.ttft_s is not None]),
        itl_s=Summary.of([gap for c in ok for gap in c.text_gaps_s]),
        tpot_s=Summary.of([c.tpot_s for c in ok if c.tpot_s is not None]),
        e2e_s=Summary.of([c.e2e_s for c in ok]),
    )


def table(result: LoadResult) -> str:
    """The figures for a reader."""
    lines = [
        f"requests      {result.num_ok} ok, {result.num_failed} failed, peak concurrency {result.peak_concurrency}",
        f"duration      {result.duration_s:.2f} s",
        f"output        {result.output_tokens} tokens (by {result.tokens_counted_by}), "
        f"{result.num_full_length} answers of full length, {result.tokens_per_chunk or 0:.2f} tokens per chunk",
        f"throughput    {result.output_tokens_per_s:.1f} output tok/s, {result.requests_per_s:.2f} requests/s",
        "",
        f"{'ms':<14}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'samples':>10}",
    ]
    rows = {"TTFT": result.ttft_s, "ITL": result.itl_s, "TPOT": result.tpot_s, "e2e": result.e2e_s}
    for name, summary in rows.items():
        cells = (summary.mean, summary.p50, summary.p90, summary.p99)
        figures = "".join("         -" if cell is None else f"{cell * 1000:10.1f}" for cell in cells)
        lines.append(f"{name:<14}{figures}{summary.count:>10}")
    lines += [f"failed {count} x {failure}" for failure, count in result.failures.items()]
    return "\n".join(lines)


def report(params: LoadParams, result: LoadResult) -> dict[str, Any]:
    """The JSON that ends a run: figures with machine, versions and parameters."""
    return {
        "bench": "load",
        **msgspec.to_builtins(result),
        "machine": msgspec.to_builtins(facts.machine()),
        "versions": facts.versions(),
        "parameters": msgspec.to_builtins(params),
    }


def parse_arguments(argv: Sequence[str] | None) -> tuple[LoadParams, Path | None]:
    """The command line, and where the JSON goes beside standard output."""
    parser = argparse.ArgumentParser(prog="python -m perf.load", description="Load on an OpenAI-compatible server.")
    parser.add_argument("--url", required=True, help="server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="model name to send; default: none")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--concurrency", type=_positive, default=8, help="streams at once (closed loop)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second, Poisson; 0 = closed loop")
    parser.add_argument("--requests", type=_positive, default=32)
    parser.add_argument("--warmup", type=int, default=2, help="requests before the clock starts")
    parser.add_argument("--input-tokens", type=_positive, default=128, help="about so many in each prompt")
    parser.add_argument("--output-tokens", type=_positive, default=64)
    parser.add_argument("--shared-prefix-tokens", type=int, default=0, help="of the prompt, equal in all requests")
    parser.add_argument("--vocab-size", type=int, default=0, help="send random token ids below this instead of words")
    parser.add_argument("--natural-length", action="store_true", help="let answers end by themselves: no ignore_eos")
    parser.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="laid over every body")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    parser.add_argument("--new-connections", action="store_true", help="one for each request: no keep-alive")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json-out", type=Path, metavar="FILE", help="write the JSON line there too")
    args = parser.parse_args(argv)
    request = RequestOptions(
        args.endpoint, args.model, args.output_tokens, fixed_length=not args.natural_length, extra_body=args.extra_body
    )
    params = LoadParams(
        url=args.url.rstrip("/"),
        request=request,
        num_requests=args.requests,
        concurrency=args.concurrency,
        rate=args.rate,
        num_warmup=args.warmup,
        input_tokens=args.input_tokens,
        shared_prefix_tokens=args.shared_prefix_tokens,
        vocab_size=args.vocab_size,
        seed=args.seed,
        timeout_s=args.timeout,
        new_connections=args.new_connections,
    )
    try:
        _prompt(params, params.num_requests + params.num_warmup)
    except ValueError as error:
        parser.error(str(error))
    return params, args.json_out


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"not a JSON object: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if any request failed."""
    params, json_out = parse_arguments(argv)
    result = asyncio.run(run(params))
    line = msgspec.json.encode(report(params, result)).decode()
    print(table(result))
    print(line)
    if json_out is not None:
        json_out.write_text(line + "\n")
    return 1 if result.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
