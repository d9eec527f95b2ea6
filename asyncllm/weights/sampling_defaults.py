"""Reads what a model's makers recommend for sampling, from generation_config.json or GGUF metadata. Torch-free.

As vLLM does, `do_sample` is not looked at: it says how transformers' `generate` behaves when told nothing, while the
values beside it are the recommendation. Any thread.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import SamplingDefaults

# GGUF key -> field.
GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class _Recommended(msgspec.Struct):
    """The keys that are read, in the ranges a request may name."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None


def sampling_defaults(values: Mapping[str, Any], source: str) -> SamplingDefaults:
    """The defaults that `values` (a generation_config.json) set; null is neutral, unknown keys are others' business.

    Raises StartupError naming `source`, the key and the way around it.
    """
    try:
        read = msgspec.convert({name: values.get(name) for name in _Recommended.__struct_fields__}, _Recommended)
    except msgspec.ValidationError as error:
        rule, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        raise StartupError(
            f"{source}: {name} = {show(values.get(name))}: {rule} (model.generation_config = ignore leaves it out)"
        ) from None
    given = {name: value for name, value in msgspec.structs.asdict(read).items() if value is not None}
    return SamplingDefaults(**given)


def of_gguf(metadata: Mapping[str, Any], source: str) -> SamplingDefaults:
    """The defaults that a GGUF file sets."""
    return sampling_defaults({name: metadata.get(key) for key, name in GGUF_KEYS.items()}, source)
