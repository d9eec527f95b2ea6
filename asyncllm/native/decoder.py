"""A decoder whose steps run in C++; see `models.base.CausalLM`. Engine thread.

Takes over the weights of a model that was read but not prepared for torch, packs each into the order in which products
read it, and lets go of the rest. A step is one call for all layers and one for the logits.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asyncllm.attention.base import AttentionMetadata
from asyncllm.host_memory import advise_huge_pages
from asyncllm.layers.blocks import BlockRows
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.experts import SparseMLP
from asyncllm.layers.linear import Linear
from asyncllm.layers.lora import LoRALinear
from asyncllm.layers.mlp import GatedMLP, PlainMLP
from asyncllm.layers.norm import LayerNorm, RMSNorm
from asyncllm.layers.rotary import Rotary
from asyncllm.models.decoder import DecoderForCausalLM, DecoderLayer
from asyncllm.native import library as c
from asyncllm.native.library import Library

ALIGNMENT = 64
SLAB_BYTES = 256 * 2**20  # of packed weights; a matrix that takes more has its own
KEPT_BYTES = 64 * 2**20  # of hidden states and of logits each, for steps that need no more


class NativeDecoder:
    """The model in C++."""

    # What reading the weights costs, in tokens: steps of 1 and 8 rows took 3.8 and 9.0 ms with 4-bit blocks, 6.6 and
    # 14.5 ms with bfloat16. Less than half of what follows from that: a row with drafts costs Python and samples too.
    balance_tokens = 2

    def __init__(
        self,
        model: nn.Module,
        library: Library,
        block_size: int,
        num_threads: int,
        int8_cache: bool = False,
        adapter_spans: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Empties `model`, a DecoderForCausalLM. `num_threads` compute, the caller's among them.

        `int8_cache`: keys and values are kept in 8 bits, otherwise in bfloat16. `adapter_spans`: see `AdapterMask`.
        """
        assert isinstance(model, DecoderForCausalLM)
        self.architecture = model.architecture
        self._adapter_spans = adapter_spans
        most_rank = max((end - first for first, end in adapter_spans), default=0)
        self._adapter_width = -(-most_rank // c.ROW_MULTIPLE) * c.ROW_MULTIPLE
        self.num_bytes = 0  # of packed weights
        self.kinds: set[int] = set()  # of matrices
        self._most_adapter_parts = 0  # of one matrix
        self.block_bytes = library.block_bytes(self.architecture, block_size, int8_cache)  # a cache: [num_blocks, this]
        self._library = library
        self._owned: list[Any] = []  # what the structures point to
        self._decoder: int | None = None
        # For all steps; pages that none needs are never touched. Fresh ones would cost more than to fill them.
        self._hidden, self._logits = (torch.empty(KEPT_BYTES // 4, dtype=torch.float32) for _ in range(2))
        self._arena = _Arena()
        with torch.inference_mode():
            structure = self._describe(model, block_size, int8_cache)
        self._decoder = library.decoder_new(ctypes.byref(structure), num_threads)
        if self._decoder is None:
            raise MemoryError

    def __del__(self) -> None:
        if self._decoder is not None:
            self._library.decoder_delete(self._decoder)

    def forward(
        self,
        input_ids: Tensor,
        metadata: AttentionMetadata,
        kv_caches: list[Tensor],
        adapters: npt.NDArray[np.int64] | None = None,
        wanted: npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        """[N] int64 -> [N, hidden] float32; stores keys and values in `kv_caches`, uint8 [num_blocks, block_bytes].

        As any `CausalLM`; `adapters`: [L] by slot, from 1, 0 = none; `wanted`: tokens whose hidden states are computed,
        ascending, the others' are left as they were. The executor fills in a step itself.
        """
        query_lens = np.array(metadata.query_lens, dtype=np.int64)
        computed = np.array(metadata.seq_lens_host, dtype=np.int64) - query_lens
        caches = addresses(kv_caches)
        step = c.Step(
            num_rows=len(query_lens),
            num_tokens=len(input_ids),
            slots=metadata.slots.data_ptr(),
            adapters=None if adapters is None else adapters.ctypes.data,
            computed=computed.ctypes.data,
            query_lens=query_lens.ctypes.data,
            token_ids=input_ids.data_ptr(),
            block_table=metadata.block_table.data_ptr(),
            num_columns=metadata.block_table.shape[1],
            caches=caches.ctypes.data,
            wanted=None if wanted is None else wanted.ctypes.data,
            num_wanted=0 if wanted is None else len(wanted),
        )
        return self.run(step).clone()

    def run(self, step: c.Step) -> Tensor:  # hot
        """Compute a step, all of it filled in but `hidden`: [N, hidden] float32, in memory that the next writes to.

        Of tokens that were not wanted, nothing is there.
        """
        hidden = _rows_of(self._hidden, step.num_tokens, self.architecture.hidden_size)
        step.hidden = hidden.data_ptr()
        if self._library.decoder_forward(self._decoder, ctypes.byref(step)):
            raise MemoryError
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:  # hot
        """[M, hidden] -> [M, V] float32, in memory that the next call may write to."""
        hidden = hidden.contiguous()
        logits = _rows_of(self._logits, len(hidden), self.architecture.vocab_size)
        if self._library.decoder_logits(self._decoder, hidden.data_ptr(), len(hidden), logits.data_ptr()):
            raise MemoryError
        soft_cap = self.architecture.logit_soft_cap
        return logits if soft_cap == 0.0 else logits.div_(soft_cap).tanh_().mul_(soft_cap)

    def likeliest(self, hidden: Tensor) -> Tensor | None:  # hot
        """[M, hidden] -> [M] int64: where `compute_logits` would be largest, the first place of several.

        None for a model with a soft cap on logits, as what it makes equal only the logits tell.
        """
        if self.architecture.logit_soft_cap:
            return None
        hidden, places = hidden.contiguous(), torch.empty(len(hidden), dtype=torch.int64)
        if self._library.decoder_likeliest(self._decoder, hidden.data_ptr(), len(hidden), places.data_ptr()):
            raise MemoryError
        return places

    def spent_s(self) -> dict[str, float]:
        """Seconds that all steps so far took, by part of a step."""
        nanoseconds = (ctypes.c_int64 * len(c.PARTS))()
        self._library.decoder_spent(self._decoder, nanoseconds)
        return {part: spent / 1e9 for part, spent in zip(c.PARTS, nanoseconds)}

    def _describe(self, model: DecoderForCausalLM, block_size: int, int8_cache: bool) -> c.Model:
        a, decoder = self.architecture, model.model
        layers = [cast(DecoderLayer, layer) for layer in decoder.layers]
        rotaries = list(dict.fromkeys(layer.self_attn.rotary for layer in layers))
        head = None if a.tie_word_embeddings else self._matrix(model.lm_head)
        embedding = self._matrix(decoder.embed_tokens)
        positions = decoder.embed_positions
        described = self._array(c.Layer, [self._layer(layer, rotaries) for layer in layers])
        return c.Model(
            hidden_size=a.hidden_size,
            intermediate_size=max(a.intermediate_size, 0 if a.experts is None else a.experts.intermediate_size),
            num_layers=a.num_layers,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            block_size=block_size,
            activation=c.ACTIVATIONS.index(a.activation),
            is_gated=a.gated_mlp,
            num_rotations=len(rotaries),
            cache_kind=c.INT8_PAGES if int8_cache else c.BFLOAT16_PAGES,
            num_experts_per_token=0 if a.experts is None else a.experts.num_experts_per_token,
            norm_expert_weights=a.experts is not None and a.experts.norm_topk_prob,
            adapter_width=self._adapter_width,
            most_adapter_parts=self._most_adapter_parts,
            norm_eps=a.rms_norm_eps,
            embedding_scale=decoder.embed_tokens.scale,
            layers=described,
            last_norm=self._norm(decoder.norm),
            embedding=embedding,
            head=head or embedding,
            position_embedding=None if positions is None else self._floats(_values_of(positions)),
            frequencies=self._floats(torch.stack([rotary.inv_freq for rotary in rotaries])),
            amplitudes=self._floats(torch.stack([_amplitude(rotary) for rotary in rotaries])),
        )

    def _layer(self, layer: DecoderLayer, rotaries: list[Rotary]) -> c.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if isinstance(mlp, SparseMLP):
            router = self._pack([BlockRows.of(_values_of(mlp.gate))])
            mlps = [c.FeedForward(self._pack(up), self._pack(down)) for up, down in mlp.experts.take_rows()]
        else:
            assert isinstance(mlp, GatedMLP | PlainMLP)
            up = mlp.gate_up_proj if isinstance(mlp, GatedMLP) else mlp.up_proj
            router, mlps = c.Matrix(), [c.FeedForward(self._matrix(up), self._matrix(mlp.down_proj))]
        has_branch_norms = layer.pre_feedforward_layernorm is not None
        # Gemma 2 and 3 call the norm of attention's result what others call the norm before the MLP.
        after, before = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
        return c.Layer(
            before_attention=self._norm(layer.input_layernorm),
            after_attention=self._norm(after if has_branch_norms else None),
            before_mlp=self._norm(before if has_branch_norms else after),
            after_mlp=self._norm(layer.post_feedforward_layernorm),
            q_norm=self._floats(None if attention.q_norm is None else attention.q_norm.weight),
            k_norm=self._floats(None if attention.k_norm is None else attention.k_norm.weight),
            qkv=self._matrix(attention.qkv_proj),
            out=self._matrix(attention.o_proj),
            mlps=self._array(c.FeedForward, mlps),
            router=router,
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            window=attention.window,
            rotation=rotaries.index(attention.rotary),
        )

    def _norm(self, norm: RMSNorm | LayerNorm | None) -> c.Norm:
        if norm is None:
            return c.Norm()
        return c.Norm(self._floats(norm.weight), self._floats(norm.bias) if isinstance(norm, LayerNorm) else None)

    def _floats(self, values: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as this does."""
        if values is None:
            return None
        kept = values.detach().float().contiguous()
        self._owned.append(kept)
        return kept.data_ptr()

    def _array(self, kind: type[ctypes.Structure], items: Sequence[ctypes.Structure]) -> Any:
        """Structures side by side that live as long as this does."""
        array = (kind * len(items))(*items)
        self._owned.append(array)
        return array

    def _matrix(self, layer: nn.Module) -> c.Matrix:
        """Pack a layer's weight and its adapters, and let go of them."""
        if isinstance(layer, LoRALinear):
            matrix = self._matrix(layer.base)
            adapters = [self._adapter(layer.changes(*span)) for span in self._adapter_spans]
            matrix.adapters = ctypes.cast(self._array(c.Adapter, adapters), ctypes.c_void_p)
            return matrix
        assert isinstance(layer, Linear | Embedding)
        return self._pack(layer.take_rows(), self._floats(layer.bias) if isinstance(layer, Linear) else None)

    def _adapter(self, changes: list[tuple[int, Tensor, Tensor]]) -> c.Adapter:
        """`changes`: as `LoRALinear.changes` gives them."""
        if not changes:
            return c.Adapter()
        width = self._adapter_width
        parts = []
        for row, _, up in changes:
            first, end = row // c.GROUP, (row + len(up)) // c.GROUP
            assert row % c.GROUP == len(up) % c.GROUP == 0  # of heads and of inner features, multiples of 32
            parts.append(c.AdapterPart(first, end, self._pack([_filled_up(up, len(up), width)])))
        down = torch.cat([_filled_up(down, width, down.shape[1]).values() for _, down, _ in changes])
        self._most_adapter_parts = max(self._most_adapter_parts, len(parts))
        return c.Adapter(self._pack([BlockRows.of_bfloat16(down)]), len(parts), self._array(c.AdapterPart, parts))

    def _pack(self, parts: Sequence[BlockRows], bias: int | None = None) -> c.Matrix:
        """One matrix of parts of one kind, one below the other."""
        if any(part.shape[0] % c.GROUP for part in parts[:-1]):
            parts = [BlockRows.joined(parts)]
        stored, kind = c.STORED[parts[0].kind]
        n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
        data = self._arena.place(self._library.packed_bytes(kind, n, k))
        offsets = np.empty(-(-n // c.GROUP), dtype=np.int64)
        self._owned.append(offsets)
        num_bytes = group = 0
        for part in parts:
            num_rows, of_part = part.shape[0], offsets[group : group + -(-part.shape[0] // c.GROUP)]
            rows, to = part.rows.data_ptr(), data + num_bytes
            packed_bytes = self._library.pack(stored, rows, num_rows, k, to, of_part.ctypes.data)
            of_part += num_bytes
            group += len(of_part)
            num_bytes += packed_bytes
        self._arena.take(num_bytes)
        self.num_bytes += num_bytes
        self.kinds.add(kind)
        return c.Matrix(kind, n, k, data, offsets.ctypes.data, bias)


def addresses(kv_caches: list[Tensor]) -> npt.NDArray[np.uint64]:
    """Where each layer's cache is, as a `Step` has it."""
    return np.array([cache.data_ptr() for cache in kv_caches], dtype=np.uint64)


def _rows_of(kept: Tensor, num_rows: int, width: int) -> Tensor:
    """[num_rows, width] of the memory that is kept, or of fresh memory where that does not do."""
    num_values = num_rows * width
    memory = kept if num_values <= len(kept) else torch.empty(num_values, dtype=torch.float32)
    return memory[:num_values].view(num_rows, width)


def _values_of(layer: Linear | Embedding) -> Tensor:
    return BlockRows.joined(layer.take_rows()).values()


def _filled_up(values: Tensor, num_rows: int, num_columns: int) -> BlockRows:
    """With zeros, to [num_rows, num_columns]."""
    filled = torch.zeros(num_rows, num_columns)
    filled[: values.shape[0], : values.shape[1]] = values
    return BlockRows.of_bfloat16(filled)


def _amplitude(rotary: Rotary) -> Tensor:
    return torch.ones_like(rotary.inv_freq) if rotary.amplitude is None else rotary.amplitude


class _Arena:
    """Memory for packed weights, side by side in slabs: of what is not taken no page is ever touched."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._taken = 0  # of the last one

    def place(self, num_bytes: int) -> int:
        """The address where what is taken next begins, and that many bytes at most may lie."""
        if not self._slabs or self._taken + num_bytes > len(self._slabs[-1]):
            slab = torch.empty(max(num_bytes + ALIGNMENT, SLAB_BYTES), dtype=torch.uint8)
            advise_huge_pages(slab.data_ptr(), len(slab))
            self._slabs.append(slab)
            self._taken = -slab.data_ptr() % ALIGNMENT
        return self._slabs[-1].data_ptr() + self._taken

    def take(self, num_bytes: int) -> None:
        """Keep the bytes that were written."""
        self._taken += -(-num_bytes // ALIGNMENT) * ALIGNMENT
