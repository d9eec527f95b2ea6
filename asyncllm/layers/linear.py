"""A linear layer, possibly several of the checkpoint's stacked into one product.

On a CPU in bfloat16 the weight is packed once into oneDNN's blocked layout. Knows nothing of models. Engine thread.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.blocks import BlockRows


class Linear(nn.Module):
    """y = x Wᵀ + b over rows of tokens.

    `parts` names the checkpoint's layers that are stacked here, in order, with the rows each brings: `{"q_proj": 576,
    "k_proj": 192, "v_proj": 192}`. The loader fills them from tensors named beside this module.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, parts: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        assert parts is None or sum(parts.values()) == out_features, (parts, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.parts = parts
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: Tensor | None = None  # opaque oneDNN tensor
        self.blocks: list[BlockRows | None] = [None] * (1 if parts is None else len(parts))

    def keep_blocks(self, part: int, blocks: BlockRows) -> None:
        """Instead of a part of the weight, which is not filled then, what the checkpoint has."""
        self.blocks[part] = blocks

    def take_rows(self) -> list[BlockRows]:
        """Let go of the weight: as the checkpoint has it, or in 16 bits; see the function of this name."""
        assert self.weight is not None
        sizes = [self.out_features] if self.parts is None else list(self.parts.values())
        rows = take_rows(self.weight.detach(), sizes, self.blocks)
        self.weight, self.blocks = None, []
        return rows

    def prepare(self, fused: bool) -> None:
        """Pack the loaded weight where that is faster, and let go of the plain one.

        A tied embedding holds on to its table by itself. Measured on 2 Zen 4 cores, packed against plain, in µs:
        576 x 49152, 1 row: 905 against 3843, 8 rows: 1759 against 5132; 576 x 3072, 1 row: 46 against 99.
        """
        if self.weight is None or not can_pack(self.weight):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, in_features] -> [N, out_features]."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        assert self.weight is not None
        return functional.linear(x, self.weight, self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product exists here for this weight.

    float32 stays plain: the reference should be the plain product, and it gains little.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def take_rows(weight: Tensor, sizes: Sequence[int], blocks: Sequence[BlockRows | None]) -> list[BlockRows]:
    """A weight [N, K] whose parts, of `sizes` rows, came in blocks where there are some.

    All that is returned is of one kind, and to be thought of one below the other. Parts of several kinds become Q8_0;
    beside one that came in none, all become bfloat16, or float16 where the weight is that.
    """
    kept = [part for part in blocks if part is not None]
    if len(kept) == len(sizes):
        kinds = {part.kind for part in kept}
        return kept if len(kinds) == 1 else [part.in_eight_bits() for part in kept]
    for rows, part in zip(weight.split(list(sizes)), blocks):
        if part is not None:
            rows.copy_(part.values())
    return [BlockRows.of(weight)]
