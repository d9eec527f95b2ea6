"""Part 4: a real server process with random weights, and `perf.load` as its client in another process.

Streams at full speed first, then open-loop rates below what that reached. Knows commands, ports and the two processes'
own words; imports no torch.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from perf import servers
from perf.gpu_check import scrape
from perf.gpu_check.findings import Findings, Found, progress
from perf.gpu_check.models import architecture, write_directory
from perf.gpu_check.setup import MAIN_MODEL, Box, Setup

READY_TIMEOUT_S = 60.0
MIN_CLIENT_S = 5.0  # what a client needs at least to start and end
FIGURES = ("output_tokens_per_s", "requests_per_s", "num_ok", "num_failed", "failures", "num_full_length", "ttft_s",
           "itl_s", "tpot_s", "peak_concurrency", "tokens_per_chunk", "duration_s")  # fmt: skip


class ClientError(Exception):
    """perf.load ended without figures; the message ends with what it printed."""


def run(setup: Setup, findings: Findings) -> None:
    """Start the server, load it, stop it."""
    scale = setup.scale
    directory = Path(setup.directory) / MAIN_MODEL
    findings.run("directory", lambda found: write_directory(directory, architecture(MAIN_MODEL, setup.rehearse)))
    with tempfile.TemporaryDirectory() as logs:
        port = servers.free_port()
        with servers.Server(_spec(setup, directory, port), port, Path(logs) / "server.log") as server:

            def start(found: Found) -> None:
                server.wait_ready(min(READY_TIMEOUT_S, findings.box.left_s))
                found["ready_s"] = server.ready_s

            findings.run("server", start)
            if findings.errors:
                return
            saturation = findings.run("streams", lambda found: _streams(setup, server, findings.box, found))
            findings.run("idle", lambda found: _idle(setup, server, findings.box, found))
            # Requests per second that the closed loop reached: the most there is to get.
            most = saturation.get("requests_per_s", 0.0)
            for share in scale.load_shares if most else ():
                findings.run(
                    f"load_{share:g}",
                    lambda found, share=share: _rate(setup, server, share * most, findings.box, found),  # type: ignore[misc]
                )
            if findings.errors:
                findings.sections["server"]["log_tail"] = server.log_tail()


def _spec(setup: Setup, directory: Path, port: int) -> servers.ServerSpec:
    """The server under test, as a user would start it."""
    scale = setup.scale
    keys = {
        "server.port": port,
        "model.path": str(directory),
        "model.max_context_length": 2 * (scale.stream_prompt_tokens + scale.stream_output_tokens),
        "cache.memory_gib": scale.kv_gib,
        "scheduler.max_sequences": scale.num_requests,
    }
    return servers.ServerSpec("asyncllm", [sys.executable, "-m", "asyncllm"], "/readyz", setup.environment(keys))


def _streams(setup: Setup, server: servers.Server, box: Box, found: Found) -> None:
    """Closed loop: so many streams at all times."""
    scale = setup.scale
    arguments = ["--concurrency", str(scale.num_streams), "--requests", str(scale.closed_loop_requests)]
    _measure(setup, server, arguments, scale.closed_loop_requests, box, found)
    progress(f"http: {scale.num_streams} streams: {found['output_tokens_per_s']:.0f} tokens/s")


def _idle(setup: Setup, server: servers.Server, box: Box, found: Found) -> None:
    """One request after the other: the time to a first token when nobody else is there."""
    num_requests = setup.scale.idle_requests
    _measure(setup, server, ["--concurrency", "1", "--requests", str(num_requests)], num_requests, box, found)


def _rate(setup: Setup, server: servers.Server, rate: float, box: Box, found: Found) -> None:
    """Open loop: requests arrive by themselves, however many still run."""
    num_requests = max(2, round(rate * setup.scale.rate_seconds))
    found["rate"] = round(rate, 3)
    _measure(setup, server, ["--rate", str(rate), "--requests", str(num_requests)], num_requests, box, found)


def _measure(
    setup: Setup, server: servers.Server, arguments: list[str], num_requests: int, box: Box, found: Found
) -> None:
    """One run of the client, with what the server says of itself before and after."""
    scale, pid = setup.scale, server.pids[0]
    body = {"min_tokens": 0}  # ignore_eos alone fixes the length, without a ban to apply at every step
    command = [sys.executable, "-m", "perf.load", "--url", server.url, *arguments]
    command += ["--vocab-size", str(architecture(MAIN_MODEL, setup.rehearse).vocab_size), "--seed", str(num_requests)]
    command += ["--input-tokens", str(scale.stream_prompt_tokens), "--output-tokens", str(scale.stream_output_tokens)]
    command += ["--extra-body", json.dumps(body), "--timeout", f"{max(MIN_CLIENT_S, box.left_s - MIN_CLIENT_S):.0f}"]
    before = scrape.look(pid, _metrics(server))
    client = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = client.communicate(timeout=max(MIN_CLIENT_S, box.left_s))
    except subprocess.TimeoutExpired:
        client.kill()
        client.communicate()
        raise ClientError("perf.load did not end in time") from None
    after = scrape.look(pid, _metrics(server))
    last = output.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise ClientError(f"perf.load exited with {client.returncode}: {(output + errors)[-1500:]}")
    figures: dict[str, Any] = json.loads(last)
    found |= {name: figures[name] for name in FIGURES}
    found["server_cores"] = round(
        (after.loop_s + after.other_s - before.loop_s - before.other_s) / figures["duration_s"], 3
    )
    found |= scrape.differences(before, after, figures["output_tokens"])


def _metrics(server: servers.Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text: str = response.read().decode()
    return text
