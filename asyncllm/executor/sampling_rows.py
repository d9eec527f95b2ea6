"""Sampling parameters of one batch composition, gathered from the slots and sorted by what each row needs.

Built when the composition changes, reused by every step in between: steady decode pays nothing for parameters. Rows are
grouped so that a stage runs over the rows that need it and no others. Engine thread only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor import slots as column
from asyncllm.executor.narrowing import Limits
from asyncllm.executor.slots import SlotState

# Below this, logits divided by the temperature leave float32's useful range; such rows are greedy.
MIN_TEMPERATURE = 1e-5


@dataclass(slots=True)
class DrawGroup:
    """Rows with a temperature, r of the step's R."""

    rows: Tensor  # [r] int64
    rows_host: npt.NDArray[np.int64]
    temperature: Tensor | None  # [r, 1] float32; None where all are 1
    log_min_p: Tensor | None  # [r, 1] float32, log(0) = -inf where off; None where all are off
    limits: Limits | None  # None: drawn from the whole vocabulary


@dataclass(slots=True)
class PenaltyGroup:
    """Rows with any penalty, r of the step's R."""

    rows: Tensor  # [r] int64
    slots: Tensor  # [r] int64
    repetition: Tensor | None  # [r, 1] float32; None where all are 1
    frequency: Tensor  # [r, 1] float32
    presence: Tensor  # [r, 1] float32


@dataclass(slots=True)
class SamplingRows:
    """What the sampler must know about the R rows that sample in a step."""

    seeds: npt.NDArray[np.int64]  # [R]
    greedy: Tensor  # [g] int64, rows at temperature 0
    groups: list[DrawGroup]  # the rest: over the whole vocabulary, with top_k, with top_p alone
    penalties: PenaltyGroup | None
    bias: tuple[Tensor, Tensor] | None  # positions in the flattened [R * V] logits, int64, and what to add, float32

    @property
    def want_the_likeliest(self) -> bool:
        """Whether each row's token is the one whose logit, as the model has it, is largest."""
        return not self.groups and self.penalties is None and self.bias is None


def gather_rows(state: SlotState, slot_ids: list[int], vocab_size: int, device: torch.device) -> SamplingRows:
    """Parameters of the rows whose sequences sit in `slot_ids` [R]."""
    table = state.sampling[slot_ids]  # [R, 7]
    greedy = table[:, column.TEMPERATURE] < MIN_TEMPERATURE
    top_k = ~greedy & _has_top_k(table, vocab_size)
    top_p = ~greedy & ~top_k & (table[:, column.TOP_P] < 1)
    groups = [
        _draw_group(table, np.flatnonzero(mask), vocab_size, device)
        for mask in (~greedy & ~top_k & ~top_p, top_k, top_p)
        if mask.any()
    ]
    return SamplingRows(
        seeds=state.seeds[slot_ids],
        greedy=torch.from_numpy(np.flatnonzero(greedy)).to(device),
        groups=groups,
        penalties=_penalty_group(table, slot_ids, device),
        bias=_bias(state, slot_ids, vocab_size, device),
    )


def _column(values: npt.NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).unsqueeze(1).to(device)


def _draw_group(
    table: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], vocab_size: int, device: torch.device
) -> DrawGroup:
    table = table[rows]
    temperature, min_p = table[:, column.TEMPERATURE], table[:, column.MIN_P]
    log_min_p = np.log(min_p, out=np.full_like(min_p, -np.inf), where=min_p > 0)
    return DrawGroup(
        rows=torch.from_numpy(rows).to(device),
        rows_host=rows,
        temperature=_column(temperature, device) if (temperature != 1).any() else None,
        log_min_p=_column(log_min_p, device) if (min_p > 0).any() else None,
        limits=_limits(table, vocab_size, device),
    )


def _limits(table: npt.NDArray[np.float32], vocab_size: int, device: torch.device) -> Limits | None:
    """Limits of a group; its rows agree on whether they have a top_k."""
    top_k, top_p = table[:, column.TOP_K].astype(np.int64), table[:, column.TOP_P]
    has_top_k, has_top_p = _has_top_k(table, vocab_size), top_p < 1
    if not (has_top_k.any() or has_top_p.any()):
        return None
    return Limits(
        top_k=torch.from_numpy(top_k).unsqueeze(1).to(device) if has_top_k.any() else None,
        top_p=_column(np.where(has_top_p, top_p, np.float32(np.inf)), device) if has_top_p.any() else None,
        max_top_k=int(top_k[has_top_k].max(initial=0)),
    )


def _has_top_k(table: npt.NDArray[np.float32], vocab_size: int) -> npt.NDArray[np.bool_]:
    return (table[:, column.TOP_K] > 0) & (table[:, column.TOP_K] < vocab_size)


def _penalty_group(table: npt.NDArray[np.float32], slot_ids: list[int], device: torch.device) -> PenaltyGroup | None:
    repetition, frequency, presence = (table[:, c] for c in (column.REPETITION, column.FREQUENCY, column.PRESENCE))
    rows = np.flatnonzero((repetition != 1) | (frequency != 0) | (presence != 0))
    if not len(rows):
        return None
    return PenaltyGroup(
        rows=torch.from_numpy(rows).to(device),
        slots=torch.from_numpy(np.array(slot_ids, dtype=np.int64)[rows]).to(device),
        repetition=_column(repetition[rows], device) if (repetition[rows] != 1).any() else None,
        frequency=_column(frequency[rows], device),
        presence=_column(presence[rows], device),
    )


def _bias(state: SlotState, slot_ids: list[int], vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    entries = [
        (row * vocab_size + token_id, bias)
        for row, slot in enumerate(slot_ids)
        for token_id, bias in state.logit_bias[slot]
    ]
    if not entries:
        return None
    positions, biases = zip(*entries)
    return torch.tensor(positions, device=device), torch.tensor(biases, dtype=torch.float32, device=device)
