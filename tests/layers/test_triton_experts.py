"""A mixture of experts in kernels against the plain one, and what its order by expert must be."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from asyncllm.layers import triton_routing
from asyncllm.layers.experts import SparseMLP
from asyncllm.layers.triton_experts import CONFIGS, ExpertsConfig, choose_config, mix_experts, why_not
from asyncllm.layers.triton_routing import Routing, max_tiles, route
from asyncllm.models.config import Experts

# The exponential of a very negative gate is infinite and its sigmoid 0, as meant; only the interpreter's numpy minds.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def mixture(
    num_experts: int, num_chosen: int, hidden: int, inner: int, renormalize: bool = True, activation: str = "silu"
) -> SparseMLP:
    """The plain one in float32, with random weights that keep the sizes of values."""
    experts = Experts(
        num_experts=num_experts,
        num_experts_per_token=num_chosen,
        intermediate_size=inner,
        norm_topk_prob=renormalize,
    )
    mlp = SparseMLP(hidden, experts, activation)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return mlp


def fused(mlp: SparseMLP, x: Tensor, logits: Tensor, config: ExpertsConfig | None = None) -> Tensor:
    """The kernels, in the dtype and on the device of `x`."""
    stacks = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
    weights = (stack.to(x.device, x.dtype) for stack in stacks if stack is not None)
    return mix_experts(x, logits, *weights, mlp.num_experts_per_token, mlp.norm_topk_prob, mlp.activation, config)


def plain(mlp: SparseMLP, x: Tensor, logits: Tensor) -> Tensor:
    """In float32, with weights rounded to the dtype of `x`: what the kernels compute but for their own roundings."""
    for parameter in mlp.parameters():
        parameter.copy_(parameter.to(x.dtype).float())
    mlp.prepare(fused=False)
    mlp.experts.prepare(fused=False)
    return mlp.chosen_experts(x.cpu().float(), *mlp.choose(logits.cpu().float()))


def inputs(device: torch.device, dtype: torch.dtype, mlp: SparseMLP, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens [N, hidden] in `dtype`, and float32 logits [N, E] without ties."""
    x = torch.randn(num_tokens, mlp.gate.in_features).to(dtype)
    return x.to(device), torch.randn(num_tokens, mlp.num_experts).to(device)


def check(mlp: SparseMLP, x: Tensor, logits: Tensor, config: ExpertsConfig | None = None) -> None:
    """Equal up to a few roundings of values around 1; the interpreter truncates to bfloat16 where devices round."""
    ours, expected = fused(mlp, x, logits, config), plain(mlp, x, logits)
    assert ours.dtype == x.dtype
    error = (ours.cpu().float() - expected).abs().max() / expected.abs().max()
    assert float(error) < (1e-5 if x.dtype == FLOAT32 else 4 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "hidden", "inner"),
    [
        (1, 4, 1, 32, 16),
        (1, 128, 8, 64, 16),  # every pair has an expert of its own
        (2, 8, 2, 48, 24),
        (17, 5, 2, 39, 53),  # nothing is a power of two
        (17, 8, 8, 33, 17),  # all experts, one after the other
        (64, 4, 1, 130, 66),
        (64, 40, 2, 32, 16),  # some experts get nothing
        (300, 8, 2, 40, 24),
        (300, 4, 1, 16, 8),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_sum_of_the_chosen_experts_is_that_of_the_plain_layer(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    hidden: int,
    inner: int,
) -> None:
    torch.manual_seed(num_tokens + num_experts)
    mlp = mixture(num_experts, num_chosen, hidden, inner)
    check(mlp, *inputs(device, dtype, mlp, num_tokens))


@pytest.mark.parametrize("config", [config for _, config in CONFIGS[2]], ids=lambda config: f"{config.tile_rows}-rows")
def test_every_size_of_tile_computes_the_same(device: torch.device, config: ExpertsConfig) -> None:
    torch.manual_seed(0)
    mlp = mixture(3, 1, 200, 150)
    check(mlp, *inputs(device, FLOAT16, mlp, 2 * config.tile_rows), config)


def test_more_pairs_per_expert_take_larger_tiles() -> None:
    sizes = [choose_config(num_tokens, 128, 8, BFLOAT16).tile_rows for num_tokens in (1, 64, 256, 2048)]
    assert sizes == [16, 16, 32, 64]
    assert choose_config(2048, 128, 8, FLOAT32).tile_rows == 16


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_weights_and_activations_are_those_of_the_plain_layer(
    device: torch.device, renormalize: bool, activation: str
) -> None:
    torch.manual_seed(5)
    mlp = mixture(8, 3, 48, 40, renormalize, activation)
    check(mlp, *inputs(device, FLOAT32, mlp, 5))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_all_tokens_at_one_expert_fill_its_tiles_and_no_other(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = mixture(6, 2, 32, 24)
    x, logits = inputs(device, dtype, mlp, 50)
    logits[:, 4] += 100.0
    logits[:, 1] += 50.0
    check(mlp, x, logits)


def test_a_token_gets_the_same_bits_again_and_in_another_place(device: torch.device) -> None:
    torch.manual_seed(0)
    mlp = mixture(8, 2, 40, 24)
    x, logits = inputs(device, FLOAT32, mlp, 30)
    order = torch.randperm(30).to(device)
    first = fused(mlp, x, logits)
    assert torch.equal(first, fused(mlp, x, logits))
    assert torch.equal(first[order], fused(mlp, x[order], logits[order]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_token_of_nan_stays_alone(device: torch.device) -> None:
    torch.manual_seed(0)
    mlp = mixture(5, 2, 40, 24)
    x, logits = inputs(device, FLOAT32, mlp, 9)
    good = fused(mlp, x, logits)
    x[3], logits[3] = torch.nan, torch.nan
    bad = fused(mlp, x, logits)
    others = [row for row in range(9) if row != 3]
    assert bad[3].isnan().all()
    assert torch.equal(bad[others], good[others])


def test_what_no_kernel_computes_is_named() -> None:
    assert why_not(128, "silu", BFLOAT16) == ""
    assert why_not(128, "relu", BFLOAT16) == "activation relu"
    assert why_not(2048, "silu", BFLOAT16) == "2048 experts"
    assert why_not(128, "silu", torch.float64) == "torch.float64"


# --- the order by expert --------------------------------------------------------------------------------------------


def chosen_of(routing: Routing, num_tokens: int, num_chosen: int) -> list[list[int]]:
    """Experts of each token by choice, read from the tiles; fails where these are not one cover of all pairs."""
    tiles = routing.tiles[: int(routing.num_tiles)].tolist()
    pairs = routing.pairs.tolist()
    assert sorted(pairs) == list(range(num_tokens * num_chosen))
    assert [first for _, first, _ in tiles] == [0, *torch.tensor(tiles)[:, 2].cumsum(0).tolist()][:-1]
    assert sum(count for _, _, count in tiles) == len(pairs)
    expert_of = {pair: expert for expert, first, count in tiles for pair in pairs[first : first + count]}
    assert [expert for expert, _, _ in tiles] == sorted(expert for expert, _, _ in tiles)
    return [[expert_of[token * num_chosen + choice] for choice in range(num_chosen)] for token in range(num_tokens)]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen"), [(1, 4, 2), (3, 128, 8), (40, 7, 7), (100, 60, 4), (70, 128, 8)]
)
@pytest.mark.parametrize("most_cells", [8192, 1])
def test_choices_and_weights_are_those_of_torch(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    num_experts: int,
    num_chosen: int,
    most_cells: int,
) -> None:
    # In one program, and in blocks of a few tokens that must know of each other.
    monkeypatch.setattr(triton_routing, "_MOST_CELLS", most_cells)
    monkeypatch.setattr(triton_routing, "_CELLS_OF_MANY", 1024)
    torch.manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts).to(device)
    routing = route(logits, num_chosen, False, 16)
    weights, chosen = logits.softmax(-1).topk(num_chosen)
    assert chosen_of(routing, num_tokens, num_chosen) == chosen.tolist()
    torch.testing.assert_close(routing.weights.view_as(weights), weights)
    counts = Counter(chosen.flatten().tolist())
    assert int(routing.num_tiles) == sum(-(-count // 16) for count in counts.values()) <= len(routing.tiles)
    # By token within an expert: the order of a step's pairs is a function of its choices.
    token_of = [pair // num_chosen for pair in routing.pairs.tolist()]
    for _, first, count in routing.tiles[: int(routing.num_tiles)].tolist():
        assert token_of[first : first + count] == sorted(token_of[first : first + count])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_of_equal_experts_the_first_is_chosen(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0, 1, 1, 0, 1], [2, 2, 2, 2, 2], [-300, 9, -300, -300, -300]], device=device, dtype=dtype)
    assert chosen_of(route(logits, 3, True, 16), 3, 3) == [[1, 2, 4], [0, 1, 2], [1, 0, 2]]


def test_renormalized_weights_add_up_to_one(device: torch.device) -> None:
    logits = torch.randn(20, 12).to(device)
    weights = route(logits, 5, True, 16).weights.view(20, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, device=device))
    assert torch.equal(weights, weights.sort(-1, descending=True).values)


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 8, 2), (9, 4, 2), (33, 5, 3)])
def test_no_choice_needs_more_tiles_than_there_is_room_for(num_tokens: int, num_experts: int, num_chosen: int) -> None:
    # The worst: experts with one pair beyond a full tile, as many as there are pairs for.
    room, worst = max_tiles(num_tokens, num_experts, num_chosen, 16), 0
    for spread in range(1, num_experts + 1):
        pairs = num_tokens * num_chosen
        shares = [pairs // spread + (index < pairs % spread) for index in range(spread)]
        worst = max(worst, sum(-(-share // 16) for share in shares))
        lonely = min(spread - 1, pairs)
        worst = max(worst, lonely + -(-(pairs - lonely) // 16))
    assert worst <= room
