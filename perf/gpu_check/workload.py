"""Part 3: 256 requests of random lengths, all at once, as nano-vllm's bench made them known; and peers beside it.

Knows requests and tokens per second; no tensors.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from perf.gpu_check.device import Device
from perf.gpu_check.findings import Findings, Found, progress
from perf.gpu_check.models import architecture, checkpoint, hugging_face_config
from perf.gpu_check.peers import TRANSFORMERS_COMMAND, run_peer
from perf.gpu_check.requests import Request, Workload, make_workload
from perf.gpu_check.session import EngineSession
from perf.gpu_check.setup import MAIN_MODEL, Box, Setup

TEMPERATURE = 0.6
NUM_WARM_REQUESTS = 8
PEER_START_S = 30.0  # what a peer may need to import, build and warm up
MIN_PEER_S = 5.0


def run(setup: Setup, findings: Findings) -> None:
    """Our engine with the bench's temperature and greedily, then every peer on the same prompts."""
    workload = make_workload(setup.scale)
    findings.run("asyncllm", lambda found: _ours(setup, workload, findings.box, found))
    Device(setup.scale.device).free_memory()
    peers = {"transformers": TRANSFORMERS_COMMAND} | setup.peers
    file = Path(setup.directory) / "workload.json"
    for name, command in peers.items():
        # A peer that stops by itself reports what it has; one that is killed reports nothing.
        seconds = min(setup.scale.peer_seconds, max(MIN_PEER_S, findings.box.left_s - PEER_START_S))
        file.write_text(json.dumps(_for_peers(setup, workload, seconds)))
        findings.run(name, lambda found, command=command: run_peer(command, file, findings.box, found))  # type: ignore[misc]


def _ours(setup: Setup, workload: Workload, box: Box, found: Found) -> None:
    scale = setup.scale
    shapes = architecture(MAIN_MODEL, setup.rehearse)
    config = setup.config(
        {
            "model.max_context_length": 2 * scale.max_tokens,
            "cache.memory_gib": scale.kv_gib,
            "scheduler.max_sequences": scale.num_requests,
        }
    )
    with EngineSession(config, checkpoint(MAIN_MODEL, shapes)) as session:
        found["ready_s"], found["facts"] = session.ready_s, session.facts
        warm = workload.requests(TEMPERATURE, "warm")[:NUM_WARM_REQUESTS]
        session.run([_cut(request) for request in warm], box.part(scale.workload_seconds))
        for name, temperature in (("temperature_0.6", TEMPERATURE), ("greedy", 0.0)):
            done = session.run(workload.requests(temperature, name), box.part(scale.workload_seconds))
            found[name] = done.figures()
            progress(f"workload: {name}: {found[name]['tokens_per_s']:.0f} tokens/s")


def _cut(request: Request) -> Request:
    """The request with a short answer."""
    return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, max_tokens=2))


def _for_peers(setup: Setup, workload: Workload, seconds: float) -> dict[str, Any]:
    """All that a peer needs to make the same model of random weights and the same requests."""
    shapes = architecture(MAIN_MODEL, setup.rehearse)
    return {
        "prompts": workload.prompts,
        "max_tokens": workload.max_tokens,
        "temperature": TEMPERATURE,
        "model": MAIN_MODEL,
        "config": hugging_face_config(shapes),
        "dtype": setup.scale.dtype,
        "device": setup.scale.device,
        "seconds": round(seconds, 1),  # what the run itself may take
    }
