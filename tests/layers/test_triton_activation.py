"""Gated activations against torch's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from asyncllm.layers.triton_activation import FEW_ROWS, gelu_tanh_and_mul, silu_and_mul


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# The exponential of a very negative gate is infinite and its sigmoid 0, as meant; only the interpreter's numpy minds.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

# The interpreter truncates to bfloat16 where devices round.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
PAIRS = [(silu_and_mul, functional.silu), (gelu_tanh_and_mul, gelu_tanh)]
Activation = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(("kernel", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [1, 256, 576, 1536])
def test_gate_is_activated_and_multiplies_its_neighbour(
    device: torch.device, kernel: Activation, reference: Activation, dtype: torch.dtype, num_features: int
) -> None:
    torch.manual_seed(num_features)
    gate_up = (3 * torch.randn(2, 2 * num_features)).to(device, dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    expected = (reference(gate) * up).to(dtype)
    torch.testing.assert_close(kernel(gate_up), expected, rtol=max(torch.finfo(dtype).eps, 2e-6), atol=2e-6)


@pytest.mark.parametrize(("kernel", "reference"), PAIRS)
def test_wide_programs_of_many_rows_compute_the_same(
    device: torch.device, kernel: Activation, reference: Activation
) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(FEW_ROWS + 1, 2 * 1100, device="cpu").to(device)
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(kernel(gate_up), reference(gate) * up, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("kernel", "reference"), PAIRS)
def test_large_gates_saturate_instead_of_overflowing(
    device: torch.device, kernel: Activation, reference: Activation
) -> None:
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(kernel(gate_up), reference(gate), rtol=1e-6, atol=1e-6)
