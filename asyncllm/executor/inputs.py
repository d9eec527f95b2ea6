"""Turns a step plan into the tensors of one forward pass.

Arithmetic on rows happens in numpy, which on a few hundred integers costs a fraction of the torch ops; everything then
travels to the device as one array. Knows slots and plans, no model. Engine thread only.
"""

import numpy as np
import torch
from torch import Tensor

from asyncllm.attention.base import AttentionMetadata
from asyncllm.executor.base import StepPlan
from asyncllm.executor.rows import Ints, RowArrays
from asyncllm.executor.slots import SlotState


def build_inputs(
    plan: StepPlan, rows: RowArrays, state: SlotState, block_size: int, device: torch.device
) -> tuple[Tensor, AttentionMetadata]:  # hot
    """Token ids [N] int64 and what attention needs; `rows`: the plan's, int64.

    Applies nothing: the slots already hold this step's blocks.
    """
    positions = np.arange(plan.num_tokens) + np.repeat(rows.computed - rows.query_starts, rows.query_lens)
    blocks = state.block_table_host[np.repeat(rows.slots, rows.query_lens), positions // block_size]
    slot_mapping = blocks * block_size + positions % block_size
    packed = (positions, slot_mapping, rows.slots, rows.seq_lens, np.array(plan.token_ids, np.int64))
    device_positions, device_mapping, device_slots, device_lens, token_ids = _to_device(packed, device)
    metadata = AttentionMetadata(
        positions=device_positions,
        slot_mapping=device_mapping,
        block_table=state.block_table,
        slots=device_slots,
        seq_lens=device_lens,
        num_decode_rows=plan.num_decode_rows,
        block_size=block_size,
        query_lens=plan.num_query_tokens,
        seq_lens_host=rows.seq_lens.tolist(),
    )
    decoding = state.last_token.index_select(0, device_slots[: plan.num_decode_rows])
    return torch.cat((decoding, token_ids)), metadata


def _to_device(arrays: tuple[Ints, ...], device: torch.device) -> tuple[Tensor, ...]:
    """All arrays in one transfer; views of one tensor come back."""
    together = torch.from_numpy(np.concatenate(arrays)).to(device)
    return together.split([len(array) for array in arrays])
