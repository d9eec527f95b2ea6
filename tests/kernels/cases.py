"""Which kernels with which shapes the offline gate compiles: the production wrappers on tensors without memory.

A case is a name and a function of `pdl`; a new kernel needs a few lines here. Tensors are on the device "meta", where
shapes, strides and dtypes are real and sizes cost nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from asyncllm.attention.triton_decode import decode_attention, make_decode_scratch, plan_splits
from asyncllm.attention.triton_prefill import prefill_attention
from asyncllm.attention.triton_store import norm_rope_store
from asyncllm.layers.sampling_columns import NUM_COLUMNS
from asyncllm.layers.triton_activation import gelu_tanh_and_mul, silu_and_mul
from asyncllm.layers.triton_experts import mix_experts
from asyncllm.layers.triton_logits import (
    add_to_logits,
    apply_bitmask,
    count_tokens,
    penalize,
    rebuild_counts,
    score,
)
from asyncllm.layers.triton_norm import add_rms_norm, rms_norm
from asyncllm.layers.triton_sampling import Kind, make_sample_scratch, sample
from asyncllm.layers.triton_step import apply_block_writes, gather_decode_inputs, gather_tokens

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
HALF_DTYPES = (FP16, BF16)
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZE = 16
NUM_SMS = 132
FEW, MANY = 1, 2048  # tokens or rows of a step: wrappers choose programs by them
# Blocks of a cache whose values lie less, and more, than 2^31 elements behind the keys: strides of 32 and 64 bits.
NUM_BLOCKS, MANY_BLOCKS = 4096, 1 << 21


class Case(NamedTuple):
    """Something to compile."""

    name: str
    run: Callable[[bool], None]  # called with whether to launch dependents early


class Model(NamedTuple):
    """The shapes of a model that people run."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    head_norms: torch.dtype | None = None
    norms: torch.dtype = BF16


MODELS = (
    Model("Qwen3-0.6B", 16, 8, 128, 1024, 3072, head_norms=BF16),
    Model("Llama-3.2-1B", 32, 8, 64, 2048, 8192),
    Model("Llama-3.1-8B", 32, 8, 128, 4096, 14336),
    Model("SmolLM2-135M", 9, 3, 64, 576, 1536),
    Model("Gemma-3-4B", 8, 4, 256, 2560, 10240, head_norms=FP32, norms=FP32),
)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def int32(*shape: int) -> Tensor:
    """Like `empty`."""
    return empty(*shape, dtype=torch.int32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _store(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    num_tokens: int,
    norm_dtype: torch.dtype | None,
    num_blocks: int,
    pdl: bool,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    weight = None if norm_dtype is None else empty(head_dim, dtype=norm_dtype)
    qkv = empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    kv_cache = empty(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype)
    table = empty(4096, head_dim, dtype=FP32)
    norm_rope_store(
        qkv, int32(num_tokens), int32(num_tokens), table, kv_cache, num_heads, weight, weight, 1e-6, pdl=pdl
    )


def store_cases() -> Iterator[Case]:
    """Every head dim with and without head norms; every model; far values."""
    for head_dim, dtype, norm, tokens in product(HEAD_DIMS, HALF_DTYPES, (False, True), (FEW, MANY)):
        run = partial(_store, (16, 8, head_dim), dtype, tokens, dtype if norm else None, NUM_BLOCKS)
        yield Case(f"store D={head_dim} {_name(dtype)} norm={norm} N={tokens}", run)
    for head_dim, tokens in product((64, 128), (FEW, MANY)):
        yield Case(f"store D={head_dim} float32 N={tokens}", partial(_store, (16, 8, head_dim), FP32, tokens, FP32, 64))
    for model, tokens in product(MODELS, (FEW, MANY)):
        run = partial(_store, model[1:4], BF16, tokens, model.head_norms, MANY_BLOCKS)
        yield Case(f"store {model.name} N={tokens} far values", run)


def _norms(num_features: int, dtype: torch.dtype, weight_dtype: torch.dtype, pdl: bool) -> None:
    x, weight = empty(MANY, num_features, dtype=dtype), empty(num_features, dtype=weight_dtype)
    rms_norm(x, weight, 1e-6, pdl=pdl)
    add_rms_norm(x, empty(MANY, num_features, dtype=dtype), weight, 1e-6, pdl=pdl)


def _activations(num_features: int, dtype: torch.dtype, num_rows: int, pdl: bool) -> None:
    gate_up = empty(num_rows, 2 * num_features, dtype=dtype)
    silu_and_mul(gate_up, pdl=pdl)
    gelu_tanh_and_mul(gate_up, pdl=pdl)


def layer_cases() -> Iterator[Case]:
    """Norms and activations of every model, and the widest rows."""
    for model in MODELS:
        yield Case(f"norm {model.name}", partial(_norms, model.hidden_size, BF16, model.norms))
        for rows in (FEW, MANY):
            run = partial(_activations, model.intermediate_size, BF16, rows)
            yield Case(f"activation {model.name} N={rows}", run)
    for width, dtype in product((960, 16384), (*HALF_DTYPES, FP32)):
        yield Case(f"norm F={width} {_name(dtype)}", partial(_norms, width, dtype, dtype))
        yield Case(f"activation F={width} {_name(dtype)}", partial(_activations, width, dtype, MANY))


def _experts(sizes: tuple[int, int, int, int], dtype: torch.dtype, num_tokens: int, activation: str, pdl: bool) -> None:
    num_experts, num_chosen, hidden, inner = sizes
    gate_up, down = empty(num_experts, 2 * inner, hidden, dtype=dtype), empty(num_experts, hidden, inner, dtype=dtype)
    x, logits = empty(num_tokens, hidden, dtype=dtype), empty(num_tokens, num_experts, dtype=dtype)
    mix_experts(x, logits, gate_up, down, num_chosen, True, activation)


def experts_cases() -> Iterator[Case]:
    """Every configuration at the sizes of Qwen3-30B-A3B, other dtypes, and sizes that no tile divides."""
    real = (128, 8, 2048, 768)
    for tokens in (FEW, 64, 256):
        yield Case(f"experts N={tokens}", partial(_experts, real, BF16, tokens, "silu"))
    # All of these kernels, for the gate that compiles one model.
    yield Case(f"experts N={MANY}, beside Qwen3-0.6B", partial(_experts, real, BF16, MANY, "silu"))
    for dtype in (FP16, FP32):
        yield Case(f"experts {_name(dtype)}", partial(_experts, real, dtype, MANY, "silu"))
    for tokens in (FEW, MANY):
        run = partial(_experts, (60, 4, 1000, 1000), BF16, tokens, "gelu_tanh")
        yield Case(f"experts of odd sizes N={tokens}", run)


def _start_of_step(pdl: bool) -> None:
    block_table, last_token = int32(257, 512), int32(257)
    apply_block_writes(block_table, int32(3, 512))
    decode = (int32(64), int32(64), last_token, block_table, BLOCK_SIZE)
    gather_decode_inputs(*decode, *(int32(64) for _ in range(3)))
    mixed = (*(int32(MANY) for _ in range(3)), last_token, block_table, BLOCK_SIZE)
    gather_tokens(*mixed, int32(MANY), int32(MANY))


class Attention(NamedTuple):
    """One variant of both attention kernels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0
    soft_cap: float = 0.0
    num_blocks: int = NUM_BLOCKS

    def inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query as a view of qkv [N, H, D], kv_cache, block table, out [N, H, D]."""
        total_heads = self.num_heads + 2 * self.num_kv_heads
        query = empty(num_tokens, total_heads, self.head_dim, dtype=self.dtype)[:, : self.num_heads]
        pages = (2, self.num_blocks, self.num_kv_heads, BLOCK_SIZE, self.head_dim)
        return query, empty(*pages, dtype=self.dtype), int32(257, 512), torch.empty_like(query).contiguous()

    def decode(self, pdl: bool) -> None:
        """Plan, attend and combine for 64 rows."""
        query, kv_cache, block_table, out = self.inputs(64)
        slots, seq_lens = int32(64), int32(64)
        shape = (self.num_heads, self.num_kv_heads, self.head_dim)
        scratch = make_decode_scratch(256, *shape, NUM_SMS, torch.device("meta"))
        plan_splits(seq_lens, scratch, self.num_kv_heads)
        scale = self.head_dim**-0.5
        arguments = (query, kv_cache, block_table, slots, seq_lens, scratch, out, scale)
        decode_attention(*arguments, self.window, self.soft_cap, pdl=pdl)

    def prefill(self, pdl: bool) -> None:
        """Attend for four rows."""
        query, kv_cache, block_table, out = self.inputs(MANY)
        rows = (int32(4) for _ in range(4))  # slots, starts, query lens, seq lens
        arguments = (query, kv_cache, block_table, *rows, int32(64, 2), out, self.head_dim**-0.5)
        prefill_attention(*arguments, self.window, self.soft_cap, pdl=pdl)


def attention_cases() -> Iterator[Case]:
    """Every head dim, dtype, window and soft cap; every size of group; every model, with values far from their keys."""
    variants = {model.name: Attention(*model[1:4], BF16, num_blocks=MANY_BLOCKS) for model in MODELS}
    for head_dim, dtype, window, soft_cap in product(HEAD_DIMS, HALF_DTYPES, (0, 4096), (0.0, 50.0)):
        name = f"D={head_dim} {_name(dtype)} window={window} soft_cap={soft_cap}"
        variants[name] = Attention(16, 8, head_dim, dtype, window, soft_cap)
    for group, head_dim in product((1, 3, 4, 7, 8, 16), (64, 128)):
        variants[f"D={head_dim} group={group}"] = Attention(4 * group, 4, head_dim, BF16)
    for head_dim, window in product((64, 128, 256), (0, 4096)):
        variants[f"D={head_dim} float32 window={window}"] = Attention(4, 2, head_dim, FP32, window)
    for name, variant in variants.items():
        yield Case(f"decode {name}", variant.decode)
        yield Case(f"prefill {name}", variant.prefill)


def _sample(vocab_size: int, dtype: torch.dtype, pdl: bool) -> None:
    rows, slots = 64, 257
    scratch = make_sample_scratch(256, vocab_size, torch.device("meta"))
    parameters = (empty(slots, NUM_COLUMNS, dtype=FP32), int32(slots, NUM_COLUMNS), int32(vocab_size))
    logits = empty(rows, vocab_size, dtype=dtype)
    for kind in get_args(Kind):
        sample(logits, int32(rows), int32(rows), *parameters, kind, scratch, int32(slots), int32(rows), pdl=pdl)


def _change_logits(vocab_size: int, pdl: bool) -> None:
    rows, slots, entries = 8, 257, 100
    logits, floats = empty(64, vocab_size, dtype=FP32), empty(slots, NUM_COLUMNS, dtype=FP32)
    counts, prompt_mask = int32(slots, vocab_size), int32(slots, -(-vocab_size // 32))
    penalize(logits, int32(rows), int32(rows), floats, counts, prompt_mask)
    add_to_logits(logits, int32(entries), int32(entries), empty(entries, dtype=FP32))
    apply_bitmask(logits, int32(rows), int32(rows, prompt_mask.shape[1]))
    count_tokens(counts, int32(rows), int32(rows))
    rebuild_counts(counts, prompt_mask, 1, int32(entries), 10)


def _score(vocab_size: int, dtype: torch.dtype, pdl: bool) -> None:
    score(empty(64, vocab_size, dtype=dtype), int32(64))


def sampling_cases() -> Iterator[Case]:
    """Vocabularies of the models, and one whose rows begin at odd places."""
    vocabularies = {"Qwen3-0.6B": 151936, "Llama-3.2-1B": 128256, "SmolLM2-135M": 49152, "odd": 50257}
    for name, vocab_size in vocabularies.items():
        yield Case(f"change logits {name}", partial(_change_logits, vocab_size))
        for dtype in (BF16, FP32):
            yield Case(f"sample {name} {_name(dtype)}", partial(_sample, vocab_size, dtype))
            yield Case(f"score {name} {_name(dtype)}", partial(_score, vocab_size, dtype))
    yield Case("sample odd float16", partial(_sample, 50257, FP16))
    yield Case("score odd float16", partial(_score, 50257, FP16))


CASES = [
    *store_cases(),
    *layer_cases(),
    *experts_cases(),
    Case("start of step, Qwen3-0.6B as any model", _start_of_step),
    *attention_cases(),
    *sampling_cases(),
]
