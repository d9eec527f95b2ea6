"""Attention over pages written out: float64, one query at a time, every index spelt out. The kernels' oracle."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int = 0, soft_cap: float = 0.0) -> Tensor:
    """The last T of L tokens attend causally: query [T, H, D], keys and values [L, K, D] -> [T, H, D] float64."""
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = keys.shape
    keys = keys.double().repeat_interleave(num_heads // num_kv_heads, 1)  # [L, H, D]
    values = values.double().repeat_interleave(num_heads // num_kv_heads, 1)
    scores = torch.einsum("thd,lhd->htl", query.double(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    key_positions = torch.arange(num_keys, device=query.device)
    visible = key_positions <= query_positions  # [T, L]
    if window:
        visible &= key_positions > query_positions - window
    return torch.einsum("htl,lhd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)


@dataclass
class PagedRows:
    """Random keys and values of some rows, spread over the pages of a cache.

    Everything no row owns is NaN: unused pages, and the tails of pages. Table entries behind a row's pages are ids of
    no page at all, and so are the table rows of slots that no row uses.
    """

    keys: list[Tensor]  # per row [L, K, D]
    values: list[Tensor]
    kv_cache: Tensor  # [2, num_blocks, K, B, D]
    block_table: Tensor  # [slots, C] int32
    slots: Tensor  # [S] int32
    seq_lens: Tensor  # [S] int32
    query: Tensor  # [N, H, D], a strided view
    scale: float

    def expect(self, query_lens: list[int], window: int = 0, soft_cap: float = 0.0) -> Tensor:
        """What attention gives for the last `query_lens` tokens of each row: [N, H, D] float32, zeros for length 0."""
        outputs, start = [], 0
        for keys, values, query_len in zip(self.keys, self.values, query_lens, strict=True):
            query = self.query[start : start + query_len]
            start += query_len
            outputs.append(
                attend(query, keys, values, self.scale, window, soft_cap) if len(keys) else torch.zeros_like(query)
            )
        return torch.cat([output.float() for output in outputs])


def paged_rows(
    seq_lens: list[int],
    query_lens: list[int],
    device: torch.device,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedRows:
    """Rows of `seq_lens` tokens in shuffled pages and slots; the query is part of a wider tensor, as of a fused QKV."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(needed) + 3
    num_slots = len(seq_lens) + 2
    slots = torch.randperm(num_slots, generator=generator)[: len(seq_lens)]
    table = torch.full((num_slots, max(needed) + 2), 2**30, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    cache = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), torch.nan)
    keys, values = [], []
    for slot, length in zip(slots.tolist(), seq_lens):
        rows = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype).float()
        for page, start in enumerate(range(0, length, block_size)):
            table[slot, page] = free.pop()
            part = rows[:, start : start + block_size].transpose(1, 2)  # [2, K, up to B, D]
            cache[:, table[slot, page], :, : part.shape[2]] = part
        keys.append(rows[0].to(device))
        values.append(rows[1].to(device))
    width = num_heads + 2 * num_kv_heads
    wide = torch.randn(sum(query_lens), width * head_dim, generator=generator)
    query = wide.to(device, dtype).view(-1, width, head_dim)[:, :num_heads]
    return PagedRows(
        keys=keys,
        values=values,
        kv_cache=cache.to(device, dtype),
        block_table=table.to(device),
        slots=slots.to(device, torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        query=query,
        scale=1 / math.sqrt(head_dim),
    )


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Within a few units in the last place of the dtype of `actual`: scores round once more on tensor cores."""
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
