"""Feed-forward layers: gated as in Llama and its kin, and plain. Engine thread."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False, activation: str = "silu") -> None:
        """`activation`: a key of ACTIVATIONS."""
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias, parts)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self.activation = activation
        self._activate = ACTIVATIONS[activation]
        self._kernel: Callable[[Tensor], Tensor] | None = None

    def prepare(self, fused: bool) -> None:
        """Choose between a kernel, where there is one for this activation, and two operations."""
        if fused:
            from asyncllm.layers.triton_activation import gelu_tanh_and_mul, silu_and_mul

            self._kernel = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}.get(self.activation)

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        gate_up = self.gate_up_proj(x)
        if self._kernel is not None:
            return self.down_proj(self._kernel(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(self._activate(gate).mul_(up))


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, activation: str) -> None:
        """`activation`: a key of ACTIVATIONS."""
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self._activate = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        return self.down_proj(self._activate(self.up_proj(x)))
