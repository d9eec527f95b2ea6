"""Llama: pre-norm decoder of grouped-query attention with rotary positions and a gated MLP.

Module names follow Hugging Face's, so that a checkpoint's tensor names lead to their places; layers that read the same
input are stacked (`qkv_proj`, `gate_up_proj`). Qwen3 is the same with a norm over each query and key head. Knows
nothing of files or of how attention is computed. Engine thread.
"""

import math
from typing import cast

from torch import Tensor, nn

from asyncllm.attention.base import AttentionBackend, AttentionMetadata, AttentionStep
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.linear import Linear
from asyncllm.layers.mlp import GatedMLP
from asyncllm.layers.norm import RMSNorm
from asyncllm.layers.rotary import Rotary
from asyncllm.models.config import ModelArchitecture


class LlamaAttention(nn.Module):
    """Projections around whatever the step's attention is; see `attention.base.AttentionLayer`."""

    def __init__(self, architecture: ModelArchitecture, rotary: Rotary) -> None:
        super().__init__()
        a = architecture
        self.num_heads = a.num_heads
        self.num_kv_heads = a.num_kv_heads
        self.head_dim = a.head_dim
        self.scale = 1.0 / math.sqrt(a.head_dim)
        self.rotary = rotary
        parts = {
            "q_proj": a.num_heads * a.head_dim,
            "k_proj": a.num_kv_heads * a.head_dim,
            "v_proj": a.num_kv_heads * a.head_dim,
        }
        self.qkv_proj = Linear(a.hidden_size, sum(parts.values()), a.attention_bias, parts)
        self.o_proj = Linear(a.num_heads * a.head_dim, a.hidden_size, a.attention_bias)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, step: AttentionStep, kv_cache: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        qkv = self.qkv_proj(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return self.o_proj(step.forward(qkv, self, kv_cache))


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, architecture: ModelArchitecture, rotary: Rotary) -> None:
        super().__init__()
        a = architecture
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = LlamaAttention(a, rotary)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = GatedMLP(a.hidden_size, a.intermediate_size, a.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor, step: AttentionStep, kv_cache: Tensor) -> Tensor:  # hot
        """Normed input [N, hidden] -> this layer's last branch [N, hidden]; `residual` is added to in place."""
        attended = self.self_attn(x, step, kv_cache)
        return self.mlp(self.post_attention_layernorm.add_norm(attended, residual))


class LlamaModel(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, architecture: ModelArchitecture) -> None:
        super().__init__()
        self.embed_tokens = Embedding(architecture.vocab_size, architecture.hidden_size)
        rotary = Rotary(architecture.head_dim, architecture.rope_theta, architecture.max_position)
        self.layers = nn.ModuleList(LlamaLayer(architecture, rotary) for _ in range(architecture.num_layers))
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)

    def forward(self, input_ids: Tensor, step: AttentionStep, kv_caches: list[Tensor]) -> Tensor:
        """[N] -> [N, hidden]. The residual stream is one tensor, added to in place."""
        residual = self.embed_tokens(input_ids)
        branch: Tensor | None = None
        for module, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer = cast(LlamaLayer, module)
            norm = layer.input_layernorm
            x = norm(residual) if branch is None else norm.add_norm(branch, residual)
            branch = layer(x, residual, step, kv_cache)
        assert branch is not None
        return self.norm.add_norm(branch, residual)


class LlamaForCausalLM(nn.Module):
    """The model with its head; see `models.base.CausalLM`."""

    def __init__(self, architecture: ModelArchitecture, attention: AttentionBackend) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention = attention
        self.model = LlamaModel(architecture)
        self.lm_head = Linear(architecture.hidden_size, architecture.vocab_size)
        if architecture.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, metadata: AttentionMetadata, kv_caches: list[Tensor]) -> Tensor:
        """[N] int64 -> [N, hidden]; stores keys and values in `kv_caches`."""
        step = self.attention.begin(metadata, kv_caches[0])
        return self.model(input_ids, step, kv_caches)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, V] in the model's dtype."""
        return self.lm_head(hidden)
