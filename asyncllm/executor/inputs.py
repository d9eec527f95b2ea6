"""Turns a step plan into the tensors of one forward pass.

Arithmetic on rows happens in numpy, which on a few hundred integers costs a fraction of the torch ops; everything then
travels to the device as one array. Knows slots and plans, no model. Engine thread only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.attention.base import AttentionMetadata
from asyncllm.executor.base import StepPlan
from asyncllm.executor.drafts import sampling_places
from asyncllm.executor.slots import SlotState

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """One step's tensors. N query tokens, S rows, R samples: one of a row that samples, several of one with drafts."""

    input_ids: Tensor  # [N] int64
    metadata: AttentionMetadata
    sampling_rows: list[int]  # [R], rows of the plan
    sampling_slots: list[int]  # [R]
    sampling_slot_index: Tensor  # [R] int64
    sampling_tokens: Tensor | None  # [R] int64, query token whose hidden state is sampled; None when R = S = N
    sample_positions: Ints  # [R], index of the sampled token in its sequence
    query_starts: Ints  # [S], first query token of each row


def build_inputs(plan: StepPlan, state: SlotState, block_size: int, device: torch.device) -> StepInputs:  # hot
    """Lay the plan out for the model. Applies nothing: the slots already hold this step's blocks."""
    slots = np.array(plan.slots, dtype=np.int64)  # [S]
    computed = np.array(plan.num_computed_tokens, dtype=np.int64)  # [S]
    num_query = np.array(plan.num_query_tokens, dtype=np.int64)  # [S]
    seq_lens = computed + num_query
    num_rows, num_tokens = len(slots), plan.num_tokens
    decode_only = num_rows == num_tokens == plan.num_decode_rows
    if decode_only:
        query_starts, positions, token_slots = np.arange(num_rows), computed, slots
    else:
        query_starts = np.cumsum(num_query) - num_query
        positions = np.arange(num_tokens) + np.repeat(computed - query_starts, num_query)
        token_slots = np.repeat(slots, num_query)
    blocks = state.block_table_host[token_slots, positions // block_size]
    slot_mapping = blocks * block_size + positions % block_size

    all_sample = all(plan.samples) and not plan.drafts
    sampling, num_behind = (np.arange(num_rows), None) if all_sample else sampling_places(plan)
    sampling_slots = slots[sampling]
    last_tokens, sample_positions = (query_starts + num_query - 1)[sampling], seq_lens[sampling]
    if num_behind is not None:
        last_tokens, sample_positions = last_tokens - num_behind, sample_positions - num_behind
    packed = (positions, slot_mapping, slots, seq_lens, sampling_slots, last_tokens, np.array(plan.token_ids, np.int64))
    device_positions, device_mapping, device_slots, device_lens, sampling_index, sampling_tokens, token_ids = (
        _to_device(packed, device)
    )
    metadata = AttentionMetadata(
        positions=device_positions,
        slot_mapping=device_mapping,
        block_table=state.block_table,
        slots=device_slots,
        seq_lens=device_lens,
        num_decode_rows=plan.num_decode_rows,
        block_size=block_size,
        query_lens=plan.num_query_tokens,
        seq_lens_host=seq_lens.tolist(),
    )
    decode_slots = device_slots if decode_only else device_slots[: plan.num_decode_rows]
    input_ids = state.last_token.index_select(0, decode_slots)
    return StepInputs(
        input_ids=input_ids if decode_only else torch.cat((input_ids, token_ids)),
        metadata=metadata,
        sampling_rows=sampling.tolist(),
        sampling_slots=plan.slots if all_sample else sampling_slots.tolist(),
        sampling_slot_index=sampling_index,
        sampling_tokens=None if decode_only and all_sample else sampling_tokens,
        sample_positions=sample_positions,
        query_starts=query_starts,
    )


def _to_device(arrays: tuple[Ints, ...], device: torch.device) -> tuple[Tensor, ...]:
    """All arrays in one transfer; views of one tensor come back."""
    together = torch.from_numpy(np.concatenate(arrays)).to(device)
    return together.split([len(array) for array in arrays])
