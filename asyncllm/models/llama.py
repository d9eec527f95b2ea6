"""Llama: pre-norm decoder of grouped-query attention with rotary positions and a gated MLP.

Module names follow Hugging Face's, so that a checkpoint's tensor names lead to their places; layers that read the same
input are stacked (`qkv_proj`, `gate_up_proj`). Knows nothing of files or of how attention is computed. Engine thread.
"""

import math
from typing import cast

from torch import Tensor, nn

from asyncllm.attention.base import AttentionBackend, AttentionMetadata, AttentionStep
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.linear import Linear
from asyncllm.layers.mlp import GatedMLP
from asyncllm.layers.norm import RMSNorm
from asyncllm.layers.rotary import Rotary, rotate
from asyncllm.models.config import ModelArchitecture


class LlamaAttention(nn.Module):
    """Projections and rotation around whatever the step's attention is."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, qkv_bias: bool, output_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = 1.0 / math.sqrt(head_dim)
        parts = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        self.qkv_proj = Linear(hidden_size, sum(parts.values()), qkv_bias, parts)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, output_bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep, kv_cache: Tensor
    ) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv_proj(x).view(x.shape[0], num_rotated + self.num_kv_heads, self.head_dim)
        # Queries and keys lie side by side and turn together.
        rotated = rotate(heads[:, :num_rotated], *rotation)
        query, key, value = rotated[:, : self.num_heads], rotated[:, self.num_heads :], heads[:, num_rotated:]
        attended = step.forward(query, key, value, kv_cache, self.scale)  # [N, H, D]
        return self.o_proj(attended.reshape(x.shape[0], self.num_heads * self.head_dim))


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, architecture: ModelArchitecture) -> None:
        super().__init__()
        a = architecture
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = LlamaAttention(
            a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim, a.attention_bias, a.attention_bias
        )
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = GatedMLP(a.hidden_size, a.intermediate_size, a.mlp_bias)

    def forward(
        self, x: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep, kv_cache: Tensor
    ) -> Tensor:  # hot
        """Normed input [N, hidden] -> this layer's last branch [N, hidden]; `residual` is added to in place."""
        attended = self.self_attn(x, rotation, step, kv_cache)
        return self.mlp(self.post_attention_layernorm.add_norm(attended, residual))


class LlamaModel(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, architecture: ModelArchitecture) -> None:
        super().__init__()
        self.embed_tokens = Embedding(architecture.vocab_size, architecture.hidden_size)
        self.rotary = Rotary(architecture.head_dim, architecture.rope_theta)
        self.layers = nn.ModuleList(LlamaLayer(architecture) for _ in range(architecture.num_layers))
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, kv_caches: list[Tensor]) -> Tensor:
        """[N] -> [N, hidden]. The residual stream is one tensor, added to in place."""
        residual = self.embed_tokens(input_ids)
        rotation = self.rotary(positions, residual.dtype)
        branch: Tensor | None = None
        for module, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer = cast(LlamaLayer, module)
            norm = layer.input_layernorm
            x = norm(residual) if branch is None else norm.add_norm(branch, residual)
            branch = layer(x, residual, rotation, step, kv_cache)
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
        return self.model(input_ids, metadata.positions, step, kv_caches)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, V] float32."""
        return self.lm_head(hidden).float()
