"""Tiny random Llamas and their kin, written to disk the way the real ones come."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from perf.gguf_file import add_vocabulary, write_and_close

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Family -> the prefix of transformers' classes.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "phi3": "Phi3",
    "starcoder2": "Starcoder2",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "opt": "OPT",
    "gpt2": "GPT2",
}
CLASSES = {"gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}
# Settings of the tiny model where a family's own are not tiny, or not there.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "smollm3": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 20, "attn_implementation": "eager"},
    "gemma3": {"head_dim": 12, "query_pre_attn_scalar": 20},
    "qwen3_moe": {"head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.3, "dropout": 0.0},
}


def llama(seed: int = 0, family: str = "llama", **overrides: Any) -> Any:
    """A float32 reference model whose logits are far enough apart for greedy decoding to be stable."""
    torch.manual_seed(seed)
    prefix = FAMILIES[family]
    config_name, model_name = CLASSES.get(family, (f"{prefix}Config", f"{prefix}ForCausalLM"))
    settings = {**TINY, "initializer_range": 0.3, **FAMILY_SETTINGS.get(family, {}), **overrides}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).eval()
    norm_mean = 0.0 if family.startswith("gemma") else 1.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or ".ln_" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else norm_mean, std=0.3)
    return model


def save_llama(directory: Path, seed: int = 0, shard_size: str = "1GB", **overrides: Any) -> LlamaForCausalLM:
    """Write a model directory with weights, configuration and tokenizer; return the model that was written."""
    model = llama(seed, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        model.save_pretrained(directory, max_shard_size=shard_size)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    return model


def tiny_tokenizer() -> Tokenizer:
    """Bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(tensor: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Rows of q or k as GGUF stores them: the two halves of each head interleaved."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def save_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
) -> dict[str, numpy.ndarray]:
    """Write a model as GGUF, matrices as `kind`; return what gguf itself reads back, by Hugging Face name."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **(extra or {}),
    }
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_vocabulary(writer, tiny_tokenizer())
    for key, value in values.items():
        if key not in leave_out:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    expected = {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.removeprefix("model.layers.").partition(".") if stem.startswith("model.layers.") else None
        gguf_name = f"blk.{layer[0]}.{GGUF_NAMES[layer[2]]}" if layer else GGUF_NAMES[stem]
        num_heads = heads.get(stem.rpartition(".")[2])
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name in leave_out:
            continue
        data = parameter.numpy() if num_heads is None else permute(parameter.numpy(), num_heads)
        tensor_kind = kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(data, tensor_kind)
        writer.add_tensor(f"{gguf_name}.{suffix}", stored, raw_dtype=tensor_kind)
        read = gguf.quants.dequantize(stored, tensor_kind)
        if num_heads is not None:
            pairs = read.reshape(num_heads, -1, 2, *read.shape[1:]).swapaxes(1, 2)
            read = pairs.reshape(read.shape)
        expected[name] = read
    write_and_close(writer)
    return expected
