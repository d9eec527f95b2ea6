"""Runs a model over a paged KV cache, block by block in random order, as an executor would."""

import random

import torch

from asyncllm.attention.base import AttentionMetadata
from asyncllm.models.base import CausalLM


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
        self.block_size = block_size
        shape = (2, num_blocks, block_size, a.num_kv_heads, a.head_dim)
        # Rubbish instead of zeros: what nobody wrote must not be read.
        self.kv_caches = [torch.full(shape, 100.0, dtype=dtype) for _ in range(a.num_layers)]
        self.free_blocks = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free_blocks)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

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
        metadata = AttentionMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(tables),
            seq_lens=torch.tensor(seq_lens),
            num_decode_rows=num_decode_rows,
            query_lens=rows_lens,
            seq_lens_host=seq_lens,
            block_size=self.block_size,
        )
        input_ids = torch.tensor([token for _, tokens in rows for token in tokens])
        with torch.inference_mode():
            hidden = self.model.forward(input_ids, metadata, self.kv_caches)
            return list(self.model.compute_logits(hidden).split(rows_lens))

    def greedy(self, prompt: list[int], num_tokens: int, name: str = "greedy") -> list[int]:
        """Prefill, then decode one by one."""
        token_ids = []
        tokens = prompt
        for _ in range(num_tokens):
            tokens = [int(self.step([(name, tokens)])[0][-1].argmax())]
            token_ids += tokens
        return token_ids
