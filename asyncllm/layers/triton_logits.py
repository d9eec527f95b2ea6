"""Changes to logits before the draw, token counts, and log-probabilities: for the rows that ask, between graphs.

The definitions are `executor/sampler.py` (penalties, bias, bans) and `executor/logprobs.py`. Knows rows and request
slots; knows nothing of requests or grammars. Logits that change are float32 [R, V] and change in place. Engine thread
only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.layers.sampling_columns import FREQUENCY, NUM_COLUMNS, PRESENCE, REPETITION
from asyncllm.layers.triton_narrowing import exp, load_logits

# Kernels are not specialised on lists and their lengths: serving would stop to compile for each new alignment.
_BLOCK = 2048  # tokens of a program
_LIST_BLOCK = 256  # list entries of a program
_NUM_COLUMNS, _REPETITION = tl.constexpr(NUM_COLUMNS), tl.constexpr(REPETITION)
_FREQUENCY, _PRESENCE = tl.constexpr(FREQUENCY), tl.constexpr(PRESENCE)
_INFINITY = tl.constexpr(float("inf"))


def penalize(logits: Tensor, rows: Tensor, slots: Tensor, floats: Tensor, counts: Tensor, prompt_mask: Tensor) -> None:
    """Apply the repetition, frequency and presence penalties of slots[i] to row rows[i].

    logits [R, V] float32; rows, slots [r] int32; floats [L, 16]; counts [L, V] int32, output tokens; prompt_mask
    [L, ceil(V / 32)] int32, bit 0 of word 0 is token 0.
    """
    vocab_size = logits.shape[1]
    if num_rows := len(rows):
        _penalize_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits,
            logits.stride(0),
            rows,
            slots,
            floats,
            counts,
            counts.stride(0),
            prompt_mask,
            prompt_mask.stride(0),
            vocab_size,
            BLOCK=_BLOCK,
        )


def add_to_logits(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """logits[rows[i], token_ids[i]] += values[i]: a bias, or -inf for a ban, in any number for one token.

    logits [R, V] float32; rows, token_ids [n] int32; values [n] float32, finite or -inf.
    """
    if num_entries := len(rows):
        _add_kernel[(triton.cdiv(num_entries, _LIST_BLOCK),)](
            logits, logits.stride(0), rows, token_ids, values, num_entries, BLOCK=_LIST_BLOCK
        )


def apply_bitmask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set logits[rows[i]] to -inf where masks[i] has a cleared bit.

    logits [R, V] float32; rows [r] int32; masks [r, ceil(V / 32)] int32, bit 0 of word 0 is token 0.
    """
    vocab_size = logits.shape[1]
    if num_rows := len(rows):
        _bitmask_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits, logits.stride(0), rows, masks, masks.stride(0), vocab_size, BLOCK=_BLOCK
        )


def count_tokens(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """counts[slots[i], token_ids[i]] += 1. counts [L, V] int32; slots, token_ids [r] int32."""
    if num_entries := len(slots):
        _count_kernel[(triton.cdiv(num_entries, _LIST_BLOCK),)](
            counts, counts.stride(0), slots, token_ids, num_entries, BLOCK=_LIST_BLOCK
        )


def rebuild_counts(counts: Tensor, prompt_mask: Tensor, slot: int, token_ids: Tensor, num_prompt: int) -> None:
    """Count a whole sequence anew: the first `num_prompt` tokens into the mask, the rest into the counts.

    counts [L, V] int32; prompt_mask [L, ceil(V / 32)] int32; token_ids [T] int32.
    """
    counts[slot].zero_()
    prompt_mask[slot].zero_()
    if num_tokens := len(token_ids):
        _rebuild_kernel[(triton.cdiv(num_tokens, _LIST_BLOCK),)](
            counts[slot], prompt_mask[slot], token_ids, num_prompt, num_tokens, BLOCK=_LIST_BLOCK
        )


def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [M] float32 and rank [M] int32 of token_ids [M] under logits [M, V] of any float dtype.

    The rank is 1 + the number of larger logits, so equals share the better one.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    # Two kernels at any M: a prompt of 2,048 tokens makes 1.8 MB of partial results of 622 MB of logits.
    partial = torch.empty((3, num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        _score_blocks_kernel[(num_rows, num_blocks)](
            logits, logits.stride(0), token_ids, *partial.unbind(), vocab_size, BLOCK=_BLOCK
        )
        _score_rows_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            token_ids,
            *partial.unbind(),
            logprobs,
            ranks,
            num_blocks,
            PADDED=triton.next_power_of_2(num_blocks),
            num_warps=1,
        )
    return logprobs, ranks


@triton.jit(do_not_specialize=["rows", "slots"])
def _penalize_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    rows: tl.tensor,  # [r]
    slots: tl.tensor,  # [r]
    floats: tl.tensor,  # [L, 16]
    counts: tl.tensor,  # [L, V]
    counts_stride: tl.tensor,
    prompt_mask: tl.tensor,  # [L, ceil(V / 32)]
    mask_stride: tl.tensor,
    V: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry, block = tl.program_id(0), tl.program_id(1)
    row, slot = tl.load(rows + entry).to(tl.int64), tl.load(slots + entry).to(tl.int64)
    token_ids = block * BLOCK + tl.arange(0, BLOCK)
    mask = token_ids < V
    count = tl.load(counts + slot * counts_stride + token_ids, mask=mask, other=0)
    words = tl.load(prompt_mask + slot * mask_stride + token_ids // 32, mask=mask, other=0)
    # Most of the vocabulary was never seen: its logits are neither read nor written.
    seen = (count > 0) | (((words >> (token_ids % 32)) & 1) != 0)
    z = tl.load(logits + row * stride + token_ids, mask=seen, other=0.0)
    repetition = tl.load(floats + slot * _NUM_COLUMNS + _REPETITION)
    frequency = tl.load(floats + slot * _NUM_COLUMNS + _FREQUENCY)
    presence = tl.load(floats + slot * _NUM_COLUMNS + _PRESENCE)
    z = tl.where(z > 0, tl.div_rn(z, repetition), z * repetition)
    z = z - count.to(tl.float32) * frequency - tl.where(count > 0, presence, 0.0)
    tl.store(logits + row * stride + token_ids, z, mask=seen)


@triton.jit(do_not_specialize=["rows", "token_ids", "values", "num_entries"])
def _add_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    rows: tl.tensor,  # [n]
    token_ids: tl.tensor,  # [n]
    values: tl.tensor,  # [n]
    num_entries: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    row = tl.load(rows + entries, mask=mask, other=0).to(tl.int64)
    token_id = tl.load(token_ids + entries, mask=mask, other=0)
    # Atomic, since a token may be biased and banned. -inf stays -inf whatever finite is added before or after.
    tl.atomic_add(logits + row * stride + token_id, tl.load(values + entries, mask=mask), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def _bitmask_kernel(
    logits: tl.tensor,  # [R, V]
    stride: tl.tensor,
    rows: tl.tensor,  # [r]
    masks: tl.tensor,  # [r, ceil(V / 32)]
    mask_stride: tl.tensor,
    V: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry, block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    token_ids = block * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(masks + entry.to(tl.int64) * mask_stride + token_ids // 32, mask=token_ids < V, other=-1)
    cleared = ((words >> (token_ids % 32)) & 1) == 0
    tl.store(logits + row * stride + token_ids, -_INFINITY, mask=cleared)


@triton.jit(do_not_specialize=["slots", "token_ids", "num_entries"])
def _count_kernel(
    counts: tl.tensor,  # [L, V]
    counts_stride: tl.tensor,
    slots: tl.tensor,  # [r]
    token_ids: tl.tensor,  # [r]
    num_entries: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    slot = tl.load(slots + entries, mask=mask, other=0).to(tl.int64)
    token_id = tl.load(token_ids + entries, mask=mask, other=0)
    tl.atomic_add(counts + slot * counts_stride + token_id, 1, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["token_ids", "num_prompt", "num_tokens"])
def _rebuild_kernel(
    count_row: tl.tensor,  # [V]
    mask_row: tl.tensor,  # [ceil(V / 32)]
    token_ids: tl.tensor,  # [T]
    num_prompt: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_tokens
    token_id = tl.load(token_ids + index, mask=mask, other=0)
    bit = tl.full([BLOCK], 1, tl.int32) << (token_id % 32)
    tl.atomic_or(mask_row + token_id // 32, bit, mask=mask & (index < num_prompt), sem="relaxed")
    tl.atomic_add(count_row + token_id, 1, mask=mask & (index >= num_prompt), sem="relaxed")


@triton.jit(do_not_specialize=["token_ids"])
def _score_blocks_kernel(
    logits: tl.tensor,  # [M, V]
    stride: tl.tensor,
    token_ids: tl.tensor,  # [M]
    block_best: tl.tensor,  # [M, NB]
    block_mass: tl.tensor,  # [M, NB], sum of exp(z - block_best)
    block_larger: tl.tensor,  # [M, NB], logits above that of the token, exact in float32
    V: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    row_logits = logits + row.to(tl.int64) * stride
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(row_logits, columns, columns < V)
    chosen = tl.load(row_logits + tl.load(token_ids + row)).to(tl.float32)
    best = tl.max(z, 0)
    base = tl.where(best > -_INFINITY, best, 0.0)  # a block may be banned as a whole
    out = row * tl.num_programs(1) + block
    tl.store(block_best + out, best)
    tl.store(block_mass + out, tl.sum(exp(z - base), 0))
    tl.store(block_larger + out, tl.sum((z > chosen).to(tl.float32), 0))


@triton.jit(do_not_specialize=["token_ids"])
def _score_rows_kernel(
    logits: tl.tensor,  # [M, V]
    stride: tl.tensor,
    token_ids: tl.tensor,  # [M]
    block_best: tl.tensor,  # [M, NB]
    block_mass: tl.tensor,  # [M, NB]
    block_larger: tl.tensor,  # [M, NB]
    logprobs: tl.tensor,  # [M] float32
    ranks: tl.tensor,  # [M] int32
    num_blocks: tl.tensor,
    PADDED: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    blocks = tl.arange(0, PADDED)
    mask = blocks < num_blocks
    partial = row * num_blocks + blocks
    best = tl.load(block_best + partial, mask=mask, other=-_INFINITY)
    mass = tl.load(block_mass + partial, mask=mask, other=0.0)
    peak = tl.max(best, 0)
    base = tl.where(peak > -_INFINITY, peak, 0.0)
    norm = base + tl.log(tl.sum(mass * exp(best - base), 0))
    chosen = tl.load(logits + row.to(tl.int64) * stride + tl.load(token_ids + row)).to(tl.float32)
    tl.store(logprobs + row, chosen - norm)
    larger = tl.sum(tl.load(block_larger + partial, mask=mask, other=0.0), 0)
    tl.store(ranks + row, larger.to(tl.int32) + 1)
