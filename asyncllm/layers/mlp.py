"""The gated feed-forward layer of Llama and its kin. Engine thread."""

from types import ModuleType

from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.linear import Linear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias, parts)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self._kernels: ModuleType | None = None

    def prepare(self, fused: bool) -> None:
        """Choose between a kernel and two operations."""
        if fused:
            from asyncllm.layers import triton_activation

            self._kernels = triton_activation

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        gate_up = self.gate_up_proj(x)
        if self._kernels is not None:
            return self.down_proj(self._kernels.silu_and_mul(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate).mul_(up))
