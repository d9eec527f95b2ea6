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
class SamplingPlaces:
    """Where a step samples. S rows, R samples: one of a row that samples, several of one with drafts."""

    rows: Ints  # [R], rows of the plan
    slots: Ints  # [R]
    tokens: Ints | None  # [R], query token whose hidden state is sampled; None: all of them, in order
    positions: Ints  # [R], index of the sampled token in its sequence
    query_starts: Ints  # [S], first query token of each row


@dataclass(slots=True)
class RowArrays:
    """The rows of a plan, [S] int64 each."""

    slots: Ints
    computed: Ints
    query_lens: Ints

    @classmethod
    def of(cls, plan: StepPlan) -> "RowArrays":
        """A plan's."""
        columns = (plan.slots, plan.num_computed_tokens, plan.num_query_tokens)
        return cls(*(np.array(column, dtype=np.int64) for column in columns))

    def sampling(self, plan: StepPlan) -> SamplingPlaces:
        """Where the plan samples."""
        seq_lens = self.computed + self.query_lens
        if plan.num_decode_rows == len(self.slots) and all(plan.samples):
            every = np.arange(len(self.slots))
            return SamplingPlaces(every, self.slots, None, seq_lens, every)
        query_starts = np.cumsum(self.query_lens) - self.query_lens
        rows, num_behind = sampling_places(plan)
        tokens, positions = (query_starts + self.query_lens - 1)[rows], seq_lens[rows]
        if num_behind is not None:
            tokens, positions = tokens - num_behind, positions - num_behind
        return SamplingPlaces(rows, self.slots[rows], tokens, positions, query_starts)


def build_inputs(
    plan: StepPlan, rows: RowArrays, query_starts: Ints, state: SlotState, block_size: int, device: torch.device
) -> tuple[Tensor, AttentionMetadata]:  # hot
    """Token ids [N] int64 and what attention needs; `rows` of the plan, `query_starts` [S] as `SamplingPlaces` has them.

    Applies nothing: the slots already hold this step's blocks.
    """
    positions = np.arange(plan.num_tokens) + np.repeat(rows.computed - query_starts, rows.query_lens)
    seq_lens = rows.computed + rows.query_lens
    blocks = state.block_table_host[np.repeat(rows.slots, rows.query_lens), positions // block_size]
    slot_mapping = blocks * block_size + positions % block_size
    packed = (positions, slot_mapping, rows.slots, seq_lens, np.array(plan.token_ids, np.int64))
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
        seq_lens_host=seq_lens.tolist(),
    )
    decoding = state.last_token.index_select(0, device_slots[: plan.num_decode_rows])
    return torch.cat((decoding, token_ids)), metadata


def _to_device(arrays: tuple[Ints, ...], device: torch.device) -> tuple[Tensor, ...]:
    """All arrays in one transfer; views of one tensor come back."""
    together = torch.from_numpy(np.concatenate(arrays)).to(device)
    return together.split([len(array) for array in arrays])
