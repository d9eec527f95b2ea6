"""The pre-norm decoder that every family served is: attention and an MLP, each behind a norm and around a residual.

What families do otherwise is in `ModelArchitecture`; nothing here asks for a family's name. Module names follow Hugging
Face's Llama, so that a checkpoint's tensor names lead to their places (`weights/names.py` for those that call things
otherwise); layers that read the same input are stacked (`qkv_proj`, `gate_up_proj`). Knows nothing of files or of how
attention is computed. Engine thread.
"""

import math
from typing import cast

from torch import Tensor, nn

from asyncllm.attention.base import AttentionBackend, AttentionMetadata, AttentionStep
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.experts import SparseMLP
from asyncllm.layers.linear import Linear
from asyncllm.layers.mlp import GatedMLP, PlainMLP
from asyncllm.layers.norm import LayerNorm, RMSNorm
from asyncllm.layers.rotary import Rotary, rotary_order
from asyncllm.models.config import LayerKind, ModelArchitecture


class DecoderAttention(nn.Module):
    """Projections around whatever the step's attention is; see `attention.base.AttentionLayer`."""

    def __init__(self, architecture: ModelArchitecture, kind: LayerKind, rotary: Rotary) -> None:
        super().__init__()
        a = architecture
        self.num_heads = a.num_heads
        self.num_kv_heads = a.num_kv_heads
        self.head_dim = a.head_dim
        self.scale = a.attention_scale or 1.0 / math.sqrt(a.head_dim)
        self.window = kind.window
        self.soft_cap = a.attention_soft_cap
        self.rotary = rotary
        self._rotary_dim = a.rotary_dim or a.head_dim
        parts = {
            "q_proj": a.num_heads * a.head_dim,
            "k_proj": a.num_kv_heads * a.head_dim,
            "v_proj": a.num_kv_heads * a.head_dim,
        }
        self.qkv_proj = Linear(a.hidden_size, sum(parts.values()), a.attention_bias or a.qkv_bias, parts)
        self.o_proj = Linear(a.num_heads * a.head_dim, a.hidden_size, a.attention_bias)
        self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps, a.norm_plus_one) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps, a.norm_plus_one) if a.qk_norm else None

    def prepare(self, fused: bool) -> None:
        """Bring the dimensions of queries and keys that turn together to where `Rotary` wants them."""
        for parameter in self.qkv_proj.parameters():
            self.arrange(parameter)
        for blocks in self.qkv_proj.blocks[:2]:  # of queries, of keys
            if blocks is not None:
                self._arrange_heads(blocks.rows.unflatten(0, (-1, self.head_dim)))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                self._arrange_heads(norm.weight[None])

    def arrange(self, rows: Tensor) -> None:
        """The same for whatever else has a row for each output of `qkv_proj`, [H + 2K heads · D, …], in place."""
        num_rows = (self.num_heads + self.num_kv_heads) * self.head_dim
        self._arrange_heads(rows[:num_rows].unflatten(0, (-1, self.head_dim)))

    def _arrange_heads(self, heads: Tensor) -> None:
        if self._rotary_dim != self.head_dim:
            order = rotary_order(self.head_dim, self._rotary_dim)
            heads.copy_(heads[:, order.to(heads.device)])

    def forward(self, x: Tensor, step: AttentionStep, kv_cache: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        qkv = self.qkv_proj(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return self.o_proj(step.forward(qkv, self, kv_cache))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, perhaps before another, and around a residual."""

    def __init__(self, architecture: ModelArchitecture, kind: LayerKind, rotary: Rotary) -> None:
        super().__init__()
        a = architecture
        self.input_layernorm = make_norm(a)
        self.self_attn = DecoderAttention(a, kind, rotary)
        self.post_attention_layernorm = make_norm(a)
        self.pre_feedforward_layernorm = make_norm(a) if a.branch_norms else None
        self.mlp = make_mlp(a, kind)
        self.post_feedforward_layernorm = make_norm(a) if a.branch_norms else None

    def forward(self, x: Tensor, residual: Tensor, step: AttentionStep, kv_cache: Tensor) -> Tensor:  # hot
        """Normed input [N, hidden] -> this layer's last branch [N, hidden]; `residual` is added to in place."""
        attended = self.self_attn(x, step, kv_cache)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            return self.mlp(self.post_attention_layernorm.add_norm(attended, residual))
        # Gemma 2 and 3 call the norm of attention's result what others call the norm before the MLP.
        attended = self.post_attention_layernorm(attended)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm.add_norm(attended, residual)))


def make_norm(architecture: ModelArchitecture) -> RMSNorm | LayerNorm:
    """Over hidden states."""
    a = architecture
    if a.layer_norm:
        return LayerNorm(a.hidden_size, a.rms_norm_eps)
    return RMSNorm(a.hidden_size, a.rms_norm_eps, a.norm_plus_one)


def make_mlp(architecture: ModelArchitecture, kind: LayerKind) -> nn.Module:
    """[N, hidden] -> [N, hidden]."""
    a = architecture
    if kind.has_experts and a.experts is not None:
        return SparseMLP(a.hidden_size, a.experts, a.activation)
    if a.gated_mlp:
        return GatedMLP(a.hidden_size, a.intermediate_size, a.mlp_bias, a.activation)
    return PlainMLP(a.hidden_size, a.intermediate_size, a.mlp_bias, a.activation)


def make_rotary(architecture: ModelArchitecture, kind: LayerKind) -> Rotary:
    """The rotation of layers of one kind."""
    a = architecture
    if not kind.has_rope or a.learned_positions:
        return Rotary(a.head_dim, a.rope_theta, a.max_position, rotary_dim=0)
    rotary_dim = a.rotary_dim or a.head_dim
    if kind.rope_theta is not None:
        return Rotary(a.head_dim, kind.rope_theta, a.max_position, rotary_dim)
    return Rotary(a.head_dim, a.rope_theta, a.max_position, rotary_dim, a.rope_scaling)


class DecoderModel(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, architecture: ModelArchitecture) -> None:
        super().__init__()
        a = architecture
        self.embed_tokens = Embedding(a.vocab_size, a.hidden_size, a.embedding_scale)
        self.embed_positions = Embedding(a.max_position, a.hidden_size) if a.learned_positions else None
        # Shared, as a step works out its cosines and sines once for each.
        rotaries = {(kind.has_rope, kind.rope_theta): make_rotary(a, kind) for kind in a.layer_kinds}
        self.layers = nn.ModuleList(
            DecoderLayer(a, kind, rotaries[kind.has_rope, kind.rope_theta]) for kind in a.layers
        )
        self.norm = make_norm(a)

    def forward(self, input_ids: Tensor, positions: Tensor, step: AttentionStep, kv_caches: list[Tensor]) -> Tensor:
        """[N] -> [N, hidden]. The residual stream is one tensor, added to in place."""
        residual = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            residual += self.embed_positions(positions)
        branch: Tensor | None = None
        for module, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer = cast(DecoderLayer, module)
            norm = layer.input_layernorm
            x = norm(residual) if branch is None else norm.add_norm(branch, residual)
            branch = layer(x, residual, step, kv_cache)
        assert branch is not None
        return self.norm.add_norm(branch, residual)


class DecoderForCausalLM(nn.Module):
    """The model with its head; see `models.base.CausalLM`."""

    def __init__(self, architecture: ModelArchitecture, attention: AttentionBackend) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention = attention
        self.model = DecoderModel(architecture)
        self.lm_head = Linear(architecture.hidden_size, architecture.vocab_size)
        if architecture.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, metadata: AttentionMetadata, kv_caches: list[Tensor]) -> Tensor:
        """[N] int64 -> [N, hidden]; stores keys and values in `kv_caches`."""
        step = self.attention.begin(metadata, kv_caches[0])
        return self.model(input_ids, metadata.positions, step, kv_caches)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, V] in the model's dtype."""
        logits = self.lm_head(hidden)
        soft_cap = self.architecture.logit_soft_cap
        return logits if soft_cap == 0.0 else logits.div_(soft_cap).tanh_().mul_(soft_cap)
