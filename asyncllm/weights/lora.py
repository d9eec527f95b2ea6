"""LoRA adapters in PEFT's format, read and checked: adapter_config.json and adapter_model.safetensors.

What would change numbers in a way that is not served is refused by its name, and so is a key that nobody here knows.
Knows no model; `lora_stacks.py` finds the places. Torch-free. Any thread.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from asyncllm.errors import StartupError, show
from asyncllm.weights.hub import HUB_NAME, fetch_adapter
from asyncllm.weights.hugging_face import read_json
from asyncllm.weights.safetensors import SERVED_DTYPES, TensorEntry, read_header

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HALF = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Of these, PEFT makes new matrices beside a base model that stays as it is.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
# Keys that change nothing once an adapter is trained, whatever their values: which layers there are, the tensors say.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config",
})  # fmt: skip


class AdapterConfig(msgspec.Struct, frozen=True):
    """The keys of adapter_config.json that count."""

    peft_type: str
    r: Annotated[int, Meta(ge=1)] = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Meta(ge=1)]] | None = None  # regular expression of layers -> rank
    alpha_pattern: dict[str, float] | None = None
    layers_to_transform: list[int] | int | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True


class Half(msgspec.Struct, frozen=True):
    """One of the two tensors of a layer."""

    name: str  # in the file
    shape: tuple[int, ...]


class AdaptedLayer(msgspec.Struct, frozen=True):
    """A layer of the checkpoint and its A [rank, in] and B [out, rank]."""

    name: str  # as the checkpoint has it
    down: Half
    up: Half
    rank: int
    scale: float


class Adapter(msgspec.Struct, frozen=True):
    """An opened adapter."""

    name: str  # that clients use
    file: Path
    layers: list[AdaptedLayer]
    layer_numbers: frozenset[int] | None  # of the decoder's layers that are changed; None: any

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(layer.rank for layer in self.layers)


def open_adapter(name: str, path: str) -> Adapter:
    """Open a directory, or the hub's repository of this name. Raises StartupError, one line, for what is not served."""
    directory = _locate(name, path)
    config_file, file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config = _config(config_file, read_json(config_file))
    if not file.is_file():
        pickled = " (pickled .bin files are never loaded)" if any(directory.glob("adapter_model*.bin")) else ""
        raise StartupError(f"{directory}: no {WEIGHTS_FILE}{pickled}")
    try:
        layers = [_layer(config, layer, halves, file) for layer, halves in _halves(file).items()]
    except re.error as error:
        raise StartupError(f"{config_file}: rank_pattern or alpha_pattern: {error}") from None
    if not layers:
        raise StartupError(f"{file}: it holds no tensors")
    numbers = config.layers_to_transform
    listed = [numbers] if isinstance(numbers, int) else numbers
    return Adapter(name, file, layers, frozenset(listed) if listed else None)


def _locate(name: str, path: str) -> Path:
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / CONFIG_FILE).is_file():
            raise StartupError(f"lora.adapters.{name}: {local} has no {CONFIG_FILE}: it is no adapter in PEFT's format")
        return local
    if local.exists():
        raise StartupError(f"lora.adapters.{name}: {local} is a file: name the directory with {CONFIG_FILE}")
    if HUB_NAME.fullmatch(path):
        return fetch_adapter(path, (CONFIG_FILE, WEIGHTS_FILE))
    raise StartupError(f"lora.adapters.{name}: no such directory or adapter: {show(path)}")


def _config(file: Path, raw: dict[str, Any]) -> AdapterConfig:
    """Refuse what is not served, by the key that asks for it."""
    try:
        config = msgspec.convert(raw, AdapterConfig)
    except msgspec.ValidationError as error:
        raise StartupError(f"{file}: {error}") from None
    if config.peft_type != "LORA":
        raise StartupError(f"{file}: peft_type = {show(config.peft_type)} is not served; served: LORA")
    if config.bias != "none":
        raise StartupError(
            f"{file}: bias = {show(config.bias)} is not served: only adapters that leave biases alone are"
        )
    if config.init_lora_weights not in KEEPS_BASE and config.init_lora_weights is not None:
        raise StartupError(
            f"{file}: init_lora_weights = {show(config.init_lora_weights)} changes the base model as well: convert the "
            "adapter when it is saved (PEFT: path_initial_model_for_weight_conversion)"
        )
    for key, value in raw.items():
        if key not in AdapterConfig.__struct_fields__ and key not in WITHOUT_EFFECT and value not in NEUTRAL:
            raise StartupError(f"{file}: {show(key)} = {show(value)} is not served: plain LoRA on linear layers is")
    return config


def _halves(file: Path) -> dict[str, dict[str, TensorEntry]]:
    """Layer -> its tensors, "A" and "B"."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for entry in read_header(file):
        match = HALF.fullmatch(entry.name)
        if match is None:
            raise StartupError(
                f"{file}: tensor {show(entry.name)} is not served: only the A and B of linear layers are"
            )
        if entry.dtype not in SERVED_DTYPES:
            raise StartupError(
                f"{file}: tensor {show(entry.name)} has dtype {entry.dtype}; served: {', '.join(SERVED_DTYPES)}"
            )
        halves.setdefault(match[1], {})[match[2]] = entry
    return halves


def _layer(config: AdapterConfig, layer: str, halves: Mapping[str, TensorEntry], file: Path) -> AdaptedLayer:
    for letter, other in ("AB", "BA"):
        if letter not in halves:
            raise StartupError(f"{file}: tensor {show(halves[other].name)} is there without lora_{letter}")
    down, up = halves["A"], halves["B"]
    rank = int(_of_pattern(config.rank_pattern, layer, config.r))
    for half, axis in ((down, 0), (up, 1)):
        if len(half.shape) != 2 or half.shape[axis] != rank:
            raise StartupError(
                f"{file}: tensor {show(half.name)} has shape {list(half.shape)}, but {CONFIG_FILE} gives it rank {rank}"
            )
    alpha = _of_pattern(config.alpha_pattern, layer, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return AdaptedLayer(layer, Half(down.name, down.shape), Half(up.name, up.shape), rank, scale)


def _of_pattern(pattern: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first key that is a regular expression for the layer's name, or for the end of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default
