"""What a CUDA device remembers of each running sequence, indexed by its request slot.

A step names slots and finds there the last sampled token, the block table and the sampling parameters, so steady
decoding sends nothing else. The host keeps only what it branches on. The slot behind the last one is for padding.
Engine thread only.
"""

import numpy as np
import numpy.typing as npt
import torch

from asyncllm.executor.base import SlotInit
from asyncllm.layers import sampling_columns as column
from asyncllm.layers.triton_sampling import Kind
from asyncllm.types import Capacity, SamplingParams

# From cheapest to dearest: each can do what those before it can.
KINDS: tuple[Kind, ...] = ("greedy", "gumbel", "full")


class DeviceSlots:
    """Per-slot state. L slots = max_sequences + 1, C columns of the block table, V vocab."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        num_slots = capacity.max_sequences + 1
        num_columns = -(-capacity.max_context_length // capacity.block_size)
        self.vocab_size = capacity.vocab_size
        self.padding_slot = capacity.max_sequences
        self.last_token = torch.zeros(num_slots, dtype=torch.int32, device=device)  # [L]
        self.block_table = torch.zeros((num_slots, num_columns), dtype=torch.int32, device=device)  # [L, C]
        # One memory, two views: a row holds floats and integers. All zeros is greedy.
        self.floats = torch.zeros((num_slots, column.NUM_COLUMNS), dtype=torch.float32, device=device)
        self.ints = self.floats.view(torch.int32)
        # Counts of output tokens, for penalties. Made at once: a request that asks must not be what runs out of memory.
        self.counts = torch.zeros((num_slots, capacity.vocab_size), dtype=torch.int32, device=device)  # [L, V]
        self.prompt_mask = torch.zeros((num_slots, -(-capacity.vocab_size // 32)), dtype=torch.int32, device=device)
        # The host's part.
        self.kinds: npt.NDArray[np.uint8] = np.zeros(num_slots, dtype=np.uint8)  # index into KINDS
        self.edits_logits: npt.NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)  # penalties or bias
        self.has_penalties: npt.NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)
        self.logit_bias: list[tuple[tuple[int, float], ...]] = [()] * num_slots

    def seat(self, new_slots: list[SlotInit]) -> npt.NDArray[np.int32]:
        """Book new sequences on the host; returns their rows of `ints`, [n, 16]."""
        rows = np.zeros((len(new_slots), column.NUM_COLUMNS), dtype=np.int32)
        for row, init in zip(rows, new_slots):
            slot, params = init.slot, init.params
            self.kinds[slot] = self._fill(row, params)
            row[column.ADAPTER] = init.adapter
            self.has_penalties[slot] = params.has_penalties
            self.edits_logits[slot] = params.has_penalties or bool(params.logit_bias)
            self.logit_bias[slot] = params.logit_bias
        return rows

    def kind(self, slots: npt.NDArray[np.int32]) -> Kind:
        """The cheapest kind that serves all of these."""
        return KINDS[self.kinds[slots].max(initial=0)]

    def _fill(self, row: npt.NDArray[np.int32], params: SamplingParams) -> int:
        """Write one sequence's parameters; returns its kind."""
        floats = row.view(np.float32)
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        greedy = params.temperature < column.MIN_TEMPERATURE
        floats[column.TEMPERATURE] = 0.0 if greedy else params.temperature
        floats[column.TOP_P] = params.top_p if params.top_p < 1 else np.inf
        floats[column.LOG_MIN_P] = np.log(params.min_p) if params.min_p > 0 else -np.inf
        floats[column.REPETITION] = params.repetition_penalty
        floats[column.FREQUENCY] = params.frequency_penalty
        floats[column.PRESENCE] = params.presence_penalty
        row[column.TOP_K] = top_k
        row[[column.SEED_LOW, column.SEED_HIGH]] = np.array([params.seed], dtype=np.int64).view(np.int32)
        if greedy:
            return 0
        return 2 if top_k or params.top_p < 1 or params.min_p > 0 else 1
