"""The bodies of what probes and operators' routes answer, as structs: the documentation is made from them."""

import msgspec
from msgspec import UNSET, UnsetType


class Liveness(msgspec.Struct):
    """GET /livez"""

    status: str  # alive or dead


class Readiness(msgspec.Struct):
    """GET /readyz"""

    status: str  # ready, else the state that keeps it from being so
    phase: str | UnsetType = UNSET  # of start-up, where it is not ready


class StartupProgress(msgspec.Struct):
    """GET /startupz: seconds by phase, null for the one that runs."""

    status: str
    phase: str
    phases: dict[str, float | None]
    error: str | None


class Memory(msgspec.Struct):
    """Part of the health."""

    process_resident_bytes: int
    kv_cache_used: float  # share, 1 = all


class Health(msgspec.Struct):
    """GET /health"""

    status: str
    timestamp: float
    backend: str
    model: str
    device: str
    memory: Memory
    details: dict[str, str]


class Load(msgspec.Struct):
    """GET /load: requests and prompt tokens, and the share of the KV cache that is held."""

    running: int
    waiting: int
    waiting_tokens: int
    kv_cache_usage: float
    streams: int


class Version(msgspec.Struct):
    """GET /version"""

    version: str
    python: str
    torch: str
    transformers: str
    aiohttp: str


class ModelCard(msgspec.Struct, kw_only=True):
    """One served name; its context in tokens, null until the model is loaded. An adapter's parent is the model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "asyncllm"
    root: str
    parent: str | None = None
    max_model_len: int | None
    context_length: int | None


class ModelList(msgspec.Struct, kw_only=True):
    """GET /v1/models"""

    object: str = "list"
    data: list[ModelCard]


class Aborted(msgspec.Struct):
    """POST /abort: the ids of what was ended."""

    aborted: list[str]
