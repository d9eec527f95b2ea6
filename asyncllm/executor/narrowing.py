"""Where top_k and top_p cut a row of logits.

A cut is a threshold and the number of tokens of exactly that logit that stay, those with the lowest ids. Half-precision
models make equal logits an everyday thing: without the number, which of them survive would depend on the batch. Engine
thread only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Buckets of 1/8 nat below the peak; the last one, 128 nats down, takes everything whose probability underflows.
_BUCKETS_PER_NAT = 8
_NUM_BUCKETS = 1024


@dataclass(slots=True)
class Limits:
    """top_k, top_p or both, of r rows; either all of the rows have a top_k or none has."""

    top_k: Tensor | None  # [r, 1] int64, 1 … V - 1
    top_p: Tensor | None  # [r, 1] float32; infinity where off, since rounded sums may reach 1 before the last token
    max_top_k: int  # 0 where top_k is None

    def select(self, rows: Tensor) -> "Limits":
        """The limits of some of the rows."""
        return Limits(
            None if self.top_k is None else self.top_k[rows],
            None if self.top_p is None else self.top_p[rows],
            self.max_top_k,
        )


@dataclass(slots=True)
class Cut:
    """What stays of r rows: logits above the threshold, and the first few of those equal to it."""

    threshold: Tensor  # [r, 1] float32
    num_equal: Tensor  # [r, 1] int64

    def select(self, rows: Tensor) -> "Cut":
        """The cuts of some of the rows."""
        return Cut(self.threshold[rows], self.num_equal[rows])

    def drop(self, scores: Tensor, z: Tensor) -> Tensor:
        """Set the scores of what is cut off to -inf, in place. scores, z [r, C], in order of their token ids."""
        equal = z == self.threshold
        kept = (z > self.threshold).logical_or_(equal & (equal.cumsum(-1) <= self.num_equal))
        return scores.masked_fill_(kept.logical_not_(), -torch.inf)


def cut_sorted(z: Tensor, values: Tensor, limits: Limits) -> Cut:
    """Cut by the largest logits of each row: z [r, V]; values [r, W], the W > max_top_k largest, largest first.

    Without top_k the cut may lie beyond W; the threshold is then values[:, -1], and `cut_nucleus` finds the true one.
    """
    peak = values[:, :1]
    mass = (values - peak).exp_()  # [r, W], probabilities times a constant
    # A banned token never stays, whatever rounding makes of the sums.
    num_kept = (mass > 0).sum(-1, keepdim=True)
    if limits.top_k is not None:
        num_kept = torch.minimum(num_kept, limits.top_k)
    if limits.top_p is not None:
        cumulated = mass.cumsum(-1)
        if limits.top_k is not None:
            total = cumulated.gather(1, limits.top_k - 1)
        else:
            total = (z - peak).exp_().sum(-1, keepdim=True)
        # A token stays while those before it have not reached top_p.
        num_nucleus = (cumulated[:, :-1] < total * limits.top_p).sum(-1, keepdim=True).add_(1)
        num_kept = torch.minimum(num_kept, num_nucleus)
    threshold = values.gather(1, num_kept.clamp_(min=1) - 1)
    return Cut(threshold, num_kept - (values > threshold).sum(-1, keepdim=True))


def cut_nucleus(z: Tensor, top_p: Tensor) -> Cut:
    """Cut rows with top_p alone, however wide their nucleus, without sorting them. z [r, V]; top_p [r, 1].

    Probabilities are summed by bucket of logits; only the bucket in which the sum reaches top_p is sorted. Takes 0.3 ms
    a row on a CPU where a sort of 49152 takes 8. Asks the device for sizes, so it is for CPUs.
    """
    cuts = [_cut_row(row, p) for row, p in zip(z, top_p)]
    return Cut(torch.stack([threshold for threshold, _ in cuts]), torch.stack([num_equal for _, num_equal in cuts]))


def _cut_row(z: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold and number of equals, [1] each, of z [V]."""
    depth = z.max() - z  # [V], nats below the peak
    # Equal logits share a bucket, and larger ones never come after smaller ones.
    bucket_of = (depth * _BUCKETS_PER_NAT).clamp_(max=_NUM_BUCKETS - 1).to(torch.int64)
    mass = depth.neg_().exp_()
    needed = mass.sum() * top_p  # [1]
    cumulated = torch.zeros(_NUM_BUCKETS).scatter_add_(0, bucket_of, mass).cumsum(0)
    bucket = min(int(torch.searchsorted(cumulated, needed)), int(bucket_of.max()))
    inside = bucket_of == bucket
    values, order = z[inside].sort(descending=True)
    before = cumulated[bucket - 1] if bucket else 0.0
    reached = mass[inside][order].cumsum(0) + before
    num_kept = (reached[:-1] < needed).sum(0, keepdim=True).add_(1)
    threshold = values.gather(0, num_kept - 1)
    return threshold, num_kept - (values > threshold).sum()
