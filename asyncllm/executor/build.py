"""Builds the executor a configuration asks for: picks device and precision, loads weights, sizes and allocates KV.

Torch-free at import: torch comes in the first phase of start-up, on the engine thread, where everything here runs.
"""

import ctypes
import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor import host
from asyncllm.executor.base import Executor
from asyncllm.executor.build_native import (
    describe_kernels,
    fast_dtypes,
    find_native,
    has_int8_cache,
    load_native,
    native_kv_bytes_per_token,
    native_weight_bytes,
)
from asyncllm.executor.memory import (
    GIB,
    activation_bytes,
    check_weights_fit,
    cpu_room,
    gpu_room,
    plan_cache,
    weight_bytes,
)
from asyncllm.models.config import BYTES_PER_VALUE, ModelArchitecture
from asyncllm.native.library import Library
from asyncllm.weights.base import Checkpoint

if TYPE_CHECKING:
    import torch

    from asyncllm.weights.lora_stacks import AdapterPlan

# How long OpenMP threads spin for the next operation before they sleep; libgomp reads it as torch is imported. Its
# default spins for milliseconds: beside one other busy process on two cores, 8 streams made 70 tokens/s with it and 130
# with this; on a quiet machine both made 304.
SPIN_COUNT = "20000"


def build_executor(config: Config, checkpoint: Checkpoint, report: Callable[[str], None]) -> Executor:
    """An executor that is ready for its first step; `report` is told each phase as it begins.

    Raises StartupError when the device is not there or not fit for the model, or weights or KV do not fit.
    """
    report("import torch")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    import torch

    architecture = checkpoint.architecture
    device, remark = _device(config.model.device)
    on_gpu = device.type == "cuda"
    native = find_native(config, architecture, on_gpu)
    dtype, dtype_fact = choose_dtype(config.model.dtype, architecture.dtype, on_gpu, fast_dtypes(native))
    if isinstance(native, str):
        needed_bytes = weight_bytes(architecture, BYTES_PER_VALUE[dtype], on_gpu)
    else:
        needed_bytes = native_weight_bytes(config, checkpoint)
    adapters = _plan_adapters(config, architecture, report)
    facts = {
        "device": _describe(device) + remark,
        "dtype": dtype_fact,
        "parameters": f"{architecture.num_parameters:,}",
        "threads": str(_set_threads(config.executor.threads)),
        "weights": f"{needed_bytes / GIB:.2f} GiB",
    }
    if adapters is not None:
        adapter_bytes = adapters.num_values * BYTES_PER_VALUE[dtype]
        needed_bytes += adapter_bytes
        facts["adapters"] = f"{adapters.summary}, {adapter_bytes / GIB:.2f} GiB"
    if not on_gpu:
        facts["kernels"] = describe_kernels(native)
    check_weights_fit(needed_bytes, _available_bytes(device))
    try:
        if _attention_backend(config.executor.attention_backend, device) == "triton":
            from asyncllm.executor.build_cuda import build_cuda_executor

            return build_cuda_executor(config, checkpoint, device, dtype, facts, report, adapters)
        if isinstance(native, str):
            return _build_torch_executor(config, checkpoint, device, dtype, facts, report, adapters)
        return _build_native_executor(config, checkpoint, native, facts, report, adapters)
    except torch.OutOfMemoryError:
        raise StartupError(
            f"{device} ran out of memory: lower cache.memory_gib, cache.memory_fraction or scheduler.max_batched_tokens"
        ) from None


def _plan_adapters(
    config: Config, architecture: ModelArchitecture, report: Callable[[str], None]
) -> "AdapterPlan | None":
    """Look at all adapters before any weight is read; None where there are none."""
    if not config.lora.adapters:
        return None
    from asyncllm.weights.lora_stacks import plan_adapters

    report("open adapters")
    return plan_adapters(config.lora, architecture)


def _build_torch_executor(
    config: Config,
    checkpoint: Checkpoint,
    device: "torch.device",
    dtype: str,
    facts: dict[str, str],
    report: Callable[[str], None],
    adapters: "AdapterPlan | None",
) -> Executor:
    """Plain torch: on a CPU what the native kernels cannot run, on a GPU the reference."""
    import torch

    from asyncllm.attention.torch_attention import TorchAttention
    from asyncllm.executor.torch_executor import TorchExecutor
    from asyncllm.weights.loader import load_model
    from asyncllm.weights.lora_stacks import install_adapters

    architecture, bytes_per_value = checkpoint.architecture, BYTES_PER_VALUE[dtype]
    report("load weights")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model = load_model(checkpoint, TorchAttention(), torch_dtype, device)
    mask = install_adapters(adapters, model, torch_dtype, device)

    report("allocate kv cache")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        step_bytes = activation_bytes(architecture, config, bytes_per_value)
        room = gpu_room(architecture, config, bytes_per_value, total, total - free, step_bytes)
        facts["graphs"] = "none: executor.attention_backend = torch runs every step eagerly"
    else:
        room = cpu_room(host.available_memory_bytes())
    plan = plan_cache(architecture, config, architecture.kv_bytes_per_token(bytes_per_value), room)
    facts["kv"] = plan.summary
    return _warmed(TorchExecutor(model, architecture, plan.capacity, device, torch_dtype, facts, mask), config, report)


def _build_native_executor(
    config: Config,
    checkpoint: Checkpoint,
    library: Library,
    facts: dict[str, str],
    report: Callable[[str], None],
    adapters: "AdapterPlan | None",
) -> Executor:
    """A CPU's, on native kernels."""
    from asyncllm.attention.torch_attention import TorchAttention
    from asyncllm.executor.native_executor import NativeExecutor

    report("load weights")
    model = load_native(config, checkpoint, library, TorchAttention(), adapters)

    report("allocate kv cache")
    token_bytes = native_kv_bytes_per_token(config, checkpoint, library)
    plan = plan_cache(checkpoint.architecture, config, token_bytes, cpu_room(host.available_memory_bytes()))
    facts["kv"] = plan.summary + ("; in 8 bits" if has_int8_cache(config, checkpoint) else "")
    return _warmed(NativeExecutor(model, plan.capacity, facts), config, report)


def _warmed(executor: Executor, config: Config, report: Callable[[str], None]) -> Executor:
    from asyncllm.executor.warm_up import warm_up

    report("warm up")
    warm_up(executor, config.scheduler.max_batched_tokens)
    _return_freed_memory()
    return executor


def _return_freed_memory() -> None:
    """Give the system back what loading and warming up took for a while, and glibc keeps in its lists."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def choose_dtype(asked: str, of_checkpoint: str, on_gpu: bool, fast: Collection[str]) -> tuple[str, str]:
    """The precision to compute in, and how to tell people about it; `fast` as `fast_dtypes` returns it.

    `auto` is the checkpoint's, except where a CPU would have to emulate it. float16 then becomes float32 rather than
    bfloat16, which would drop three bits of every weight.
    """
    if asked != "auto":
        return asked, asked
    if on_gpu or of_checkpoint == "float32" or of_checkpoint in fast:
        return of_checkpoint, of_checkpoint
    return "float32", f"float32 (the model's {of_checkpoint} is slower on this CPU)"


def _device(asked: str) -> tuple["torch.device", str]:
    """The device to compute on, and why it is not the GPU that is there."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problem = "" if num_gpus else _why_no_cuda()
    if asked == "auto":
        asked = "cuda" if num_gpus else "cpu"
        remark = f"; no GPU: {problem}" if problem else ""
    else:
        remark = ""
    device = torch.device(asked)
    if device.type == "cpu":
        return device, remark
    index = device.index or 0
    if index >= num_gpus:
        found = f"{num_gpus} CUDA devices" if num_gpus else "no CUDA device" + (f" ({problem})" if problem else "")
        raise StartupError(f"model.device = {asked}, but this machine has {found}: set model.device to auto or cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index), ""


def _why_no_cuda() -> str:
    """Why an NVIDIA driver that is there cannot be used; empty where there is none."""
    import torch

    if not host.has_nvidia_driver():
        return ""
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install one with it"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # such as a driver too old for torch's CUDA
        return str(error).strip().partition("\n")[0]
    return "the driver shows no device"


def _attention_backend(asked: str, device: "torch.device") -> str:
    """Own kernels on CUDA; elsewhere "torch", whose executor runs native kernels too."""
    if asked in ("auto", "native"):
        return "triton" if device.type == "cuda" else "torch"
    if asked == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise StartupError(
            "executor.attention_backend = triton needs a CUDA device (or TRITON_INTERPRET=1, for tests): set it to auto"
        )
    return asked


def _describe(device: "torch.device") -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else host.cpu_name()
    return f"{device} ({name})" if name else str(device)


def _available_bytes(device: "torch.device") -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host.available_memory_bytes()


def _set_threads(asked: int) -> int:
    """Tensor threads of this thread and those it starts; torch's own default knows cores, but no container's limit."""
    import torch

    num_threads = asked or min(torch.get_num_threads(), host.cpu_quota() or torch.get_num_threads())
    torch.set_num_threads(num_threads)
    return num_threads
