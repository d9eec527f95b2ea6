"""The embedding's scale."""

import torch
from torch import nn

from asyncllm.layers.embedding import Embedding


def test_a_scale_is_rounded_as_the_weights_are_before_it_multiplies() -> None:
    torch.manual_seed(0)
    weight, ids = torch.randn(50, 3072).bfloat16(), torch.tensor([3, 49, 3])
    embedding = Embedding(50, 3072, scale=3072**0.5)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.prepare(fused=False)
    assert embedding.scale == 55.5  # of 55.43
    assert torch.equal(embedding(ids), weight[ids] * torch.tensor(55.5).bfloat16())
    assert torch.equal(embedding.weight, weight)
