"""Lays out the tokens and rows of a step with prompts in it: as they are, or padded to the sizes of a captured graph.

Knows plans, and tiles as somebody else cut them; nothing of sampling. Engine thread only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from asyncllm.attention.base import AttentionMetadata, PrefillRows
from asyncllm.executor.base import StepPlan
from asyncllm.executor.rows import RowArrays
from asyncllm.executor.staging import Ints, aligned


class TokenLayout(NamedTuple):
    """How many of each there is room for. N tokens, S rows, T tiles."""

    num_tokens: int
    num_rows: int
    num_tiles: int

    @property
    def sizes(self) -> list[int]:
        """Integers of each array, in the order of `TokenInputs`, each begun at 16 bytes."""
        return [aligned(self.num_tokens)] * 3 + [aligned(self.num_rows)] * 5 + [aligned(2 * self.num_tiles)]

    @property
    def num_ints(self) -> int:
        """Integers of them all."""
        return sum(self.sizes)


@dataclass(slots=True)
class TokenInputs:
    """On the device, all int32; padding has slot -1, length 0 or row -1."""

    token_slots: Tensor  # [N]
    positions: Tensor  # [N]
    token_ids: Tensor  # [N], -1: the slot's last
    slots: Tensor  # [S]
    decode_lens: Tensor  # [S], length of a decode row, 0 for any other
    query_starts: Tensor  # [S]
    query_lens: Tensor  # [S]
    seq_lens: Tensor  # [S]
    tiles: Tensor  # [T, 2]

    def metadata(
        self, num_decode_rows: int, slot_mapping: Tensor, block_table: Tensor, block_size: int
    ) -> AttentionMetadata:
        """For the model. `num_decode_rows`: rows that may be decode rows; those that are not have no length there."""
        prefill = PrefillRows(self.query_starts, self.query_lens, self.seq_lens, self.tiles)
        return AttentionMetadata(
            positions=self.positions,
            slot_mapping=slot_mapping,
            block_table=block_table,
            slots=self.slots,
            seq_lens=self.decode_lens,
            num_decode_rows=num_decode_rows,
            block_size=block_size,
            query_lens=[],
            seq_lens_host=[],
            prefill=prefill if len(self.tiles) else None,
        )


def token_inputs(buffer: Tensor, layout: TokenLayout) -> TokenInputs:
    """Views of a device buffer [layout.num_ints]."""
    num_tokens, num_rows, num_tiles = layout
    *parts, tiles = buffer.split(layout.sizes)
    token_slots, positions, token_ids = (part[:num_tokens] for part in parts[:3])
    slots, decode_lens, query_starts, query_lens, seq_lens = (part[:num_rows] for part in parts[3:])
    return TokenInputs(
        token_slots=token_slots,
        positions=positions,
        token_ids=token_ids,
        slots=slots,
        decode_lens=decode_lens,
        query_starts=query_starts,
        query_lens=query_lens,
        seq_lens=seq_lens,
        tiles=tiles[: 2 * num_tiles].view(num_tiles, 2),
    )


def fill_tokens(host: Ints, layout: TokenLayout, plan: StepPlan, rows: RowArrays, tiles: Ints) -> None:
    """Write a step into host [layout.num_ints], padding the rest."""
    num_tokens, num_decode_rows = plan.num_tokens, plan.num_decode_rows
    token_slots, positions, token_ids, slots, decode_lens, query_starts, query_lens, seq_lens, tile_rows = np.split(
        host, np.cumsum(layout.sizes)[:-1]
    )
    token_slots[:num_tokens] = np.repeat(rows.slots, rows.query_lens)
    token_slots[num_tokens:] = -1
    positions[:num_tokens] = np.arange(num_tokens) + np.repeat(rows.computed - rows.query_starts, rows.query_lens)
    positions[num_tokens:] = 0
    token_ids[:num_decode_rows] = -1
    token_ids[num_decode_rows:num_tokens] = plan.token_ids
    num_rows = len(rows.slots)
    slots[:num_rows] = rows.slots
    slots[num_rows:] = 0
    decode_lens[:num_decode_rows] = rows.seq_lens[:num_decode_rows]
    decode_lens[num_decode_rows:] = 0
    for target, source in ((query_starts, rows.query_starts), (query_lens, rows.query_lens), (seq_lens, rows.seq_lens)):
        target[:num_rows] = source
        target[num_rows:] = 0
    tile_rows[: tiles.size] = tiles.ravel()
    tile_rows[tiles.size :] = -1
