"""Tiny models written as GGUF the way llama.cpp's converter does: names by the gguf package, its own quirks by hand."""

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import MODEL_ARCH

from perf.gguf_file import add_sizes, add_vocabulary, write_and_close
from tests.weights.tiny import permute, tiny_tokenizer

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "gpt2": MODEL_ARCH.GPT2,
}
INTERLEAVED = ("llama", "smollm3")  # whose rope llama.cpp computes over neighbouring dimensions


def write_converted(path: Path, family: str, model: Any, writer_type: type[gguf.GGUFWriter] = gguf.GGUFWriter) -> None:
    """The model in float32 with the tiny tokenizer."""
    architecture = ARCHITECTURES[family]
    writer = writer_type(path, gguf.MODEL_ARCH_NAMES[architecture])
    config = model.config
    if family == "gpt2":
        _gpt2_keys(writer, config)
    else:
        _keys(writer, family, config)
    add_vocabulary(writer, tiny_tokenizer())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in _tensors(family, model):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, numpy.ascontiguousarray(tensor.numpy()))
    for name, factors in _rope_factors(family, model).items():
        writer.add_tensor(name, numpy.asarray(factors, numpy.float32))
    write_and_close(writer)


def _keys(writer: gguf.GGUFWriter, family: str, config: Any) -> None:
    add_sizes(writer, config.to_dict())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if family == "phi3":
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    else:
        writer.add_key_length(head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        if rope["full_attention"]["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    elif family != "gemma":  # whose converter writes no base
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if family == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _gpt2_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_context_length(config.n_positions)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _tensors(family: str, model: Any) -> Any:
    """The weights as the converter stores them."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if family.startswith("gemma") and module.endswith("norm"):
            tensor = tensor + 1
        if family == "gpt2" and module.endswith(("c_attn", "c_proj", "c_fc")) and tensor.ndim == 2:
            tensor = tensor.T
        if family in INTERLEAVED and (num_heads := heads.get(module.rpartition(".")[2])):
            tensor = torch.from_numpy(permute(tensor.numpy(), num_heads))
        if name.endswith("experts.gate_up_proj"):  # transformers keeps all experts in one; so does GGUF, but not both
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
            continue
        if name.endswith("experts.down_proj"):
            name += ".weight"
        yield name, tensor


def _rope_factors(family: str, model: Any) -> dict[str, Any]:
    """What longrope lists, and what Llama 3's scaling divides each frequency by."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ("short", "long")}
    if rope.get("rope_type") == "llama3":
        dim = config.head_dim
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        return {"rope_freqs.weight": plain / model.model.rotary_emb.inv_freq}
    return {}
