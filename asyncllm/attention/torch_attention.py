"""Attention in plain torch: the CPU's backend, and the reference for kernels.

Device-agnostic: branches look at host lists only. Engine thread.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asyncllm.attention.base import AttentionLayer, AttentionMetadata, AttentionStep
from asyncllm.layers.rotary import Rotary, rotate

# Query tokens attended at once when keys precede them: bounds the mask, and what it costs, to 256 x context.
PREFIX_QUERY_CHUNK = 256
# A further decode group costs every layer some calls; it pays once it saves about this many padded keys (measured).
PADDED_KEYS_PER_GROUP = 1024
# Keys in a decode group from which two batched products beat the fused kernel on a CPU in bfloat16. Whole steps of a
# 135M model on 2 cores, fused against products, in ms: 1 x 150: 18.6, 20.0; 8 x 150: 25.4, 25.0; 8 x 1000: 50, 42;
# 32 x 150: 57, 51; 32 x 500: 99, 78. Their scores are rounded to bfloat16; over 100 steps at a context of 600 the
# divergence from float32 was 0.0013 either way.
MIN_KEYS_FOR_PRODUCTS = 2048


class TorchAttention:
    """Gathers each row's pages and calls scaled_dot_product_attention; see `AttentionBackend`."""

    fused = False

    def begin(self, metadata: AttentionMetadata, kv_cache: Tensor) -> AttentionStep:
        """Work out page indices and masks for all layers."""
        _, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
        heads = torch.arange(num_kv_heads, device=kv_cache.device)
        slots = metadata.slot_mapping[:, None]  # [N, 1]
        blocks, offsets = slots // block_size, slots % block_size
        key_rows = ((blocks * num_kv_heads + heads) * block_size + offsets).flatten()  # [N * K]
        # As many columns as the longest row needs: whole rows of pages are gathered.
        num_columns = -(-max(metadata.seq_lens_host) // block_size)
        tables = metadata.block_table[:, :num_columns].index_select(0, metadata.slots)  # [S, num_columns]
        lengths = metadata.seq_lens_host[: metadata.num_decode_rows]
        decodes = [_decode_group(metadata, tables, kv_cache, rows) for rows in split_decode_rows(lengths)]
        prefills = _prefills(metadata, tables, kv_cache)
        pages = [group.pages for group in decodes] + [row.pages for row in prefills if row.pages is not None]
        num_gathered = max((page_ids.numel() for page_ids in pages), default=0)
        return TorchAttentionStep(
            positions=metadata.positions,
            key_rows=key_rows,
            value_rows=key_rows + num_blocks * num_kv_heads * block_size,
            decodes=decodes,
            prefills=prefills,
            mask_strip=_mask_strip(prefills, kv_cache),
            scratch=kv_cache.new_empty(num_gathered, block_size * head_dim),
        )


@dataclass(slots=True)
class _Decode:
    """Decode rows of similar length, attended in one call over their gathered pages."""

    rows: Tensor | None  # [S] int64; None for all decode rows in their order
    num_rows: int
    pages: Tensor  # [2 * S * K * P] int64, of the cache as rows of one page and head; keys first
    length: int  # keys attended: the longest row's, or whole pages for products
    mask: Tensor | None  # [S, 1, 1, length] added to scores; None where every row has all of them
    by_products: bool  # two batched products rather than the fused kernel


@dataclass(slots=True)
class _Prefill:
    """A row of a prompt's tokens: a whole one, or a chunk with keys before it."""

    start: int  # first query token in the step
    query_len: int
    seq_len: int
    pages: Tensor | None  # [2 * K * P], None where nothing precedes the query


def split_decode_rows(lengths: list[int]) -> list[list[int]]:
    """Group rows by length, so that one long row does not make all others gather as much.

    Longest first; a row opens a new group when that spares it and all shorter ones enough padding.
    """
    num_rows = len(lengths)
    if num_rows == 0:
        return []
    order = sorted(range(num_rows), key=lambda row: -lengths[row])
    groups: list[list[int]] = [[]]
    longest = lengths[order[0]]
    for place, row in enumerate(order):
        if (longest - lengths[row]) * (num_rows - place) > PADDED_KEYS_PER_GROUP:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups if len(groups) > 1 else [list(range(num_rows))]


def _decode_group(metadata: AttentionMetadata, tables: Tensor, kv_cache: Tensor, rows: list[int]) -> _Decode:
    device = kv_cache.device
    lengths = [metadata.seq_lens_host[row] for row in rows]
    num_rows, num_pages = len(rows), -(-max(lengths) // metadata.block_size)
    by_products = (
        num_rows * num_pages * metadata.block_size >= MIN_KEYS_FOR_PRODUCTS
        and device.type == "cpu"
        and kv_cache.dtype == torch.bfloat16
    )
    # The products want the gathered pages uncut: a slice of them would be copied.
    length = num_pages * metadata.block_size if by_products else max(lengths)
    whole = num_rows == metadata.num_decode_rows
    chosen = None if whole else torch.tensor(rows, device=device)
    tables = tables[:num_rows] if chosen is None else tables[chosen]
    mask = None
    if min(lengths) != length:
        seq_lens = metadata.seq_lens[:num_rows] if chosen is None else metadata.seq_lens[chosen]
        hidden = torch.arange(length, device=device) >= seq_lens[:, None]  # [S, length]
        mask = torch.zeros(hidden.shape, dtype=kv_cache.dtype, device=device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
    return _Decode(chosen, num_rows, _page_rows(tables[:, :num_pages], kv_cache), length, mask, by_products)


def _prefills(metadata: AttentionMetadata, tables: Tensor, kv_cache: Tensor) -> list[_Prefill]:
    prefills = []
    start = metadata.num_decode_rows
    for row in range(metadata.num_decode_rows, len(metadata.query_lens)):
        query_len, seq_len = metadata.query_lens[row], metadata.seq_lens_host[row]
        pages = None
        if seq_len > query_len:
            pages = _page_rows(tables[row : row + 1, : -(-seq_len // metadata.block_size)], kv_cache)
        prefills.append(_Prefill(start, query_len, seq_len, pages))
        start += query_len
    return prefills


def _page_rows(tables: Tensor, kv_cache: Tensor) -> Tensor:
    """Block ids [S, P] -> indices [2 * S * K * P] into the cache seen as rows of one page and head."""
    _, num_blocks, num_kv_heads, _, _ = kv_cache.shape
    heads = torch.arange(num_kv_heads, device=kv_cache.device)[:, None]
    keys = (tables[:, None] * num_kv_heads + heads).flatten()  # [S, K, P]
    return torch.cat((keys, keys + num_blocks * num_kv_heads))


def _mask_strip(prefills: list[_Prefill], kv_cache: Tensor) -> Tensor | None:
    """Zeros, then a causal triangle: [C, longest prefix + C] for chunks of C queries.

    The mask of any chunk is a window of it that ends within the triangle, so that one strip serves a whole step.
    """
    chunked = [row for row in prefills if row.pages is not None]
    if not chunked:
        return None
    num_queries = min(PREFIX_QUERY_CHUNK, max(row.query_len for row in chunked))
    longest = max(row.seq_len for row in chunked)
    strip = torch.full((num_queries, longest + num_queries), -torch.inf, dtype=kv_cache.dtype, device=kv_cache.device)
    return strip.triu_(longest + 1)


@dataclass(slots=True)
class TorchAttentionStep:
    """See `AttentionStep`."""

    positions: Tensor  # [N] int64
    key_rows: Tensor  # [N * K] int64, of the cache seen as rows of D values
    value_rows: Tensor  # [N * K]
    decodes: list[_Decode]
    prefills: list[_Prefill]
    mask_strip: Tensor | None
    scratch: Tensor  # [rows gathered at most, B * D]: reused by every layer, so it stays in the CPU's cache
    rotations: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of this step's positions

    def forward(self, qkv: Tensor, layer: AttentionLayer, kv_cache: Tensor) -> Tensor:  # hot
        """[N, H + 2K, D] -> [N, H * D]."""
        num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
        query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        rotation = self.rotations.get(layer.rotary)
        if rotation is None:
            rotation = self.rotations[layer.rotary] = layer.rotary(self.positions, qkv.dtype)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = rotate(layer.q_norm(query), *rotation), rotate(layer.k_norm(key), *rotation)
        else:
            # Queries and keys lie side by side and turn together.
            query, key = rotate(qkv[:, : num_heads + num_kv_heads], *rotation).split((num_heads, num_kv_heads), dim=1)
        return self.attend(query, key, value, kv_cache, layer.scale).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, scale: float) -> Tensor:  # hot
        """Store and attend: [N, H, D], [N, K, D], [N, K, D] -> [N, H, D]."""
        head_dim = query.shape[2]
        flat = kv_cache.view(-1, head_dim)
        flat.index_copy_(0, self.key_rows, key.reshape(-1, head_dim))
        flat.index_copy_(0, self.value_rows, value.reshape(-1, head_dim))
        if not self.prefills and len(self.decodes) == 1:
            return self._decode(self.decodes[0], query, kv_cache, scale)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in self.decodes:
            if group.rows is None:
                output[: group.num_rows] = self._decode(group, query[: group.num_rows], kv_cache, scale)
            else:
                attended = self._decode(group, query.index_select(0, group.rows), kv_cache, scale)
                output.index_copy_(0, group.rows, attended)
        for row in self.prefills:
            tokens = slice(row.start, row.start + row.query_len)
            if row.pages is None:
                output[tokens] = _attend_prompt(query[tokens], key[tokens], value[tokens], scale)
            else:
                self._attend_behind_prefix(row, query[tokens], kv_cache, scale, output[tokens])
        return output

    def _gather(self, kv_cache: Tensor, pages: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Copies of the pages, as keys and values [S, K, P * B, D]."""
        _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
        gathered = self.scratch[: pages.numel()]
        torch.index_select(kv_cache.view(-1, block_size * head_dim), 0, pages, out=gathered)
        keys, values = gathered.view(2, num_rows, num_kv_heads, -1, head_dim).unbind()
        return keys, values

    def _decode(self, group: _Decode, query: Tensor, kv_cache: Tensor, scale: float) -> Tensor:
        """[S, H, D] -> [S, H, D].

        Query heads of a KV head stand where query tokens usually do, so that keys are not repeated per query head.
        """
        keys, values = self._gather(kv_cache, group.pages, group.num_rows)
        grouped = query.reshape(group.num_rows, kv_cache.shape[2], -1, query.shape[2])  # [S, K, H / K, D]
        if group.by_products:
            return _attend_by_products(grouped, keys, values, group.mask, scale).view(query.shape)
        attended = scaled_dot_product_attention(
            grouped, keys[:, :, : group.length], values[:, :, : group.length], group.mask, scale=scale
        )
        return attended.reshape(query.shape)

    def _attend_behind_prefix(self, row: _Prefill, query: Tensor, kv_cache: Tensor, scale: float, out: Tensor) -> None:
        """A chunk whose keys begin before it: [T, H, D] into `out` [T, H, D], some queries at a time."""
        assert row.pages is not None and self.mask_strip is not None
        keys, values = self._gather(kv_cache, row.pages, 1)
        num_queries, width = self.mask_strip.shape
        for start in range(0, row.query_len, num_queries):
            chunk = _grouped(query[start : start + num_queries], kv_cache.shape[2])  # [K, H / K, C, D]
            end = row.seq_len - row.query_len + start + chunk.shape[2]  # keys seen by the chunk's last query
            first_column = width - num_queries - (end - chunk.shape[2])
            mask = self.mask_strip[: chunk.shape[2], first_column : first_column + end]
            shape = (*chunk.shape[:2], end, chunk.shape[3])
            attended = scaled_dot_product_attention(
                chunk, keys[0, :, None, :end].expand(shape), values[0, :, None, :end].expand(shape), mask, scale=scale
            )
            out[start : start + num_queries] = attended.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[S, K, G, D], keys and values [S, K, L, D] contiguous, mask [S, 1, 1, L] -> [S, K, G, D]."""
    scores = torch.matmul(query * scale, keys.transpose(2, 3))  # [S, K, G, L]
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1), values)


def _grouped(query: Tensor, num_kv_heads: int) -> Tensor:
    """[T, H, D] -> [K, H / K, T, D]: KV heads as the batch, so that keys broadcast over their query heads."""
    return query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _attend_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """A prompt from its first token: [T, H, D], [T, K, D] -> [T, H, D]; causal, so no mask is built."""
    grouped = _grouped(query, key.shape[1])
    keys = key.transpose(0, 1)[:, None].expand_as(grouped)
    values = value.transpose(0, 1)[:, None].expand_as(grouped)
    attended = scaled_dot_product_attention(grouped, keys, values, is_causal=True, scale=scale)
    return attended.permute(2, 0, 1, 3).flatten(1, 2)
