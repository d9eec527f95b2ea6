"""Low-rank adapters beside a linear layer: a batch may mix tokens of several adapters with tokens of none.

y = x Wᵀ + b + s · (x Aᵀ) Bᵀ with the A, B and s of the token's adapter (https://arxiv.org/abs/2106.09685). The A of all
adapters lie stacked in one matrix and so do the B, so that a step is two narrow products whatever is in it, and nothing
depends on values: graphs capture it like anything else. The price of every token is proportional to the sum of ranks.
Knows nothing of files. Engine thread.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asyncllm.layers.linear import Linear


class AdapterMask:
    """Which columns of the stacked adapters the tokens of a step take; shared by all layers. R columns."""

    def __init__(
        self, spans: Sequence[tuple[int, int]], num_columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`spans`: [first, end) of the columns of each adapter, of which there are `num_columns` in all."""
        self._table = torch.zeros(1 + len(spans), num_columns, dtype=dtype, device=device)
        for number, (first, end) in enumerate(spans, 1):
            self._table[number, first:end] = 1
        self.columns: Tensor | None = None  # [N, 1, R], 1 where a column is the token's, else 0; None: no token has any

    def choose(self, adapters: Tensor | None) -> None:  # hot
        """Say whose the tokens of the next step are: adapters [N], from 1, 0 = the base; None: all are the base's."""
        self.columns = None if adapters is None else self._table.index_select(0, adapters).unsqueeze(1)


class LoRALinear(nn.Module):
    """A linear layer with all adapters that change it.

    Where it stacks several of the checkpoint's layers, an adapter may have an A and a B for each: P parts, which lie
    one behind the other. Columns of other adapters, and of adapters that leave this layer alone, hold zeros in B.
    """

    def __init__(
        self, base: Linear, down: Tensor, up: Tensor, parts: Sequence[tuple[int, int]], mask: AdapterMask
    ) -> None:
        """down [P * R, in_features]; up [P * R, out_features], scaled; parts: first row and number of rows of each."""
        super().__init__()
        self.base = base
        with torch.device("meta"):
            self.down = Linear(base.in_features, len(down))
        self.down.weight = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.parts = parts
        self._mask = mask

    def changes(self, first: int, end: int) -> list[tuple[int, Tensor, Tensor]]:
        """Of the adapter with columns [first, end): from a row on A [rank, in] and scaled B [rows, rank]; no zeros.

        Before `prepare`.
        """
        assert self.down.weight is not None
        stride = len(self.up) // len(self.parts)
        found = []
        for number, (row, num_rows) in enumerate(self.parts):
            columns = slice(number * stride + first, number * stride + end)
            up = self.up[columns, row : row + num_rows].t()
            if up.any():
                found.append((row, self.down.weight[columns], up))
        return found

    def prepare(self, fused: bool) -> None:
        """As `Linear`."""
        self.down.prepare(fused)

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, in_features] -> [N, out_features]. A token without adapter gets exactly what the layer alone gives it."""
        out = self.base.forward(x)
        columns = self._mask.columns
        if columns is None:
            return out
        narrow = self.down.forward(x)  # [N, P * R]
        narrow.view(len(x), -1, columns.shape[2]).mul_(columns)
        return out.addmm_(narrow, self.up)
