"""Builds the CUDA executor: checks that the GPU fits the model, measures steps, gives the rest to KV, captures graphs.

Memory is decided once, before readiness: the largest steps run first with a cache of two blocks, and what is then in
use stays in use. Nothing later asks the device for more. Engine thread only.
"""

import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor.device import CudaDevice, Device, HostDevice
from asyncllm.executor.memory import GIB, gpu_room, graph_bytes, plan_cache
from asyncllm.executor.warm_up import warm_up, warm_up_largest
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import Capacity
from asyncllm.weights.base import Checkpoint

if TYPE_CHECKING:
    from asyncllm.executor.cuda_executor import CudaExecutor
    from asyncllm.weights.lora_stacks import AdapterPlan

_HEAD_DIMS = (64, 80, 96, 128, 256)
_MAX_GROUP = 16  # query heads of a KV head: rows of one tensor core operand
_MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
_PDL_CAPABILITY = (9, 0)
_SPIN_CORES = 4  # with fewer, a core that spins is one the event loop misses
_USE_TORCH = "set executor.attention_backend = torch"


def check_gpu(name: str, capability: tuple[int, int], config: Config, architecture: ModelArchitecture) -> None:
    """Raise StartupError where the kernels do not run, saying what would."""
    group = architecture.num_heads // architecture.num_kv_heads
    block_size = config.cache.block_size
    if capability < _MIN_CAPABILITY:
        raise StartupError(
            f"{name} has compute capability {_version(capability)}, the kernels need {_version(_MIN_CAPABILITY)}: "
            f"{_USE_TORCH}"
        )
    if architecture.head_dim not in _HEAD_DIMS:
        served = ", ".join(map(str, _HEAD_DIMS))
        raise StartupError(
            f"the model's heads have {architecture.head_dim} dimensions, the kernels serve {served}: {_USE_TORCH}"
        )
    if group > _MAX_GROUP:
        raise StartupError(f"{group} query heads share a KV head, the kernels serve up to {_MAX_GROUP}: {_USE_TORCH}")
    if block_size & (block_size - 1):
        raise StartupError(f"cache.block_size = {block_size}: the kernels need a power of two")
    if config.executor.pdl and capability < _PDL_CAPABILITY:
        raise StartupError(
            f"executor.pdl = true needs compute capability {_version(_PDL_CAPABILITY)}, {name} has "
            f"{_version(capability)}: set it to false"
        )


def build_cuda_executor(
    config: Config,
    checkpoint: Checkpoint,
    torch_device: torch.device,
    dtype: str,
    facts: dict[str, str],
    report: Callable[[str], None],
    adapters: "AdapterPlan | None" = None,
) -> "CudaExecutor":
    """An executor on `torch_device`; a CPU stands in for one under Triton's interpreter."""
    architecture, settings = checkpoint.architecture, config.executor
    device = _open(torch_device, config, architecture)
    from asyncllm.attention.triton_attention import TritonAttention
    from asyncllm.executor.cuda_executor import CudaExecutor
    from asyncllm.weights.loader import load_model
    from asyncllm.weights.lora_stacks import install_adapters

    torch_dtype: torch.dtype = getattr(torch, dtype)
    report("load weights")
    attention = TritonAttention(
        config.scheduler.max_sequences,
        architecture.num_heads,
        architecture.num_kv_heads,
        architecture.head_dim,
        torch_device,
        device.num_sms,
        settings.pdl,
    )
    model = load_model(checkpoint, attention, torch_dtype, torch_device)
    mask = install_adapters(adapters, model, torch_dtype, torch_device)
    no_graphs, max_batched_tokens = settings.disable_cuda_graph, config.scheduler.max_batched_tokens

    def make(capacity: Capacity) -> CudaExecutor:
        return CudaExecutor(
            model,
            attention,
            architecture,
            capacity,
            device,
            torch_dtype,
            facts,
            graph_rows=0 if no_graphs else settings.cuda_graph_max_bs,
            graph_tokens=0 if no_graphs else min(settings.cuda_graph_max_tokens, max_batched_tokens),
            overlap=settings.overlap,
            adapters=mask,
        )

    report("measure steps")
    rehearsal = make(_smallest(config, architecture))
    warm_up_largest(rehearsal, max_batched_tokens)
    graphs = rehearsal.graphs
    rehearsal.release()
    del rehearsal  # and the state of its slots

    report("allocate kv cache")
    bytes_per_value = torch_dtype.itemsize
    free, total = device.memory()
    reserved = graph_bytes(
        architecture,
        max(graphs.row_sizes, default=0),
        max(graphs.token_sizes, default=0),
        graphs.num_missing,
        bytes_per_value,
    )
    room = gpu_room(architecture, config, bytes_per_value, total, total - free, reserved)
    plan = plan_cache(architecture, config, architecture.kv_bytes_per_token(bytes_per_value), room)
    facts["kv"] = plan.summary
    executor = make(plan.capacity)

    report("warm up")
    warm_up_largest(executor, max_batched_tokens)
    warm_up(executor, max_batched_tokens)
    _capture(executor, device, config, report)
    return executor


def _capture(executor: "CudaExecutor", device: Device, config: Config, report: Callable[[str], None]) -> None:
    """Capture all graphs now, or say when they will be."""
    facts, graphs = executor.facts, executor.graphs
    if config.executor.disable_cuda_graph:
        facts["graphs"] = "none: executor.disable_cuda_graph"
        return
    sizes = f"{graphs.num_missing} for decode steps up to {graphs.row_sizes[-1]} rows"
    if graphs.token_sizes:
        sizes += f" and steps with prompts up to {graphs.token_sizes[-1]} tokens"
    if config.executor.cuda_graph_capture == "background":
        facts["graphs"] = f"{sizes}, captured in idle gaps"
        return
    report("capture graphs")
    begin_s, free = time.perf_counter(), device.memory()[0]
    while executor.improve():
        pass
    taken = (free - device.memory()[0]) / GIB
    facts["graphs"] = f"{sizes}, captured in {time.perf_counter() - begin_s:.1f} s, {taken:.2f} GiB"


def _open(torch_device: torch.device, config: Config, architecture: ModelArchitecture) -> Device:
    """The device, once it is known to be fit for the model."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise StartupError(f"triton is not installed: pip install triton, or {_USE_TORCH}") from None
    if torch_device.type != "cuda":
        check_gpu("the interpreter", _MIN_CAPABILITY, config, architecture)
        return HostDevice()
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        # Triton builds its launchers with one, at the first kernel; then it would be a traceback.
        raise StartupError(f"triton needs a C compiler: install gcc or clang, or {_USE_TORCH}")
    name = torch.cuda.get_device_name(torch_device)
    check_gpu(name, torch.cuda.get_device_capability(torch_device), config, architecture)
    return CudaDevice(torch_device, spin=len(os.sched_getaffinity(0)) >= _SPIN_CORES)


def _smallest(config: Config, architecture: ModelArchitecture) -> Capacity:
    """A cache of the null block and one more; everything else as it will be."""
    return Capacity(
        num_blocks=2,
        block_size=config.cache.block_size,
        max_sequences=config.scheduler.max_sequences,
        max_context_length=config.model.max_context_length or architecture.max_position,
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
