"""What attention needs to know about a step, and the interface every backend offers.

The metadata is passed explicitly down the model; there is no global context.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Rows of a step, decode rows (one query token each) first.

    N tokens, S sequences (rows), B block_size. Device tensors for kernels, host lists for code that must branch.
    """

    positions: Tensor  # [N] int64, position of each query token in its sequence
    slot_mapping: Tensor  # [N] int64, block_id * B + offset where each query token's KV is stored
    block_tables: Tensor  # [S, max_blocks] int64, block ids of each row, padded with the null block 0
    seq_lens: Tensor  # [S] int64, tokens in the cache once this step's KV is stored
    num_decode_rows: int
    query_lens: list[int]  # [S]
    seq_lens_host: list[int]  # [S], same as seq_lens
    block_size: int


class AttentionStep(Protocol):
    """One step's attention, the same for every layer: page indices and masks are worked out once."""

    def forward(
        self,
        query: Tensor,  # [N, H, D]
        key: Tensor,  # [N, K, D]
        value: Tensor,  # [N, K, D]
        kv_cache: Tensor,  # [2, num_blocks, B, K, D], of this layer
        scale: float,
    ) -> Tensor:
        """Store keys and values in the pages, then attend causally over each row's pages: [N, H, D]."""
        ...


class AttentionBackend(Protocol):
    """A way to compute attention; one object serves all layers of a model."""

    def begin(self, metadata: AttentionMetadata, kv_cache: Tensor) -> AttentionStep:
        """Prepare a step. `kv_cache` is any layer's: its shape, dtype and device are those of all."""
        ...
