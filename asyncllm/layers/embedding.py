"""Token embedding. Engine thread."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Embedding(nn.Module):
    """A table of vectors, one per token id or position, all multiplied by `scale`."""

    def __init__(self, num_rows: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size), requires_grad=False)

    def prepare(self, fused: bool) -> None:
        """Round the scale as the weights are rounded: models were trained with the rounded one."""
        self.scale = torch.tensor(self.scale, dtype=self.weight.dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        """[N] int64 or int32 -> [N, hidden]."""
        vectors = functional.embedding(ids, self.weight)
        return vectors if self.scale == 1.0 else vectors.mul_(self.scale)
