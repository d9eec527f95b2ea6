"""A mixture of experts on CUDA: what tokens of one expert share is one product, and nobody's weights are read in vain.

    route, place     which experts, and tiles of (token, choice) pairs by expert          (triton_routing.py)
    gate_up          act(x · gate) · (x · up) of each tile, into the order by expert
    down             · down · weight of the pair, back to the order by token
    combine          sum over a token's choices, from the likeliest on

Products are summed in float32, and rounded where a tensor is written. Nothing is asked of the host, no sum depends on
who comes first: made for CUDA graphs, and the same every time. Engine thread.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.layers.triton_activation import activate
from asyncllm.layers.triton_routing import MAX_EXPERTS, Routing, route

ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMBINED = 1024  # features per program


class Product(NamedTuple):
    """How one of the two products is cut."""

    columns: int  # of the output in a program; gate_up: so many of gate and as many of up
    depth: int  # of the sum per step of the loop
    num_warps: int
    num_stages: int


class ExpertsConfig(NamedTuple):
    """How a step of some size is computed."""

    tile_rows: int  # pairs of a tile at most
    gate_up: Product
    down: Product


# (pairs per expert up to which, config), by bytes per element. Few pairs: the weights' bytes are all that counts, so
# narrow programs put many loads in flight, 64 KiB each. Many: tiles that wgmma likes. All stay below the 99 KiB of
# shared memory that small GPUs have, and float32 multiplies without tensor cores, so its tiles are what registers hold.
CONFIGS: dict[int, tuple[tuple[float, ExpertsConfig], ...]] = {
    2: (
        (6.0, ExpertsConfig(16, Product(32, 128, 4, 4), Product(64, 128, 4, 4))),
        (24.0, ExpertsConfig(32, Product(64, 64, 4, 4), Product(128, 64, 4, 4))),
        (float("inf"), ExpertsConfig(64, Product(64, 64, 4, 4), Product(128, 64, 4, 4))),
    ),
    4: ((float("inf"), ExpertsConfig(16, Product(16, 32, 4, 3), Product(32, 32, 4, 3))),),
}


def why_not(num_experts: int, activation: str, dtype: torch.dtype) -> str:
    """What of a mixture the kernels cannot do; empty where they can."""
    if activation not in ACTIVATIONS:
        return f"activation {activation}"
    if num_experts > MAX_EXPERTS:
        return f"{num_experts} experts"
    return "" if dtype in DTYPES else f"{dtype}"


def choose_config(num_tokens: int, num_experts: int, num_chosen: int, dtype: torch.dtype) -> ExpertsConfig:
    """By how many pairs an expert has on average."""
    per_expert = num_tokens * num_chosen / num_experts
    return next(config for most, config in CONFIGS[dtype.itemsize] if per_expert <= most)


def mix_experts(  # hot
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_chosen: int,
    renormalize: bool,
    activation: str,
    config: ExpertsConfig | None = None,
) -> Tensor:
    """Sum of each token's best experts, weighed by the softmax over its logits; see `triton_routing.route`.

    x [N, hidden], logits [N, E], gate_up [E, 2·inner, hidden], down [E, hidden, inner], all contiguous -> [N, hidden].
    `config`: None for the one that suits the number of tokens.
    """
    num_tokens, num_experts = logits.shape
    config = config or choose_config(num_tokens, num_experts, num_chosen, x.dtype)
    routing = route(logits, num_chosen, renormalize, config.tile_rows)
    inner = multiply_gate_up(x, gate_up, routing, num_chosen, activation, config)
    parts = multiply_down(inner, down, routing, config)
    return combine(parts.view(num_tokens, num_chosen, -1))


def multiply_gate_up(  # hot
    x: Tensor, weight: Tensor, routing: Routing, num_chosen: int, activation: str, config: ExpertsConfig
) -> Tensor:
    """act(gate) · up of every pair: x [N, hidden], weight [E, 2·inner, hidden] -> [P, inner] in the order by expert."""
    hidden, inner = x.shape[1], weight.shape[1] // 2
    assert x.is_contiguous() and weight.is_contiguous()
    product, num_tiles = config.gate_up, len(routing.tiles)
    out = torch.empty((len(routing.pairs), inner), dtype=x.dtype, device=x.device)
    _gate_up[(triton.cdiv(inner, product.columns), num_tiles)](
        x,
        weight,
        routing.pairs,
        routing.tiles,
        routing.num_tiles,
        out,
        HIDDEN=hidden,
        INNER=inner,
        K=num_chosen,
        ROWS=config.tile_rows,
        COLUMNS=product.columns,
        DEPTH=product.depth,
        GELU_TANH=activation == "gelu_tanh",
        WIDEN=_must_widen(x),
        num_warps=product.num_warps,
        num_stages=product.num_stages,
    )
    return out


def multiply_down(inner: Tensor, weight: Tensor, routing: Routing, config: ExpertsConfig) -> Tensor:  # hot
    """inner [P, I] in the order by expert, weight [E, hidden, I] -> [P, hidden] weighed, pair by pair."""
    num_pairs, num_inner = inner.shape
    hidden = weight.shape[1]
    assert weight.is_contiguous()
    product = config.down
    out = torch.empty((num_pairs, hidden), dtype=inner.dtype, device=inner.device)
    _down[(triton.cdiv(hidden, product.columns), len(routing.tiles))](
        inner,
        weight,
        routing.pairs,
        routing.weights,
        routing.tiles,
        routing.num_tiles,
        out,
        HIDDEN=hidden,
        INNER=num_inner,
        ROWS=config.tile_rows,
        COLUMNS=product.columns,
        DEPTH=product.depth,
        WIDEN=_must_widen(inner),
        num_warps=product.num_warps,
        num_stages=product.num_stages,
    )
    return out


def combine(parts: Tensor) -> Tensor:  # hot
    """Sum over choices in their order, in float32: [N, k, hidden] -> [N, hidden]."""
    num_tokens, num_chosen, hidden = parts.shape
    if num_chosen == 1:
        return parts.view(num_tokens, hidden)
    out = torch.empty((num_tokens, hidden), dtype=parts.dtype, device=parts.device)
    _combine[(num_tokens, triton.cdiv(hidden, _COMBINED))](
        parts, out, HIDDEN=hidden, K=num_chosen, BLOCK=_COMBINED, num_warps=4
    )
    return out


def _must_widen(x: Tensor) -> bool:
    """Whether to multiply as float32: a CPU means Triton's interpreter, whose products of bfloat16 are wrong."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


@triton.jit
def _gate_up(
    x: tl.tensor,  # [N, HIDDEN]
    weight: tl.tensor,  # [E, 2 * INNER, HIDDEN], gate above up
    pairs: tl.tensor,  # [P]
    tiles: tl.tensor,  # [T, 3]
    num_tiles: tl.tensor,  # [1]
    out: tl.tensor,  # [P, INNER]
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GELU_TANH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Program (block of columns, tile): tiles of one expert run side by side, and find its weights in the L2."""
    tile = tl.program_id(1)
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    places = tl.load(tiles + 3 * tile + 1) + tl.arange(0, ROWS)
    there = tl.arange(0, ROWS) < tl.load(tiles + 3 * tile + 2)
    # Loads of rows and columns that are not there go to others that are: only the sum's ends need a mask.
    tokens = (tl.load(pairs + places, mask=there, other=0) // K).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    inputs = x + (tokens * HIDDEN)[:, None] + depths[None, :]
    gates = weight + expert * (2 * INNER * HIDDEN)
    gates += (tl.minimum(columns, INNER - 1) * HIDDEN)[None, :] + depths[:, None]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        gate_ptrs = gates + start
        if HIDDEN % DEPTH == 0:
            values = tl.load(inputs + start)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(gate_ptrs + INNER * HIDDEN)
        else:
            inside = depths < HIDDEN - start
            values = tl.load(inputs + start, mask=inside[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=inside[:, None], other=0.0)
            up_weight = tl.load(gate_ptrs + INNER * HIDDEN, mask=inside[:, None], other=0.0)
        if WIDEN:
            values = values.to(tl.float32)
            gate_weight = gate_weight.to(tl.float32)
            up_weight = up_weight.to(tl.float32)
        gate = tl.dot(values, gate_weight, gate, input_precision="ieee")
        up = tl.dot(values, up_weight, up, input_precision="ieee")
    result = (activate(gate, GELU_TANH) * up).to(out.dtype.element_ty)
    to = out + (places.to(tl.int64) * INNER)[:, None] + columns[None, :]
    tl.store(to, result, mask=there[:, None] & (columns < INNER)[None, :])


@triton.jit
def _down(
    inner: tl.tensor,  # [P, INNER] in the order by expert
    weight: tl.tensor,  # [E, HIDDEN, INNER]
    pairs: tl.tensor,  # [P]
    weights: tl.tensor,  # [P], of pairs
    tiles: tl.tensor,  # [T, 3]
    num_tiles: tl.tensor,  # [1]
    out: tl.tensor,  # [P, HIDDEN] pair by pair
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Program (block of columns, tile)."""
    tile = tl.program_id(1)
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    first = tl.load(tiles + 3 * tile + 1)
    lanes = tl.arange(0, ROWS)
    there = lanes < tl.load(tiles + 3 * tile + 2)
    numbers = tl.load(pairs + first + lanes, mask=there, other=0)
    shares = tl.load(weights + numbers, mask=there, other=0.0)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depths = tl.arange(0, DEPTH)
    rows = first + tl.where(there, lanes, 0)
    inputs = inner + (rows.to(tl.int64) * INNER)[:, None] + depths[None, :]
    matrix = weight + expert * (HIDDEN * INNER)
    matrix += (tl.minimum(columns, HIDDEN - 1) * INNER)[None, :] + depths[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        if INNER % DEPTH == 0:
            values = tl.load(inputs + start)
            part = tl.load(matrix + start)
        else:
            inside = depths < INNER - start
            values = tl.load(inputs + start, mask=inside[None, :], other=0.0)
            part = tl.load(matrix + start, mask=inside[:, None], other=0.0)
        if WIDEN:
            values = values.to(tl.float32)
            part = part.to(tl.float32)
        total = tl.dot(values, part, total, input_precision="ieee")
    result = (total * shares[:, None]).to(out.dtype.element_ty)
    to = out + (numbers.to(tl.int64) * HIDDEN)[:, None] + columns[None, :]
    tl.store(to, result, mask=there[:, None] & (columns < HIDDEN)[None, :])


@triton.jit
def _combine(
    parts: tl.tensor,  # [N, K, HIDDEN]
    out: tl.tensor,  # [N, HIDDEN]
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (token, block of features)."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(K):
        total += tl.load(parts + row * K + choice * HIDDEN + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + columns, total.to(out.dtype.element_ty), mask=there)
