"""What a model would find on this machine: every device's memory, and the sequences that fit beside the weights.

For `asyncllm-server --probe`; the arithmetic is start-up's own (`memory.py`). Torch comes only where a GPU is.
"""

from collections.abc import Iterator

import msgspec

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor import host
from asyncllm.executor.build import choose_dtype
from asyncllm.executor.build_native import (
    describe_kernels,
    fast_dtypes,
    find_native,
    native_kv_bytes_per_token,
    native_weight_bytes,
)
from asyncllm.executor.memory import activation_bytes, check_weights_fit, cpu_room, gpu_room, plan_cache, weight_bytes
from asyncllm.models.config import BYTES_PER_VALUE
from asyncllm.weights.base import Checkpoint

LENGTHS = (1024, 4096, 16384, 65536, 131072)  # tokens of the sequences that are counted, and the model's own limit


class Device(msgspec.Struct, frozen=True):
    """A place to compute."""

    name: str  # as in model.device: cpu, cuda:0
    description: str
    total_bytes: int
    available_bytes: int

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory of its own."""
        return self.name != "cpu"


class Fit(msgspec.Struct, frozen=True):
    """What a model would get on a device under a configuration."""

    device: Device
    dtype: str
    weight_bytes: int
    problem: str = ""  # why it does not fit, one line; the rest is 0 then
    num_kv_tokens: int = 0
    max_context_length: int = 0
    num_sequences: dict[int, int] = {}  # length in tokens -> how many run at once
    kernels: str = ""  # on a CPU: native or torch, and why


def devices() -> Iterator[Device]:
    """The CPU, then each GPU that torch can use."""
    available = host.available_memory_bytes()
    yield Device("cpu", host.cpu_name(), available, available)
    if not host.has_nvidia_driver():
        return
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        yield Device(f"cuda:{index}", torch.cuda.get_device_name(index), total, free)


def fit(checkpoint: Checkpoint, config: Config, device: Device) -> Fit:
    """Choose kernels and size weights and KV cache as start-up would."""
    architecture = checkpoint.architecture
    problem = ""
    try:
        native = find_native(config, architecture, device.is_gpu)
    except StartupError as error:
        native = problem = error.message
    is_native = not isinstance(native, str)
    dtype, _ = choose_dtype(config.model.dtype, architecture.dtype, device.is_gpu, fast_dtypes(native))
    width = BYTES_PER_VALUE[dtype]
    if is_native:
        needed_bytes = native_weight_bytes(config, checkpoint)
    else:
        needed_bytes = weight_bytes(architecture, width, device.is_gpu)
    if problem:
        return Fit(device, dtype, needed_bytes, problem)
    kernels = "" if device.is_gpu else describe_kernels(native)
    try:
        check_weights_fit(needed_bytes, device.available_bytes)
        if device.is_gpu:
            used = device.total_bytes - device.available_bytes + needed_bytes
            steps = activation_bytes(architecture, config, width)
            room = gpu_room(architecture, config, width, device.total_bytes, used, steps)
        else:
            room = cpu_room(device.available_bytes - needed_bytes)
        if isinstance(native, str):
            token_bytes = architecture.kv_bytes_per_token(width)
        else:
            token_bytes = native_kv_bytes_per_token(config, checkpoint, native)
        capacity = plan_cache(architecture, config, token_bytes, room).capacity
    except StartupError as error:
        return Fit(device, dtype, needed_bytes, error.message, kernels=kernels)
    context, at_once = capacity.max_context_length, config.scheduler.max_sequences
    lengths = [length for length in LENGTHS if length < context] + [context]
    fitting = {length: min(at_once, capacity.num_kv_tokens // length) for length in lengths}
    return Fit(device, dtype, needed_bytes, "", capacity.num_kv_tokens, context, fitting, kernels)
