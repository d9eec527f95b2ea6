"""A mixture of experts in place of an MLP: a router picks a few gated MLPs for each token. Engine thread."""

import logging
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncllm.layers.blocks import BlockRows
from asyncllm.layers.linear import Linear, can_pack, take_rows
from asyncllm.layers.mlp import ACTIVATIONS
from asyncllm.models.config import Experts

log = logging.getLogger("asyncllm.layers")
# What a checkpoint calls an expert's matrices, by the stack that has them.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class ExpertWeights(nn.Module):
    """Gated MLPs of one shape, their matrices stacked: E experts with I inner features each."""

    def __init__(self, hidden_size: int, experts: Experts, activation: str) -> None:
        super().__init__()
        num_experts, inner = experts.num_experts, experts.intermediate_size
        gate_up, down = torch.empty(num_experts, 2 * inner, hidden_size), torch.empty(num_experts, hidden_size, inner)
        self.gate_up_proj: nn.Parameter | None = nn.Parameter(gate_up, requires_grad=False)  # [E, 2I, hidden]
        self.down_proj: nn.Parameter | None = nn.Parameter(down, requires_grad=False)  # [E, hidden, I]
        self._activate = ACTIVATIONS[activation]
        self._matrices: list[tuple[Tensor, Tensor]] = []  # of each expert, packed or views
        self._packed = False
        self._blocks: list[BlockRows | None] = [None] * (num_experts * sum(map(len, PARTS.values())))

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint calls the single matrices stacked in a parameter, below this module, and where they go."""
        for index, matrix in enumerate(getattr(self, name)):
            for part, rows in zip(PARTS[name], matrix.chunk(len(PARTS[name]))):
                yield f"{index}.{part}.weight", rows

    def all_parts(self) -> Iterator[tuple[str, int]]:
        """All of them in the order that `keep_blocks` counts, and how many rows each has."""
        for name in PARTS:
            for part, rows in self.parts(name):
                yield part, len(rows)

    def keep_blocks(self, part: int, blocks: BlockRows) -> None:
        """Instead of a part of the weights, which is not filled then, what the checkpoint has."""
        self._blocks[part] = blocks

    def take_rows(self) -> Iterator[tuple[list[BlockRows], list[BlockRows]]]:
        """Let go of the weights, expert by expert: gate above up, and down, as `Linear.take_rows` gives them."""
        assert self.gate_up_proj is not None and self.down_proj is not None
        stacks, blocks = zip(self.gate_up_proj.detach(), self.down_proj.detach()), self._blocks
        first_down = 2 * len(self.gate_up_proj)
        self.gate_up_proj, self.down_proj, self._blocks = None, None, []
        for index, (gate_up, down) in enumerate(stacks):
            gate_up_rows = take_rows(gate_up, [len(gate_up) // 2] * 2, blocks[2 * index : 2 * index + 2])
            yield gate_up_rows, take_rows(down, [len(down)], blocks[first_down + index : first_down + index + 1])

    def prepare(self, fused: bool) -> None:
        """Where `Linear` would, pack each expert's matrices, one stack after the other, and let go of the stack.

        Kernels, interpreted ones too, read the stacks.
        """
        assert self.gate_up_proj is not None and self.down_proj is not None
        self._packed = not fused and can_pack(self.gate_up_proj)
        if not self._packed:
            self._matrices = list(zip(self.gate_up_proj.detach().unbind(), self.down_proj.detach().unbind()))
            return
        gate_up = _pack(self.gate_up_proj.detach())
        self.gate_up_proj = None
        down = _pack(self.down_proj.detach())
        self.down_proj = None
        self._matrices = list(zip(gate_up, down))

    def forward(self, x: Tensor, index: int) -> Tensor:  # hot
        """One expert: [N, hidden] -> [N, hidden]."""
        gate_up, down = self._matrices[index]
        gate, up = self._multiply(x, gate_up).chunk(2, dim=-1)
        return self._multiply(self._activate(gate).mul_(up), down)

    def _multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
        return functional.linear(x, matrix)


def _pack(stack: Tensor) -> list[Tensor]:
    """Each matrix as an opaque oneDNN tensor."""
    return [torch.ops.mkldnn._reorder_linear_weight(matrix, None) for matrix in stack.unbind()]


class SparseMLP(nn.Module):
    """Sum of a token's best experts, weighed by the router's softmax over all (https://arxiv.org/abs/1701.06538)."""

    def __init__(self, hidden_size: int, experts: Experts, activation: str) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.num_experts_per_token = experts.num_experts_per_token
        self.norm_topk_prob = experts.norm_topk_prob
        self.activation = activation
        self.gate = Linear(hidden_size, experts.num_experts)
        self.experts = ExpertWeights(hidden_size, experts, activation)
        self._kernels: ModuleType | None = None
        self._dense = False

    def prepare(self, fused: bool) -> None:
        """Choose kernels where a step may be captured in a graph, which cannot ask the device what was picked.

        What they cannot do is computed densely there: right, captured, and as slow as all experts are.
        """
        if not fused:
            return
        from asyncllm.layers import triton_experts

        gate = self.gate.weight
        assert gate is not None
        problem = triton_experts.why_not(self.num_experts, self.activation, gate.dtype)
        if problem:
            _warn_dense(problem)
            self._dense = True
        else:
            self._kernels = triton_experts

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        logits = self.gate(x)
        if self._kernels is not None:
            return self._kernels.mix_experts(
                x,
                logits,
                self.experts.gate_up_proj,
                self.experts.down_proj,
                self.num_experts_per_token,
                self.norm_topk_prob,
                self.activation,
            )
        weights, chosen = self.choose(logits)
        return self.all_experts(x, weights, chosen) if self._dense else self.chosen_experts(x, weights, chosen)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits [N, E] -> weights, in their dtype, and numbers of the chosen experts, both [N, top k]."""
        probabilities = torch.softmax(logits.float(), dim=-1)  # [N, E]
        weights, chosen = probabilities.topk(self.num_experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), chosen

    def chosen_experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """One product for all tokens of an expert; experts that nobody picked cost nothing."""
        out = torch.zeros_like(x)
        by_expert = chosen.flatten().argsort(stable=True)  # places in [N, top k]
        counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
        weights = weights.flatten()
        for index, places in enumerate(by_expert.split(counts)):
            if len(places):
                tokens = places // chosen.shape[1]
                out.index_add_(0, tokens, self.experts(x[tokens], index).mul_(weights[places, None]))
        return out

    def all_experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same without a look at `chosen` on the host: every expert computes every token."""
        spread = x.new_zeros(len(x), self.num_experts).scatter_(1, chosen, weights)  # [N, E]
        out = torch.zeros_like(x)
        for index, weight in enumerate(spread.split(1, dim=1)):
            out += self.experts(x, index) * weight
        return out


@cache  # once for all layers
def _warn_dense(problem: str) -> None:
    log.warning("no kernel computes %s in a mixture of experts: every expert computes every token", problem)
