"""Frequencies of every kind of rope scaling against transformers', and the reordering that partial rope needs."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asyncllm.layers.rotary import Rotary, frequencies, rotary_order, rotate
from asyncllm.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

HEAD_DIM = 32
MAX_POSITION = 4096
SHORT = tuple(1.0 + 0.1 * i for i in range(HEAD_DIM // 2))
LONG = tuple(1.0 + 0.9 * i for i in range(HEAD_DIM // 2))
SCALINGS: dict[str, tuple[str, RopeScaling]] = {
    "linear": ("linear", LinearScaling(factor=4.0)),
    "dynamic": ("dynamic", DynamicScaling(factor=3.0, original_max_position_embeddings=MAX_POSITION)),
    "llama3": ("llama3", Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)),
    "yarn": ("yarn", YarnScaling(factor=4.0, original_max_position_embeddings=1024)),
    "yarn-mscale": ("yarn", YarnScaling(
        factor=40.0, original_max_position_embeddings=256, beta_fast=16.0, beta_slow=2.0, mscale=0.7,
        mscale_all_dim=1.2)),
    "yarn-exact": ("yarn", YarnScaling(
        factor=4.0, original_max_position_embeddings=1024, truncate=False, attention_factor=1.25)),
    "longrope-short": ("longrope", LongRopeScaling(
        factor=2.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=MAX_POSITION)),
    "longrope-long": ("longrope", LongRopeScaling(
        factor=4.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=1024)),
}  # fmt: skip


def of_transformers(kind: str, scaling: RopeScaling, length: int) -> tuple[torch.Tensor, float]:
    fields: dict[str, Any] = {name: getattr(scaling, name) for name in scaling.__struct_fields__}
    table = {"rope_type": kind, "rope_theta": 5e4} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if value is not None
    }
    config = LlamaConfig(
        hidden_size=HEAD_DIM, num_attention_heads=1, max_position_embeddings=MAX_POSITION, rope_parameters=table
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers_at_the_longest_context(name: str) -> None:
    kind, scaling = SCALINGS[name]
    # Dynamic scaling changes nothing before the context is longer than the original one.
    lengths = (MAX_POSITION, 3 * MAX_POSITION) if kind == "dynamic" else (MAX_POSITION,)
    for length in lengths:
        expected, expected_amplitude = of_transformers(kind, scaling, length)
        inv_freq, amplitude = frequencies(HEAD_DIM, 5e4, length, scaling)
        torch.testing.assert_close(inv_freq, expected, rtol=2e-6, atol=0.0)
        assert amplitude == pytest.approx(expected_amplitude)
        assert not torch.equal(inv_freq, frequencies(HEAD_DIM, 5e4, length, None)[0]) or length == MAX_POSITION


def test_kernels_table_and_plain_torch_turn_alike() -> None:
    rotary = Rotary(HEAD_DIM, 1e4, 64, 16, YarnScaling(factor=4.0, original_max_position_embeddings=16))
    rotary.prepare(fused=True)
    assert rotary.table is not None
    cos, sin = rotary(torch.arange(64), torch.float32)
    torch.testing.assert_close(rotary.table[:, : HEAD_DIM // 2], cos[:, 0, : HEAD_DIM // 2])
    torch.testing.assert_close(rotary.table[:, HEAD_DIM // 2 :], sin[:, 0, HEAD_DIM // 2 :])


def test_in_rotary_order_the_first_dimensions_turn_as_a_smaller_head_and_the_rest_stay() -> None:
    partial, whole = Rotary(HEAD_DIM, 1e4, 64, rotary_dim=12), Rotary(12, 1e4, 64, rotary_dim=12)
    heads, positions = torch.randn(5, 3, HEAD_DIM), torch.tensor([0, 1, 7, 30, 63])
    order = rotary_order(HEAD_DIM, 12)
    turned = torch.empty_like(heads)
    turned[..., order] = rotate(heads[..., order], *partial(positions, torch.float32))
    torch.testing.assert_close(turned[..., 12:], heads[..., 12:], rtol=0.0, atol=0.0)
    torch.testing.assert_close(turned[..., :12], rotate(heads[..., :12], *whole(positions, torch.float32)))


def test_without_rope_nothing_turns() -> None:
    rotary = Rotary(HEAD_DIM, 1e4, 64, rotary_dim=0)
    cos, sin = rotary(torch.arange(64), torch.float32)
    assert not rotary.turns and (cos == 1).all() and (sin == 0).all()
