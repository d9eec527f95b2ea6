"""What the device remembers of each running sequence, indexed by its request slot.

The last sampled token lives here, so that a step can read the token of the step before it without the host. Block
tables and sampling parameters have a host copy as well, because the host branches on them. The slot behind the last one
is for padding and warm-up; no request ever takes it. Engine thread only.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor.base import SlotInit
from asyncllm.types import Capacity, SamplingParams

# Columns of `SlotState.sampling`.
TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(7)


class SlotState:
    """Per-slot state. L slots = max_sequences + 1, V vocab."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        num_slots = capacity.max_sequences + 1
        max_blocks = -(-capacity.max_context_length // capacity.block_size)
        self.padding_slot = capacity.max_sequences
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)  # [L]
        self.block_table_host: npt.NDArray[np.int64] = np.zeros((num_slots, max_blocks), dtype=np.int64)
        # On a CPU both names are one memory, and a write to the host's copy is all there is to do.
        self.block_table: Tensor = torch.from_numpy(self.block_table_host).to(device)  # [L, max_blocks] int64
        self.sampling: npt.NDArray[np.float32] = np.zeros((num_slots, 7), dtype=np.float32)
        self.seeds: npt.NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        self.logit_bias: list[tuple[tuple[int, float], ...]] = [()] * num_slots
        self.adapters: npt.NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)  # 0 = none
        # Token counts, for penalties; 5 bytes per slot and vocabulary entry, so only once a request asks for them.
        self.output_counts: Tensor | None = None  # [L, V] int32
        self.prompt_mask: Tensor | None = None  # [L, V] bool
        self.version = 0  # grows when any slot gets a new sequence
        self._vocab_size = capacity.vocab_size
        self._device = device

    def apply(self, new_slots: list[SlotInit], block_writes: list[tuple[int, int, int]]) -> None:  # hot
        """Seat new sequences, then write block tables."""
        if new_slots:
            self._seat(new_slots)
        if block_writes:
            writes = np.array(block_writes, dtype=np.int64)
            self.block_table_host[writes[:, 0], writes[:, 1]] = writes[:, 2]
            if self._device.type != "cpu":
                staged = torch.from_numpy(writes).to(self._device)
                self.block_table.index_put_((staged[:, 0], staged[:, 1]), staged[:, 2])

    def count(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count sampled tokens of slots with penalties. slots, token_ids [R] int64, no slot twice."""
        assert self.output_counts is not None, "penalties without counts"
        one = torch.ones((), dtype=torch.int32, device=self._device)
        self.output_counts.index_put_((slots, token_ids), one, accumulate=True)

    def _seat(self, new_slots: list[SlotInit]) -> None:
        self.version += 1
        for init in new_slots:
            params = init.params
            self.sampling[init.slot] = _columns(params)
            self.seeds[init.slot] = params.seed
            self.logit_bias[init.slot] = params.logit_bias
            self.adapters[init.slot] = init.adapter
            if params.has_penalties:
                self._rebuild_counts(init)
        # A shorter sequence must not attend to, or be padded with, blocks its predecessor left in the row.
        slots = [init.slot for init in new_slots]
        self.block_table_host[slots] = 0
        if self._device.type != "cpu":
            self.block_table[slots] = 0

    def _rebuild_counts(self, init: SlotInit) -> None:
        """Count the whole sequence again: it may come back from a preemption with output."""
        if self.output_counts is None or self.prompt_mask is None:
            shape = (self.padding_slot + 1, self._vocab_size)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self.prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
        tokens = torch.from_numpy(np.array(init.token_ids, dtype=np.int64)).to(self._device)
        prompt, output = tokens[: init.num_prompt_tokens], tokens[init.num_prompt_tokens :]
        counts, mask = self.output_counts[init.slot], self.prompt_mask[init.slot]
        counts.zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        mask.zero_().index_fill_(0, prompt, True)


def _columns(params: SamplingParams) -> tuple[float, ...]:
    return (
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )
