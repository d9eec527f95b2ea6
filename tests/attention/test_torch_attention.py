"""The paged backend against attention written out over plain, unpaged keys."""

import math
import random

import pytest
import torch

from asyncllm.attention import torch_attention
from asyncllm.attention.base import AttentionMetadata
from asyncllm.attention.torch_attention import TorchAttention, split_decode_rows
from tests.attention.oracle import attend

H, K, D, B = 6, 2, 8, 4


class Batch:
    """Random rows: the pages hold all but the query tokens' keys, as previous steps would have left them."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        seed: int,
        dtype: torch.dtype = torch.float32,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        """`rows`: (query tokens, tokens in all) each, rows of one query token with a prefix first."""
        self.window, self.soft_cap = window, soft_cap
        generator = torch.Generator().manual_seed(seed)
        needed = sum(-(-length // B) for _, length in rows)
        blocks = list(range(1, needed + 1))
        random.Random(seed).shuffle(blocks)
        self.query_lens = [query_len for query_len, _ in rows]
        self.seq_lens = [length for _, length in rows]
        self.num_decode_rows = sum(1 for query_len, length in rows if query_len == 1 < length)
        self.keys = [torch.randn(length, K, D, generator=generator).to(dtype) for _, length in rows]
        self.values = [torch.randn(length, K, D, generator=generator).to(dtype) for _, length in rows]
        self.query = torch.randn(sum(self.query_lens), H, D, generator=generator).to(dtype)
        # NaN in the pages nobody wrote would spread; the null block may hold anything finite.
        self.kv_cache = torch.full((2, needed + 1, K, B, D), torch.nan, dtype=dtype)
        self.kv_cache[:, 0] = 50.0
        width = max(-(-length // B) for _, length in rows)
        self.tables = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, (_, length) in enumerate(rows):
            for column in range(-(-length // B)):
                self.tables[row, column] = blocks.pop()
                self.kv_cache[:, self.tables[row, column]] = 50.0

    def metadata(self, query_lens: list[int], seq_lens: list[int], num_decode_rows: int) -> AttentionMetadata:
        positions, slots = [], []
        for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens)):
            for position in range(seq_len - query_len, seq_len):
                positions.append(position)
                slots.append(int(self.tables[row, position // B]) * B + position % B)
        return AttentionMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_table=self.tables,
            slots=torch.arange(len(self.tables)),
            seq_lens=torch.tensor(seq_lens),
            num_decode_rows=num_decode_rows,
            query_lens=query_lens,
            seq_lens_host=seq_lens,
            block_size=B,
        )

    def run(self) -> torch.Tensor:
        """Store the prefixes in one step, then attend in the next."""
        backend, scale = TorchAttention(), 1 / math.sqrt(D)
        prefixes = [length - query_len for query_len, length in zip(self.query_lens, self.seq_lens)]
        keys = torch.cat([keys[:prefix] for keys, prefix in zip(self.keys, prefixes)])
        values = torch.cat([values[:prefix] for values, prefix in zip(self.values, prefixes)])
        if len(keys):
            step = backend.begin(self.metadata(prefixes, prefixes, 0), self.kv_cache)
            step.attend(keys.new_zeros(len(keys), H, D), keys, values, self.kv_cache, scale)
        keys = torch.cat([keys[prefix:] for keys, prefix in zip(self.keys, prefixes)])
        values = torch.cat([values[prefix:] for values, prefix in zip(self.values, prefixes)])
        step = backend.begin(self.metadata(self.query_lens, self.seq_lens, self.num_decode_rows), self.kv_cache)
        return step.attend(self.query, keys, values, self.kv_cache, scale, self.window, self.soft_cap)

    def expected(self) -> torch.Tensor:
        rows = zip(self.query.split(self.query_lens), self.keys, self.values)
        return torch.cat([attend(*row, 1 / math.sqrt(D), self.window, self.soft_cap) for row in rows])


def assert_right(batch: Batch, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(batch.run().double(), batch.expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 2)],
        [(1, 17)],
        [(1, 8), (1, 8), (1, 8)],
        [(1, 5), (1, 30), (1, 16)],
        [(1, 1)],
        [(9, 9)],
        [(5, 20)],
        [(1, 12), (1, 7), (4, 4), (6, 21), (1, 1)],
    ],
    ids=str,
)
def test_rows_attend_to_their_own_pages_only(rows: list[tuple[int, int]]) -> None:
    assert_right(Batch(rows, seed=0))


# Windows within a page, of a page, over pages, and longer than any row.
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(1, 0.0), (3, 0.0), (4, 0.0), (9, 0.0), (60, 0.0), (0, 1.5), (6, 2.0)]
)
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 2)],
        [(1, 17)],
        [(1, 30), (1, 5), (1, 16), (1, 4)],
        [(9, 9)],
        [(5, 20)],
        [(1, 12), (1, 7), (4, 4), (6, 21), (1, 1), (19, 19)],
    ],
    ids=str,
)
def test_queries_see_their_window_and_scores_stay_below_the_cap(
    rows: list[tuple[int, int]], window: int, soft_cap: float
) -> None:
    assert_right(Batch(rows, seed=5, window=window, soft_cap=soft_cap))


def test_a_windowed_chunk_is_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "PREFIX_QUERY_CHUNK", 7)
    assert_right(Batch([(1, 3), (20, 33), (24, 24), (3, 50)], seed=6, window=5))
    assert_right(Batch([(20, 33), (24, 24)], seed=6, window=11, soft_cap=1.0))


def test_windowed_rows_of_different_lengths_are_one_decode_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "PADDED_KEYS_PER_GROUP", 8)
    # Each gathers its window alone, so the long ones cost what the short ones do.
    batch = Batch([(1, 9), (1, 60), (1, 12), (1, 33), (1, 58)], seed=7, window=6)
    assert_right(batch)
    step = TorchAttention().begin(batch.metadata(batch.query_lens, batch.seq_lens, 5), batch.kv_cache)
    step.attend(batch.query, *(torch.zeros(5, K, D) for _ in range(2)), batch.kv_cache, 1.0, batch.window)
    (plan,) = step.plans.values()
    assert [group.length <= 6 + B for group in plan.decodes] == [True]


@pytest.mark.parametrize("seed", range(30))
def test_random_steps_agree_with_attention_written_out(seed: int) -> None:
    rng = random.Random(seed)
    decodes = [(1, rng.randint(2, 40)) for _ in range(rng.randint(0, 5))]
    prompts = [
        (length, length + rng.choice([0, rng.randint(1, 30)]))
        for length in rng.choices(range(2, 30), k=rng.randint(1, 3))
    ]
    window, soft_cap = rng.choice([0, rng.randint(1, 40)]), rng.choice([0.0, 0.0, rng.uniform(0.5, 5.0)])
    assert_right(Batch(decodes + prompts, seed, window=window, soft_cap=soft_cap))


def test_a_long_chunk_behind_a_prefix_is_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "PREFIX_QUERY_CHUNK", 7)
    assert_right(Batch([(1, 3), (20, 33), (7, 9), (3, 50), (15, 16)], seed=1))


def test_groups_of_decode_rows_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "PADDED_KEYS_PER_GROUP", 8)
    batch = Batch([(1, 4), (1, 60), (1, 5), (1, 33), (1, 58), (3, 8)], seed=2)
    assert len(split_decode_rows(batch.seq_lens[:5])) > 2
    assert_right(batch)


@pytest.mark.parametrize("threshold", [0, 1 << 30], ids=["by products", "fused"])
@pytest.mark.parametrize("rows", [[(1, 8), (1, 8)], [(1, 5), (1, 30), (1, 16)], [(1, 64)]], ids=str)
def test_both_ways_of_decoding_in_bfloat16_are_near_the_exact_one(
    monkeypatch: pytest.MonkeyPatch, threshold: int, rows: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(torch_attention, "MIN_KEYS_FOR_PRODUCTS", threshold)
    # Scores and outputs are of order 1 and rounded to 8 bits (0.4 %) about three times on the way.
    assert_right(Batch(rows, 3, torch.bfloat16), tolerance=2e-2)
    assert_right(Batch(rows, 3, torch.bfloat16, window=7), tolerance=2e-2)
    assert_right(Batch(rows, 3, torch.bfloat16, soft_cap=3.0), tolerance=2e-2)


def test_one_long_row_is_decoded_apart_from_many_short_ones() -> None:
    assert split_decode_rows([100, 2000, *[100] * 31]) == [[1], [0, *range(2, 33)]]


def test_rows_of_about_the_same_length_stay_together_in_order() -> None:
    assert split_decode_rows([90, 120, 100]) == [[0, 1, 2]]
