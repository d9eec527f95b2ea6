"""Puts all adapters into a model: finds each one's layers, checks that they fit, stacks what belongs together.

`plan_adapters` knows shapes only, so what does not fit is refused before the model's weights are read;
`install_adapters` changes the loaded model. Engine thread.
"""

import contextlib
import re
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.config import LoRAConfig
from asyncllm.errors import StartupError, show
from asyncllm.layers.linear import Linear
from asyncllm.layers.lora import AdapterMask, LoRALinear
from asyncllm.models.base import CausalLM
from asyncllm.models.config import ModelArchitecture
from asyncllm.models.decoder import DecoderAttention
from asyncllm.models.registry import build_model
from asyncllm.weights.lora import AdaptedLayer, Adapter, open_adapter
from asyncllm.weights.names import decoder_name

COLUMNS_MULTIPLE = 8  # of the stacked ranks: 16 bytes in two-byte precisions, as matrix units want them
# Linear layers that adapters may change. Not among them: the output layer, experts and their router.
SERVED = re.compile(r"model\.layers\.(\d+)\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|up|down)_proj)")


class Place(msgspec.Struct, frozen=True):
    """Where an adapter's layer is in the model: a linear layer, or some of its rows."""

    linear: str  # path of the module
    first: int  # row
    num_rows: int
    in_features: int
    number: int  # of the decoder's layer


class Placed(msgspec.Struct, frozen=True):
    """An adapter's layer, and where it lies in the stack."""

    adapter: Adapter
    layer: AdaptedLayer
    place: Place
    column: int  # the first of its `rank` ones


class Stack(msgspec.Struct):
    """All adapters of one linear layer. Each part that has an A and a B of its own has a block of columns."""

    shape: tuple[int, int]  # of the linear layer, [out, in]
    blocks: list[tuple[int, int]]  # first row and number of rows
    placed: list[Placed]


class AdapterPlan(msgspec.Struct):
    """What `install_adapters` does."""

    adapters: list[Adapter]
    spans: list[tuple[int, int]]  # [first, end) of the columns of each
    num_columns: int
    stacks: dict[str, Stack]  # by path of the linear layer

    @property
    def summary(self) -> str:
        """Names and ranks, for /health and the log."""
        return ", ".join(f"{adapter.name} (rank {adapter.rank})" for adapter in self.adapters)

    @property
    def num_values(self) -> int:
        """Numbers in memory, zeros included."""
        return sum(len(stack.blocks) * self.num_columns * sum(stack.shape) for stack in self.stacks.values())


def plan_adapters(config: LoRAConfig, architecture: ModelArchitecture) -> AdapterPlan:
    """Open all adapters and place them. Raises StartupError, one line, for what is not there, not served, too much."""
    adapters = [open_adapter(name, path) for name, path in config.adapters.items()]
    ranks = [adapter.rank for adapter in adapters]
    if sum(ranks) > config.max_total_rank:
        raise StartupError(
            f"the adapters have ranks {' + '.join(map(str, ranks))} = {sum(ranks)}, above lora.max_total_rank = "
            f"{config.max_total_rank}: every token pays for their sum; raise it or serve fewer adapters"
        )
    with torch.device("meta"):
        model = build_model(architecture, TorchAttention())
    places = places_of(model)
    spans = list(pairwise(accumulate(ranks, initial=0)))
    stacks: dict[str, Stack] = {}
    for adapter, (first_column, _) in zip(adapters, spans):
        for layer, place in find_places(adapter, places, architecture.family):
            linear = model.get_submodule(place.linear)
            assert isinstance(linear, Linear)
            stack = stacks.setdefault(place.linear, Stack((linear.out_features, linear.in_features), [], []))
            rows = (place.first, place.num_rows)
            if rows not in stack.blocks:
                stack.blocks.append(rows)
            stack.placed.append(Placed(adapter, layer, place, first_column))
    num_columns = -(-sum(ranks) // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    return AdapterPlan(adapters, spans, num_columns, stacks)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Where adapters can go, by the names that the decoder knows layers and their parts by."""
    places: dict[str, Place] = {}
    for path, module in model.named_modules():
        served = SERVED.fullmatch(path)
        if served is None or not isinstance(module, Linear):
            continue
        number, first = int(served[1]), 0
        places[path] = Place(path, 0, module.out_features, module.in_features, number)
        for part, num_rows in (module.parts or {}).items():
            name = f"{path.rpartition('.')[0]}.{part}"
            places[name] = Place(path, first, num_rows, module.in_features, number)
            first += num_rows
    return places


def find_places(adapter: Adapter, places: Mapping[str, Place], family: str) -> list[tuple[AdaptedLayer, Place]]:
    """An adapter's layers with their places, those of a part that no text model needs left out.

    Raises StartupError for layers that the model does not have, or that have other sizes.
    """
    found: dict[Place, AdaptedLayer] = {}
    for layer in adapter.layers:
        name = decoder_name(family, f"{layer.name}.weight")
        if not name:
            continue
        path = name.removesuffix(".weight")
        # Adapters of a model without its output layer lack the first part of the path.
        place = places.get(path) or places.get(f"model.{path}")
        if place is None:
            raise StartupError(
                f"{adapter.file}: the model has no layer {show(layer.name)} that adapters can change: attention and "
                "MLP are served, not embeddings, the output layer or experts"
            )
        for half, axis, expected in ((layer.down, 1, place.in_features), (layer.up, 0, place.num_rows)):
            if half.shape[axis] != expected:
                raise StartupError(
                    f"{adapter.file}: tensor {show(half.name)} has shape {list(half.shape)}, but the model's layer has "
                    f"{expected} {'outputs' if axis == 0 else 'inputs'}: it was made for another model"
                )
        if place in found:
            raise StartupError(f"{adapter.file}: {show(layer.name)} and {show(found[place].name)} are one layer")
        found[place] = layer
    numbers = {place.number for place in found}
    if adapter.layer_numbers is not None and numbers != adapter.layer_numbers:
        raise StartupError(
            f"{adapter.file}: layers_to_transform names {_list(adapter.layer_numbers)}, but tensors are there for "
            f"layers {_list(numbers)}"
        )
    if not found:
        raise StartupError(f"{adapter.file}: none of its layers belongs to the text model")
    return [(layer, place) for place, layer in found.items()]


def _list(numbers: "frozenset[int] | set[int]") -> str:
    return show(", ".join(map(str, sorted(numbers))))


def install_adapters(
    plan: AdapterPlan | None,
    model: CausalLM | nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    products: bool = True,
) -> AdapterMask | None:
    """Put the adapters into a loaded model; the mask is to be told whose each step's tokens are. None without any.

    `products`: they make ready for their first step.
    """
    if plan is None:
        return None
    assert isinstance(model, nn.Module)
    mask = AdapterMask(plan.spans, plan.num_columns, dtype, device)
    with contextlib.ExitStack() as files, torch.inference_mode(False), torch.no_grad():
        tensors = {adapter.name: files.enter_context(_open(adapter.file)) for adapter in plan.adapters}
        for path, stack in plan.stacks.items():
            parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            base = getattr(parent, name)
            num_rows = len(stack.blocks) * plan.num_columns
            down = torch.zeros(num_rows, base.in_features, dtype=dtype, device=device)
            up = torch.zeros(base.out_features, num_rows, dtype=dtype, device=device)
            for placed in stack.placed:
                layer, first, end = placed.layer, placed.place.first, placed.place.first + placed.place.num_rows
                start = stack.blocks.index((first, placed.place.num_rows)) * plan.num_columns + placed.column
                columns = slice(start, start + layer.rank)
                file = tensors[placed.adapter.name]
                down[columns] = file.get_tensor(layer.down.name).to(device, dtype)
                up[first:end, columns] = (file.get_tensor(layer.up.name).float() * layer.scale).to(device, dtype)
            if isinstance(parent, DecoderAttention) and base is parent.qkv_proj:
                parent.arrange(up)
            adapted = LoRALinear(base, down, up.t().contiguous(), stack.blocks, mask)
            if products:
                adapted.prepare(fused=False)
            setattr(parent, name, adapted)
    return mask


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{file}: damaged safetensors file: {show(str(error))}") from None
