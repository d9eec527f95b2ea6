"""Whether a model runs on the native CPU kernels, and how it is loaded for them.

Torch-free at import. Engine thread.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor import host
from asyncllm.models.config import ModelArchitecture
from asyncllm.native.builds import find_library
from asyncllm.native.library import PAGE, Library, why_not
from asyncllm.weights.base import BlockCheckpoint, Checkpoint

if TYPE_CHECKING:
    from asyncllm.attention.base import AttentionBackend
    from asyncllm.native.decoder import NativeDecoder
    from asyncllm.weights.lora_stacks import AdapterPlan

DTYPES = ("bfloat16", "float16")  # of what is not in blocks; keys and values are bfloat16 or in 8 bits
BYTES_PER_WEIGHT = 2  # of both


def find_native(config: Config, architecture: ModelArchitecture, on_gpu: bool) -> Library | str:
    """The kernels to run a model on, or in a few words why it runs on torch.

    Raises StartupError where they were asked for by name and cannot run it.
    """
    asked = config.executor.attention_backend
    dtype = _dtype(config, architecture)
    if asked not in ("auto", "native"):
        reason = f"executor.attention_backend = {asked}"
    elif on_gpu:
        reason = "on a GPU"
    elif dtype not in DTYPES:
        reason = f"the model's dtype is {dtype}"
    else:
        reason = why_not(architecture, config.cache.block_size)
    library = reason or find_library(host.cpu_flags())
    if isinstance(library, str) and asked == "native":
        raise StartupError(f"executor.attention_backend = native cannot run this model: {library}; set it to auto")
    if isinstance(library, str) and config.cache.kv_cache_dtype == "int8":
        raise StartupError(f"cache.kv_cache_dtype = int8 needs the CPU's native kernels ({library}): set it to auto")
    return library


def describe_kernels(native: Library | str) -> str:
    """What runs a model on a CPU, and why, for people; `native` as `find_native` returns it."""
    return f"torch: {native}" if isinstance(native, str) else f"native, {native.description}"


def fast_dtypes(native: Library | str) -> Collection[str]:
    """Those that a CPU is no slower with than with float32; `native` as `find_native` returns it."""
    if not isinstance(native, str):
        return DTYPES
    return ("bfloat16",) if host.cpu_has_bfloat16() else ()


def native_weight_bytes(config: Config, checkpoint: Checkpoint) -> int:
    """Memory of the loaded weights, about: packing adds a tenth to blocks, and leaves bfloat16 12 bits, mostly."""
    in_blocks = _bytes_in_blocks(config, checkpoint)
    if in_blocks is not None:
        return in_blocks * 11 // 10
    return _plain_bytes(checkpoint) * (4 if _dtype(config, checkpoint.architecture) == "bfloat16" else 5) // 5


def _dtype(config: Config, architecture: ModelArchitecture) -> str:
    return architecture.dtype if config.model.dtype == "auto" else config.model.dtype


def _plain_bytes(checkpoint: Checkpoint) -> int:
    return checkpoint.architecture.num_parameters * BYTES_PER_WEIGHT


def _bytes_in_blocks(config: Config, checkpoint: Checkpoint) -> int | None:
    """Of weights that are quantized and stay so."""
    if config.model.quantization != "auto" or not isinstance(checkpoint, BlockCheckpoint):
        return None
    num_bytes = checkpoint.num_bytes_in_blocks(BYTES_PER_WEIGHT)
    return num_bytes if num_bytes < _plain_bytes(checkpoint) else None


def has_int8_cache(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether keys and values are kept in 8 bits; of a model that runs on these kernels.

    Quantized weights cost a model's answers far more than these do: of the embedded model's, by the Kullback-Leibler
    divergence from float32 over texts of 1500 tokens, 0.0012 with keys and values in bfloat16 and 0.0020 in 8 bits,
    where computing with bfloat16 weights in torch is off by 0.0013.
    """
    if config.cache.kv_cache_dtype == "auto":
        return _bytes_in_blocks(config, checkpoint) is not None
    return config.cache.kv_cache_dtype == "int8"


def native_kv_bytes_per_token(config: Config, checkpoint: Checkpoint, library: Library) -> int:
    """Bytes of keys and values that one token needs over all layers; in whole pages there are no others."""
    architecture = checkpoint.architecture
    return architecture.num_layers * library.block_bytes(architecture, PAGE, has_int8_cache(config, checkpoint)) // PAGE


def load_native(
    config: Config,
    checkpoint: Checkpoint,
    library: Library,
    attention: "AttentionBackend",
    adapters: "AdapterPlan | None" = None,
) -> "NativeDecoder":
    """Read a checkpoint and adapters, and pack them for the kernels.

    Raises StartupError as `weights.loader.read_model` does.
    """
    import torch

    from asyncllm.native.decoder import NativeDecoder
    from asyncllm.weights.loader import prepare, read_model
    from asyncllm.weights.lora_stacks import install_adapters

    device, dtype = torch.device("cpu"), getattr(torch, _dtype(config, checkpoint.architecture))
    model = read_model(checkpoint, attention, dtype, device, config.model.quantization == "auto")
    prepare(model, fused=False, products=False)
    install_adapters(adapters, model, dtype, device, products=False)
    spans = () if adapters is None else adapters.spans
    int8_cache = has_int8_cache(config, checkpoint)
    return NativeDecoder(model, library, config.cache.block_size, torch.get_num_threads(), int8_cache, spans)
