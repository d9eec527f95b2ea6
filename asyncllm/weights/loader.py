"""Fills a model from a checkpoint, tensor by tensor.

Knows how stacked layers and experts take their parts and how tied weights are shared; knows no file format. Engine
thread.
"""

from collections.abc import Iterable
from typing import cast

import msgspec
import torch
from torch import Tensor, nn

from asyncllm.attention.base import AttentionBackend
from asyncllm.errors import StartupError, show
from asyncllm.layers.blocks import BlockRows
from asyncllm.layers.embedding import Embedding
from asyncllm.layers.experts import ExpertWeights
from asyncllm.layers.linear import Linear
from asyncllm.models.base import CausalLM
from asyncllm.models.registry import build_model
from asyncllm.weights.base import BlockCheckpoint, Checkpoint
from asyncllm.weights.names import decoder_tensor

MAX_NAMES_SHOWN = 4


class Target(msgspec.Struct, frozen=True):
    """Where one checkpoint tensor goes."""

    destination: Tensor  # a parameter, or the rows of one that the tensor fills
    optional: bool  # a tied weight, which some checkpoints store a second time


def load_model(
    checkpoint: Checkpoint, attention: AttentionBackend, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """Build the checkpoint's model, stream its weights in, and prepare its layers to run in torch; see `read_model`."""
    model = read_model(checkpoint, attention, dtype, device)
    prepare(model, attention.fused)
    return cast(CausalLM, model.eval())


def read_model(
    checkpoint: Checkpoint,
    attention: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    keep_blocks: bool = False,
) -> nn.Module:
    """Build the checkpoint's model and stream its weights in.

    With `keep_blocks`, layers that the checkpoint stores in blocks keep those instead of a weight.

    Peak memory is the weights plus one tensor: on a CPU the pages of an empty parameter are only taken when they are
    written. Raises StartupError naming tensors that are missing, unexpected or of a wrong shape.
    """
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            model = build_model(checkpoint.architecture, attention)
        _materialise(model, dtype, device)
        _fill(checkpoint, model, keep_blocks)
    return model


def prepare(model: nn.Module, fused: bool, products: bool = True) -> None:
    """Let each layer make ready for its first step, those of products only if `products`.

    Outer ones first: attention may reorder what its projections then pack.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            prepare_module = getattr(module, "prepare", None)
            if prepare_module is not None and (products or not isinstance(module, Linear | ExpertWeights)):
                prepare_module(fused)


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace meta parameters by empty ones on the device; a parameter in two places stays one."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Every tensor name a checkpoint may hold for this model, stacks as their parts."""
    targets: dict[str, Target] = {}
    seen: set[Tensor] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = _parts_of(path, module, name, parameter)
            if parts is None:
                targets[f"{path}.{name}"] = Target(parameter, parameter in seen)
            else:
                targets |= {part: Target(rows, False) for part, rows in parts.items()}
            seen.add(parameter)
    return targets


def stacks_of(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Parameters that some checkpoints (Phi 3, GPT-2) store as one tensor, by its name, and the names of the parts.

    transformers 5 keeps experts so; its checkpoints have them one by one or as it keeps them, depending on the version.
    """
    stacks: dict[str, tuple[Tensor, list[str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = _parts_of(path, module, name, parameter)
            if parts is not None:
                stacks[f"{path}.{name}"] = (parameter, list(parts))
    return stacks


def _parts_of(path: str, module: nn.Module, name: str, parameter: Tensor) -> dict[str, Tensor] | None:
    """The checkpoint's tensors that are stacked in a parameter, and the rows each fills; None where nothing is."""
    if isinstance(module, Linear) and module.parts:
        parent = path.rpartition(".")[0]
        rows = parameter.split(list(module.parts.values()))
        return {f"{parent}.{part}.{name}": some for part, some in zip(module.parts, rows)}
    if isinstance(module, ExpertWeights):
        return {f"{path}.{part}": rows for part, rows in module.parts(name)}
    return None


class BlockPlace(msgspec.Struct, frozen=True):
    """Where blocks of a checkpoint may stay."""

    layer: Linear | Embedding | ExpertWeights
    part: int
    num_rows: int


def _block_places(model: nn.Module) -> dict[str, list[BlockPlace]]:
    """The weights that may stay in blocks, by tensor name.

    All parts of a linear layer, one after the other, where a checkpoint may have them in one tensor.
    """
    places: dict[str, list[BlockPlace]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.parts:
            parent, sizes = path.rpartition(".")[0], module.parts.items()
            whole = places[f"{path}.weight"] = []
            for part, (name, num_rows) in enumerate(sizes):
                places[f"{parent}.{name}.weight"] = [BlockPlace(module, part, num_rows)]
                whole += places[f"{parent}.{name}.weight"]
        elif isinstance(module, ExpertWeights):
            for number, (part_name, num_rows) in enumerate(module.all_parts()):
                places[f"{path}.{part_name}"] = [BlockPlace(module, number, num_rows)]
        elif isinstance(module, Linear | Embedding) and module.weight is not None:
            places[f"{path}.weight"] = [BlockPlace(module, 0, len(module.weight))]
    return places


def _fill(checkpoint: Checkpoint, model: nn.Module, keep_blocks: bool) -> None:
    targets, stacks, family = targets_of(model), stacks_of(model), checkpoint.architecture.family
    places: dict[str, list[BlockPlace]] = {}
    stream: Iterable[tuple[str, Tensor | BlockRows]] = checkpoint.tensors()
    if keep_blocks and isinstance(checkpoint, BlockCheckpoint):
        places, stream = _block_places(model), checkpoint.tensors_in_blocks()
    missing = {name for name, target in targets.items() if not target.optional}
    unexpected = []
    for stored_name, stored in stream:
        blocks = stored if isinstance(stored, BlockRows) else None
        given = stored if isinstance(stored, Tensor) else torch.empty(stored.shape, device="meta")
        named = decoder_tensor(family, stored_name, given)
        if named is None:
            continue
        name, tensor = named
        assert blocks is None or tensor is given, f"{stored_name} has a layout of its own, and came in blocks"
        if name in stacks:
            destination, filled = stacks[name]
        elif name not in targets:
            unexpected.append(stored_name)
            continue
        elif targets[name].optional:
            continue
        else:
            destination, filled = targets[name].destination, [name]
        if tensor.shape != destination.shape:
            raise StartupError(
                f"{checkpoint.source}: tensor {stored_name} has shape {list(tensor.shape)}, "
                f"expected {list(destination.shape)}"
            )
        if blocks is None:
            destination.copy_(tensor)
        elif name in places:
            for place, rows in zip(places[name], blocks.rows.split([place.num_rows for place in places[name]])):
                place.layer.keep_blocks(place.part, BlockRows(blocks.kind, rows))
        else:
            destination.copy_(blocks.values())
        missing.difference_update(filled)
    if missing:
        raise StartupError(f"{checkpoint.source}: missing tensors ({len(missing)}): {_names(missing)}")
    if unexpected:
        raise StartupError(f"{checkpoint.source}: unexpected tensors ({len(unexpected)}): {_names(unexpected)}")


def _names(names: set[str] | list[str]) -> str:
    """The first few, in order."""
    listed = sorted(names)
    rest = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return show(", ".join(listed[:MAX_NAMES_SHOWN])) + rest
