"""Sums of hidden states over runs of a step's tokens, of which embeddings are made. Engine thread only."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def pool(hidden: Tensor, ranges: Mapping[int, tuple[int, int]], query_starts: npt.NDArray[Any]) -> Tensor:
    """Sum hidden [N, hidden] over [first, end) of each row's query tokens: [len(ranges), hidden] float32.

    Each sum is a reduction of its own, so it is the same whatever else the step computes.
    """
    sums = torch.empty((len(ranges), hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    for target, (row, (first, end)) in zip(sums, ranges.items()):
        start = int(query_starts[row])
        torch.sum(hidden[start + first : start + end], 0, dtype=torch.float32, out=target)
    return sums
