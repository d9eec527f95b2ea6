"""asyncllm: an LLM server in one asyncio process with one dedicated engine thread."""

__version__ = "0.1.0"
