"""Runs step plans with plain torch ops, on a CPU or eagerly on a GPU; the reference every other executor must match.

Knows the model as two functions, forward and compute_logits; knows nothing of requests, queues or text. Depth 1:
launching computes. Built, used and closed on the engine thread.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncllm.executor import logprobs
from asyncllm.executor.base import CPU_BALANCE_TOKENS, CPU_PROMPT_TOKENS, GPU_BALANCE_TOKENS, StepPlan, StepResult
from asyncllm.executor.drafts import by_row, draft_arrays, settle
from asyncllm.executor.inputs import build_inputs
from asyncllm.executor.logprobs import Scores
from asyncllm.executor.pooling import pool
from asyncllm.executor.rows import RowArrays, SamplingPlaces
from asyncllm.executor.sampler import Sampler
from asyncllm.executor.sampling_rows import SamplingRows, gather_rows
from asyncllm.executor.slots import SlotState
from asyncllm.host_memory import zeros
from asyncllm.layers.lora import AdapterMask
from asyncllm.models.base import CausalLM
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import Capacity, TokenLogprobs

CACHE_ALIGNMENT = 4096  # bytes, of each layer's cache in memory
# Prompt positions are scored in groups whose logits take this many bytes at most.
_SCORE_BYTES = 64 * 2**20


@dataclass(slots=True)
class TorchStep:
    """A launched step; its tensors are read by `wait`."""

    num_rows: int
    rows: list[int]  # [R], rows of the plan that sampled; one with drafts several times
    token_ids: Tensor | None  # [R] int64
    scored_rows: dict[int, int]  # row -> alternatives wanted, in the order of `scores`
    scores: Scores | None
    scored_prompts: dict[int, tuple[int, list[int]]]  # row -> (alternatives, targets), in the order of `prompt_scores`
    prompt_scores: Scores | None
    pooled_rows: dict[int, tuple[int, int]]  # row -> query tokens, in the order of `pooled`
    pooled: Tensor | None  # [len(pooled_rows), hidden] float32
    drafts: dict[int, list[int]]

    def wait(self) -> StepResult:
        """Copy the results to the host, the step's only synchronisation."""
        result = StepResult([-1] * self.num_rows)
        if self.token_ids is not None:
            # `to` releases the GIL while it waits for a device.
            sampled = self.token_ids.to("cpu").tolist()
            if self.drafts:
                result.token_ids, result.verified = by_row(self.drafts, self.rows, sampled, self.num_rows)
            elif len(sampled) == self.num_rows:
                result.token_ids = sampled
            else:
                for row, token_id in zip(self.rows, sampled):
                    result.token_ids[row] = token_id
        if self.scores is not None:
            result.logprobs = dict(zip(self.scored_rows, self.scores.to_host(list(self.scored_rows.values()))))
        if self.prompt_scores is not None:
            result.prompt_logprobs = self._prompt_logprobs(self.prompt_scores)
        if self.pooled is not None:
            result.pooled = dict(zip(self.pooled_rows, self.pooled.to("cpu").numpy()))
        return result

    def _prompt_logprobs(self, scores: Scores) -> dict[int, list[TokenLogprobs]]:
        wanted = [k for k, targets in self.scored_prompts.values() for _ in targets]
        entries = iter(scores.to_host(wanted))
        return {row: [next(entries) for _ in targets] for row, (_, targets) in self.scored_prompts.items()}


class TorchExecutor:
    """The `Executor` of this process. B block_size, K kv heads, D head_dim."""

    depth = 1

    def __init__(
        self,
        model: CausalLM,
        architecture: ModelArchitecture,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype,
        facts: dict[str, str],
        adapters: AdapterMask | None = None,
        block_bytes: int = 0,
    ) -> None:
        """`adapters`: of the model's layers, where they have any. `block_bytes`: of a block that the model lays out."""
        self.model = model
        self.capacity = capacity
        self.facts = facts
        self.most_prompt_tokens = CPU_PROMPT_TOKENS if device.type == "cpu" else sys.maxsize
        self.balance_tokens = CPU_BALANCE_TOKENS if device.type == "cpu" else GPU_BALANCE_TOKENS
        self._device = device
        self._adapters = adapters
        # Per layer [2, num_blocks, K, B, D], or bytes [num_blocks, block_bytes].
        num_blocks, num_kv_heads = capacity.num_blocks, architecture.num_kv_heads
        shape: tuple[int, ...] = (2, num_blocks, num_kv_heads, capacity.block_size, architecture.head_dim)
        if block_bytes:
            shape, dtype = (num_blocks, block_bytes), torch.uint8
        if device.type == "cpu":
            self.kv_caches = _host_caches(architecture.num_layers, shape, dtype)
        else:
            self.kv_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(architecture.num_layers)]
        self.slots = SlotState(capacity, device)
        self._sampler = Sampler(capacity.vocab_size, self.slots, device)
        self._rows: SamplingRows | None = None
        self._rows_key = (-1, b"")  # slots' version and slot ids that _rows was gathered for

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> TorchStep:  # hot
        """Compute the step. On a GPU the kernels may still run when this returns."""
        self.slots.apply(plan.new_slots, plan.block_writes)
        rows = RowArrays.of(plan, np.int64)
        places = SamplingPlaces.of(plan, rows)
        hidden = self._forward(plan, rows, places)
        token_ids, scores = self._sample(plan, places, hidden)
        return TorchStep(
            num_rows=len(plan.slots),
            rows=places.rows.tolist(),
            token_ids=token_ids,
            scored_rows=plan.logprob_rows,
            scores=scores,
            scored_prompts=plan.prompt_logprob_rows,
            prompt_scores=self._score_prompts(plan, rows, hidden) if plan.prompt_logprob_rows else None,
            pooled_rows=plan.pooled_rows,
            pooled=pool(hidden, plan.pooled_rows, rows.query_starts) if plan.pooled_rows else None,
            drafts=plan.drafts,
        )

    def improve(self) -> bool:
        """Nothing to prepare: every step runs eagerly."""
        return False

    def close(self) -> None:
        """Drop weights and cache, so that their memory can be used before this object dies."""
        self.kv_caches.clear()
        del self.model

    def _forward(self, plan: StepPlan, rows: RowArrays, places: SamplingPlaces) -> Tensor:
        """Hidden states of query tokens, [N, hidden]: of all whose logits or states the plan asks for."""
        input_ids, metadata = build_inputs(plan, rows, self.slots, self.capacity.block_size, self._device)
        if self._adapters is not None:
            self._choose_adapters(self._adapters, plan)
        return self.model.forward(input_ids, metadata, self.kv_caches)

    def _choose_adapters(self, mask: AdapterMask, plan: StepPlan) -> None:
        """Whose each token is; a step without any adapter does without their products."""
        adapters = self.slots.adapters[plan.slots]  # [S]
        if adapters.any():
            mask.choose(torch.from_numpy(np.repeat(adapters, plan.num_query_tokens)).to(self._device))
        else:
            mask.choose(None)

    def _sample(self, plan: StepPlan, places: SamplingPlaces, hidden: Tensor) -> tuple[Tensor | None, Scores | None]:
        """Sample the rows that want a token and remember it in their slots: ids [R] and scores of those who asked."""
        if not len(places.rows):
            return None, None
        if places.tokens is not None:
            hidden = hidden.index_select(0, self._array(places.tokens))
        token_ids, scores = self._choose(plan, places, hidden)
        self.slots.last_token.index_copy_(0, self._array(places.slots), token_ids)
        if plan.drafts:
            drafts = (self._array(array) for array in draft_arrays(plan, places.rows))
            settle(token_ids, self.slots.last_token, *drafts)
        return token_ids, scores

    def _choose(self, plan: StepPlan, places: SamplingPlaces, hidden: Tensor) -> tuple[Tensor, Scores | None]:
        """Tokens for hidden states [R, hidden], and scores of those who asked."""
        logits = self.model.compute_logits(hidden).float()  # [R, V]
        has_extras = plan.banned or plan.masks or plan.logprob_rows
        index_of = {row: index for index, row in enumerate(places.rows.tolist())} if has_extras else {}
        raw, scored = None, None
        if plan.logprob_rows:
            scored = self._index([index_of[row] for row in plan.logprob_rows])
            raw = logits.index_select(0, scored)  # a copy: sampling overwrites the logits
        banned = {index_of[row]: token_ids for row, token_ids in plan.banned.items()}
        masks = {index_of[row]: mask for row, mask in plan.masks.items()}
        token_ids = self._sampler.sample(logits, self._sampling_rows(places.slots), places.positions, banned, masks)
        if raw is None or scored is None:
            return token_ids, None
        return token_ids, logprobs.score(raw, token_ids.index_select(0, scored), max(plan.logprob_rows.values()))

    def _sampling_rows(self, slots: npt.NDArray[np.int64]) -> SamplingRows:
        """Parameters of the rows that sample, gathered anew only when another set of sequences runs."""
        key = (self.slots.version, slots.tobytes())
        if self._rows is None or key != self._rows_key:
            self._rows = gather_rows(self.slots, slots.tolist(), self.capacity.vocab_size, self._device)
            self._rows_key = key
        return self._rows

    def _score_prompts(self, plan: StepPlan, rows: RowArrays, hidden: Tensor) -> Scores:
        """Score prompt tokens, [sum of targets], in the order of plan.prompt_logprob_rows."""
        wanted = plan.prompt_logprob_rows
        tokens = [int(rows.query_starts[row]) + i for row, (_, targets) in wanted.items() for i in range(len(targets))]
        targets = [target for _, row_targets in wanted.values() for target in row_targets]
        num_alternatives = max(k for k, _ in wanted.values())
        group = max(1, _SCORE_BYTES // (4 * self.capacity.vocab_size))
        token_index, target_ids = self._index(tokens), self._index(targets)
        parts = [
            logprobs.score(
                self.model.compute_logits(hidden.index_select(0, some)).float(), some_targets, num_alternatives
            )
            for some, some_targets in zip(token_index.split(group), target_ids.split(group))
        ]
        return logprobs.concatenate(parts)

    def _index(self, values: list[int]) -> Tensor:
        return self._array(np.array(values, dtype=np.int64))

    def _array(self, values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _host_caches(num_layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of zeros, side by side."""
    num_values = math.prod(shape)
    layer_bytes = -(-num_values * dtype.itemsize // CACHE_ALIGNMENT) * CACHE_ALIGNMENT
    memory = zeros(num_layers * layer_bytes)
    caches = (
        torch.frombuffer(memory, dtype=dtype, count=num_values, offset=layer * layer_bytes)
        for layer in range(num_layers)
    )
    return [cache.view(shape) for cache in caches]
