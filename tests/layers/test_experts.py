"""The mixture of experts in plain torch: its three ways, and what stays in memory."""

import logging

import pytest
import torch

from asyncllm.layers import experts as experts_module
from asyncllm.layers.experts import SparseMLP
from asyncllm.layers.linear import can_pack
from asyncllm.layers.mlp import ACTIVATIONS
from asyncllm.models.config import Experts

EXPERTS = Experts(num_experts=6, num_experts_per_token=2, intermediate_size=24, norm_topk_prob=True)


def mixture(activation: str = "silu", dtype: torch.dtype = torch.float32) -> SparseMLP:
    """Not prepared yet; every weight random."""
    torch.manual_seed(0)
    mlp = SparseMLP(40, EXPERTS, activation).to(dtype)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mlp


def prepare(mlp: SparseMLP, fused: bool) -> SparseMLP:
    """As the loader does: outer modules first."""
    for module in (mlp, mlp.gate, mlp.experts):
        module.prepare(fused)
    return mlp


def by_definition(mlp: SparseMLP, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    router, gate_up, down = mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj
    assert router is not None and gate_up is not None and down is not None
    rows = []
    for token in x:
        shares = torch.softmax(router @ token, 0)
        best = shares.argsort(descending=True)[: EXPERTS.num_experts_per_token]
        row = torch.zeros_like(token)
        for expert in best:
            gate, up = (gate_up[expert] @ token).chunk(2)
            row += shares[expert] / shares[best].sum() * (down[expert] @ (ACTIVATIONS["silu"](gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_each_way_gives_the_weighed_sum_of_the_chosen_experts(num_tokens: int) -> None:
    mlp = prepare(mixture(), fused=False)
    x = torch.randn(num_tokens, 40)
    expected = by_definition(mlp, x)
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp.all_experts(x, *mlp.choose(mlp.gate(x))), expected)


def test_beside_kernels_what_they_cannot_do_is_dense_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts_module._warn_dense.cache_clear()
    x = torch.randn(9, 40)
    plain = prepare(mixture("relu"), fused=False)
    with caplog.at_level(logging.WARNING, logger="asyncllm.layers"):
        dense, _ = (prepare(mixture("relu"), fused=True) for _ in range(2))
    assert [record.getMessage() for record in caplog.records] == [
        "no kernel computes activation relu in a mixture of experts: every expert computes every token"
    ]
    # A step that is captured cannot ask what was chosen.
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    ours = dense(x)
    monkeypatch.undo()
    torch.testing.assert_close(ours, plain(x))


@pytest.mark.skipif(not can_pack(torch.empty(1, dtype=torch.bfloat16)), reason="oneDNN packs no bfloat16 here")
def test_packed_experts_let_go_of_their_stacks() -> None:
    whole = mixture(dtype=torch.bfloat16)
    x = torch.randn(11, 40).to(torch.bfloat16)
    expected = by_definition(whole.float(), x.float())
    packed = prepare(mixture(dtype=torch.bfloat16), fused=False)
    assert not list(packed.experts.parameters())
    torch.testing.assert_close(packed(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_for_kernels_it_computes_with_them(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = mixture()
    x = torch.randn(7, 40)
    expected = by_definition(mlp.to(dtype).float(), x.to(dtype).float())
    ours = prepare(mixture(dtype=dtype).to(device), fused=True)
    for plain in ("choose", "chosen_experts", "all_experts"):
        monkeypatch.setattr(ours, plain, None)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours(x.to(device, dtype)).cpu().float(), expected, rtol=tolerance, atol=tolerance)
