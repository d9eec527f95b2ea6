"""Facts about an architecture, the same whichever file they came from. Torch-free.

A family is a set of values of these facts: `weights/families.py` reads them, `models/decoder.py` builds from them. What
a new family does otherwise becomes a fact here, with the default that leaves all others as they are.
"""

from itertools import cycle, islice

import msgspec

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """Stretches rotary positions over a context longer than that of pre-training; fields are those of config.json."""

    factor: float = 1.0


class LinearScaling(_Scaling, frozen=True, kw_only=True):
    """All frequencies divided by the factor."""


class DynamicScaling(_Scaling, frozen=True, kw_only=True):
    """NTK-aware: a larger base, as the context served goes beyond the original one."""

    original_max_position_embeddings: int


class Llama3Scaling(_Scaling, frozen=True, kw_only=True):
    """Long wavelengths divided by the factor, short ones kept, those between blended."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class YarnScaling(_Scaling, frozen=True, kw_only=True):
    """Like Llama3Scaling with a ramp over dimensions, and longer queries and keys (https://arxiv.org/abs/2309.00071)."""

    original_max_position_embeddings: int
    beta_fast: float | None = None  # 32
    beta_slow: float | None = None  # 1
    attention_factor: float | None = None  # from the factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class LongRopeScaling(_Scaling, frozen=True, kw_only=True):
    """A factor for each frequency, one list for contexts up to the original one and one for longer ones."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None  # from the factor


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


class LayerKind(msgspec.Struct, frozen=True, kw_only=True):
    """Facts in which layers of one model may differ."""

    window: int = 0  # keys a query sees, its own among them; 0: all of them
    has_rope: bool = True
    rope_theta: float | None = None  # a base of its own, unscaled; None: the model's, scaled as the model's
    has_experts: bool = False


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of gated MLPs, of which each token takes a few."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # whether the weights of a token's experts are scaled to add up to 1


class ModelArchitecture(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's code needs to build itself, mostly in the words of Hugging Face's config.json."""

    family: str  # "llama", … the key of the registry
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float  # or the layer norm's
    rope_theta: float
    max_position: int  # tokens the model was made for
    tie_word_embeddings: bool
    attention_bias: bool = False  # in all four projections
    qkv_bias: bool = False  # in all but the output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm over each query and key head, before the rotation
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)  # over and over until all layers have one
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0  # dimensions of a head that turn, its first; 0: all
    learned_positions: bool = False  # a vector per position added to the embedding; such models have no rope
    attention_scale: float = 0.0  # of scores; 0: 1 / sqrt(head_dim)
    attention_soft_cap: float = 0.0  # c in c·tanh(score / c); 0: none
    logit_soft_cap: float = 0.0
    embedding_scale: float = 1.0  # rounded to the model's dtype before it multiplies
    layer_norm: bool = False  # mean and bias too (https://arxiv.org/abs/1607.06450), instead of RMS norms
    norm_plus_one: bool = False  # stored norm weights are what is added to 1
    branch_norms: bool = False  # attention's and the MLP's results are normed again before they are added
    activation: str = "silu"  # silu, gelu_tanh, gelu, relu
    gated_mlp: bool = True
    experts: Experts | None = None  # of those layers whose kind says so
    dtype: str = "bfloat16"  # of the checkpoint: float32, bfloat16, float16; bfloat16 for quantized files

    @property
    def layers(self) -> list[LayerKind]:
        """The kind of each layer."""
        return list(islice(cycle(self.layer_kinds), self.num_layers))

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones counted once."""
        hidden, norm = self.hidden_size, self.hidden_size * (2 if self.layer_norm else 1)
        query_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (2 * query_rows + 2 * kv_rows)
        if self.attention_bias or self.qkv_bias:
            attention += query_rows + 2 * kv_rows + (hidden if self.attention_bias else 0)
        if self.qk_norm:
            attention += 2 * self.head_dim
        layers = self.num_layers * (attention + norm * (4 if self.branch_norms else 2))
        layers += sum(self._num_mlp_parameters(kind) for kind in self.layers)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + norm + (self.max_position * hidden if self.learned_positions else 0)

    def _num_mlp_parameters(self, kind: LayerKind) -> int:
        if kind.has_experts and self.experts is not None:
            expert = 3 * self.hidden_size * self.experts.intermediate_size
            return self.experts.num_experts * (expert + self.hidden_size)  # and the router's row
        num_inner = (2 if self.gated_mlp else 1) * self.intermediate_size  # gate and up
        biases = num_inner + self.hidden_size if self.mlp_bias else 0
        return (num_inner + self.intermediate_size) * self.hidden_size + biases

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token needs over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value
