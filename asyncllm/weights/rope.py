"""The rope tables of config.json -> facts of `ModelArchitecture`.

Knows `rope_parameters` of transformers 5 and `rope_scaling` of older ones; what they mean is in `layers/rotary.py`.
Torch-free. Any thread.
"""

import math
from typing import Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelArchitecture,
    RopeScaling,
    YarnScaling,
)

Raw = dict[str, Any]

SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
}


def rope_facts(
    table: Raw, *, theta: float, head_dim: int, partial: float | None, max_position: int, original: int | None
) -> Raw:
    """rope_theta, rope_scaling, rotary_dim and max_position.

    The other arguments are what stands beside the table: `theta` and `partial` (how much of a head turns) where it has
    none of its own, the longest context, and that of pre-training.
    """
    if any(isinstance(value, dict) for value in table.values()):
        raise StartupError("rope_parameters for each layer type are not served for this architecture")
    theta = positive("rope_theta", table.get("rope_theta") or theta)
    share = table.get("partial_rotary_factor") or partial
    rotary_dim = head_dim if share is None else int(head_dim * positive("partial_rotary_factor", share))
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2 or head_dim % 2:
        raise StartupError(f"rope over {rotary_dim} of {head_dim} dimensions is not served: both must be even")
    scaling = _scaling(table, rotary_dim, max_position, original)
    if isinstance(scaling, YarnScaling):
        # Its users raise the factor and leave the rest of the file as it was.
        max_position = max(max_position, int(scaling.factor * scaling.original_max_position_embeddings))
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": 0 if rotary_dim == head_dim else rotary_dim,
        "max_position": max_position,
    }


def stretched(architecture: ModelArchitecture, kind: str, context_length: int) -> ModelArchitecture:
    """The model for contexts of `context_length` tokens: `model.rope_scaling` of `kind` where its own are shorter.

    Raises StartupError for a model that has no rope, or a scaling of its own.
    """
    own = architecture.max_position
    if kind != "none" and not context_length:
        raise StartupError(f"model.rope_scaling = {kind} needs model.max_context_length: the context to reach")
    if kind == "none" or context_length <= own:
        return architecture
    if architecture.learned_positions:
        raise StartupError(f"model.rope_scaling = {kind}: this model has learned positions and no rope; leave it out")
    if architecture.rope_scaling is not None:
        already = next(name for name, scaling in SCALINGS.items() if type(architecture.rope_scaling) is scaling)
        raise StartupError(
            f"model.rope_scaling = {kind}: this model's context of {own} tokens is stretched already ({already}): "
            f"leave it out, or change the checkpoint's rope_scaling"
        )
    scalings: dict[str, RopeScaling] = {
        "linear": LinearScaling(factor=context_length / own),
        "dynamic": DynamicScaling(original_max_position_embeddings=own),  # its stretch comes from max_position
        "yarn": YarnScaling(factor=context_length / own, original_max_position_embeddings=own),
    }
    return msgspec.structs.replace(architecture, rope_scaling=scalings[kind], max_position=context_length)


def positive(key: str, value: object) -> float:
    """The value of `key` as a float; StartupError for anything but a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise StartupError(f"{key} = {show(value)}: expected a positive number")
    return float(value)


def _scaling(table: Raw, rotary_dim: int, max_position: int, original: int | None) -> RopeScaling | None:
    """How the table stretches the context, or None."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise StartupError(f"rope scaling {show(str(kind))} is not served; served: default, {', '.join(SCALINGS)}")
    given = {key: value for key, value in table.items() if value is not None}
    if kind == "dynamic":  # it starts where the model's own context ends
        original = max_position
    original = original or given.get("original_max_position_embeddings") or max_position
    positive("original_max_position_embeddings", original)
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", max_position / original)
    positive(f"the factor of rope scaling {kind}", given.get("factor"))
    scaling = msgspec.convert(given | {"original_max_position_embeddings": original}, SCALINGS[kind])
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise StartupError("rope scaling llama3 needs a high_freq_factor above its low_freq_factor")
    if isinstance(scaling, LongRopeScaling):
        for key, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
            if len(factors) != rotary_dim // 2:
                raise StartupError(f"{key} has {len(factors)} entries for {rotary_dim // 2} frequencies")
    return scaling
