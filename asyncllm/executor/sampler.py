"""Turns logits into tokens: every sampling parameter, vectorised over rows, each stage only where a row needs it.

    raw logits                                       (log-probabilities are taken here, by `logprobs.score`)
    banned tokens -> -inf, logit_bias added
    repetition:  z / r where z > 0, z * r elsewhere, for tokens of prompt or output (as transformers does)
    frequency, presence:  z - f * count - p * (count > 0), counts over the output alone (as vLLM does)
    temperature 0: argmax, the lowest id among equals; else z / temperature, then
    min_p:  drop z < max(z) + log(min_p)
    top_k:  keep the k largest
    top_p:  of those, renormalised, keep the fewest largest whose probabilities reach top_p, at least one
    draw:   argmax of z + Gumbel noise of (seed, position, token)            (see noise.py)

Wherever a cut falls between equal logits, lower ids stay. Half-precision models make equal logits an everyday thing, so
this is what keeps a row's draw the same whatever batch it is in. Engine thread only.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor.noise import CounterNoise, row_keys
from asyncllm.executor.sampling_rows import DrawGroup, Limits, PenaltyGroup, SamplingRows
from asyncllm.executor.slots import SlotState
from asyncllm.executor.topk import argmax, topk

# Candidates looked at for top_k and top_p, narrow to wide: sorting a whole vocabulary costs a CPU 8 ms a row, the best
# 64 of it 50 µs, and nearly every draw is settled there.
_WIDTHS = (64, 1024, 8192)
# Up to this many, candidates are gathered and put in id order; above, a mask over the vocabulary costs less.
_MAX_GATHERED = 1024


class Sampler:
    """Samples one token per row. V vocab, R rows that sample, r rows of a group."""

    def __init__(self, vocab_size: int, state: SlotState, device: torch.device) -> None:
        self._state = state
        self._device = device
        self._noise = CounterNoise(vocab_size, device)
        self._vocab_size = vocab_size
        # A device that runs ahead of the host must not be asked whether 64 were enough: there the sort is cheap.
        self._widths = (*_WIDTHS, vocab_size) if device.type == "cpu" else (vocab_size,)

    def sample(
        self, logits: Tensor, rows: SamplingRows, positions: npt.NDArray[np.int64], banned: dict[int, list[int]]
    ) -> Tensor:  # hot
        """Sampled token ids, [R] int64. Overwrites `logits` [R, V] float32.

        positions: [R], index of the sampled token in its sequence; banned: row -> token ids.
        """
        if banned:
            self._ban(logits, banned)
        if rows.bias is not None:
            logits.view(-1).index_add_(0, *rows.bias)
        if rows.penalties is not None:
            self._penalize(logits, rows.penalties)
        if not rows.groups:
            token_ids = argmax(logits)
        else:
            token_ids = self._draw_groups(logits, rows, positions)
        if rows.penalties is not None:
            self._state.count(rows.penalties.slots, token_ids[rows.penalties.rows])
        return token_ids

    def _ban(self, logits: Tensor, banned: dict[int, list[int]]) -> None:
        width = self._vocab_size
        flat = [row * width + token_id for row, token_ids in banned.items() for token_id in token_ids]
        logits.view(-1).index_fill_(0, torch.tensor(flat, dtype=torch.int64).to(self._device), -math.inf)

    def _penalize(self, logits: Tensor, group: PenaltyGroup) -> None:
        counts, prompt_mask = self._state.output_counts, self._state.prompt_mask
        assert counts is not None and prompt_mask is not None, "penalties without counts"
        z = logits.index_select(0, group.rows)  # [r, V]
        counts = counts.index_select(0, group.slots)  # [r, V]
        in_output = counts > 0
        if group.repetition is not None:
            seen = prompt_mask.index_select(0, group.slots).logical_or_(in_output)
            repeated = torch.where(z > 0, z / group.repetition, z * group.repetition)
            z = torch.where(seen, repeated, z)
        z.sub_(counts * group.frequency).sub_(in_output * group.presence)
        logits.index_copy_(0, group.rows, z)

    def _draw_groups(self, logits: Tensor, rows: SamplingRows, positions: npt.NDArray[np.int64]) -> Tensor:
        keys = row_keys(rows.seeds, positions)  # [R, 2]
        if len(rows.groups) == 1 and not len(rows.greedy):
            return self._draw(logits, rows.groups[0], keys.to(self._device))
        token_ids = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        if len(rows.greedy):
            token_ids[rows.greedy] = argmax(logits.index_select(0, rows.greedy))
        for group in rows.groups:
            drawn = self._draw(logits.index_select(0, group.rows), group, keys[group.rows_host].to(self._device))
            token_ids[group.rows] = drawn
        return token_ids

    def _draw(self, z: Tensor, group: DrawGroup, keys: Tensor) -> Tensor:
        """Token ids [r] drawn from logits z [r, V], which it overwrites."""
        if group.temperature is not None:
            z.div_(group.temperature)
        if group.log_min_p is not None:
            z.masked_fill_(z < z.amax(-1, keepdim=True) + group.log_min_p, -math.inf)
        if group.limits is None:
            return argmax(self._noise.race(z, keys))
        first = next(
            i for i, width in enumerate(self._widths) if width >= min(group.limits.min_width, self._vocab_size)
        )
        return self._draw_narrowed(z, group.limits, keys, self._widths[first:])

    def _draw_narrowed(self, z: Tensor, limits: Limits, keys: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Draw within top_k and top_p [r], looking at the widths[0] largest of z [r, V]; rows that need more go on."""
        width = min(widths[0], self._vocab_size)
        values, ids = topk(z, width)  # [r, width]
        threshold, num_equal = _cut(z, values, limits)
        if width <= _MAX_GATHERED:
            ids, order = ids.sort(-1)
            candidates = values.gather(1, order)
            scores = _keep(self._noise.race_among(candidates, ids, keys), candidates, threshold, num_equal)
            token_ids = ids.gather(1, argmax(scores).unsqueeze(1)).squeeze(1)
        else:
            token_ids = argmax(_keep(self._noise.race(z.clone(), keys), z, threshold, num_equal))
        if width == self._vocab_size:
            return token_ids
        # Settled once the narrowest candidate is below the cut: then every token equal to the cut was seen too.
        unsettled = (values[:, -1:] >= threshold).squeeze(1)
        if bool(unsettled.any()):
            rest = unsettled.nonzero().squeeze(1)
            token_ids[rest] = self._draw_narrowed(z[rest], limits.select(rest), keys[rest], widths[1:])
        return token_ids


def _cut(z: Tensor, values: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Where top_k and top_p cut: the smallest logit kept, and how many tokens of exactly that logit stay. [r, 1] each.

    z [r, V]; values [r, W], the W largest of each row, largest first.
    """
    width = values.shape[1]
    peak = values[:, :1]
    mass = (values - peak).exp_()  # [r, W], probabilities times a constant
    cumulated = mass.cumsum(-1)
    top_k = limits.top_k.clamp(max=width)
    total = cumulated.gather(1, top_k - 1)
    if limits.needs_total:
        total = torch.where(limits.has_top_k, total, (z - peak).exp_().sum(-1, keepdim=True))
    # A token stays while those before it have not reached top_p.
    num_kept = (cumulated[:, :-1] < total * limits.top_p).sum(-1, keepdim=True).add_(1)
    num_kept = torch.minimum(num_kept, top_k)
    # Nor does a banned token stay, whatever rounding made of the sums: a cut at -inf would never look settled.
    num_kept = torch.minimum(num_kept, (mass > 0).sum(-1, keepdim=True)).clamp_(min=1)
    threshold = values.gather(1, num_kept - 1)
    return threshold, num_kept - (values > threshold).sum(-1, keepdim=True)


def _keep(scores: Tensor, candidates: Tensor, threshold: Tensor, num_equal: Tensor) -> Tensor:
    """Scores of what was cut off set to -inf, in place. scores, candidates [r, C], in order of their ids."""
    equal = candidates == threshold
    kept = (candidates > threshold) | (equal & (equal.cumsum(-1) <= num_equal))
    return scores.masked_fill_(~kept, -math.inf)
