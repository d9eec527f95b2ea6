"""How many KV blocks to allocate, and what to tell people when something does not fit.

Pure arithmetic on numbers it is given; knows no device and no torch.
"""

import msgspec

from asyncllm.config import CacheConfig, Config
from asyncllm.errors import StartupError
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import Capacity

GIB = 2**30
_CPU_DEFAULT_BYTES = GIB
_CPU_SHARE = 0.25  # a machine has other things to do
_GPU_WORKSPACE_BYTES = GIB // 4  # cuBLAS workspaces, allocator rounding
_GRAPH_BYTES = 2 * 2**20  # of the driver's, for a graph of some hundreds of kernels


class CachePlan(msgspec.Struct, frozen=True):
    """The KV cache to allocate."""

    capacity: Capacity
    num_bytes: int
    summary: str  # one sentence for the log and /health


def weight_bytes(architecture: ModelArchitecture, bytes_per_value: int, on_gpu: bool) -> int:
    """Memory of the weights as torch keeps them."""
    num_values = architecture.num_parameters
    if not on_gpu and architecture.tie_word_embeddings:
        # The output layer runs on a copy packed for oneDNN's product; the table stays for look-ups.
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
    tokens = _hidden_bytes(architecture, config.scheduler.max_batched_tokens, bytes_per_value)
    # Logits in float32, their copy while sampling, and the noise of a part of them.
    logits = 4 * 2 * config.scheduler.max_sequences * architecture.vocab_size
    return tokens + logits + _GPU_WORKSPACE_BYTES


def graph_bytes(
    architecture: ModelArchitecture, num_rows: int, num_tokens: int, num_graphs: int, bytes_per_value: int
) -> int:
    """Memory that graphs of up to `num_rows` rows and `num_tokens` tokens keep; all share what the largest needs."""
    if not num_graphs:
        return 0
    logits = num_rows * architecture.vocab_size * bytes_per_value
    return _hidden_bytes(architecture, max(num_rows, num_tokens), bytes_per_value) + logits + num_graphs * _GRAPH_BYTES


def _hidden_bytes(architecture: ModelArchitecture, num_tokens: int, bytes_per_value: int) -> int:
    hidden, inner, experts = architecture.hidden_size, 3 * architecture.intermediate_size, architecture.experts
    if experts is not None:
        # Each of a token's experts has its inner features and its result at once.
        inner = max(inner, experts.num_experts_per_token * (experts.intermediate_size + hidden))
    return num_tokens * (6 * hidden + inner) * bytes_per_value


class CacheRoom(msgspec.Struct, frozen=True):
    """Memory for KV: what it may take, what it takes unless told otherwise, and how that came about."""

    available_bytes: int
    default_bytes: int
    reason: str = ""


def cpu_room(available_bytes: int) -> CacheRoom:
    """On a CPU: a modest cache, whatever is free."""
    return CacheRoom(available_bytes, min(_CPU_DEFAULT_BYTES, int(_CPU_SHARE * available_bytes)))


def gpu_room(
    architecture: ModelArchitecture,
    config: Config,
    bytes_per_value: int,
    total_bytes: int,
    used_bytes: int,
    reserved_bytes: int,
) -> CacheRoom:
    """On a GPU: what its share of the memory leaves beside what is in use and what steps still need."""
    fraction = config.cache.memory_fraction
    available_bytes = max(0, int(fraction * total_bytes) - used_bytes - reserved_bytes)
    # Beyond the longest contexts of all sequences, blocks only lengthen the memory of the prefix cache.
    scheduler, asked = config.scheduler, config.model.max_context_length
    most_tokens = scheduler.max_sequences * (asked or architecture.max_position)
    most_bytes = (most_tokens + config.cache.block_size) * architecture.kv_bytes_per_token(bytes_per_value)
    reason = (
        f"{fraction:g} of {_gib(total_bytes)}, less {_gib(used_bytes)} in use and {_gib(reserved_bytes)} kept for steps"
    )
    return CacheRoom(available_bytes, min(available_bytes, most_bytes), reason)


def plan_cache(architecture: ModelArchitecture, config: Config, bytes_per_token: int, room: CacheRoom) -> CachePlan:
    """Size the cache for the room there is, where a token's keys and values take `bytes_per_token` over all layers.

    Raises StartupError, naming the keys to change, when what was asked for does not fit.
    """
    block_size = config.cache.block_size
    block_bytes = bytes_per_token * block_size
    num_blocks = _num_blocks(config.cache, block_bytes, room)
    num_bytes = num_blocks * block_bytes
    if num_bytes > room.available_bytes:
        key = "num_blocks" if config.cache.num_blocks else "memory_gib"
        asked = getattr(config.cache, key)
        raise StartupError(f"the KV cache needs {_gib(num_bytes)}, {_available(room)}: lower cache.{key} = {asked}")
    num_tokens = (num_blocks - 1) * block_size
    context_length, remark = _context_length(architecture, config, num_tokens, bytes_per_token)
    max_sequences = config.scheduler.max_sequences
    summary = (
        f"KV: {num_tokens:,} tokens in {_gib(num_bytes)}; {max_sequences} sequences of {num_tokens // max_sequences:,}"
    )
    if room.reason:
        summary += f" ({room.reason})"
    capacity = Capacity(
        num_blocks=num_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        max_context_length=context_length,
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
    )
    return CachePlan(capacity, num_bytes, summary + remark)


def _num_blocks(cache: CacheConfig, block_bytes: int, room: CacheRoom) -> int:
    """Blocks as the settings ask, with the null block."""
    if cache.num_blocks:
        return cache.num_blocks + 1
    budget = int(cache.memory_gib * GIB) if cache.memory_gib else room.default_bytes
    if budget < 2 * block_bytes:
        remedy = "cache.memory_gib" if cache.memory_gib or not room.reason else "cache.memory_fraction"
        raise StartupError(
            f"the KV cache may take {budget:,} bytes, but one block and the null block need {2 * block_bytes:,}; "
            f"{_available(room)}: raise {remedy} or lower scheduler.max_batched_tokens"
        )
    return budget // block_bytes


def _available(room: CacheRoom) -> str:
    return f"{_gib(room.available_bytes)} are available" + (f" ({room.reason})" if room.reason else "")


def _context_length(
    architecture: ModelArchitecture, config: Config, num_tokens: int, bytes_per_token: int
) -> tuple[int, str]:
    """Tokens a sequence may have, and a remark where that is less than the model could do."""
    asked, own = config.model.max_context_length, architecture.max_position
    if asked > own:
        raise StartupError(
            f"model.max_context_length = {asked} is above the model's own limit of {own} tokens: lower it, or choose "
            "model.rope_scaling, which most models take"
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
