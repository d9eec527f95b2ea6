"""The calls that differ between a GPU and the CPU of a rehearsal, each in one place with both branches.

Knows torch and clocks; knows nothing of models.
"""

import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

NVIDIA_SMI_FIELDS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
NAME_CHARS = 70  # of a kernel in a table; Triton's and cuBLAS's names go on for hundreds


class Device:
    """One device of this process."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"

    def synchronize(self) -> None:
        """Wait for everything launched so far."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Give back what dead tensors held, so that the next section finds the device empty."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @property
    def num_sms(self) -> int:
        """Multiprocessors."""
        return torch.cuda.get_device_properties(self.torch).multi_processor_count if self.is_cuda else 4

    @property
    def has_pdl(self) -> bool:
        """Whether kernels may be launched before the ones they depend on have ended: Hopper and later."""
        return self.is_cuda and torch.cuda.get_device_capability(self.torch) >= (9, 0)

    def seconds(self, work: Callable[[], object], repeats: int = 10) -> float:
        """The median time of one call, by the device's own clock; the first calls are not counted."""
        for _ in range(2):
            work()
        if not self.is_cuda:
            return statistics.median(_host_seconds(work) for _ in range(repeats))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1000

    def graphed(self, work: Callable[[], object]) -> Callable[[], object]:
        """The same work without launch costs, as a captured graph; on a CPU the work itself."""
        if not self.is_cuda:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles kernels and makes library handles, neither of which a capture allows
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def top_kernels(self, work: Callable[[], object], num_steps: int, limit: int = 12) -> dict[str, Any]:
        """Where `num_steps` steps that `work` makes spend their time: kernels per step and a table of the longest."""
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if self.is_cuda else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            work()
            self.synchronize()
        rows = []
        for event in profiler.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device == self.is_cuda:
                total_us = event.self_device_time_total if self.is_cuda else event.self_cpu_time_total
                rows.append((float(total_us), int(event.count), str(event.key)))
        rows.sort(reverse=True)
        total_us = sum(us for us, _, _ in rows) or 1.0
        table = [f"{'µs/step':>10} {'share':>7} {'calls/step':>11}  kernel"]
        for us, count, name in rows[:limit]:
            table.append(
                f"{us / num_steps:>10.1f} {us / total_us:>7.1%} {count / num_steps:>11.1f}  {name[:NAME_CHARS]}"
            )
        return {
            "kernels_per_step": round(sum(count for _, count, _ in rows) / num_steps, 1),
            "kernel_us_per_step": round(total_us / num_steps, 1),
            "table": table,
        }

    def facts(self) -> dict[str, Any]:
        """The device, and its clocks as they are now."""
        if not self.is_cuda:
            return {"device": "cpu"}
        properties = torch.cuda.get_device_properties(self.torch)
        found: dict[str, Any] = {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            values = answer.stdout.strip().partition("\n")[0].split(", ")
            found["nvidia_smi"] = dict(zip(NVIDIA_SMI_FIELDS.split(","), values))
        return found


def _host_seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
