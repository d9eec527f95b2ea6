"""A linear layer, possibly several of the checkpoint's stacked into one product.

On a CPU in bfloat16 the weight is packed once into oneDNN's blocked layout; where the checkpoint has it in 4-bit
blocks, products of few rows read those instead. Knows nothing of models. Engine thread.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.blocks import OUT_MULTIPLE, BlockProduct, BlockRows, max_rows


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
        self._blocks: dict[int, BlockRows] = {}  # by the number of the part, until `prepare`
        self.block_product: BlockProduct | None = None  # of up to _max_block_rows rows
        self._max_block_rows = 0

    def keep_blocks(self, part: int, blocks: BlockRows) -> None:
        """Beside the loaded weight, the same values as the checkpoint has them."""
        self._blocks[part] = blocks

    def block_rows(self) -> list[Tensor]:
        """Rows of bytes, one for each output, of all that came in blocks; empty unless all did."""
        num_parts = 1 if self.parts is None else len(self.parts)
        return [self._blocks[part].rows for part in range(num_parts)] if len(self._blocks) == num_parts else []

    def prepare(self, fused: bool) -> None:
        """Pack the loaded weight where that is faster, and let go of the plain one.

        A tied embedding holds on to its table by itself. Measured on 2 Zen 4 cores, packed against plain, in µs:
        576 x 49152, 1 row: 905 against 3843, 8 rows: 1759 against 5132; 576 x 3072, 1 row: 46 against 99.
        """
        if self.weight is None or not can_pack(self.weight):
            return
        if self.block_rows() and self.out_features % OUT_MULTIPLE == 0 and max_rows() > 0:
            self.block_product = BlockProduct([self._blocks[part] for part in sorted(self._blocks)])
            self._max_block_rows = max_rows()
        self._blocks.clear()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        self.weight = None

    @property
    def num_bytes(self) -> int:
        """What a product of one row reads of the weight."""
        if self.block_product is not None:
            return self.block_product.num_bytes
        weight = self._packed if self.weight is None else self.weight
        assert weight is not None
        return weight.element_size() * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, in_features] -> [N, out_features]."""
        if self.block_product is not None and len(x) <= self._max_block_rows:
            out = self.block_product(x)
            return out if self.bias is None else out.add_(self.bias)
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
