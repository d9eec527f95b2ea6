"""Samples on the device, by Triton kernels and without asking the host: what `sampler.Sampler` is to plain torch.

Plain rows are sampled inside a captured graph. Rows that edit their logits (penalties, bias, bans, masks) or want
log-probabilities are sampled behind one; `Extras` says what for. Engine thread only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor import logprobs
from asyncllm.executor.base import StepPlan
from asyncllm.executor.device_slots import DeviceSlots
from asyncllm.executor.logprobs import Scores
from asyncllm.executor.noise import token_hashes
from asyncllm.executor.sampler import mask_words
from asyncllm.executor.staging import Ints, Staging
from asyncllm.layers.triton_logits import add_to_logits, apply_bitmask, count_tokens, penalize
from asyncllm.layers.triton_sampling import Kind, make_sample_scratch, sample
from asyncllm.types import Capacity


@dataclass(slots=True)
class Extras:
    """What some of the R rows that sample want besides a token; all [n] int32 but for the values."""

    edit_rows: Tensor  # logits to add to: row, token, value; -inf bans a token
    edit_tokens: Tensor
    edit_values: Tensor  # float32
    mask_rows: Tensor
    masks: Tensor  # [n, ceil(V / 32)] bits of the tokens that mask_rows may sample
    penalty_rows: Tensor
    penalty_slots: Tensor
    scored_rows: Tensor  # whose log-probabilities are wanted
    num_alternatives: int  # the most any of them wants


def wants_extras(plan: StepPlan, slots: DeviceSlots, sampling_slots: Ints) -> bool:  # hot
    """Whether any row needs more than a draw."""
    return bool(plan.banned or plan.masks or plan.logprob_rows or slots.edits_logits[sampling_slots].any())


def stage_extras(
    plan: StepPlan, slots: DeviceSlots, sampling: npt.NDArray[np.intp], sampling_slots: Ints, staging: Staging
) -> Extras:
    """Collect and send. `sampling` [R]: rows of the plan that sample."""
    index_of = {int(row): index for index, row in enumerate(sampling)}
    edits = [
        (index, token_id, bias)
        for index, slot in enumerate(sampling_slots.tolist())
        for token_id, bias in slots.logit_bias[slot]
    ]
    edits += [(index_of[row], token_id, -np.inf) for row, banned in plan.banned.items() for token_id in banned]
    edit_rows, edit_tokens, edit_values = zip(*edits) if edits else ((), (), ())
    penalty_rows = np.flatnonzero(slots.has_penalties[sampling_slots]).astype(np.int32)
    sent = staging.send(
        {
            "edit_rows": np.array(edit_rows, dtype=np.int32),
            "edit_tokens": np.array(edit_tokens, dtype=np.int32),
            "edit_values": np.array(edit_values, dtype=np.float32).view(np.int32),
            "mask_rows": np.array([index_of[row] for row in plan.masks], dtype=np.int32),
            "masks": mask_words(plan.masks.values(), slots.vocab_size),
            "penalty_rows": penalty_rows,
            "penalty_slots": sampling_slots[penalty_rows],
            "scored_rows": np.array([index_of[row] for row in plan.logprob_rows], dtype=np.int32),
        }
    )
    sent["edit_values"] = sent["edit_values"].view(torch.float32)
    return Extras(**sent, num_alternatives=max(plan.logprob_rows.values(), default=0))


class DeviceSampler:
    """One per executor. V vocab, R rows that sample; one with drafts counts several times."""

    def __init__(self, capacity: Capacity, slots: DeviceSlots, device: torch.device) -> None:
        self._slots = slots
        self._hashes = token_hashes(capacity.vocab_size).to(device)  # [V] int32
        self._scratch = make_sample_scratch(capacity.max_samples, capacity.vocab_size, device)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor, kind: Kind, out: Tensor) -> None:  # hot
        """Draw into out [R] int32 and the slots' last tokens.

        logits [R, V] in any precision; slots, positions [R] int32, the position is that of the token to be drawn.
        """
        state = self._slots
        sample(
            logits,
            slots,
            positions,
            state.floats,
            state.ints,
            self._hashes,
            kind,
            self._scratch,
            state.last_token,
            out,
        )

    def sample_with(
        self, logits: Tensor, slots: Tensor, positions: Tensor, kind: Kind, out: Tensor, extras: Extras
    ) -> Scores | None:
        """The same with extras; returns the scores of those rows that wanted them, under the raw model."""
        scored = extras.scored_rows
        raw = logits.index_select(0, scored) if len(scored) else None
        num_penalties = len(extras.penalty_rows)
        if num_penalties or len(extras.edit_rows) or len(extras.mask_rows):
            logits = logits.float()  # raw is a copy: a float32 model's logits are edited in place
        apply_bitmask(logits, extras.mask_rows, extras.masks)
        if len(extras.edit_rows):
            add_to_logits(logits, extras.edit_rows, extras.edit_tokens, extras.edit_values)
        state = self._slots
        if num_penalties:
            penalize(logits, extras.penalty_rows, extras.penalty_slots, state.floats, state.counts, state.prompt_mask)
        self.sample(logits, slots, positions, kind, out)
        if num_penalties:
            count_tokens(state.counts, extras.penalty_slots, out.index_select(0, extras.penalty_rows))
        if raw is None:
            return None
        return logprobs.score_on_device(raw, out.index_select(0, scored), extras.num_alternatives)
