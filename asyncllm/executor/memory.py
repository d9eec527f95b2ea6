"""How many KV blocks to allocate, and what to tell people when something does not fit.

Pure arithmetic on numbers it is given; knows no device and no torch.
"""

import msgspec

from asyncllm.config import CacheConfig, Config
from asyncllm.errors import StartupError
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import Capacity

GIB = 2**30
_GPU_SHARE = 0.9  # of what is free once the weights are loaded
_CPU_DEFAULT_BYTES = GIB
_CPU_SHARE = 0.25  # a machine has other things to do
_GPU_WORKSPACE_BYTES = GIB // 4  # cuBLAS workspaces, allocator rounding


class CachePlan(msgspec.Struct, frozen=True):
    """The KV cache to allocate."""

    capacity: Capacity
    num_bytes: int
    summary: str  # one sentence for the log and /health


def weight_bytes(architecture: ModelArchitecture, bytes_per_value: int, on_gpu: bool) -> int:
    """Memory of the loaded weights."""
    num_values = architecture.num_parameters
    if not on_gpu and architecture.tie_word_embeddings:
        # The output layer runs on a copy packed for the CPU's matrix kernel; the table stays for look-ups.
        num_values += architecture.vocab_size * architecture.hidden_size
    return num_values * bytes_per_value


def check_weights_fit(needed_bytes: int, available_bytes: int) -> None:
    """Raise StartupError before loading what cannot fit."""
    if needed_bytes > available_bytes:
        raise StartupError(
            f"the model's weights need {_gib(needed_bytes)}, {_gib(available_bytes)} are available: "
            "use a smaller model or a narrower model.dtype"
        )


def activation_bytes(architecture: ModelArchitecture, config: Config, bytes_per_value: int) -> int:
    """Memory a step may take beside weights and KV: hidden states of its tokens, logits of its rows."""
    per_token = 6 * architecture.hidden_size + 3 * architecture.intermediate_size
    # Logits in float32, their copy while sampling, and the noise of a part of them.
    logits = 4 * 2 * config.scheduler.max_sequences * architecture.vocab_size
    return config.scheduler.max_batched_tokens * per_token * bytes_per_value + logits + _GPU_WORKSPACE_BYTES


def plan_cache(
    architecture: ModelArchitecture, config: Config, bytes_per_value: int, available_bytes: int, on_gpu: bool
) -> CachePlan:
    """Size the cache for `available_bytes`, free once the weights are loaded.

    Raises StartupError, naming the keys to change, when what was asked for does not fit.
    """
    block_size = config.cache.block_size
    block_bytes = architecture.kv_bytes_per_token(bytes_per_value) * block_size
    headroom = activation_bytes(architecture, config, bytes_per_value) if on_gpu else 0
    if on_gpu:
        default_bytes = int(_GPU_SHARE * available_bytes) - headroom
    else:
        default_bytes = min(_CPU_DEFAULT_BYTES, int(_CPU_SHARE * available_bytes))
    num_blocks = _num_blocks(config.cache, block_bytes, default_bytes, available_bytes)
    num_bytes = num_blocks * block_bytes
    if num_bytes + headroom > available_bytes:
        beside = f" beside {_gib(headroom)} for a step's activations" if on_gpu else ""
        key = "num_blocks" if config.cache.num_blocks else "memory_gib"
        raise StartupError(
            f"the KV cache needs {_gib(num_bytes)}{beside}, {_gib(available_bytes)} are available: "
            f"lower cache.{key} = {getattr(config.cache, key)}"
        )
    num_tokens = (num_blocks - 1) * block_size
    context_length, remark = _context_length(architecture, config, num_tokens, block_bytes // block_size)
    max_sequences = config.scheduler.max_sequences
    summary = (
        f"KV: {num_tokens:,} tokens in {_gib(num_bytes)}; {max_sequences} sequences of {num_tokens // max_sequences:,}"
    )
    capacity = Capacity(
        num_blocks=num_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        max_context_length=context_length,
        vocab_size=architecture.vocab_size,
    )
    return CachePlan(capacity, num_bytes, summary + remark)


def _num_blocks(cache: CacheConfig, block_bytes: int, default_bytes: int, available_bytes: int) -> int:
    """Blocks as the settings ask, with the null block."""
    if cache.num_blocks:
        return cache.num_blocks + 1
    budget = int(cache.memory_gib * GIB) if cache.memory_gib else default_bytes
    if budget < 2 * block_bytes:
        raise StartupError(
            f"the KV cache may take {max(0, budget):,} bytes of {_gib(available_bytes)} available, but one block and "
            f"the null block need {2 * block_bytes:,}: raise cache.memory_gib or lower scheduler.max_batched_tokens"
        )
    return budget // block_bytes


def _context_length(
    architecture: ModelArchitecture, config: Config, num_tokens: int, bytes_per_token: int
) -> tuple[int, str]:
    """Tokens a sequence may have, and a remark where that is less than the model could do."""
    asked, own = config.model.max_context_length, architecture.max_position
    if asked > own:
        raise StartupError(
            f"model.max_context_length = {asked} is above the model's own limit of {own} tokens: lower it"
        )
    wanted = asked or own
    if wanted <= num_tokens:
        return wanted, ""
    if asked:
        raise StartupError(
            f"one sequence of model.max_context_length = {asked} tokens needs {_gib(asked * bytes_per_token)} of KV, "
            f"but the cache holds {num_tokens} tokens: lower model.max_context_length or raise cache.memory_gib"
        )
    return num_tokens, f"; context limited to {num_tokens:,} of the model's {own:,} tokens: raise cache.memory_gib"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
