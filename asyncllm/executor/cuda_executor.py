"""Runs step plans on a GPU: what the host knows goes up in one copy, a captured graph computes, sampled ids come down.

    host      |plan 1|stage, launch 1|plan 2|stage, launch 2|wait 1 .........|plan 3|stage, launch 3|wait 2 ...
    stream             |copy|== graph 1 ==|copy|copy|== graph 2 ==|copy|        |copy|== graph 3 ==|copy|

A step of decode rows is padded to a captured size and replayed; inside are the staged block table writes, the gathering
of inputs, the model, and sampling. A step with prompts is padded to a captured number of tokens and samples behind its
graph, as do rows that edit their logits; what no graph was captured for is launched kernel by kernel. All read what the
previous step sampled from the slots, so nothing waits for the host. Knows the model as two functions; knows nothing of
requests or text. Engine thread only.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asyncllm.attention.base import AttentionMetadata
from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.executor import logprobs
from asyncllm.executor.base import GPU_BALANCE_TOKENS, StepPlan, StepResult
from asyncllm.executor.device import Device, Mark, Work
from asyncllm.executor.device_sampler import DeviceSampler, Extras, stage_extras, wants_extras
from asyncllm.executor.device_slots import DeviceSlots
from asyncllm.executor.drafts import by_row, sampling_places, settle
from asyncllm.executor.graphs import GraphTable
from asyncllm.executor.logprobs import Scores
from asyncllm.executor.mixed_inputs import MixedInputs, stage_mixed
from asyncllm.executor.pooling import pool
from asyncllm.executor.rows import RowArrays
from asyncllm.executor.staging import NUM_DECODE_ROWS, Ints, Staging, aligned, fill_decode
from asyncllm.executor.token_inputs import TokenLayout, fill_tokens, token_inputs
from asyncllm.layers import sampling_columns as column
from asyncllm.layers.lora import AdapterMask
from asyncllm.layers.triton_logits import rebuild_counts
from asyncllm.layers.triton_sampling import Kind
from asyncllm.layers.triton_step import apply_block_writes, gather_decode_inputs, gather_tokens
from asyncllm.models.base import CausalLM
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import Capacity, TokenLogprobs

# Prompt positions are scored in groups whose logits take this many bytes at most.
_SCORE_BYTES = 64 * 2**20


@dataclass(slots=True)
class _Buffers:
    """What a step in flight needs on the host; free once it was waited for."""

    staging: Staging
    token_ids: Tensor  # [max_samples] int32, pinned
    begin: Mark


@dataclass(slots=True)
class CudaStep:
    """A launched step; see `StepHandle`."""

    begin: Mark
    end: Mark
    previous_end: Mark | None  # of the step before; None for the first
    num_rows: int
    rows: list[int] | None  # rows of the plan that sample, one with drafts several times; None: all, once
    token_ids: Tensor  # pinned
    replayed: bool
    plan: StepPlan
    scores: Scores | None = None
    prompt_scores: Scores | None = None
    pooled: Tensor | None = None  # [len(plan.pooled_rows), hidden] float32, pinned

    def wait(self) -> StepResult:  # hot
        """Wait for the device, then read what came down."""
        self.end.wait()
        sampled: list[int] = self.token_ids.tolist()
        verified = None
        if self.plan.drafts and self.rows is not None:
            sampled, verified = by_row(self.plan.drafts, self.rows, sampled, self.num_rows)
        elif self.rows is not None:
            scattered = [-1] * self.num_rows
            for row, token_id in zip(self.rows, sampled):
                scattered[row] = token_id
            sampled = scattered
        result = StepResult(sampled, replayed=self.replayed, device_s=self.end.seconds_since(self.begin))
        result.verified = verified
        if self.previous_end is not None:
            result.gap_s = self.begin.seconds_since(self.previous_end)
        if self.scores is not None:
            wanted = self.plan.logprob_rows
            result.logprobs = dict(zip(wanted, self.scores.to_host(list(wanted.values()))))
        if self.prompt_scores is not None:
            result.prompt_logprobs = self._prompt_logprobs(self.prompt_scores)
        if self.pooled is not None:
            # A copy: these go far, and pinned memory is dear.
            result.pooled = dict(zip(self.plan.pooled_rows, self.pooled.numpy().copy()))
        return result

    def _prompt_logprobs(self, scores: Scores) -> dict[int, list[TokenLogprobs]]:
        rows = self.plan.prompt_logprob_rows
        entries = iter(scores.to_host([k for k, targets in rows.values() for _ in targets]))
        return {row: [next(entries) for _ in targets] for row, (_, targets) in rows.items()}


class CudaExecutor:
    """The `Executor` of a GPU. B block_size, K kv heads, D head_dim, L slots."""

    balance_tokens = GPU_BALANCE_TOKENS
    most_prompt_tokens = sys.maxsize

    def __init__(
        self,
        model: CausalLM,
        attention: TritonAttention,
        architecture: ModelArchitecture,
        capacity: Capacity,
        device: Device,
        dtype: torch.dtype,
        facts: dict[str, str],
        *,
        graph_rows: int = 0,
        graph_tokens: int = 0,
        overlap: bool = True,
        adapters: AdapterMask | None = None,
    ) -> None:
        """`graph_rows`, `graph_tokens`: of the largest graphs, 0 = none; `improve` captures them, one a call.

        `adapters`: of the model's layers, where they have any.
        """
        self.model = model
        self.capacity = capacity
        self.facts = facts
        self.depth = 2 if overlap else 1
        self._attention = attention
        self._adapters = adapters
        self._dtype = dtype
        self._device = device
        on, rows = device.torch_device, capacity.max_sequences
        shape = (2, capacity.num_blocks, architecture.num_kv_heads, capacity.block_size, architecture.head_dim)
        # Not zeroed: kernels read no position that was not written.
        self.kv_caches = [torch.empty(shape, dtype=dtype, device=on) for _ in range(architecture.num_layers)]
        self.slots = DeviceSlots(capacity, on)
        self._sampler = DeviceSampler(capacity, self.slots, on)
        self.graphs = GraphTable(min(graph_rows, rows), graph_tokens)

        # Where captured steps read and write: the same memory at every replay.
        self._inputs = torch.zeros(NUM_DECODE_ROWS * aligned(rows), dtype=torch.int32, device=on)
        self._gathered = torch.zeros((3, aligned(rows)), dtype=torch.int32, device=on)  # ids, positions, slot mapping
        self._hidden = torch.zeros((max(rows, graph_tokens), architecture.hidden_size), dtype=dtype, device=on)
        self._tokens = torch.zeros(self._layout(graph_tokens).num_ints, dtype=torch.int32, device=on)
        self._sampled = torch.zeros(capacity.max_samples, dtype=torch.int32, device=on)

        num_ints = NUM_DECODE_ROWS * aligned(rows)
        self._buffers = [
            _Buffers(Staging(device, num_ints), device.pinned((capacity.max_samples,), torch.int32), device.mark())
            for _ in range(self.depth)
        ]
        # One more than steps in flight: a step's wait still reads the end of the step before it.
        self._ends = [device.mark() for _ in range(self.depth + 1)]
        self._num_steps = 0

    def launch(self, plan: StepPlan) -> CudaStep:  # hot
        """Send what the host knows and launch; returns while the device computes."""
        buffers = self._buffers[self._num_steps % self.depth]
        end = self._ends[self._num_steps % (self.depth + 1)]
        previous = self._ends[(self._num_steps - 1) % (self.depth + 1)] if self._num_steps else None
        self._num_steps += 1
        buffers.staging.reset()
        device = self._device
        device.set(buffers.begin)
        step = CudaStep(
            begin=buffers.begin,
            end=end,
            previous_end=previous,
            num_rows=len(plan.slots),
            rows=None,
            token_ids=buffers.token_ids,
            replayed=False,
            plan=plan,
        )
        if plan.num_decode_rows == len(plan.slots) and not plan.new_slots:
            num_sampled = self._launch_decode(plan, step, buffers.staging)
        else:
            num_sampled = self._launch_mixed(plan, step, buffers.staging)
        step.token_ids = buffers.token_ids[:num_sampled]
        if num_sampled:
            device.download(step.token_ids, self._sampled[:num_sampled])
        device.set(end)
        return step

    def improve(self) -> bool:
        """Capture the next graph."""
        if not self.graphs.num_missing:
            return False
        size, kind = self.graphs.next_missing()
        work: Work
        if kind == "tokens":
            work = partial(self._forward_tokens, size)
            layout = self._layout(size)
            pinned, host = Staging(self._device, layout.num_ints).reserve(layout.num_ints)
            fill_tokens(host, layout, _NOTHING, RowArrays.of(_NOTHING, np.int32), np.empty((0, 2), dtype=np.int32))
            self._device.upload(self._tokens[: len(pinned)], pinned)
        else:
            work = partial(self._decode, size, kind)
            num_ints = NUM_DECODE_ROWS * aligned(size)
            pinned, host = Staging(self._device, num_ints).reserve(num_ints)
            fill_decode(host, _NOTHING, size, self.slots.padding_slot)
            self._device.upload(self._inputs[:num_ints], pinned)
        # Once eagerly: what is compiled or allocated on first use must not be while a graph is recorded.
        self._device.run(work)
        self._device.synchronize()
        self.graphs.add(self._device.capture(work))
        return self.graphs.num_missing > 0

    def release(self) -> None:
        """Drop cache and graphs, so that their memory can be used before this object dies."""
        self._device.synchronize()
        self.graphs = GraphTable(0, 0)
        self.kv_caches.clear()

    def close(self) -> None:
        """Drop the weights as well."""
        self.release()
        del self.model

    # --- decode ------------------------------------------------------------------------------------------------------

    def _launch_decode(self, plan: StepPlan, step: CudaStep, staging: Staging) -> int:  # hot
        """A step of decode rows alone; returns how many rows sample, which is all."""
        num_rows = len(plan.slots)
        slots = np.array(plan.slots, dtype=np.int32)
        has_extras = wants_extras(plan, self.slots, slots)
        kind: Kind | Literal["forward"] = "forward" if has_extras else self.slots.kind(slots)
        graph = self.graphs.find(num_rows, kind)
        padded = num_rows if graph is None else graph.size
        pinned, host = staging.reserve(NUM_DECODE_ROWS * aligned(padded))
        fill_decode(host, plan, padded, self.slots.padding_slot)
        self._device.upload(self._inputs[: len(pinned)], pinned)
        if graph is not None:
            graph.replay()
            step.replayed = True
        else:
            self._device.run(partial(self._decode, num_rows, kind))
        if has_extras:
            extras = stage_extras(plan, self.slots, np.arange(num_rows), slots, staging)
            self._device.run(partial(self._finish_decode, padded, num_rows, self.slots.kind(slots), extras, step))
        return num_rows

    @torch.inference_mode()
    def _decode(self, num_rows: int, kind: Kind | Literal["forward"]) -> None:
        """One token of every row, from `_inputs`: what a graph holds."""
        slots, seq_lens, writes = self._decode_inputs(num_rows)
        state = self.slots
        apply_block_writes(state.block_table, writes)
        input_ids, positions, slot_mapping = self._gathered[:, :num_rows]
        gather_decode_inputs(
            slots,
            seq_lens,
            state.last_token,
            state.block_table,
            self.capacity.block_size,
            input_ids,
            positions,
            slot_mapping,
        )
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=state.block_table,
            slots=slots,
            seq_lens=seq_lens,
            num_decode_rows=num_rows,
            block_size=self.capacity.block_size,
            query_lens=[],
            seq_lens_host=[],
        )
        self._choose_adapters(slots)
        hidden = self.model.forward(input_ids, metadata, self.kv_caches)
        if kind == "forward":
            self._hidden[:num_rows].copy_(hidden)
            return
        logits = self.model.compute_logits(hidden)
        # The token to be drawn stands where the sequence ends now.
        self._sampler.sample(logits, slots, seq_lens, kind, self._sampled[:num_rows])

    def _decode_inputs(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [n], lengths [n] and block writes [3, W], as `fill_decode` laid them out."""
        rows = self._inputs[: NUM_DECODE_ROWS * aligned(num_rows)].view(NUM_DECODE_ROWS, -1)
        return rows[0, :num_rows], rows[1, :num_rows], rows[2:]

    @torch.inference_mode()
    def _finish_decode(self, padded: int, num_rows: int, kind: Kind, extras: Extras, step: CudaStep) -> None:
        """Sample rows whose logits are edited or scored, behind a forward pass of `padded` rows."""
        slots, seq_lens, _ = self._decode_inputs(padded)
        logits = self.model.compute_logits(self._hidden[:num_rows])
        sampled = self._sampled[:num_rows]
        scores = self._sampler.sample_with(logits, slots[:num_rows], seq_lens[:num_rows], kind, sampled, extras)
        step.scores = self._download(scores)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _launch_mixed(self, plan: StepPlan, step: CudaStep, staging: Staging) -> int:
        """A step with prompts, drafts or new sequences; returns how many tokens it samples."""
        new_rows = self.slots.seat(plan.new_slots)
        rows = RowArrays.of(plan, np.int32)
        sampling, num_behind = sampling_places(plan)
        sampling_slots = rows.slots[sampling]
        inputs = stage_mixed(plan, rows, sampling, num_behind, new_rows, staging)
        self._device.run(partial(self._prepare_mixed, inputs))
        hidden = self._launch_tokens(plan, rows, step, staging)
        extras = None
        if wants_extras(plan, self.slots, sampling_slots):
            extras = stage_extras(plan, self.slots, sampling, sampling_slots, staging)
        if len(sampling) < len(rows.slots) or plan.drafts:
            step.rows = sampling.tolist()
        kind = self.slots.kind(sampling_slots)
        self._device.run(partial(self._finish_mixed, inputs, rows.query_starts, hidden, kind, extras, step))
        return len(sampling)

    def _launch_tokens(self, plan: StepPlan, rows: RowArrays, step: CudaStep, staging: Staging) -> Tensor:
        """Forward pass; returns where its hidden states [N, hidden] will be."""
        first, num_tokens = plan.num_decode_rows, plan.num_tokens
        tiles = self._attention.tiles(rows.query_lens[first:], rows.seq_lens[first:], first, self._dtype)
        graph = self.graphs.find(num_tokens, "tokens")
        if graph is not None:
            layout, inputs, hidden = self._layout(graph.size), self._tokens, self._hidden
        else:
            layout = TokenLayout(num_tokens, len(rows.slots), len(tiles))
            on = self._device.torch_device
            inputs = torch.empty(layout.num_ints, dtype=torch.int32, device=on)
            hidden = torch.empty((num_tokens, self._hidden.shape[1]), dtype=self._dtype, device=on)
        pinned, host = staging.reserve(layout.num_ints)
        fill_tokens(host, layout, plan, rows, tiles)
        self._device.upload(inputs[: len(pinned)], pinned)
        if graph is not None:
            graph.replay()
            step.replayed = True
        else:
            self._device.run(partial(self._forward, layout, inputs, first, hidden))
        return hidden

    def _layout(self, num_tokens: int) -> TokenLayout:
        """Room for any step of so many tokens: what a graph is captured with."""
        num_rows = min(num_tokens, self.capacity.max_sequences)
        return TokenLayout(num_tokens, num_rows, self._attention.max_tiles(num_tokens, num_rows, self._dtype))

    def _forward_tokens(self, num_tokens: int) -> None:
        """The forward pass that a graph of so many tokens holds: any row may be a decode row."""
        layout = self._layout(num_tokens)
        self._forward(layout, self._tokens[: layout.num_ints], layout.num_rows, self._hidden[:num_tokens])

    @torch.inference_mode()
    def _forward(self, layout: TokenLayout, buffer: Tensor, num_decode_rows: int, hidden: Tensor) -> None:
        """From the tokens in `buffer` to their hidden states."""
        inputs, state = token_inputs(buffer, layout), self.slots
        input_ids, slot_mapping = torch.empty_like(inputs.token_ids), torch.empty_like(inputs.token_ids)
        gather_tokens(
            inputs.token_slots,
            inputs.positions,
            inputs.token_ids,
            state.last_token,
            state.block_table,
            self.capacity.block_size,
            input_ids,
            slot_mapping,
        )
        metadata = inputs.metadata(num_decode_rows, slot_mapping, state.block_table, self.capacity.block_size)
        self._choose_adapters(inputs.token_slots)
        hidden.copy_(self.model.forward(input_ids, metadata, self.kv_caches))

    def _choose_adapters(self, slots: Tensor) -> None:
        """Whose each token is, slots [N] (-1: padding). On the device alone: it is part of every graph."""
        if self._adapters is not None:
            adapters = self.slots.ints[:, column.ADAPTER].index_select(0, slots.clamp(min=0))
            self._adapters.choose(adapters)

    @torch.inference_mode()
    def _prepare_mixed(self, inputs: MixedInputs) -> None:
        """Seat new sequences and write block tables."""
        state = self.slots
        if len(inputs.new_slots):
            state.ints.index_copy_(0, inputs.new_slots.long(), inputs.new_rows)
        for slot, num_prompt_tokens, tokens in inputs.histories:
            rebuild_counts(state.counts, state.prompt_mask, slot, tokens, num_prompt_tokens)
        if inputs.writes.shape[1]:
            apply_block_writes(state.block_table, inputs.writes)

    @torch.inference_mode()
    def _finish_mixed(
        self,
        inputs: MixedInputs,
        query_starts: Ints,
        hidden: Tensor,
        kind: Kind,
        extras: Extras | None,
        step: CudaStep,
    ) -> None:
        """Sample, score and pool."""
        num_sampled = len(inputs.sampling_slots)
        if num_sampled:
            logits = self.model.compute_logits(hidden.index_select(0, inputs.sampling_tokens))
            rows = (logits, inputs.sampling_slots, inputs.sampling_positions, kind, self._sampled[:num_sampled])
            if extras is None:
                self._sampler.sample(*rows)
            else:
                step.scores = self._download(self._sampler.sample_with(*rows, extras))
        if len(inputs.draft_slots):
            last_token = self.slots.last_token
            settle(self._sampled[:num_sampled], last_token, inputs.draft_slots, inputs.draft_starts, inputs.drafts)
        if len(inputs.scored_tokens):
            step.prompt_scores = self._download(self._score_prompts(inputs, step.plan, hidden))
        if step.plan.pooled_rows:
            step.pooled = self._fetch(pool(hidden, step.plan.pooled_rows, query_starts))

    def _score_prompts(self, inputs: MixedInputs, plan: StepPlan, hidden: Tensor) -> Scores:
        """Score prompt tokens, [M], in the order of plan.prompt_logprob_rows."""
        num_alternatives = max(k for k, _ in plan.prompt_logprob_rows.values())
        group = max(1, _SCORE_BYTES // (4 * self.capacity.vocab_size))
        parts = [
            logprobs.score_on_device(
                self.model.compute_logits(hidden.index_select(0, tokens)), targets, num_alternatives
            )
            for tokens, targets in zip(inputs.scored_tokens.split(group), inputs.scored_targets.split(group))
        ]
        return logprobs.concatenate(parts)

    def _download(self, scores: Scores | None) -> Scores | None:
        """Scores in pinned memory, to be read behind the step's end."""
        return None if scores is None else scores.map(self._fetch)

    def _fetch(self, column: Tensor) -> Tensor:
        target = self._device.pinned(tuple(column.shape), column.dtype)
        self._device.download(target, column)
        return target


_NOTHING = StepPlan([], [], [], [], 0, [], [], [], {}, {}, {})
