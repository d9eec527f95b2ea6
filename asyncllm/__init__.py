"""asyncllm: an LLM server in one asyncio process with one dedicated engine thread."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncllm.config import Config
    from asyncllm.errors import AsyncLLMError
    from asyncllm.llm.async_llm import AsyncLLM
    from asyncllm.llm.llm import LLM
    from asyncllm.llm.mount import create_app
    from asyncllm.llm.output import Choice, Embedding, Output
    from asyncllm.llm.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncLLMError",
    "Choice",
    "Config",
    "Embedding",
    "Output",
    "SamplingParams",
    "create_app",
]

# Imported when first asked for: `import asyncllm` costs nothing, and the server pays for none of it.
_HOMES = {
    "LLM": "asyncllm.llm.llm",
    "AsyncLLM": "asyncllm.llm.async_llm",
    "AsyncLLMError": "asyncllm.errors",
    "Choice": "asyncllm.llm.output",
    "Config": "asyncllm.config",
    "Embedding": "asyncllm.llm.output",
    "Output": "asyncllm.llm.output",
    "SamplingParams": "asyncllm.llm.params",
    "create_app": "asyncllm.llm.mount",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
