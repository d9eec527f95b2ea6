"""Which class builds which family of models."""

from collections.abc import Callable

from torch import nn

from asyncllm.attention.base import AttentionBackend
from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.models.decoder import DecoderForCausalLM

MODELS: dict[str, Callable[[ModelArchitecture, AttentionBackend], nn.Module]] = {
    "llama": DecoderForCausalLM,
    "mistral": DecoderForCausalLM,
    "smollm3": DecoderForCausalLM,
    "qwen2": DecoderForCausalLM,
    "qwen3": DecoderForCausalLM,
    "qwen3_moe": DecoderForCausalLM,
    "phi3": DecoderForCausalLM,
    "starcoder2": DecoderForCausalLM,
    "gemma": DecoderForCausalLM,
    "gemma2": DecoderForCausalLM,
    "gemma3": DecoderForCausalLM,
    "opt": DecoderForCausalLM,
    "gpt2": DecoderForCausalLM,
}


def build_model(architecture: ModelArchitecture, attention: AttentionBackend) -> nn.Module:
    """A model of the architecture's family with empty weights, on torch's current default device."""
    if architecture.family not in MODELS:
        raise StartupError(f"model family {show(architecture.family)} is not served; served: {', '.join(MODELS)}")
    return MODELS[architecture.family](architecture, attention)
