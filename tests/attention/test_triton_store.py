"""The kernel between projections and attention, against the same formulas in torch."""

import pytest
import torch
from torch import Tensor

from asyncllm.attention.triton_store import FEW_TOKENS, norm_rope_store

BLOCK_SIZE = 4
NUM_BLOCKS = 9
NUM_POSITIONS = 40
EPS = 1e-6
# The interpreter truncates to bfloat16 where devices round.
HALF_DTYPES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def cos_sin_table(head_dim: int, device: torch.device) -> Tensor:
    """[P, D] float32."""
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(NUM_POSITIONS)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


def rotate(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Halves rotated in float32: heads [N, heads, D], cos_sin [N, D]."""
    x1, x2 = heads.float().chunk(2, dim=-1)
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(heads.dtype)


def transformers_norm(heads: Tensor, weight: Tensor) -> Tensor:
    """The norm of Qwen3's heads, with its two roundings."""
    wide = heads.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(heads.dtype)


class Case:
    """Random heads and pages, and what the kernel should make of them."""

    def __init__(
        self,
        device: torch.device,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        with_norm: bool = True,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.num_heads, self.num_rotated = num_heads, num_heads + num_kv_heads
        self.qkv = torch.randn(num_tokens, self.num_rotated + num_kv_heads, head_dim).to(device, dtype)
        self.positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), dtype=torch.int32).to(device)
        places = torch.randperm((NUM_BLOCKS - 1) * BLOCK_SIZE)[:num_tokens] + BLOCK_SIZE  # not in the null block
        self.slot_mapping = places.to(device, torch.int32)
        self.cos_sin = cos_sin_table(head_dim, device)
        self.kv_cache = torch.full((2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim), 7.0, dtype=dtype, device=device)
        weights = (torch.rand(2, head_dim) + 0.5).to(device, dtype) if with_norm else None
        self.query_weight, self.key_weight = (None, None) if weights is None else (weights[0], weights[1])

    def run(self) -> None:
        norm_rope_store(
            self.qkv,
            self.positions,
            self.slot_mapping,
            self.cos_sin,
            self.kv_cache,
            self.num_heads,
            self.query_weight,
            self.key_weight,
            EPS,
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """The qkv and kv_cache that `run` should leave."""
        qkv, kv_cache = self.qkv.clone(), self.kv_cache.clone()
        query, key, value = qkv.split((self.num_heads, *(kv_cache.shape[2],) * 2), dim=1)
        if self.query_weight is not None and self.key_weight is not None:
            query, key = transformers_norm(query, self.query_weight), transformers_norm(key, self.key_weight)
        angles = self.cos_sin[self.positions.long()]  # [N, D]
        qkv[:, : self.num_heads] = rotate(query, angles)
        blocks, offsets = self.slot_mapping.long() // BLOCK_SIZE, self.slot_mapping.long() % BLOCK_SIZE
        kv_cache[0, blocks, :, offsets] = rotate(key, angles)
        kv_cache[1, blocks, :, offsets] = value
        return qkv, kv_cache

    def check(self, tolerance: float = 1e-5) -> None:
        qkv, kv_cache = self.expected()
        self.run()
        torch.testing.assert_close(self.qkv, qkv, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(self.kv_cache, kv_cache, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("with_norm", [False, True])
def test_queries_turn_in_place_and_keys_and_values_reach_their_pages(
    device: torch.device, head_dim: int, with_norm: bool
) -> None:
    Case(device, 3, 6, 2, head_dim, with_norm=with_norm).check()


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (14, 2), (16, 1), (7, 7)])
def test_programs_that_span_queries_keys_and_values_treat_each_head_as_what_it_is(
    device: torch.device, heads: tuple[int, int]
) -> None:
    Case(device, 2, *heads, 64, seed=1).check()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_norms_round_as_transformers_does(device: torch.device, dtype: torch.dtype) -> None:
    # One unit in the last place, where a sum in another order tipped a rounding.
    Case(device, 5, 4, 2, 64, dtype, seed=2).check(tolerance=torch.finfo(dtype).eps)


def test_many_tokens_get_the_same_answer_as_few(device: torch.device) -> None:
    few = Case(device, 2, 4, 2, 64, seed=3)
    many = Case(device, 2, 4, 2, 64, seed=3)
    repeats = FEW_TOKENS // 2 + 1
    many.qkv = many.qkv.repeat(repeats, 1, 1)
    many.positions, many.slot_mapping = many.positions.repeat(repeats), many.slot_mapping.repeat(repeats)
    few.run()
    many.run()
    torch.testing.assert_close(many.qkv[-2:], few.qkv)
    torch.testing.assert_close(many.kv_cache, few.kv_cache)


def test_padding_tokens_touch_only_the_null_block(device: torch.device) -> None:
    case = Case(device, 3, 2, 1, 64, seed=4)
    case.slot_mapping.zero_()
    before = case.kv_cache.clone()
    case.run()
    assert torch.equal(case.kv_cache[:, 1:], before[:, 1:])
    assert torch.equal(case.kv_cache[:, 0, :, 1:], before[:, 0, :, 1:])


def test_one_layer_of_a_cache_of_all_layers_is_written_in_place(device: torch.device) -> None:
    case = Case(device, 3, 2, 2, 64, seed=5)
    whole = torch.full((2, NUM_BLOCKS, 3, *case.kv_cache.shape[2:]), 7.0, device=device)  # layers inside blocks
    case.kv_cache = whole[:, :, 1]
    _, expected = case.expected()
    case.run()
    torch.testing.assert_close(whole[:, :, 1], expected)
    assert (whole[:, :, 0] == 7.0).all() and (whole[:, :, 2] == 7.0).all()
