import pytest
import torch

from asyncllm.executor.narrowing import Limits, cut_nucleus, cut_sorted


def logits_of(scale, step=None, rows=6, width=5000):
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * scale
    return z if step is None else (z / step).round() * step


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_nucleus_cut_by_buckets_is_the_one_a_full_sort_finds(scale, step, top_p):
    z = logits_of(scale, step)
    z[0, ::2] = -torch.inf
    limit = torch.full((6, 1), top_p)
    by_sort = cut_sorted(z, z.sort(-1, descending=True).values, Limits(None, limit, 0))
    by_bucket = cut_nucleus(z, limit)
    kept_by_sort = (z > by_sort.threshold).sum(-1, keepdim=True) + by_sort.num_equal
    kept_by_bucket = (z > by_bucket.threshold).sum(-1, keepdim=True) + by_bucket.num_equal
    # Sums of thousands of float32 taken in another order differ in the last digit, which may move a cut by a token.
    assert (kept_by_sort - kept_by_bucket).abs().max() <= 1
    assert kept_by_bucket.min() >= 1


def test_a_row_with_everything_banned_but_one_keeps_that_one():
    z = torch.full((1, 500), -torch.inf)
    z[0, 77] = -3.0
    for cut in (
        cut_nucleus(z, torch.tensor([[0.99]])),
        cut_sorted(z, z.sort(-1, descending=True).values, Limits(torch.tensor([[5]]), torch.tensor([[0.99]]), 5)),
        cut_sorted(z, z.sort(-1, descending=True).values, Limits(torch.tensor([[5]]), None, 5)),
    ):
        assert cut.threshold.tolist() == [[-3.0]]
        assert cut.num_equal.tolist() == [[1]]


def test_a_cut_drops_equals_with_higher_ids():
    z = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    cut = cut_sorted(z, z.sort(-1, descending=True).values, Limits(torch.tensor([[3]]), None, 3))
    assert cut.drop(z.clone(), z).tolist() == [[1.0, 2.0, 1.0, -torch.inf, -torch.inf]]
