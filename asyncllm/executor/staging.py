"""Lays out what a step sends to the device: integers in pinned memory, in one copy.

Every array begins at 16 bytes, whatever its length: a kernel is compiled anew for pointers that are aligned otherwise.
Arithmetic on rows happens in numpy, which on a few hundred integers costs a fraction of torch's operations. Engine
thread only.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor.base import StepPlan
from asyncllm.executor.device import Device

Ints = npt.NDArray[np.int32]

_ALIGNED = 4  # integers in 16 bytes
# Rows of a decode step's layout: slots, lengths, and three of block table writes.
NUM_DECODE_ROWS = 5


def aligned(length: int) -> int:
    """`length` integers, up to the next 16 bytes."""
    return -(-length // _ALIGNED) * _ALIGNED


class Staging:
    """Pinned memory for one step in flight; free again once that step was waited for."""

    def __init__(self, device: Device, num_ints: int) -> None:
        """`num_ints`: what most steps need; it grows by itself."""
        self._device = device
        self._pinned = device.pinned((num_ints,), torch.int32)
        self._used = 0

    def reset(self) -> None:
        """Begin another step."""
        self._used = 0

    def reserve(self, num_ints: int) -> tuple[Tensor, Ints]:
        """The next `num_ints` integers, as tensor and as array."""
        if self._used + num_ints > len(self._pinned):
            # What was handed out before stays alive with its views.
            self._pinned = self._device.pinned((2 * (self._used + num_ints),), torch.int32)
            self._used = 0
        part = self._pinned[self._used : self._used + num_ints]
        self._used += num_ints
        return part, part.numpy()

    def send(self, arrays: Mapping[str, Ints]) -> dict[str, Tensor]:
        """Copy arrays to fresh device memory, all at once; returns a device tensor for each, of its shape."""
        sizes = [aligned(array.size) for array in arrays.values()]
        pinned, host = self.reserve(sum(sizes))
        start = 0
        for array, size in zip(arrays.values(), sizes):
            host[start : start + array.size] = array.ravel()
            start += size
        target = torch.empty(len(pinned), dtype=torch.int32, device=self._device.torch_device)
        self._device.upload(target, pinned)
        return {
            name: part[: array.size].view(array.shape)
            for (name, array), part in zip(arrays.items(), target.split(sizes))
        }


def fill_decode(host: Ints, plan: StepPlan, padded: int, padding_slot: int) -> None:  # hot
    """Write a decode step of `padded` rows into host [5 * aligned(padded)]."""
    stride = aligned(padded)
    slots, seq_lens, *writes = host.reshape(NUM_DECODE_ROWS, stride)
    num_rows, num_writes = len(plan.slots), len(plan.block_writes)
    slots[:num_rows] = plan.slots
    slots[num_rows:] = padding_slot
    seq_lens[:num_rows] = plan.num_computed_tokens
    seq_lens[:num_rows] += 1
    seq_lens[num_rows:] = 0
    writes[0][num_writes:] = -1
    if num_writes:
        host.reshape(NUM_DECODE_ROWS, stride)[2:, :num_writes] = np.array(plan.block_writes, dtype=np.int32).T
