"""Fills a model from a checkpoint, tensor by tensor.

Knows how stacked layers take their parts and how tied weights are shared; knows no file format. Engine thread.
"""

from typing import cast

import msgspec
import torch
from torch import Tensor, nn

from asyncllm.attention.base import AttentionBackend
from asyncllm.errors import StartupError, show
from asyncllm.layers.linear import Linear
from asyncllm.models.base import CausalLM
from asyncllm.models.registry import build_model
from asyncllm.weights.base import Checkpoint
from asyncllm.weights.names import decoder_tensor

MAX_NAMES_SHOWN = 4


class Target(msgspec.Struct, frozen=True):
    """Where one checkpoint tensor goes."""

    parameter: Tensor
    start: int  # first row
    num_rows: int
    optional: bool  # a tied weight, which some checkpoints store a second time

    @property
    def destination(self) -> Tensor:
        """The rows of the parameter that the tensor fills."""
        return self.parameter[self.start : self.start + self.num_rows]


def load_model(
    checkpoint: Checkpoint, attention: AttentionBackend, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """Build the checkpoint's model and stream its weights in.

    Peak memory is the weights plus one tensor: on a CPU the pages of an empty parameter are only taken when they are
    written. Raises StartupError naming tensors that are missing, unexpected or of a wrong shape.
    """
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            model = build_model(checkpoint.architecture, attention)
        _materialise(model, dtype, device)
        _fill(checkpoint, model)
        for module in model.modules():  # outer ones first: attention may reorder what its projections then pack
            prepare = getattr(module, "prepare", None)
            if prepare is not None:
                prepare(attention.fused)
    return cast(CausalLM, model.eval())


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
    """Every tensor name a checkpoint may hold for this model."""
    targets: dict[str, Target] = {}
    seen: set[Tensor] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = module.parts if isinstance(module, Linear) and module.parts else None
            if parts is None:
                targets[f"{path}.{name}"] = Target(parameter, 0, parameter.shape[0], parameter in seen)
            else:
                start, parent = 0, path.rpartition(".")[0]
                for part, num_rows in parts.items():
                    targets[f"{parent}.{part}.{name}"] = Target(parameter, start, num_rows, False)
                    start += num_rows
            seen.add(parameter)
    return targets


def stacks_of(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Parameters that some checkpoints (Phi 3, GPT-2) store as one tensor, by its name, and the names of the parts."""
    stacks: dict[str, tuple[Tensor, list[str]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.parts:
            parent = path.rpartition(".")[0]
            for name, parameter in module.named_parameters(recurse=False):
                stacks[f"{path}.{name}"] = (parameter, [f"{parent}.{part}.{name}" for part in module.parts])
    return stacks


def _fill(checkpoint: Checkpoint, model: nn.Module) -> None:
    targets, stacks, family = targets_of(model), stacks_of(model), checkpoint.architecture.family
    missing = {name for name, target in targets.items() if not target.optional}
    unexpected = []
    for stored_name, stored in checkpoint.tensors():
        named = decoder_tensor(family, stored_name, stored)
        if named is None:
            continue
        name, tensor = named
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
        destination.copy_(tensor)
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
