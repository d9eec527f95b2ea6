"""GGUF architectures in Hugging Face's words: config.json, tensor names, and how each tensor is stored otherwise.

So a family is read in one place (`families.py`), whichever file it comes from; what is refused there is refused here.
Knows the keys and names that llama.cpp's converters write. Torch-free. Any thread.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.weights.gguf_header import GGUFHeader

T = TypeVar("T", int, float, str, bool)

# Keys below the architecture's name -> config.json, each an int or a float.
KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
EPSILON = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
FLOATS = frozenset({"rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq",
                    "attn_logit_softcapping", "final_logit_softcapping"})  # fmt: skip

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
BRANCH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
GPT2_GLOBAL_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_BLOCK_NAMES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# Tensors that are facts, not weights: they become config.json's rope scaling.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class GGUFFamily(msgspec.Struct, frozen=True, kw_only=True):
    """What one GGUF architecture is called and how it differs."""

    hugging_face: str  # the class that config.json names
    settings: Mapping[str, Any] = {}  # of config.json, which the architecture's name implies
    keys: Mapping[str, str] = msgspec.field(default_factory=lambda: KEYS | EPSILON)
    optional_keys: Mapping[str, str] = msgspec.field(default_factory=lambda: OPTIONAL_KEYS)
    global_names: Mapping[str, str] = msgspec.field(default_factory=lambda: GLOBAL_NAMES)
    block_names: Mapping[str, str] = msgspec.field(default_factory=lambda: BLOCK_NAMES)
    block_prefix: str = "model.layers."
    interleaved: bool = False  # rows of q and k are in the order x0 y0 x1 y1 …, not in halves
    norm_plus_one: bool = False  # norms are stored with the 1 that Hugging Face's code adds
    transposed: tuple[str, ...] = ()  # matrices that Hugging Face stores the other way round
    adjust: Callable[[dict[str, Any]], None] = lambda config: None  # what takes more than a rename


def _gemma_scale(config: dict[str, Any], num_layers_of_27b: int) -> None:
    """The scale of scores is not in the file: the largest model has another one, and is known by its layers."""
    is_27b = config["num_hidden_layers"] == num_layers_of_27b
    by_hidden = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = by_hidden if is_27b else config["head_dim"]


GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

GGUF_FAMILIES = {
    "llama": GGUFFamily(hugging_face="LlamaForCausalLM", interleaved=True),
    "smollm3": GGUFFamily(hugging_face="SmolLM3ForCausalLM", interleaved=True, settings={"no_rope_layer_interval": 4}),
    "qwen2": GGUFFamily(hugging_face="Qwen2ForCausalLM"),
    "qwen3": GGUFFamily(hugging_face="Qwen3ForCausalLM", block_names=BLOCK_NAMES | QK_NORMS),
    "qwen3moe": GGUFFamily(
        hugging_face="Qwen3MoeForCausalLM",
        block_names=BLOCK_NAMES | QK_NORMS | EXPERTS,
        keys=KEYS
        | EPSILON
        | {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        settings={"norm_topk_prob": True, "decoder_sparse_step": 1},
    ),
    "gemma": GGUFFamily(hugging_face="GemmaForCausalLM", settings=GEMMA, norm_plus_one=True),
    "gemma2": GGUFFamily(
        hugging_face="Gemma2ForCausalLM",
        settings=GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        optional_keys=OPTIONAL_KEYS | WINDOW | CAPS,
        block_names=BLOCK_NAMES | BRANCH_NORMS,
        norm_plus_one=True,
        adjust=partial(_gemma_scale, num_layers_of_27b=46),
    ),
    "gemma3": GGUFFamily(
        hugging_face="Gemma3ForCausalLM",
        settings=GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        keys=KEYS | EPSILON | WINDOW,
        optional_keys=OPTIONAL_KEYS | CAPS | {"rope.freq_base_swa": "rope_local_base_freq"},
        block_names=BLOCK_NAMES | QK_NORMS | BRANCH_NORMS,
        norm_plus_one=True,
        adjust=partial(_gemma_scale, num_layers_of_27b=62),
    ),
    "phi3": GGUFFamily(
        hugging_face="Phi3ForCausalLM", optional_keys=OPTIONAL_KEYS | WINDOW, block_names=BLOCK_NAMES | FUSED
    ),
    "gpt2": GGUFFamily(
        hugging_face="GPT2LMHeadModel",
        keys={
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "context_length": "n_positions",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        optional_keys={},
        global_names=GPT2_GLOBAL_NAMES,
        block_names=GPT2_BLOCK_NAMES,
        block_prefix="transformer.h.",
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
}


def family_of(path: Path, header: GGUFHeader) -> GGUFFamily:
    """The table's row. Raises StartupError that names those there are."""
    name = value(path, header.metadata, "general.architecture", str)
    if name not in GGUF_FAMILIES:
        served = ", ".join(GGUF_FAMILIES)
        raise StartupError(f"{path}: GGUF architecture {show(name)} is not served; served: {served}")
    return GGUF_FAMILIES[name]


def hugging_face_config(
    path: Path, header: GGUFHeader, read_floats: Callable[[str], tuple[float, ...]]
) -> dict[str, Any]:
    """What config.json would say of this file; `read_floats` gives the values of a small float tensor.

    Raises StartupError for keys that are missing or of a wrong type.
    """
    metadata, family = header.metadata, family_of(path, header)
    prefix = str(metadata["general.architecture"])
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise StartupError(f"{path}: tensor token_embd.weight is missing")
    config: dict[str, Any] = {
        "architectures": [family.hugging_face],
        "vocab_size": shapes["token_embd.weight"][0],  # the only figure that every writer agrees on
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        **family.settings,
    }
    for key, ours in family.keys.items():
        config[ours] = value(path, metadata, f"{prefix}.{key}", float if ours in FLOATS else int)
    for key, ours in family.optional_keys.items():
        if f"{prefix}.{key}" in metadata:
            config[ours] = value(path, metadata, f"{prefix}.{key}", float if ours in FLOATS else int)
    _complete_heads(path, config, metadata.get(f"{prefix}.rope.dimension_count"))
    if (scaling := _rope_scaling(path, prefix, header, shapes.keys(), config, read_floats)) is not None:
        config["rope_scaling"] = scaling
    family.adjust(config)
    return config


def _complete_heads(path: Path, config: dict[str, Any], rotary_dim: object) -> None:
    """head_dim where the file leaves it out, and the part of it that turns."""
    hidden_size = config.get("hidden_size", config.get("n_embd", 0))
    num_heads = config.get("num_attention_heads", config.get("n_head", 0))
    if hidden_size < 1 or num_heads < 1:
        raise StartupError(f"{path}: embedding_length {hidden_size} with head_count {num_heads} makes no model")
    head_dim = config.setdefault("head_dim", hidden_size // num_heads)
    if rotary_dim is not None and rotary_dim != head_dim:
        if not isinstance(rotary_dim, int) or not 0 < rotary_dim < head_dim:
            raise StartupError(f"{path}: rope over {show(rotary_dim)} of {head_dim} dimensions makes no model")
        # Half a dimension more, which its reader cuts off again: 49 * (1 / 49) is below 1.
        config["partial_rotary_factor"] = (rotary_dim + 0.5) / head_dim


def _rope_scaling(
    path: Path,
    prefix: str,
    header: GGUFHeader,
    tensors: Any,
    config: dict[str, Any],
    read_floats: Callable[[str], tuple[float, ...]],
) -> dict[str, Any] | None:
    """config.json's table, from keys and from tensors of factors; None where nothing is scaled."""
    metadata, key = header.metadata, f"{prefix}.rope.scaling."
    context = config.get("max_position_embeddings", 0)
    original = value(path, metadata, f"{key}original_context_length", int, context)
    attention_factor = value(path, metadata, f"{key}attn_factor", float, 0.0)
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        return {
            "rope_type": "longrope",
            "short_factor": read_floats("rope_factors_short.weight"),
            "long_factor": read_floats("rope_factors_long.weight"),
            "factor": context / original,
            "original_max_position_embeddings": original,
        } | ({"attention_factor": attention_factor} if attention_factor else {})
    if "rope_freqs.weight" in tensors:
        # Llama 3's scaling worked out by the converter: what each frequency is divided by, at any length.
        factors = read_floats("rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }
    kind = value(path, metadata, f"{key}type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": value(path, metadata, f"{key}factor", float, 1.0)}
    if kind == "linear" and scaling["factor"] == 1.0:
        return None
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"{key}yarn_{name}" in metadata:
                scaling[name] = value(path, metadata, f"{key}yarn_{name}", float)
    return scaling


def hugging_face_name(path: Path, family: GGUFFamily, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    known = family.block_names.get(block[2]) if block else family.global_names.get(stem)
    if known is None or suffix not in ("weight", "bias"):
        raise StartupError(f"{path}: unexpected tensor {show(name)} for {family.hugging_face}")
    return f"{family.block_prefix}{block[1]}.{known}.{suffix}" if block else f"{known}.{suffix}"


def value(path: Path, metadata: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """A metadata value of one type; StartupError where it is missing or of another type."""
    found = metadata.get(key, default)
    if found is None:
        raise StartupError(f"{path}: GGUF key {key} is missing")
    if not isinstance(found, kind) or isinstance(found, bool) is not (kind is bool):
        raise StartupError(f"{path}: GGUF key {key} = {show(found)}: expected {kind.__name__}")
    return found
