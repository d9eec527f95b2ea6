"""Random weights in a model's shape as GGUF files, the same numbers in each kind. Knows the `gguf` package."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncllm.models.config import ModelArchitecture
from perf.checkpoint import default_directory
from perf.gguf_file import add_sizes, add_vocabulary, write_and_close
from perf.gpu_check.models import NUM_BYTES, hugging_face_config, synthetic_tokenizer

KINDS = ("bf16", "q4_0", "q4_1")  # of a file's matrices
STD = 0.02  # as models are initialised for training: activations neither vanish nor overflow
ROUTER = "ffn_gate_inp"  # which converters leave in float32
MERGED = "ĠĠ"  # the writer leaves out an empty list of merges, and llama.cpp wants one


def shape_file(name: str, shapes: ModelArchitecture, kind: str) -> Path:
    """The GGUF file of a shape, written once into the user's cache."""
    target = default_directory(Path(name)).with_name(f"{name}-random-{kind}.gguf")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        write_random(partial, shapes, kind)
        partial.rename(target)  # one that was interrupted must not be taken for a model next time
    return target


def write_random(target: Path, shapes: ModelArchitecture, kind: str) -> None:
    """Matrices normal with deviation STD, rounded to `kind`; norms are ones, in float32. A seed per tensor."""
    import gguf
    import numpy

    wanted = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(target, shapes.family.replace("_", ""))
    file_types = {"bf16": "MOSTLY_BF16", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    _write_facts(writer, shapes)
    for name, shape in tensors(shapes):
        if len(shape) == 1:
            writer.add_tensor(name, numpy.ones(shape, numpy.float32))
            continue
        drawn = numpy.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, numpy.float32)
        kept = gguf.GGMLQuantizationType.F32 if ROUTER in name else wanted
        writer.add_tensor(name, gguf.quantize(drawn * numpy.float32(STD), kept), raw_dtype=kept)
    write_and_close(writer)


def tensors(shapes: ModelArchitecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, (out, in), of a Qwen3, with experts or without, or a Llama."""
    hidden, inner, head_dim = shapes.hidden_size, shapes.intermediate_size, shapes.head_dim
    query, kv = shapes.num_heads * head_dim, shapes.num_kv_heads * head_dim
    yield "token_embd.weight", (shapes.vocab_size, hidden)
    for layer in range(shapes.num_layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "attn_q": (query, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, query),
            "ffn_norm": (hidden,),
        }
        if shapes.experts is None:
            block |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        else:
            count, one = shapes.experts.num_experts, shapes.experts.intermediate_size
            block |= {
                ROUTER: (count, hidden),
                "ffn_gate_exps": (count, one, hidden),
                "ffn_up_exps": (count, one, hidden),
                "ffn_down_exps": (count, hidden, one),
            }
        if shapes.qk_norm:
            block |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        for name, shape in block.items():
            yield f"blk.{layer}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    if not shapes.tie_word_embeddings:
        yield "output.weight", (shapes.vocab_size, hidden)


def _write_facts(writer: Any, shapes: ModelArchitecture) -> None:
    add_sizes(writer, hugging_face_config(shapes))
    if shapes.experts is not None:
        writer.add_expert_count(shapes.experts.num_experts)
        writer.add_expert_used_count(shapes.experts.num_experts_per_token)
        writer.add_expert_feed_forward_length(shapes.experts.intermediate_size)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_freq_base(shapes.rope_theta)
    # Nobody reads a text, but no program opens a model without a vocabulary.
    add_vocabulary(writer, synthetic_tokenizer(shapes.vocab_size), MERGED)
    writer.add_tokenizer_pre("qwen2")
    writer.add_eos_token_id(NUM_BYTES)
