"""A mixture of experts in place of an MLP: a router picks a few gated MLPs for each token. Engine thread."""

import torch
from torch import Tensor, nn

from asyncllm.layers.linear import Linear
from asyncllm.layers.mlp import GatedMLP
from asyncllm.models.config import Experts


class SparseMLP(nn.Module):
    """Sum of a token's best experts, weighed by the router's softmax over all (https://arxiv.org/abs/1701.06538)."""

    def __init__(self, hidden_size: int, experts: Experts, activation: str) -> None:
        super().__init__()
        self.num_experts_per_token = experts.num_experts_per_token
        self.norm_topk_prob = experts.norm_topk_prob
        self.gate = Linear(hidden_size, experts.num_experts)
        self.experts = nn.ModuleList(
            GatedMLP(hidden_size, experts.intermediate_size, activation=activation) for _ in range(experts.num_experts)
        )
        self._dense = False

    def prepare(self, fused: bool) -> None:
        """Beside kernels nothing may ask the device what was picked: a step is captured in a graph.

        There every expert computes every token until a kernel does this: right, and as slow as all experts are.
        """
        self._dense = fused

    def forward(self, x: Tensor) -> Tensor:  # hot
        """[N, hidden] -> [N, hidden]."""
        probabilities = torch.softmax(self.gate(x).float(), dim=-1)  # [N, E]
        weights, chosen = probabilities.topk(self.num_experts_per_token, dim=-1)  # [N, top k]
        if self.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        return self._all_experts(x, weights, chosen) if self._dense else self._chosen_experts(x, weights, chosen)

    def _chosen_experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """One product for all tokens of an expert; experts that nobody picked cost nothing."""
        out = torch.zeros_like(x)
        by_expert = chosen.flatten().argsort(stable=True)  # places in [N, top k]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        weights = weights.flatten()
        for expert, places in zip(self.experts, by_expert.split(counts)):
            if len(places):
                tokens = places // chosen.shape[1]
                out.index_add_(0, tokens, expert(x[tokens]).mul_(weights[places, None]))
        return out

    def _all_experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same without a look at `chosen` on the host."""
        spread = x.new_zeros(len(x), len(self.experts)).scatter_(1, chosen, weights)  # [N, E]
        out = torch.zeros_like(x)
        for expert, weight in zip(self.experts, spread.split(1, dim=1)):
            out += expert(x) * weight
        return out
