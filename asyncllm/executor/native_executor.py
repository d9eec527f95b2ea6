"""Runs step plans on a CPU's native kernels: they find each token's id, position and block themselves.

Beside a step of few rows, what Python does counts: here it fills in one structure. Engine thread only.
"""

import numpy as np
import torch
from torch import Tensor

from asyncllm.executor.base import StepPlan
from asyncllm.executor.logprobs import Scores
from asyncllm.executor.rows import RowArrays, SamplingPlaces
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.native.decoder import NativeDecoder, addresses
from asyncllm.native.library import Step
from asyncllm.types import Capacity


class NativeExecutor(TorchExecutor):
    """A `TorchExecutor` whose model is compiled code."""

    def __init__(self, model: NativeDecoder, capacity: Capacity, facts: dict[str, str]) -> None:
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        super().__init__(model, model.architecture, capacity, cpu, dtype, facts, block_bytes=model.block_bytes)
        self.balance_tokens = model.balance_tokens
        self._native = model
        self._caches = addresses(self.kv_caches)
        self._step = Step(
            last_tokens=self.slots.last_token.data_ptr(),
            adapters=self.slots.adapters.ctypes.data,
            block_table=self.slots.block_table.data_ptr(),
            num_columns=self.slots.block_table.shape[1],
            caches=self._caches.ctypes.data,
        )

    def close(self) -> None:
        """See `TorchExecutor`."""
        super().close()
        del self._native

    def _forward(self, plan: StepPlan, rows: RowArrays, places: SamplingPlaces) -> Tensor:  # hot
        token_ids = np.array(plan.token_ids, dtype=np.int64)
        step = self._step
        step.num_rows, step.num_decode_rows, step.num_tokens = len(rows.slots), plan.num_decode_rows, plan.num_tokens
        step.slots, step.computed = rows.slots.ctypes.data, rows.computed.ctypes.data
        step.query_lens, step.token_ids = rows.query_lens.ctypes.data, token_ids.ctypes.data
        if places.tokens is None or plan.prompt_logprob_rows or plan.pooled_rows:
            step.wanted = None
        else:
            step.wanted, step.num_wanted = places.tokens.ctypes.data, len(places.tokens)
        return self._native.run(step)

    def _choose(self, plan: StepPlan, places: SamplingPlaces, hidden: Tensor) -> tuple[Tensor, Scores | None]:  # hot
        """See `TorchExecutor`; of rows that are all greedy nobody sees the logits."""
        if (
            not (plan.banned or plan.masks or plan.logprob_rows)
            and self._sampling_rows(places.slots).want_the_likeliest
        ):
            token_ids = self._native.likeliest(hidden)
            if token_ids is not None:
                return token_ids, None
        return super()._choose(plan, places, hidden)
