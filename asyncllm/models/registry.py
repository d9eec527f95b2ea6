"""Which class builds which family of models."""

from collections.abc import Callable

from torch import nn

from asyncllm.attention.base import AttentionBackend
from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.models.llama import LlamaForCausalLM

MODELS: dict[str, Callable[[ModelArchitecture, AttentionBackend], nn.Module]] = {
    "llama": LlamaForCausalLM,
    "qwen3": LlamaForCausalLM,  # with qk_norm
}


def build_model(architecture: ModelArchitecture, attention: AttentionBackend) -> nn.Module:
    """A model of the architecture's family with empty weights, on torch's current default device."""
    if architecture.family not in MODELS:
        raise StartupError(f"model family {show(architecture.family)} is not served; served: {', '.join(MODELS)}")
    return MODELS[architecture.family](architecture, attention)
