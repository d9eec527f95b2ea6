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
# Keys in a decode group from which two batched products beat the fused kernel on a CPU in bfloat16. Fused against
# products for 3 KV heads of 64 on 2 Zen 4 cores, in µs of the wall, and of processor time: 4 x 208 keys: 76, 90 and
# 126, 89; 8 x 160: 121, 109 and 199, 109; 8 x 208: 153, 122 and 251, 136; 32 x 208: 1239, 330 of processor time.
# Scores are rounded to bfloat16; over 100 steps at a context of 600 the divergence from float32 was 0.0013 either way.
MIN_KEYS_FOR_PRODUCTS = 1024


class TorchAttention:
    """Gathers each row's pages and calls scaled_dot_product_attention; see `AttentionBackend`."""

    fused = False

    def begin(self, metadata: AttentionMetadata, kv_cache: Tensor) -> AttentionStep:
        """Work out where keys and values go; the first layer of each window works out what such layers gather."""
        _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        heads = torch.arange(num_kv_heads, device=kv_cache.device)
        slots = metadata.slot_mapping[:, None]  # [N, 1]
        blocks, offsets = slots // block_size, slots % block_size
        key_rows = ((blocks * num_kv_heads + heads) * block_size + offsets).flatten()  # [N * K]
        # As many columns as the longest row needs: whole rows of pages are gathered.
        num_columns = -(-max(metadata.seq_lens_host) // block_size)
        return TorchAttentionStep(
            metadata=metadata,
            tables=metadata.block_table[:, :num_columns].index_select(0, metadata.slots),
            key_rows=key_rows,
            value_rows=key_rows + num_blocks * num_kv_heads * block_size,
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
    num_keys: int  # from the first page that is gathered, the query tokens' own included
    pages: Tensor | None  # [2 * K * P], None where nothing precedes the query
    causal: bool  # a whole prompt that no window or soft cap keeps from the fused kernel


@dataclass(slots=True)
class _Plan:
    """What layers of one window gather and mask, worked out once for all of them."""

    window: int
    soft_cap: float
    decodes: list[_Decode]
    prefills: list[_Prefill]
    mask_strip: Tensor | None
    scratch: Tensor  # [rows gathered at most, B * D]: reused by every layer, so it stays in the CPU's cache


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


def _make_plan(metadata: AttentionMetadata, tables: Tensor, kv_cache: Tensor, window: int, soft_cap: float) -> _Plan:
    """`tables` [S, C]: the pages of each row."""
    _, _, _, block_size, head_dim = kv_cache.shape
    if window >= max(metadata.seq_lens_host):
        window = 0  # nobody is so long yet
    # Keys that a row may gather; with a window, about as many for all long rows.
    spans = [length - _first_page(length, window, block_size) * block_size for length in metadata.seq_lens_host]
    groups = split_decode_rows(spans[: metadata.num_decode_rows])
    decodes = [_decode_group(metadata, tables, kv_cache, rows, [spans[row] for row in rows], window) for rows in groups]
    prefills = _prefills(metadata, tables, kv_cache, window, soft_cap)
    pages = [group.pages for group in decodes] + [row.pages for row in prefills if row.pages is not None]
    num_gathered = max((page_ids.numel() for page_ids in pages), default=0)
    scratch = kv_cache.new_empty(num_gathered, block_size * head_dim)
    return _Plan(window, soft_cap, decodes, prefills, _mask_strip(prefills, kv_cache, window), scratch)


def _first_page(seq_len: int, window: int, block_size: int) -> int:
    """Where in a row's table the window of its last token begins."""
    return max(seq_len - window, 0) // block_size if window else 0


def _decode_group(
    metadata: AttentionMetadata, tables: Tensor, kv_cache: Tensor, rows: list[int], spans: list[int], window: int
) -> _Decode:
    """`spans`: keys of each row from its first page in the window on."""
    device, block_size = kv_cache.device, metadata.block_size
    num_rows, num_pages = len(rows), -(-max(spans) // block_size)
    by_products = (
        num_rows * num_pages * block_size >= MIN_KEYS_FOR_PRODUCTS
        and device.type == "cpu"
        and kv_cache.dtype == torch.bfloat16
    )
    # The products want the gathered pages uncut: a slice of them would be copied.
    length = num_pages * block_size if by_products else max(spans)
    whole = num_rows == metadata.num_decode_rows
    chosen = None if whole else torch.tensor(rows, device=device)
    tables = tables[:num_rows] if chosen is None else tables[chosen]
    mask = None
    if window:
        first_pages = [_first_page(metadata.seq_lens_host[row], window, block_size) for row in rows]
        columns = torch.tensor(first_pages, device=device)[:, None] + torch.arange(num_pages, device=device)
        # A row that ends earlier than the longest has no page there: any one does, since its keys are masked.
        tables = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    if min(spans) != length or window:
        ends = torch.tensor(spans, device=device)[:, None]
        keys = torch.arange(length, device=device)
        hidden = keys >= ends  # [S, length]
        if window:
            hidden |= keys < ends - window
        mask = torch.zeros(hidden.shape, dtype=kv_cache.dtype, device=device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
    return _Decode(chosen, num_rows, _page_rows(tables[:, :num_pages], kv_cache), length, mask, by_products)


def _prefills(
    metadata: AttentionMetadata, tables: Tensor, kv_cache: Tensor, window: int, soft_cap: float
) -> list[_Prefill]:
    prefills = []
    start, block_size = metadata.num_decode_rows, metadata.block_size
    for row in range(metadata.num_decode_rows, len(metadata.query_lens)):
        query_len, seq_len = metadata.query_lens[row], metadata.seq_lens_host[row]
        pages, num_keys = None, seq_len
        if seq_len > query_len:
            first_page = _first_page(seq_len - query_len + 1, window, block_size)  # of the chunk's first query
            pages = _page_rows(tables[row : row + 1, first_page : -(-seq_len // block_size)], kv_cache)
            num_keys -= first_page * block_size
        causal = pages is None and not soft_cap and (not window or query_len <= window)
        prefills.append(_Prefill(start, query_len, num_keys, pages, causal))
        start += query_len
    return prefills


def _page_rows(tables: Tensor, kv_cache: Tensor) -> Tensor:
    """Block ids [S, P] -> indices [2 * S * K * P] into the cache seen as rows of one page and head."""
    _, num_blocks, num_kv_heads, _, _ = kv_cache.shape
    heads = torch.arange(num_kv_heads, device=kv_cache.device)[:, None]
    keys = (tables[:, None] * num_kv_heads + heads).flatten()  # [S, K, P]
    return torch.cat((keys, keys + num_blocks * num_kv_heads))


def _mask_strip(prefills: list[_Prefill], kv_cache: Tensor, window: int) -> Tensor | None:
    """Zeros, then a causal triangle: [C, most keys + C] for chunks of C queries; with a window a band instead.

    The mask of any chunk is a part of it that ends within the triangle, so that one strip serves a whole step.
    """
    masked = [row for row in prefills if not row.causal]
    if not masked:
        return None
    num_queries = min(PREFIX_QUERY_CHUNK, max(row.query_len for row in masked))
    longest = max(row.num_keys for row in masked)
    strip = torch.full((num_queries, longest + num_queries), -torch.inf, dtype=kv_cache.dtype, device=kv_cache.device)
    if window:
        return strip.triu(longest + 1) + strip.tril(longest - window)
    return strip.triu_(longest + 1)


@dataclass(slots=True)
class TorchAttentionStep:
    """See `AttentionStep`."""

    metadata: AttentionMetadata
    tables: Tensor  # [S, C] int64, pages of each row
    key_rows: Tensor  # [N * K] int64, of the cache seen as rows of D values
    value_rows: Tensor  # [N * K]
    plans: dict[tuple[int, float], _Plan] = field(default_factory=dict)  # by window and soft cap
    rotations: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of this step's positions

    def forward(self, qkv: Tensor, layer: AttentionLayer, kv_cache: Tensor) -> Tensor:  # hot
        """[N, H + 2K, D] -> [N, H * D]."""
        num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
        query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = layer.q_norm(query), layer.k_norm(key)
        if layer.rotary.turns:
            rotation = self.rotations.get(layer.rotary)
            if rotation is None:
                rotation = self.rotations[layer.rotary] = layer.rotary(self.metadata.positions, qkv.dtype)
            if layer.q_norm is not None:
                query, key = rotate(query, *rotation), rotate(key, *rotation)
            else:
                # Queries and keys lie side by side and turn together.
                turned = rotate(qkv[:, : num_heads + num_kv_heads], *rotation)
                query, key = turned.split((num_heads, num_kv_heads), dim=1)
        return self.attend(query, key, value, kv_cache, layer.scale, layer.window, layer.soft_cap).flatten(1)

    def attend(  # hot
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """Store and attend: [N, H, D], [N, K, D], [N, K, D] -> [N, H, D]."""
        plan = self.plans.get((window, soft_cap))
        if plan is None:
            plan = _make_plan(self.metadata, self.tables, kv_cache, window, soft_cap)
            self.plans[window, soft_cap] = plan
        head_dim = query.shape[2]
        flat = kv_cache.view(-1, head_dim)
        flat.index_copy_(0, self.key_rows, key.reshape(-1, head_dim))
        flat.index_copy_(0, self.value_rows, value.reshape(-1, head_dim))
        if not plan.prefills and len(plan.decodes) == 1:
            return _decode(plan, plan.decodes[0], query, kv_cache, scale)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in plan.decodes:
            if group.rows is None:
                output[: group.num_rows] = _decode(plan, group, query[: group.num_rows], kv_cache, scale)
            else:
                attended = _decode(plan, group, query.index_select(0, group.rows), kv_cache, scale)
                output.index_copy_(0, group.rows, attended)
        for row in plan.prefills:
            tokens = slice(row.start, row.start + row.query_len)
            if row.causal:
                output[tokens] = _attend_prompt(query[tokens], key[tokens], value[tokens], scale)
            elif row.pages is None:
                keys, values = key[tokens].transpose(0, 1), value[tokens].transpose(0, 1)
                _attend_masked(plan, row, query[tokens], keys, values, scale, output[tokens])
            else:
                keys, values = _gather(plan, kv_cache, row.pages, 1)
                _attend_masked(plan, row, query[tokens], keys[0], values[0], scale, output[tokens])
        return output


def _gather(plan: _Plan, kv_cache: Tensor, pages: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Copies of the pages, as keys and values [S, K, P * B, D]."""
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    gathered = plan.scratch[: pages.numel()]
    torch.index_select(kv_cache.view(-1, block_size * head_dim), 0, pages, out=gathered)
    keys, values = gathered.view(2, num_rows, num_kv_heads, -1, head_dim).unbind()
    return keys, values


def _decode(plan: _Plan, group: _Decode, query: Tensor, kv_cache: Tensor, scale: float) -> Tensor:
    """[S, H, D] -> [S, H, D].

    Query heads of a KV head stand where query tokens usually do, so that keys are not repeated per query head.
    """
    keys, values = _gather(plan, kv_cache, group.pages, group.num_rows)
    grouped = query.reshape(group.num_rows, kv_cache.shape[2], -1, query.shape[2])  # [S, K, H / K, D]
    if group.by_products:
        return _attend_by_products(grouped, keys, values, group.mask, scale, plan.soft_cap).view(query.shape)
    keys, values = keys[:, :, : group.length], values[:, :, : group.length]
    if plan.soft_cap:
        return _attend_by_products(grouped, keys, values, group.mask, scale, plan.soft_cap).view(query.shape)
    return scaled_dot_product_attention(grouped, keys, values, group.mask, scale=scale).reshape(query.shape)


def _attend_masked(
    plan: _Plan, row: _Prefill, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor
) -> None:
    """The last T of L tokens: [T, H, D], keys and values [K, L, D] into `out` [T, H, D], some queries at a time."""
    assert plan.mask_strip is not None
    num_queries, width = plan.mask_strip.shape
    for start in range(0, row.query_len, num_queries):
        chunk = _grouped(query[start : start + num_queries], keys.shape[0])  # [K, H / K, C, D]
        first_query = row.num_keys - row.query_len + start  # its place among the keys
        end = first_query + chunk.shape[2]
        begin = max(first_query - plan.window + 1, 0) if plan.window else 0
        shift = width - num_queries - first_query
        mask = plan.mask_strip[: chunk.shape[2], shift + begin : shift + end]
        chunk_keys, chunk_values = keys[:, None, begin:end], values[:, None, begin:end]  # [K, 1, L', D]
        if plan.soft_cap:
            attended = _attend_by_products(chunk, chunk_keys, chunk_values, mask, scale, plan.soft_cap)
        else:
            shape = (*chunk.shape[:2], end - begin, chunk.shape[3])
            attended = scaled_dot_product_attention(
                chunk, chunk_keys.expand(shape), chunk_values.expand(shape), mask, scale=scale
            )
        out[start : start + num_queries] = attended.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_by_products(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, soft_cap: float
) -> Tensor:
    """[S, K, G, D], keys and values [S, K, L, D], mask [S, 1, 1, L] -> [S, K, G, D]; or whatever broadcasts alike."""
    scores = torch.matmul(query * scale, keys.transpose(2, 3))  # [S, K, G, L]
    if soft_cap:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
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
