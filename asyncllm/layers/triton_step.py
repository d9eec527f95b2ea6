"""What starts a step on the device: staged changes of the block table, then each token's id, position and slot.

Sequences live in request slots on the device: the last sampled token of slot i is `last_token[i]`, its pages are
`block_table[i]`. A step names slots, so that step n + 1 is launched before anyone has read step n's tokens.
These kernels never let their successors begin early (no PDL): every later kernel of the step may read what they wrote
before its own wait. Engine thread.
"""

import triton
import triton.language as tl
from torch import Tensor

_ITEMS = 128  # per program: a step has a few hundred rows at most, and each row is a chain of dependent loads


@triton.jit(do_not_specialize=["num_columns", "num_writes"])
def _apply_block_writes(
    block_table: tl.tensor,  # [L, C]
    writes: tl.tensor,  # [3, W]
    num_columns: tl.tensor,
    num_writes: tl.tensor,
    ITEMS: tl.constexpr,
) -> None:
    items = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    present = items < num_writes
    slots = tl.load(writes + items, mask=present, other=-1)
    columns = tl.load(writes + num_writes + items, mask=present, other=0)
    block_ids = tl.load(writes + 2 * num_writes + items, mask=present, other=0)
    tl.store(block_table + slots.to(tl.int64) * num_columns + columns, block_ids, mask=slots >= 0)


@triton.jit
def _slots_of(
    block_table: tl.tensor,
    num_columns: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    present: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Where in the cache each position's KV is stored; 0, in the null block, for lanes that are not present."""
    cells = block_table + slots.to(tl.int64) * num_columns + positions // BLOCK_SIZE
    block_ids = tl.load(cells, mask=present, other=0)
    return tl.where(present, block_ids * BLOCK_SIZE + positions % BLOCK_SIZE, 0)


@triton.jit(do_not_specialize=["num_columns", "num_rows"])
def _gather_decode_inputs(
    slots: tl.tensor,  # [S]
    seq_lens: tl.tensor,  # [S]
    last_token: tl.tensor,  # [L]
    block_table: tl.tensor,  # [L, C]
    input_ids: tl.tensor,  # [S]
    positions: tl.tensor,  # [S]
    slot_mapping: tl.tensor,  # [S]
    num_columns: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    in_batch = rows < num_rows
    lengths = tl.load(seq_lens + rows, mask=in_batch, other=0)
    row_slots = tl.load(slots + rows, mask=in_batch, other=0)
    present = lengths > 0
    row_positions = tl.maximum(lengths - 1, 0)
    token_ids = tl.load(last_token + row_slots, mask=present, other=0)
    stored_at = _slots_of(block_table, num_columns, row_slots, row_positions, present, BLOCK_SIZE)
    tl.store(input_ids + rows, token_ids, mask=in_batch)
    tl.store(positions + rows, row_positions, mask=in_batch)
    tl.store(slot_mapping + rows, stored_at, mask=in_batch)


@triton.jit(do_not_specialize=["num_columns", "num_tokens"])
def _gather_tokens(
    token_slots: tl.tensor,  # [N]
    positions: tl.tensor,  # [N]
    token_ids: tl.tensor,  # [N]
    last_token: tl.tensor,  # [L]
    block_table: tl.tensor,  # [L, C]
    input_ids: tl.tensor,  # [N]
    slot_mapping: tl.tensor,  # [N]
    num_columns: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    tokens = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    in_batch = tokens < num_tokens
    slots = tl.load(token_slots + tokens, mask=in_batch, other=-1)
    token_positions = tl.load(positions + tokens, mask=in_batch, other=0)
    known = tl.load(token_ids + tokens, mask=in_batch, other=0)
    present = slots >= 0
    sampled = tl.load(last_token + slots, mask=present & (known < 0), other=0)
    ids = tl.where(present, tl.where(known < 0, sampled, known), 0)
    stored_at = _slots_of(block_table, num_columns, slots, token_positions, present, BLOCK_SIZE)
    tl.store(input_ids + tokens, ids, mask=in_batch)
    tl.store(slot_mapping + tokens, stored_at, mask=in_batch)


def apply_block_writes(block_table: Tensor, writes: Tensor) -> None:  # hot
    """Set single entries of the block table [L, C] int32.

    writes [3, W] int32 contiguous: slots (-1: nothing), columns, block ids. No entry may be written twice in one call:
    which write stays would be chance.
    """
    num_writes = writes.shape[1]
    assert block_table.is_contiguous() and writes.is_contiguous()
    _apply_block_writes[(triton.cdiv(num_writes, _ITEMS),)](
        block_table, writes, block_table.shape[1], num_writes, ITEMS=_ITEMS, num_warps=4
    )


def gather_decode_inputs(
    slots: Tensor,
    seq_lens: Tensor,
    last_token: Tensor,
    block_table: Tensor,
    block_size: int,
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:  # hot
    """Fill input_ids, positions, slot_mapping [S] int32 for rows of one token each: the last one of every sequence.

    slots, seq_lens [S] int32 (length 0: padding, which gets zeros); last_token [L] int32; block_table [L, C] int32.
    """
    num_rows = slots.shape[0]
    _gather_decode_inputs[(triton.cdiv(num_rows, _ITEMS),)](
        slots,
        seq_lens,
        last_token,
        block_table,
        input_ids,
        positions,
        slot_mapping,
        block_table.shape[1],
        num_rows,
        BLOCK_SIZE=block_size,
        ITEMS=_ITEMS,
        num_warps=4,
    )


def gather_tokens(
    token_slots: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    last_token: Tensor,
    block_table: Tensor,
    block_size: int,
    input_ids: Tensor,
    slot_mapping: Tensor,
) -> None:  # hot
    """Fill input_ids and slot_mapping [N] int32 of a mixed step.

    token_slots, positions, token_ids [N] int32: slot -1 is padding, which gets zeros; token id -1 stands for the slot's
    last sampled token, which the host may not know yet.
    """
    num_tokens = token_slots.shape[0]
    _gather_tokens[(triton.cdiv(num_tokens, _ITEMS),)](
        token_slots,
        positions,
        token_ids,
        last_token,
        block_table,
        input_ids,
        slot_mapping,
        block_table.shape[1],
        num_tokens,
        BLOCK_SIZE=block_size,
        ITEMS=_ITEMS,
        num_warps=4,
    )
