import pytest
import torch

from asyncllm.executor.topk import argmax, topk

SIZES = [1, 63, 64, 65, 8191, 8192, 16384, 16400, 49152, 49153]


def random_logits(rows, width, quantized, seed=0):
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4
    return z.mul(2).round().div(2) if quantized else z


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("quantized", [False, True])
def test_argmax_is_the_first_of_the_largest(width, quantized):
    z = random_logits(5, width, quantized)
    expected = [row.index(max(row)) for row in z.tolist()]
    assert argmax(z).tolist() == expected


def test_argmax_finds_the_largest_in_the_ragged_end():
    z = torch.zeros(3, 16384 + 7)
    z[0, -1] = z[1, 16384] = z[2, 16383] = 1
    assert argmax(z).tolist() == [16390, 16384, 16383]


def test_argmax_prefers_the_body_to_an_equal_in_the_ragged_end():
    z = torch.zeros(1, 16384 + 7)
    z[0, [9000, 16388]] = 1
    assert argmax(z).tolist() == [9000]


def test_argmax_of_a_row_that_is_banned_but_for_one():
    z = torch.full((1, 49152), -torch.inf)
    z[0, 40000] = -1e30
    assert argmax(z).tolist() == [40000]


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("quantized", [False, True])
def test_topk_values_are_exact_and_indices_point_at_them(width, quantized):
    z = random_logits(4, width, quantized, seed=1)
    for k in (1, 20, 64, 1024):
        if k > width:
            continue
        values, indices = topk(z, k)
        assert torch.equal(values, z.topk(k).values)
        assert torch.equal(z.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())


def test_topk_of_a_row_whose_largest_all_lie_in_one_block_or_in_the_ragged_end():
    z = torch.zeros(2, 32768 + 33)
    z[0, 640:704] = torch.arange(1.0, 65.0)
    z[1, -33:] = torch.arange(1.0, 34.0)
    values, indices = topk(z, 64)
    assert indices[0].tolist() == list(range(703, 639, -1))
    assert indices[1, :33].tolist() == list(range(32800, 32767, -1))
    assert values[1, 33:].eq(0).all()
