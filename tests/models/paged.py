"""Runs a model over a paged KV cache, block by block in random order, as an executor would."""

import random

import numpy as np
import torch

from asyncllm.attention.base import AttentionMetadata, PrefillRows
from asyncllm.models.base import CausalLM
from asyncllm.native.decoder import NativeDecoder


class PagedRunner:
    """Sequences by name; each step feeds some of them some more tokens."""

    def __init__(
        self,
        model: CausalLM,
        seed: int = 0,
        num_blocks: int = 64,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        a = model.architecture
        self.model = model
        self.dtype = dtype
        native = isinstance(model, NativeDecoder)
        self.fused = not native and model.attention.fused  # type: ignore[attr-defined]
        self.device = torch.device("cpu") if native else model.model.embed_tokens.weight.device  # type: ignore[attr-defined]
        self.block_size = block_size
        # Rubbish instead of zeros: what nobody wrote must not be read. Kernels do not even touch it.
        if isinstance(model, NativeDecoder):
            self.kv_caches = [
                torch.empty(num_blocks, model.block_bytes, dtype=torch.uint8) for _ in range(a.num_layers)
            ]
            self.fill(torch.nan)
        else:
            shape = (2, num_blocks, a.num_kv_heads, block_size, a.head_dim)
            rubbish = torch.nan if self.fused else 100.0
            self.kv_caches = [torch.full(shape, rubbish, dtype=dtype, device=self.device) for _ in range(a.num_layers)]
        self.free_blocks = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def fill(self, rubbish: float) -> None:
        """Fill a native decoder's caches, scales and values alike."""
        for cache in self.kv_caches:
            cache.view(torch.float32).fill_(rubbish)

    def step(self, rows: list[tuple[str, list[int]]]) -> list[torch.Tensor]:
        """Compute one step, one-token rows first; logits [tokens, V] of each row."""
        rows_lens = [len(tokens) for _, tokens in rows]
        num_decode_rows = sum(1 for name, tokens in rows if len(tokens) == 1 and self.lengths.get(name))
        assert all(length == 1 for length in rows_lens[:num_decode_rows]), "decode rows come first"
        positions, slots, seq_lens = [], [], []
        for name, tokens in rows:
            start = self.lengths.get(name, 0)
            end = self.lengths[name] = start + len(tokens)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.block_size < end:
                blocks.append(self.free_blocks.pop())
            for position in range(start, end):
                positions.append(position)
                slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
            seq_lens.append(end)
        width = max(len(self.blocks[name]) for name, _ in rows)
        tables = [self.blocks[name] + [0] * (width - len(self.blocks[name])) for name, _ in rows]
        dtype = torch.int32 if self.fused else torch.int64

        def tensor(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        prefill = None
        if self.fused and num_decode_rows < len(rows):
            attention = self.model.attention  # type: ignore[attr-defined]
            starts = [sum(rows_lens[:row]) for row in range(len(rows))]
            tiles = attention.tiles(
                np.array(rows_lens[num_decode_rows:]), np.array(seq_lens[num_decode_rows:]), num_decode_rows, self.dtype
            )
            prefill = PrefillRows(tensor(starts), tensor(rows_lens), tensor(seq_lens), tensor(tiles.tolist()))
        metadata = AttentionMetadata(
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            block_table=tensor(tables),
            slots=tensor(list(range(len(tables)))),
            seq_lens=tensor(seq_lens),
            num_decode_rows=num_decode_rows,
            query_lens=rows_lens,
            seq_lens_host=seq_lens,
            block_size=self.block_size,
            prefill=prefill,
        )
        input_ids = tensor([token for _, tokens in rows for token in tokens])
        with torch.inference_mode():
            hidden = self.model.forward(input_ids, metadata, self.kv_caches)
            # A copy: the next call may write to the same memory.
            return list(self.model.compute_logits(hidden).float().cpu().clone().split(rows_lens))

    def greedy(self, prompt: list[int], num_tokens: int, name: str = "greedy") -> list[int]:
        """Prefill, then decode one by one."""
        token_ids = []
        tokens = prompt
        for _ in range(num_tokens):
            tokens = [int(self.step([(name, tokens)])[0][-1].argmax())]
            token_ids += tokens
        return token_ids
