"""The models a run builds from random weights: their shapes, and directories that a server can open.

Knows config.json and tokenizer.json; holds no weights. Torch-free.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncllm.models.config import Experts, LayerKind, ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.dummy import DummyCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_TOKEN = "<|end|>"
NUM_BYTES = 256

QWEN3_06B = ModelArchitecture(
    family="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position=40960,
    tie_word_embeddings=True,
    qk_norm=True,
)
LLAMA_32_1B = ModelArchitecture(
    family="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position=131072,
    tie_word_embeddings=True,
)
LLAMA_31_8B = msgspec.structs.replace(
    LLAMA_32_1B,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    head_dim=128,
    tie_word_embeddings=False,
)
QWEN3_30B_EXPERTS = Experts(num_experts=128, num_experts_per_token=8, intermediate_size=768, norm_topk_prob=True)
# Four of Qwen3-30B-A3B's layers, and a vocabulary in proportion.
QWEN3_30B_PART = msgspec.structs.replace(
    QWEN3_06B,
    family="qwen3_moe",
    vocab_size=16384,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=4,
    num_heads=32,
    num_kv_heads=4,
    layer_kinds=(LayerKind(has_experts=True),),
    experts=QWEN3_30B_EXPERTS,
)
ARCHITECTURES = {
    "qwen3-0.6b": QWEN3_06B,
    "llama-3.2-1b": LLAMA_32_1B,
    "llama-3.1-8b": LLAMA_31_8B,
    "qwen3-30b-a3b-part": QWEN3_30B_PART,
}
MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
TINY_EXPERTS = Experts(num_experts=5, num_experts_per_token=2, intermediate_size=24, norm_topk_prob=True)


def experts(tiny: bool = False) -> tuple[int, Experts]:
    """Hidden size and experts of a layer of Qwen3-30B-A3B, or of one that a CPU computes in milliseconds."""
    return (40, TINY_EXPERTS) if tiny else (QWEN3_30B_PART.hidden_size, QWEN3_30B_EXPERTS)


def architecture(name: str, tiny: bool = False) -> ModelArchitecture:
    """A model of the table, or one of the same family that a CPU computes in milliseconds."""
    real = ARCHITECTURES[name]
    if not tiny:
        return real
    return msgspec.structs.replace(
        real,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        max_position=512,
        experts=real.experts and msgspec.structs.replace(TINY_EXPERTS, intermediate_size=32),
        dtype="float32",
    )


def checkpoint(name: str, shapes: ModelArchitecture) -> DummyCheckpoint:
    """Random weights without a directory; nothing here needs text, so the tokenizer is made only if asked for."""
    return DummyCheckpoint(name, shapes, TextFacts(), lambda: synthetic_tokenizer(shapes.vocab_size))


def hugging_face_config(shapes: ModelArchitecture) -> dict[str, Any]:
    """The architecture in the words of config.json."""
    experts = (
        {}
        if shapes.experts is None
        else {
            "num_experts": shapes.experts.num_experts,
            "num_experts_per_tok": shapes.experts.num_experts_per_token,
            "moe_intermediate_size": shapes.experts.intermediate_size,
            "norm_topk_prob": shapes.experts.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    )
    return {
        "architectures": [MODEL_TYPES[shapes.family]],
        "model_type": shapes.family,
        "vocab_size": shapes.vocab_size,
        "hidden_size": shapes.hidden_size,
        "intermediate_size": shapes.intermediate_size,
        "num_hidden_layers": shapes.num_layers,
        "num_attention_heads": shapes.num_heads,
        "num_key_value_heads": shapes.num_kv_heads,
        "head_dim": shapes.head_dim,
        "rms_norm_eps": shapes.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shapes.rope_theta},
        "max_position_embeddings": shapes.max_position,
        "tie_word_embeddings": shapes.tie_word_embeddings,
        "attention_bias": shapes.attention_bias,
        "hidden_act": "silu",
        "dtype": shapes.dtype,
        "eos_token_id": NUM_BYTES,
        **experts,
    }


def write_directory(directory: Path, shapes: ModelArchitecture) -> None:
    """All that a server needs beside weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hugging_face_config(shapes)))
    synthetic_tokenizer(shapes.vocab_size).save(str(directory / "tokenizer.json"))


def synthetic_tokenizer(vocab_size: int) -> "Tokenizer":
    """Bytes, an end token, and made-up words up to `vocab_size`, so that every id has a text of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_TOKEN]
    # Ġ is a leading space: answers look like words, and cost what text costs to write.
    tokens += [f"Ġw{index}" for index in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer
