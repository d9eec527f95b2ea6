"""Part 2: milliseconds per decode step at many batch sizes and contexts, beside the least that is possible.

Drives the executor as the engine's worker does, as many steps in flight as it allows, over contexts that were never
computed: block tables point at blocks of random numbers, which cost the same to read. Knows step plans; no scheduler.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch

from asyncllm.executor.base import Executor, SlotInit, StepHandle, StepPlan, StepResult
from asyncllm.executor.build import build_executor
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import SamplingParams
from perf.gpu_check.attention_speed import attention_speed
from perf.gpu_check.ceilings import measure_ceilings, skinny_products
from perf.gpu_check.device import Device
from perf.gpu_check.experts import experts_speed
from perf.gpu_check.findings import Findings, Found, progress
from perf.gpu_check.models import architecture, checkpoint
from perf.gpu_check.roofline import Ceilings, ideal_step_s, step_bytes
from perf.gpu_check.setup import MAIN_MODEL, Setup
from perf.stats import percentile, ratio

NUM_WARM_STEPS = 4
SEATS_PER_STEP = 8  # sequences that enter their slots in one step: as many as a server admits at once
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=1 << 20, temperature=0.6)
NOT_MEASURED = Ceilings(1.0, 1.0, 1.0)


class SteadyDecode:
    """An executor whose slots hold long sequences that were never computed."""

    def __init__(self, executor: Executor, max_batch: int, max_length: int) -> None:
        """`max_length`: tokens a sequence may reach."""
        self._executor = executor
        self._max_batch = max_batch
        self._num_columns = -(-max_length // executor.capacity.block_size)
        num_blocks = executor.capacity.num_blocks - 1
        # Scattered as in a server that ran for a while. Where the cache is smaller than what all rows would hold, rows
        # share blocks, far more apart than any cache on the chip remembers.
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)) + 1
        self._blocks: list[int] = order.tolist()

    def seat(self, params: SamplingParams) -> None:
        """Enter every slot with a full block table."""
        for first in range(0, self._max_batch, SEATS_PER_STEP):
            slots = list(range(first, min(first + SEATS_PER_STEP, self._max_batch)))
            plan = self._plan(slots, self._executor.capacity.block_size)
            plan.new_slots = [SlotInit(slot, params, [0], 1) for slot in slots]
            plan.block_writes = [
                (slot, column, self._blocks[(slot * self._num_columns + column) % len(self._blocks)])
                for slot in slots
                for column in range(self._num_columns)
            ]
            self._executor.launch(plan).wait()

    def steps(self, batch: int, context: int, num_steps: int) -> tuple[float, list[StepResult]]:
        """Seconds of `num_steps` steps behind a few warm ones, and their results; lengths grow around `context`."""
        start = context - num_steps // 2 - NUM_WARM_STEPS
        slots = list(range(batch))
        plans = [self._plan(slots, start + step) for step in range(NUM_WARM_STEPS + num_steps)]
        in_flight: deque[StepHandle] = deque()
        results: list[StepResult] = []
        started_s = time.perf_counter()
        for plan in plans:
            in_flight.append(self._executor.launch(plan))
            if len(in_flight) == self._executor.depth:
                results.append(in_flight.popleft().wait())
                if len(results) == NUM_WARM_STEPS:
                    started_s = time.perf_counter()
        while in_flight:
            results.append(in_flight.popleft().wait())
        return time.perf_counter() - started_s, results[NUM_WARM_STEPS:]

    def _plan(self, slots: list[int], num_computed: int) -> StepPlan:
        count = len(slots)
        return StepPlan(
            slots=slots,
            num_query_tokens=[1] * count,
            num_computed_tokens=[num_computed] * count,
            samples=[True] * count,
            num_decode_rows=count,
            token_ids=[],
            new_slots=[],
            block_writes=[],
            banned={},
            logprob_rows={},
            prompt_logprob_rows={},
        )


class Bench:
    """One model on its executor."""

    def __init__(
        self, setup: Setup, name: str, max_batch: int, contexts: tuple[int, ...], keys: dict[str, Any]
    ) -> None:
        """`keys`: configuration beside the usual."""
        scale = setup.scale
        self.setup = setup
        self.shapes: ModelArchitecture = architecture(name, setup.rehearse)
        max_length = max(contexts) + scale.num_steps
        config = setup.config(
            {
                "cache.memory_gib": scale.kv_gib,
                "model.max_context_length": max_length,
                "scheduler.max_sequences": max_batch,
                "executor.cuda_graph_max_bs": max_batch,
                "executor.cuda_graph_max_tokens": setup.scale.prefill_graph_tokens,
            }
            | keys
        )
        started_s = time.monotonic()
        self.executor = build_executor(config, checkpoint(name, self.shapes), lambda phase: None)
        while self.executor.improve():
            pass
        self.ready_s = round(time.monotonic() - started_s, 2)
        self._fill_cache()
        self.decode = SteadyDecode(self.executor, max_batch, max_length)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.close()

    def _fill_cache(self) -> None:
        """Random keys and values: zeros would draw less power, and the clock would rise."""
        with torch.inference_mode():
            caches: list[torch.Tensor] = cast(Any, self.executor).kv_caches  # no part of the seam; benches may look
            for cache in caches:
                cache.normal_()
        # The executor's own stream does not wait for this one.
        Device(self.setup.scale.device).synchronize()

    def cell(self, batch: int, context: int, ceilings: Ceilings) -> dict[str, Any]:
        """One batch size at one context."""
        num_steps = self.setup.scale.num_steps
        seconds, results = self.decode.steps(batch, context, num_steps)
        step_s = seconds / num_steps
        ideal_s = ideal_step_s(self.shapes, self.setup.scale.dtype, batch, context, ceilings)
        device_s = [result.device_s for result in results if result.device_s]
        gaps_s = [result.gap_s for result in results if result.gap_s is not None]
        known = ceilings is not NOT_MEASURED
        return {
            "ms": round(step_s * 1e3, 4),
            "device_ms": round(percentile(device_s, 50) * 1e3, 4) if device_s else None,
            "gap_us_p50": round(percentile(gaps_s, 50) * 1e6, 2) if gaps_s else None,
            "gap_us_p99": round(percentile(gaps_s, 99) * 1e6, 2) if gaps_s else None,
            "tokens_per_s": round(batch / step_s, 1),
            "ideal_ms": round(ideal_s * 1e3, 4) if known else None,
            "of_roofline": ratio(ideal_s, step_s) if known else None,
            "gb": round(step_bytes(self.shapes, self.setup.scale.dtype, batch, context) / 1e9, 3),
            "replayed": sum(result.replayed for result in results) / len(results),
        }


def run(setup: Setup, findings: Findings) -> None:
    """All sections, the ones that matter most first."""
    scale, device = setup.scale, Device(setup.scale.device)
    ceilings = NOT_MEASURED

    def measure(found: Found) -> None:
        nonlocal ceilings
        ceilings = measure_ceilings(device, scale, found)

    findings.run("device", lambda found: found.update(device.facts()))
    findings.run("ceilings", measure)
    findings.run(MAIN_MODEL, lambda found: _main_model(setup, device, ceilings, findings, found))
    device.free_memory()
    shapes = architecture(MAIN_MODEL, setup.rehearse)
    findings.run("attention", lambda found: attention_speed(device, setup, shapes, ceilings, findings.box, found))
    device.free_memory()
    for name, batches in scale.other_models.items():
        findings.run(name, _other_model(setup, name, batches, ceilings, findings))
        device.free_memory()
    findings.run("experts", lambda found: experts_speed(device, setup, ceilings, findings.box.part(25.0), found))
    device.free_memory()
    findings.run("pdl", lambda found: _pdl(setup, device, ceilings, findings, found))
    device.free_memory()
    findings.run("skinny_gemm", lambda found: skinny_products(device, shapes, scale, findings.box.part(20.0), found))
    findings.run("device_after", lambda found: found.update(device.facts()))


def _main_model(setup: Setup, device: Device, ceilings: Ceilings, findings: Findings, found: Found) -> None:
    """Every batch size at every context; then with sampling; then where the time goes."""
    scale = setup.scale
    with Bench(setup, MAIN_MODEL, max(scale.batches), scale.contexts, {}) as bench:
        found["ready_s"], found["facts"] = bench.ready_s, bench.executor.facts
        bench.decode.seat(GREEDY)
        cells: Found = found.setdefault("greedy", {})
        # The context of the goals first: if time runs out, it is the others that are missing.
        for context in sorted(scale.contexts, key=lambda context: context != scale.main_context):
            for batch in scale.batches:
                if findings.late(MAIN_MODEL):
                    return
                cell = cells[f"b{batch}_c{context}"] = bench.cell(batch, context, ceilings)
                progress(f"decode: batch {batch:>3}, context {context:>4}: {cell['ms']:.3f} ms")
            findings.save()
        profiles: Found = found.setdefault("profile", {})
        for batch in scale.profile_batches:
            profiles[f"b{batch}"] = _profile(device, bench, batch, scale.main_context)
        bench.decode.seat(SAMPLED)
        found["temperature_0.6"] = {
            f"b{batch}_c{scale.main_context}": bench.cell(batch, scale.main_context, ceilings)
            for batch in scale.batches
        }


def _profile(device: Device, bench: Bench, batch: int, context: int) -> dict[str, Any]:
    num_steps = min(8, bench.setup.scale.num_steps)
    work = lambda: bench.decode.steps(batch, context, num_steps)  # noqa: E731
    return device.top_kernels(work, num_steps + NUM_WARM_STEPS)


def _other_model(
    setup: Setup, name: str, batches: tuple[int, ...], ceilings: Ceilings, findings: Findings
) -> Callable[[Found], None]:
    def measure(found: Found) -> None:
        context = setup.scale.main_context
        with Bench(setup, name, max(batches), (context,), {}) as bench:
            found["ready_s"] = bench.ready_s
            bench.decode.seat(GREEDY)
            for batch in batches:
                if findings.late(name):
                    return
                found[f"b{batch}_c{context}"] = bench.cell(batch, context, ceilings)

    return measure


def _pdl(setup: Setup, device: Device, ceilings: Ceilings, findings: Findings, found: Found) -> None:
    """The small batches again, with programmatic dependent launch; without it they stand in the main section."""
    context, batches = setup.scale.main_context, setup.scale.pdl_batches
    found["pdl"] = device.has_pdl
    with Bench(setup, MAIN_MODEL, max(batches), (context,), {"executor.pdl": device.has_pdl}) as bench:
        bench.decode.seat(GREEDY)
        for batch in batches:
            if findings.late("pdl"):
                return
            found[f"b{batch}_c{context}"] = bench.cell(batch, context, ceilings)
