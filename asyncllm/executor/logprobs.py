"""Log-probabilities of the raw model: of a given token, its rank, and the best alternatives.

Never holds a [rows, vocab] log-softmax: a row needs its logsumexp and a few gathered logits. Engine thread only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.executor.topk import topk
from asyncllm.types import TokenLogprobs

# Wider than any number of alternatives the API allows, so that ties at the cut are ordered by id, not by accident.
_MIN_WIDTH = 32


@dataclass(slots=True)
class Scores:
    """Rows scored on the device; M rows, A the most alternatives any of them wants."""

    token_ids: Tensor  # [M] int64
    logprobs: Tensor  # [M] float32
    ranks: Tensor  # [M] int64, 1 = most probable; equal logits share the better rank
    top_token_ids: Tensor  # [M, A] int64, most probable first, then by id
    top_logprobs: Tensor  # [M, A] float32

    def map(self, function: Callable[[Tensor], Tensor]) -> "Scores":
        """The same with another tensor in every place."""
        return Scores(
            function(self.token_ids),
            function(self.logprobs),
            function(self.ranks),
            function(self.top_token_ids),
            function(self.top_logprobs),
        )

    def to_host(self, num_alternatives: list[int]) -> list[TokenLogprobs]:
        """One entry per row with as many alternatives as it wants. Waits for the device."""
        columns = (self.token_ids, self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        return [
            TokenLogprobs(token_id, logprob, rank, top_ids[:wanted], top_logprobs[:wanted])
            for token_id, logprob, rank, top_ids, top_logprobs, wanted in zip(
                *(column.tolist() for column in columns), num_alternatives
            )
        ]


def score(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> Scores:
    """Score token_ids [M] under logits [M, V] float32, which stay as they are."""
    norm = logits.logsumexp(-1, keepdim=True)  # [M, 1]
    chosen = logits.gather(1, token_ids.unsqueeze(1))  # [M, 1]
    ranks = (logits > chosen).sum(-1).add_(1)
    top_values, top_ids = _ordered_topk(logits, num_alternatives)
    return Scores(token_ids, (chosen - norm).squeeze(1), ranks, top_ids, top_values - norm)


def score_on_device(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> Scores:
    """`score` by a kernel, for logits of any precision; token_ids [M] int32."""
    # Here, as triton is not installed everywhere.
    from asyncllm.layers.triton_logits import score as score_kernel

    token_logprobs, ranks = score_kernel(logits, token_ids)
    chosen = logits.gather(1, token_ids.long().unsqueeze(1)).float()  # [M, 1]
    norm = chosen - token_logprobs.unsqueeze(1)
    top_values, top_ids = _ordered_topk(logits, num_alternatives)
    return Scores(token_ids, token_logprobs, ranks, top_ids, top_values.float() - norm)


def _ordered_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k by (value descending, id ascending): values and ids, [M, k]."""
    if k == 0:
        return logits[:, :0], torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    k = min(k, logits.shape[1])
    values, ids = topk(logits, min(max(k + 1, _MIN_WIDTH), logits.shape[1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k]


def concatenate(parts: list[Scores]) -> Scores:
    """Rows of all parts, in order; all parts have the same number of alternatives."""
    if len(parts) == 1:
        return parts[0]
    return Scores(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
        torch.cat([part.top_token_ids for part in parts]),
        torch.cat([part.top_logprobs for part in parts]),
    )
