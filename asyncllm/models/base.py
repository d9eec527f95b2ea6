"""What every causal language model offers to the executor and to the loader."""

from typing import Protocol

from torch import Tensor

from asyncllm.attention.base import AttentionMetadata
from asyncllm.models.config import ModelArchitecture


class CausalLM(Protocol):
    """Computes hidden states of a step's tokens, and logits of those rows that need them.

    N tokens, M rows to sample or score, V vocab.
    """

    architecture: ModelArchitecture

    def forward(self, input_ids: Tensor, metadata: AttentionMetadata, kv_caches: list[Tensor]) -> Tensor:
        """[N] int64, one [2, num_blocks, K, B, D] per layer -> hidden states [N, hidden] after the last norm.

        Stores the step's keys and values in `kv_caches`. The caller holds `torch.inference_mode()`.
        """
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[M, hidden] -> [M, V] in the model's dtype."""
        ...
