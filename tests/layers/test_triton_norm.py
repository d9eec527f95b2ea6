"""RMS norms against `torch.rms_norm`."""

import pytest
import torch

from asyncllm.layers.triton_norm import add_rms_norm, rms_norm

EPS = 1e-5
# The interpreter truncates to bfloat16 where devices round.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One unit in the last place: sums in another order may tip a rounding."""
    return {"rtol": max(torch.finfo(dtype).eps, 1e-6), "atol": 1e-6}


@pytest.mark.parametrize("num_features", [1, 64, 576, 960, 1024, 4096, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_torchs_for_any_width(device: torch.device, num_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_features)
    x = torch.randn(3, num_features).to(device, dtype)
    weight = torch.rand(num_features).to(device, dtype)
    expected = torch.rms_norm(x, (num_features,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_grows_in_place_and_the_norm_is_that_of_the_rounded_sum(
    device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 576).to(device, dtype).unbind()
    weight = torch.rand(576).to(device, dtype)
    total = x + residual
    before = x.clone()
    normed = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    torch.testing.assert_close(normed, torch.rms_norm(total, (576,), weight, EPS), **tolerance(dtype))


def test_a_row_of_zeros_stays_finite(device: torch.device) -> None:
    normed = rms_norm(torch.zeros(2, 96, device=device), torch.ones(96, device=device), EPS)
    assert torch.equal(normed, torch.zeros_like(normed))


def test_squares_beyond_the_range_of_half_precision_do_not_overflow(device: torch.device) -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16, device=device)
    normed = rms_norm(x, torch.ones(64, dtype=torch.float16, device=device), EPS)
    assert torch.equal(normed, torch.ones_like(normed))
