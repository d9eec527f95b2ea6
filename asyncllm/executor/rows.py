"""The rows of a plan as arrays, and where it samples. Knows plans; no torch. Engine thread only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncllm.executor.base import StepPlan
from asyncllm.executor.drafts import sampling_places

Ints = npt.NDArray[Any]


@dataclass(slots=True)
class RowArrays:
    """The rows of a plan, [S] each, int32 for a GPU and int64 for torch on a CPU."""

    slots: Ints
    computed: Ints
    query_lens: Ints
    seq_lens: Ints
    query_starts: Ints  # first query token of each row

    @classmethod
    def of(cls, plan: StepPlan, dtype: type[np.signedinteger[Any]]) -> "RowArrays":
        """From a plan's lists."""
        computed = np.array(plan.num_computed_tokens, dtype=dtype)
        query_lens = np.array(plan.num_query_tokens, dtype=dtype)
        query_starts = np.cumsum(query_lens, dtype=dtype) - query_lens
        return cls(np.array(plan.slots, dtype=dtype), computed, query_lens, computed + query_lens, query_starts)


@dataclass(slots=True)
class SamplingPlaces:
    """Where a step samples: R places, one of a row that samples, several of one with drafts."""

    rows: Ints  # [R], rows of the plan
    slots: Ints  # [R]
    tokens: Ints | None  # [R], query token whose hidden state is sampled; None: all of them, in order
    positions: Ints  # [R], index of the sampled token in its sequence

    @classmethod
    def of(cls, plan: StepPlan, rows: RowArrays) -> "SamplingPlaces":  # hot
        """A plan's, whose rows these are."""
        if plan.num_decode_rows == len(rows.slots) and all(plan.samples):
            return cls(np.arange(len(rows.slots)), rows.slots, None, rows.seq_lens)
        chosen, num_behind = sampling_places(plan)
        tokens, positions = (rows.query_starts + rows.query_lens - 1)[chosen], rows.seq_lens[chosen]
        if num_behind is not None:
            tokens, positions = tokens - num_behind, positions - num_behind
        return cls(chosen, rows.slots[chosen], tokens, positions)
