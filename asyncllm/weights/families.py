"""config.json of each family served -> `ModelArchitecture`.

Knows the keys of config.json, those of transformers 5 and older ones, and transformers' defaults where it leaves keys
out. A value that changes what a model computes is either served or refused by name: ignoring it would answer wrongly
in silence. Torch-free. Any thread.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.models.config import Experts, LayerKind, ModelArchitecture
from asyncllm.weights.rope import positive, rope_facts

Raw = dict[str, Any]
Size = Annotated[int, msgspec.Meta(ge=1)]
NumLayers = Annotated[int, msgspec.Meta(ge=1, le=1000)]  # facts are worked out for each: a damaged file must not hang
Positive = Annotated[float, msgspec.Meta(gt=0)]

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


class _Config(msgspec.Struct):
    """What is used of config.json by decoders with rotary positions, whichever of them have it."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: NumLayers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    max_position_embeddings: Size = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    torch_dtype: str | None = None
    dtype: str | None = None  # since transformers 5

    rope_theta: Positive | None = None
    rope_scaling: Raw | None = None
    rope_parameters: Raw | None = None  # since transformers 5: holds rope_theta as well
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    no_rope_layers: list[int] | None = None  # SmolLM3: 1 for layers that do have rope
    no_rope_layer_interval: Size = 4

    sliding_window: Annotated[int, msgspec.Meta(ge=0)] | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28  # Qwen: layers below it have no window
    layer_types: list[str] | None = None

    norm_epsilon: Positive = 1e-5  # StarCoder 2
    use_bias: bool = True

    hidden_activation: str | None = None  # Gemma, from here on
    query_pre_attn_scalar: Positive = 256.0
    attn_logit_softcapping: Annotated[float, msgspec.Meta(ge=0)] | None = None
    final_logit_softcapping: Annotated[float, msgspec.Meta(ge=0)] | None = None
    rope_local_base_freq: Positive = 10000.0
    sliding_window_pattern: Size = 6
    use_bidirectional_attention: bool | None = None


def read_architecture(file: Path, raw: Raw) -> ModelArchitecture:
    """The facts in `raw`, which was read from `file`. Raises StartupError naming the file and what would be served."""
    listed = raw.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    read = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if read is None:
        found = ", ".join(names) or str(raw.get("model_type"))
        raise StartupError(f"{file}: architecture {show(found)} is not served; served: {', '.join(FAMILIES)}")
    try:
        return read(raw)
    except (msgspec.ValidationError, StartupError) as error:
        raise StartupError(f"{file}: {error}") from None


def llama(raw: Raw) -> ModelArchitecture:
    """Llama 1, 2 and 3, SmolLM 1 and 2, and the many models that took over their code."""
    c = msgspec.convert(raw, _Config)
    return _decoder(c, "llama", attention_bias=c.attention_bias, mlp_bias=c.mlp_bias)


def mistral(raw: Raw) -> ModelArchitecture:
    """Llama with one window for all layers."""
    c = msgspec.convert({"sliding_window": 4096} | raw, _Config)
    return _decoder(c, "mistral", layer_kinds=(LayerKind(window=c.sliding_window or 0),))


def smollm3(raw: Raw) -> ModelArchitecture:
    """Llama with layers that know no positions: every fourth, or as `no_rope_layers` says."""
    c = msgspec.convert({"tie_word_embeddings": True, "rope_theta": 2000000.0} | raw, _Config)
    interval, num_layers = c.no_rope_layer_interval, c.num_hidden_layers
    has_rope = c.no_rope_layers or [layer % interval for layer in range(1, num_layers + 1)]
    if len(has_rope) < num_layers:
        raise StartupError(f"no_rope_layers has {len(has_rope)} entries for {num_layers} layers")
    windows = _windows(c, (not rope for rope in has_rope)) if c.use_sliding_window else [0] * num_layers
    kinds = tuple(LayerKind(window=window, has_rope=rope != 0) for window, rope in zip(windows, has_rope))
    return _decoder(c, "smollm3", layer_kinds=kinds, attention_bias=c.attention_bias, mlp_bias=c.mlp_bias)


def qwen2(raw: Raw) -> ModelArchitecture:
    """Qwen 2 and 2.5: Llama with biases in the first three projections, and perhaps windows in later layers."""
    c = msgspec.convert(raw, _Config)
    return _decoder(c, "qwen2", qkv_bias=True, layer_kinds=_late_windows(c))


def qwen3(raw: Raw) -> ModelArchitecture:
    """Qwen 2 with norms of query and key heads instead of biases."""
    c = msgspec.convert({"head_dim": 128} | raw, _Config)
    return _decoder(c, "qwen3", qk_norm=True, attention_bias=c.attention_bias, layer_kinds=_late_windows(c))


def phi3(raw: Raw) -> ModelArchitecture:
    """Phi 3 to 4: Llama with one window for all layers, long and perhaps partial rope; tensors come stacked."""
    c = msgspec.convert({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | raw, _Config)
    if (c.rope_scaling or {}).get("type") in ("su", "yarn"):  # early names of what became longrope
        c.rope_scaling = {**(c.rope_scaling or {}), "type": "longrope"}
    return _decoder(c, "phi3", layer_kinds=(LayerKind(window=c.sliding_window or 0),))


def starcoder2(raw: Raw) -> ModelArchitecture:
    """Llama with layer norms, biases everywhere and a plain MLP."""
    c = msgspec.convert({"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True} | raw, _Config)
    return _decoder(
        c,
        "starcoder2",
        layer_kinds=(LayerKind(window=c.sliding_window or 0),),
        attention_bias=c.use_bias,
        mlp_bias=c.use_bias,
        gated_mlp=False,
        layer_norm=True,
        norm_eps=c.norm_epsilon,
    )


class _Experts(msgspec.Struct):
    """What Qwen3-MoE adds, with its own defaults."""

    num_experts: Size = 128
    num_local_experts: Size | None = None  # the same, since transformers 5
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] | None = None


def qwen3_moe(raw: Raw) -> ModelArchitecture:
    """Qwen 3 with experts in all layers, or in every nth but for some."""
    c, e = msgspec.convert({"head_dim": 128} | raw, _Config), msgspec.convert(raw, _Experts)
    num_experts = e.num_local_experts or e.num_experts
    if c.use_sliding_window:
        raise StartupError("use_sliding_window = true is not served with experts")
    if e.num_experts_per_tok > num_experts:
        raise StartupError(f"num_experts_per_tok = {e.num_experts_per_tok} of {num_experts} experts makes no model")
    kinds = tuple(
        LayerKind(has_experts=layer not in (e.mlp_only_layers or ()) and (layer + 1) % e.decoder_sparse_step == 0)
        for layer in range(c.num_hidden_layers)
    )
    experts = Experts(
        num_experts=num_experts,
        num_experts_per_token=e.num_experts_per_tok,
        intermediate_size=e.moe_intermediate_size,
        norm_topk_prob=e.norm_topk_prob,
    )
    facts = {"qk_norm": True, "attention_bias": c.attention_bias}
    return _decoder(c, "qwen3_moe", layer_kinds=kinds, experts=experts, **facts)


def gemma(raw: Raw) -> ModelArchitecture:
    """Llama with a gelu, norm weights around 1 and a scaled embedding."""
    c = _gemma_config(raw)
    return _decoder(c, "gemma", **_gemma_facts(c))


def gemma2(raw: Raw) -> ModelArchitecture:
    """Gemma with norms around both branches, soft caps, and a window in every other layer."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    c = _gemma_config(caps | raw)
    windows = _windows(c, (layer % 2 == 0 for layer in range(c.num_hidden_layers)))
    return _decoder(
        c,
        "gemma2",
        layer_kinds=tuple(LayerKind(window=window) for window in windows),
        attention_soft_cap=c.attn_logit_softcapping or 0.0,
        **_gemma2_facts(c),
    )


def gemma3(raw: Raw) -> ModelArchitecture:
    """Gemma 2 with norms of heads instead of soft caps; five layers of six have a window and a rope of their own."""
    sizes = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    defaults = {**sizes, "max_position_embeddings": 131072, "rope_theta": 1000000.0}
    c = _gemma_config(defaults | raw)
    if c.attn_logit_softcapping:
        raise StartupError(f"attn_logit_softcapping = {c.attn_logit_softcapping} is not served for Gemma 3")
    local_theta = c.rope_local_base_freq
    if c.rope_parameters and not c.rope_parameters.keys().isdisjoint((FULL, SLIDING)):
        local = msgspec.convert(c.rope_parameters.get(SLIDING) or {}, Raw)
        if local.get("rope_type", "default") != "default":
            raise StartupError(f"rope scaling of {SLIDING} is not served")
        local_theta = positive("rope_theta", local.get("rope_theta", local_theta))
        c.rope_parameters = msgspec.convert(c.rope_parameters.get(FULL) or {}, Raw)
    pattern = c.sliding_window_pattern
    windows = _windows(c, (layer % pattern != 0 for layer in range(1, c.num_hidden_layers + 1)))
    kinds = tuple(LayerKind(window=window, rope_theta=local_theta if window else None) for window in windows)
    return _decoder(c, "gemma3", layer_kinds=kinds, qk_norm=True, **_gemma2_facts(c))


def gemma3_multimodal(raw: Raw) -> ModelArchitecture:
    """The text part of a Gemma 3 that also sees; its other tensors are left in the file."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise StartupError("text_config is missing")
    outer: Raw = {key: raw[key] for key in ("torch_dtype", "dtype", "tie_word_embeddings") if key in raw}
    return gemma3(outer | text)


class _OPT(msgspec.Struct):
    """What is used of OPT's config.json, with transformers' defaults."""

    vocab_size: Size
    hidden_size: Size
    ffn_dim: Size
    num_hidden_layers: NumLayers
    num_attention_heads: Size
    max_position_embeddings: Size = 2048
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    word_embed_proj_dim: int | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = msgspec.field(default=False, name="_remove_final_layer_norm")
    tie_word_embeddings: bool = True
    torch_dtype: str | None = None
    dtype: str | None = None


def opt(raw: Raw) -> ModelArchitecture:
    """OPT (https://arxiv.org/abs/2205.01068): learned positions, layer norms, a plain MLP."""
    c = msgspec.convert(raw, _OPT)
    if not c.do_layer_norm_before or not c.layer_norm_elementwise_affine or c.remove_final_layer_norm:
        raise StartupError("layer norms behind the branches, without weights or without the last are not served (OPT)")
    if c.word_embed_proj_dim not in (None, c.hidden_size):
        raise StartupError(f"word_embed_proj_dim = {c.word_embed_proj_dim} is not served; served: hidden_size")
    return _learned(
        "opt",
        (c.vocab_size, c.hidden_size, c.ffn_dim, c.num_hidden_layers, c.num_attention_heads),
        max_position=c.max_position_embeddings,
        rms_norm_eps=1e-5,
        activation=_activation("activation_function", c.activation_function),
        tie_word_embeddings=c.tie_word_embeddings,
        attention_bias=c.enable_bias,
        mlp_bias=c.enable_bias,
        dtype=_dtype(c.dtype or c.torch_dtype),
    )


class _GPT2(msgspec.Struct):
    """What is used of GPT-2's config.json, with transformers' defaults."""

    vocab_size: Size = 50257
    n_embd: Size = 768
    n_inner: Size | None = None
    n_layer: NumLayers = 12
    n_head: Size = 12
    n_positions: Size = 1024
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    torch_dtype: str | None = None
    dtype: str | None = None


def gpt2(raw: Raw) -> ModelArchitecture:
    """GPT-2: as OPT with a gelu; its matrices are stored transposed."""
    c = msgspec.convert(raw, _GPT2)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(c, key):
            raise StartupError(f"{key} = true is not served")
    return _learned(
        "gpt2",
        (c.vocab_size, c.n_embd, c.n_inner or 4 * c.n_embd, c.n_layer, c.n_head),
        max_position=c.n_positions,
        rms_norm_eps=c.layer_norm_epsilon,
        activation=_activation("activation_function", c.activation_function),
        tie_word_embeddings=c.tie_word_embeddings,
        attention_bias=True,
        attention_scale=0.0 if c.scale_attn_weights else 1.0,
        mlp_bias=True,
        dtype=_dtype(c.dtype or c.torch_dtype),
    )


FAMILIES: dict[str, Callable[[Raw], ModelArchitecture]] = {  # by an entry of "architectures"
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "SmolLM3ForCausalLM": smollm3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Phi3ForCausalLM": phi3,
    "Starcoder2ForCausalLM": starcoder2,
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3_multimodal,
    "OPTForCausalLM": opt,
    "GPT2LMHeadModel": gpt2,
}


def _gemma_config(raw: Raw) -> _Config:
    defaults: Raw = {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu"}
    c = msgspec.convert({**defaults, "max_position_embeddings": 8192, "sliding_window": 4096} | raw, _Config)
    # The first release said gelu and meant its tanh form. Where both keys are there, the later one is right.
    activation = c.hidden_activation or c.hidden_act
    c.hidden_act = "gelu_pytorch_tanh" if activation == "gelu" else activation
    if c.use_bidirectional_attention:
        raise StartupError("use_bidirectional_attention = true is not served: such a model generates no text")
    return c


def _gemma_facts(c: _Config) -> Raw:
    return {"embedding_scale": c.hidden_size**0.5, "norm_plus_one": True, "attention_bias": c.attention_bias}


def _gemma2_facts(c: _Config) -> Raw:
    return _gemma_facts(c) | {
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "logit_soft_cap": c.final_logit_softcapping or 0.0,
        "branch_norms": True,
    }


def _windows(c: _Config, slides: Iterable[bool]) -> list[int]:
    """The window of each layer, 0 for none: as `layer_types` says, or else where `slides` does."""
    if c.layer_types is not None:
        unknown = [name for name in c.layer_types if name not in (FULL, SLIDING)]
        if unknown:
            raise StartupError(f"layer_types: {show(unknown[0])} is not served; served: {FULL}, {SLIDING}")
        if len(c.layer_types) != c.num_hidden_layers:
            raise StartupError(f"layer_types has {len(c.layer_types)} entries for {c.num_hidden_layers} layers")
        slides = [name == SLIDING for name in c.layer_types]
    return [(c.sliding_window or 0) if slide else 0 for slide in slides]


def _late_windows(c: _Config) -> tuple[LayerKind, ...]:
    """Qwen's: none unless switched on, and then from one layer on."""
    if not c.use_sliding_window:
        return (LayerKind(),)
    windows = _windows(c, (layer >= c.max_window_layers for layer in range(c.num_hidden_layers)))
    return tuple(LayerKind(window=window) for window in windows)


def _decoder(c: _Config, family: str, norm_eps: float | None = None, **facts: Any) -> ModelArchitecture:
    """What all rotary decoders have in common, and `facts` beside it."""
    num_kv_heads = c.num_key_value_heads or c.num_attention_heads
    if c.num_attention_heads % num_kv_heads:
        raise StartupError(f"{c.num_attention_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
    rope = rope_facts(
        c.rope_scaling or c.rope_parameters or {},
        theta=c.rope_theta or 10000.0,
        head_dim=head_dim,
        partial=c.partial_rotary_factor,
        max_position=c.max_position_embeddings,
        original=c.original_max_position_embeddings,
    )
    return ModelArchitecture(
        family=family,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=norm_eps or c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        activation=_activation("hidden_act", c.hidden_act),
        dtype=_dtype(c.dtype or c.torch_dtype),
        **rope,
        **facts,
    )


def _learned(family: str, sizes: tuple[int, int, int, int, int], **facts: Any) -> ModelArchitecture:
    """A decoder with learned positions, layer norms and a plain MLP."""
    vocab_size, hidden_size, intermediate_size, num_layers, num_heads = sizes
    if hidden_size % num_heads:
        raise StartupError(f"a hidden size of {hidden_size} cannot be cut into {num_heads} heads")
    return ModelArchitecture(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        rope_theta=10000.0,
        learned_positions=True,
        layer_norm=True,
        gated_mlp=False,
        **facts,
    )


def _activation(key: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise StartupError(f"{key} {show(name)} is not served; served: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _dtype(name: str | None) -> str:
    if name is None:
        return "float32"
    if name not in DTYPES:
        raise StartupError(f"dtype {show(name)} is not served; served: {', '.join(DTYPES)}")
    return name
