"""What attention needs to know about a step, and the interface every backend offers.

The metadata is passed explicitly down the model; there is no global context.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from asyncllm.layers.norm import RMSNorm
from asyncllm.layers.rotary import Rotary


@dataclass(slots=True)
class PrefillRows:
    """The same rows as tensors, for a kernel that finds its work on the device. S rows, T tiles."""

    query_starts: Tensor  # [S] int32, first query token of each row
    query_lens: Tensor  # [S] int32
    seq_lens: Tensor  # [S] int32
    tiles: Tensor  # [T, 2] int32, from `triton_prefill.prefill_tiles`


@dataclass(slots=True)
class AttentionMetadata:
    """Rows of a step, decode rows (one query token each) first.

    N tokens, S sequences (rows), L slots, C columns, B block_size. Integers are int64 for torch's own operations, int32
    for kernels.
    """

    positions: Tensor  # [N], position of each query token in its sequence
    slot_mapping: Tensor  # [N], block_id * B + offset where each query token's KV is stored
    block_table: Tensor  # [L, C], block ids of every slot
    slots: Tensor  # [S], whose row of the block table a row reads
    seq_lens: Tensor  # [S], tokens in the cache once this step's KV is stored; for kernels 0 = no decode row
    num_decode_rows: int
    block_size: int
    query_lens: list[int]  # [S]; empty where only the device knows
    seq_lens_host: list[int]  # [S]; likewise
    prefill: PrefillRows | None = None  # kernels: the rows behind num_decode_rows; None where there are none


class AttentionLayer(Protocol):
    """What a layer tells about itself: the same in every step."""

    num_heads: int
    num_kv_heads: int
    scale: float
    window: int  # keys a query sees, its own among them; 0: all of them
    soft_cap: float  # c in c·tanh(score / c); 0: none
    rotary: Rotary
    q_norm: RMSNorm | None  # over each head, before the rotation
    k_norm: RMSNorm | None


class AttentionStep(Protocol):
    """One step's attention: what all layers share is worked out once."""

    def forward(self, qkv: Tensor, layer: AttentionLayer, kv_cache: Tensor) -> Tensor:
        """Norm and rotate, store keys and values in the pages, attend causally over each row's pages.

        qkv [N, H + 2K, D], queries, keys and values side by side, may be overwritten; kv_cache [2, num_blocks, K, B, D]
        of this layer; returns [N, H * D].
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention; one object serves all layers of a model."""

    fused: bool  # whether the layers around it run as Triton kernels too

    def begin(self, metadata: AttentionMetadata, kv_cache: Tensor) -> AttentionStep:
        """Prepare a step. `kv_cache` is any layer's: its shape, dtype and device are those of all."""
        ...
