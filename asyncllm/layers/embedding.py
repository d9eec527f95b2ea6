"""Token embedding. Engine thread."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.blocks import BlockRows
from asyncllm.layers.linear import take_rows


class Embedding(nn.Module):
    """A table of vectors, one per token id or position, all multiplied by `scale`."""

    def __init__(self, num_rows: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(num_rows, hidden_size), requires_grad=False)
        self._blocks: list[BlockRows | None] = [None]

    def keep_blocks(self, part: int, blocks: BlockRows) -> None:
        """Instead of the weight, what the checkpoint has. `part`: 0."""
        self._blocks[part] = blocks

    def take_rows(self) -> list[BlockRows]:
        """Let go of the weight: as the checkpoint has it, or in 16 bits."""
        assert self.weight is not None
        rows = take_rows(self.weight.detach(), [len(self.weight)], self._blocks)
        self.weight, self._blocks = None, []
        return rows

    def prepare(self, fused: bool) -> None:
        """Round the scale as the weights are rounded: models were trained with the rounded one."""
        assert self.weight is not None
        self.scale = torch.tensor(self.scale, dtype=self.weight.dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        """[N] int64 or int32 -> [N, hidden]."""
        assert self.weight is not None
        vectors = functional.embedding(ids, self.weight)
        return vectors if self.scale == 1.0 else vectors.mul_(self.scale)
