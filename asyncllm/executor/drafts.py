"""Rows with drafts: at which query tokens a step samples, and what a slot remembers once its drafts are verified.

Nothing here rejects or accepts for good: the host does, by the same rule. Engine thread only.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor.base import StepPlan

Indices = npt.NDArray[np.intp]


def sampling_places(plan: StepPlan) -> tuple[Indices, Indices | None]:  # hot
    """Where a step samples: rows of the plan [R], and how many query tokens before its row's last each sample is [R].

    A row with k drafts comes k + 1 times, its first sample first. None: every row that samples does so at its last.
    """
    rows = np.flatnonzero(plan.samples)
    if not plan.drafts:
        return rows, None
    counts = np.ones(len(plan.slots), dtype=np.intp)
    counts[list(plan.drafts)] += [len(draft) for draft in plan.drafts.values()]
    counts = counts[rows]
    ends = np.cumsum(counts)
    return np.repeat(rows, counts), np.repeat(ends, counts) - 1 - np.arange(ends[-1])


def draft_arrays(plan: StepPlan, rows: Indices) -> tuple[Indices, Indices, Indices]:
    """What `settle` needs: slots [n], index of each first sample [n], and drafts [n, K] with -1 behind shorter ones.

    rows [R], from `sampling_places`.
    """
    drafts = list(plan.drafts.values())
    table = np.full((len(drafts), max(map(len, drafts))), -1, dtype=np.intp)
    for row, draft in zip(table, drafts):
        row[: len(draft)] = draft
    slots = np.array([plan.slots[row] for row in plan.drafts], dtype=np.intp)
    return slots, np.searchsorted(rows, list(plan.drafts)), table


def settle(sampled: Tensor, last_token: Tensor, slots: Tensor, starts: Tensor, drafts: Tensor) -> None:
    """Leave in each slot the sample behind its right drafts: those that equal the samples before them.

    sampled [R] token ids; last_token [L], written; the others as `draft_arrays` has them, on the device. Never asks it.
    """
    places = starts[:, None] + torch.arange(drafts.shape[1], device=starts.device)  # [n, K]
    right = sampled[places.clamp_(max=len(sampled) - 1)] == drafts
    num_right = right.int().cumprod(1).sum(1)
    last_token.index_copy_(0, slots.long(), sampled[starts + num_right].to(last_token.dtype))


def by_row(
    plan_drafts: dict[int, list[int]], rows: list[int], sampled: list[int], num_rows: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Samples [R] as `StepResult` has them: one per row, and lists for the rows with drafts."""
    token_ids = [-1] * num_rows
    verified: dict[int, list[int]] = {row: [] for row in plan_drafts}
    for row, token_id in zip(rows, sampled):
        if row in verified:
            verified[row].append(token_id)
        else:
            token_ids[row] = token_id
    return token_ids, verified
