"""Norms in plain torch against their formulas, in the roundings of transformers."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from asyncllm.layers.norm import LayerNorm, RMSNorm

HIDDEN, EPS = 65, 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def loaded(norm: RMSNorm, weight: torch.Tensor) -> RMSNorm:
    norm.weight = nn.Parameter(weight, requires_grad=False)
    norm.prepare(fused=False)
    return norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norms_are_those_of_transformers(dtype: torch.dtype, plus_one: bool) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(7, HIDDEN)).to(dtype), (0.01 * torch.randn(HIDDEN)).to(dtype)
    reference = (Gemma3RMSNorm if plus_one else LlamaRMSNorm)(HIDDEN, EPS).to(dtype)
    reference.weight = nn.Parameter(weight)
    with torch.inference_mode():
        expected = reference(x)
        # One unit in the last place: half as often rounded, or a sum in another order.
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(loaded(RMSNorm(HIDDEN, EPS, plus_one), weight)(x), expected, **tolerance)


def test_what_is_added_to_one_is_not_rounded_away() -> None:
    norm = loaded(RMSNorm(HIDDEN, EPS, plus_one=True), torch.full((HIDDEN,), 2.0**-10, dtype=torch.bfloat16))
    assert (norm.weight == 1 + 2.0**-10).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_norm_behind_a_residual_add_is_that_of_the_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    norm = LayerNorm(HIDDEN, EPS)
    norm.weight, norm.bias = (nn.Parameter(torch.randn(HIDDEN).to(dtype), requires_grad=False) for _ in range(2))
    x, residual = torch.randn(2, 7, HIDDEN).to(dtype)
    total = x + residual
    torch.testing.assert_close(norm.add_norm(x, residual), norm(total))
    assert torch.equal(residual, total)
    wide = total.double()
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=0)
    expected = (wide - mean) / (variance + EPS).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(total), expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
