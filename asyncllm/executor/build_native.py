"""Whether a model runs on the native CPU kernels, and how it is loaded for them.

Torch-free at import. Engine thread.
"""

from typing import TYPE_CHECKING

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor import host
from asyncllm.models.config import BYTES_PER_VALUE, ModelArchitecture
from asyncllm.native.library import Library, find_library, why_not
from asyncllm.weights.base import BlockCheckpoint, Checkpoint

if TYPE_CHECKING:
    from asyncllm.attention.base import AttentionBackend
    from asyncllm.models.base import CausalLM

DTYPE = "bfloat16"  # of what is not in blocks, and of keys and values


def find_native(config: Config, architecture: ModelArchitecture, on_gpu: bool) -> Library | str:
    """The kernels to run a model on, or in a few words why it runs on torch.

    Raises StartupError where they were asked for by name and cannot run it.
    """
    asked = config.executor.attention_backend
    if asked not in ("auto", "native"):
        return f"executor.attention_backend = {asked}"
    dtype = architecture.dtype if config.model.dtype == "auto" else config.model.dtype
    if on_gpu:
        reason = "on a GPU"
    elif config.lora.adapters:
        reason = "lora.adapters are there"
    elif dtype != DTYPE:
        reason = f"the model's dtype is {dtype}"
    else:
        reason = why_not(architecture, config.cache.block_size)
    library = reason or find_library(host.cpu_flags())
    if isinstance(library, str) and asked == "native":
        raise StartupError(f"executor.attention_backend = native cannot run this model: {library}; set it to auto")
    return library


def describe_kernels(native: Library | str) -> str:
    """What runs a model on a CPU, and why, for people; `native` as `find_native` returns it."""
    return f"torch: {native}" if isinstance(native, str) else f"native, {native.description}"


def native_weight_bytes(config: Config, checkpoint: Checkpoint) -> int:
    """Memory of the loaded weights, about: blocks grow by a tenth as they are packed."""
    if config.model.quantization == "auto" and isinstance(checkpoint, BlockCheckpoint):
        return checkpoint.num_bytes_in_blocks(BYTES_PER_VALUE[DTYPE]) * 11 // 10
    return checkpoint.architecture.num_parameters * BYTES_PER_VALUE[DTYPE]


def load_native(config: Config, checkpoint: Checkpoint, library: Library, attention: "AttentionBackend") -> "CausalLM":
    """Read a checkpoint and pack it for the kernels. Raises StartupError as `weights.loader.read_model` does."""
    import torch

    from asyncllm.native.decoder import NativeDecoder
    from asyncllm.weights.loader import prepare, read_model

    device = torch.device("cpu")
    model = read_model(checkpoint, attention, torch.bfloat16, device, config.model.quantization == "auto")
    prepare(model, fused=False, products=False)
    return NativeDecoder(model, library, config.cache.block_size, torch.get_num_threads())
