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
from asyncllm.layers.mlp import GatedMLP
from asyncllm.layers.norm import RMSNorm
from asyncllm.layers.rotary import Rotary
from asyncllm.models.base import CausalLM
from asyncllm.models.registry import build_model
from asyncllm.weights.base import Checkpoint

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
        _fill(checkpoint, targets_of(model))
        for module in model.modules():
            if isinstance(module, Linear | RMSNorm | Rotary | GatedMLP):
                module.prepare(attention.fused)
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


def _fill(checkpoint: Checkpoint, targets: dict[str, Target]) -> None:
    missing = {name for name, target in targets.items() if not target.optional}
    unexpected = []
    for name, tensor in checkpoint.tensors():
        target = targets.get(name)
        if target is None:
            unexpected.append(name)
            continue
        if target.optional:
            continue
        destination = target.destination
        if tensor.shape != destination.shape:
            raise StartupError(
                f"{checkpoint.name}: tensor {name} has shape {list(tensor.shape)}, expected {list(destination.shape)}"
            )
        destination.copy_(tensor)
        missing.discard(name)
    if missing:
        raise StartupError(f"{checkpoint.name}: missing tensors ({len(missing)}): {_names(missing)}")
    if unexpected:
        raise StartupError(f"{checkpoint.name}: unexpected tensors ({len(unexpected)}): {_names(unexpected)}")


def _names(names: set[str] | list[str]) -> str:
    """The first few, in order."""
    listed = sorted(names)
    rest = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return show(", ".join(listed[:MAX_NAMES_SHOWN])) + rest
