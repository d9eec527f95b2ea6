"""Attention in own Triton kernels: what runs on CUDA, and under Triton's interpreter in tests.

Finds all its work in device memory, so that a step can be captured in a graph: rows of padding have length 0 and cost
next to nothing. Engine thread.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.attention.base import AttentionLayer, AttentionMetadata, AttentionStep
from asyncllm.attention.triton_decode import DecodeScratch, decode_attention, make_decode_scratch, plan_splits
from asyncllm.attention.triton_prefill import prefill_attention, prefill_tiles, queries_per_tile
from asyncllm.attention.triton_store import norm_rope_store


class TritonAttention:
    """Stores, then attends: decode rows by split-KV, all others by tiles of queries; see `AttentionBackend`."""

    fused = True

    def __init__(
        self,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        num_sms: int,
        pdl: bool = False,
    ) -> None:
        """`max_rows`: decode rows of a step at most; `pdl`: programmatic dependent launch, Hopper and later."""
        self._shape = (num_heads, num_kv_heads, head_dim)
        self._scratch = make_decode_scratch(max_rows, num_heads, num_kv_heads, head_dim, num_sms, device)
        self._pdl = pdl

    def begin(self, metadata: AttentionMetadata, kv_cache: Tensor) -> AttentionStep:
        """Plan how the decode rows are split, once for all layers."""
        num_decode_rows = metadata.num_decode_rows
        if num_decode_rows:
            plan_splits(metadata.seq_lens[:num_decode_rows], self._scratch, kv_cache.shape[2])
        num_heads, _, head_dim = self._shape
        # One for all layers. Zeros, as no tile covers a token of padding; decode rows of padding are written as zeros.
        allocate = torch.empty if metadata.prefill is None else torch.zeros
        out = allocate((len(metadata.positions), num_heads, head_dim), dtype=kv_cache.dtype, device=kv_cache.device)
        return TritonAttentionStep(metadata, self._scratch, out, self._pdl)

    def tiles(
        self,
        query_lens: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        first_row: int,
        dtype: torch.dtype,
    ) -> npt.NDArray[np.int32]:
        """The work list of the rows from `first_row` on, [T, 2], for `PrefillRows.tiles`."""
        return prefill_tiles(query_lens, first_row, *self._shape, dtype, seq_lens)

    def max_tiles(self, num_tokens: int, num_rows: int, dtype: torch.dtype) -> int:
        """Tiles that any rows of so many tokens in all need at most: only a row's last tile is not full."""
        return num_tokens // queries_per_tile(*self._shape, dtype) + num_rows


@dataclass(slots=True)
class TritonAttentionStep:
    """See `AttentionStep`."""

    metadata: AttentionMetadata
    scratch: DecodeScratch
    out: Tensor  # [N, H, D]: a layer's result, until the next layer's
    pdl: bool

    def forward(self, qkv: Tensor, layer: AttentionLayer, kv_cache: Tensor) -> Tensor:  # hot
        """[N, H + 2K, D] -> [N, H * D]; overwrites the queries in `qkv`."""
        metadata, num_heads = self.metadata, layer.num_heads
        table = layer.rotary.table
        assert table is not None, "the model was prepared for another backend"
        q_norm, k_norm = layer.q_norm, layer.k_norm
        norm_rope_store(
            qkv,
            metadata.positions,
            metadata.slot_mapping,
            table,
            kv_cache,
            num_heads,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            self.pdl,
        )
        query, out = qkv[:, :num_heads], self.out
        num_decode_rows = metadata.num_decode_rows
        if num_decode_rows:
            decode_attention(
                query[:num_decode_rows],
                kv_cache,
                metadata.block_table,
                metadata.slots,
                metadata.seq_lens,
                self.scratch,
                out[:num_decode_rows],
                layer.scale,
                layer.window,
                layer.soft_cap,
                pdl=self.pdl,
            )
        if metadata.prefill is not None:
            prefill = metadata.prefill
            prefill_attention(
                query,
                kv_cache,
                metadata.block_table,
                metadata.slots,
                prefill.query_starts,
                prefill.query_lens,
                prefill.seq_lens,
                prefill.tiles,
                out,
                layer.scale,
                layer.window,
                layer.soft_cap,
                # Behind a decode launch, whose kernels let it begin before the stores they waited for are done.
                pdl=self.pdl and not num_decode_rows,
            )
        return out.flatten(1)
