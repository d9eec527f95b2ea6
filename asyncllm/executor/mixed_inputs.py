"""Lays out what a step with prompts needs beside its tokens: new sequences, block tables, rows to sample and score.

Sizes vary from step to step, so nothing of this is captured. Engine thread only.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from asyncllm.executor.base import StepPlan
from asyncllm.executor.drafts import Indices, draft_arrays
from asyncllm.executor.rows import RowArrays
from asyncllm.executor.staging import Ints, Staging

_NO_DRAFTS = np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp), np.empty((0, 0), dtype=np.intp)


@dataclass(slots=True)
class MixedInputs:
    """On the device, all int32. R samples: one of a row that samples, several of one with drafts."""

    new_slots: Tensor  # [n]
    new_rows: Tensor  # [n, 16], their parameters
    writes: Tensor  # [3, W], of the block table
    sampling_tokens: Tensor  # [R], query tokens whose hidden state is sampled
    sampling_slots: Tensor  # [R]
    sampling_positions: Tensor  # [R]
    draft_slots: Tensor  # [d], of rows with drafts; see `drafts.draft_arrays`
    draft_starts: Tensor  # [d]
    drafts: Tensor  # [d, K]
    scored_tokens: Tensor  # [M], query tokens whose successor in the prompt is scored
    scored_targets: Tensor  # [M]
    histories: list[tuple[int, int, Tensor]]  # slot, prompt tokens, tokens [T], of new sequences with penalties


def stage_mixed(
    plan: StepPlan,
    rows: RowArrays,
    sampling: Indices,
    num_behind: Indices | None,
    new_rows: Ints,
    staging: Staging,
) -> MixedInputs:
    """Lay out and send. sampling, num_behind [R] from `sampling_places`; new_rows [n, 16], those of new sequences."""
    last_tokens, positions = (rows.query_starts + rows.query_lens - 1)[sampling], rows.seq_lens[sampling]
    slots, starts, drafts = _NO_DRAFTS
    if num_behind is not None:
        last_tokens, positions = last_tokens - num_behind, positions - num_behind
        slots, starts, drafts = draft_arrays(plan, sampling)
    with_history = [init for init in plan.new_slots if init.params.has_penalties]
    scored_tokens, scored_targets = _scored_tokens(plan, rows.query_starts)
    arrays = {
        "new_slots": np.array([init.slot for init in plan.new_slots], dtype=np.int32),
        "new_rows": new_rows,
        "writes": np.array(plan.block_writes, dtype=np.int32).reshape(-1, 3).T,
        "sampling_tokens": last_tokens,
        "sampling_slots": rows.slots[sampling],
        "sampling_positions": positions,
        "draft_slots": slots,
        "draft_starts": starts,
        "drafts": drafts,
        "scored_tokens": scored_tokens,
        "scored_targets": scored_targets,
    }
    histories = {f"{init.slot}": np.array(init.token_ids, dtype=np.int32) for init in with_history}
    sent = staging.send(arrays | histories)
    return MixedInputs(
        **{name: sent[name] for name in arrays},
        histories=[(init.slot, init.num_prompt_tokens, sent[f"{init.slot}"]) for init in with_history],
    )


def _scored_tokens(plan: StepPlan, query_starts: Ints) -> tuple[Ints, Ints]:
    """Query tokens whose logits are scored, and the prompt's next token for each."""
    wanted = plan.prompt_logprob_rows
    tokens = [int(query_starts[row]) + i for row, (_, targets) in wanted.items() for i in range(len(targets))]
    targets = [target for _, row_targets in wanted.values() for target in row_targets]
    return np.array(tokens, dtype=np.int32), np.array(targets, dtype=np.int32)
