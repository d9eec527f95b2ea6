"""`asyncllm-server --probe NAME`: what a checkpoint is, what it needs, and whether it is served. Loads no weights.

Of a model on the hub only the small files are fetched. What is not served is described as far as its headers go.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.executor.machine import Fit, devices, fit
from asyncllm.executor.memory import GIB, weight_bytes
from asyncllm.models.config import BYTES_PER_VALUE, ModelArchitecture
from asyncllm.router.answers import AnswerFormat
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.template_choice import choose_template
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.weights.base import Checkpoint
from asyncllm.weights.checkpoint import LoadFormat, locate, open_place
from asyncllm.weights.gguf_header import read_header
from asyncllm.weights.hub import stored_on_hub
from asyncllm.weights.hugging_face import read_json
from asyncllm.weights.quantization import quantization_of
from asyncllm.weights.safetensors import read_shards

# Facts by the names that configurations give them, GGUF's without the architecture in front.
ALIASES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "block_count"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "embedding_length"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads", "attention.head_count"),
    "num_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"),
}


class Memory(msgspec.Struct, frozen=True):
    """What a precision takes."""

    weight_bytes: int  # on a GPU; `Fit` says what a CPU keeps
    kv_bytes_per_token: int | None


class Probe(msgspec.Struct, kw_only=True):
    """The answer; None for what the files do not say."""

    name: str
    source: str = ""  # file or directory
    format: str = ""  # gguf, safetensors
    served: bool = False
    reason: str = ""  # why it is not, one line
    architecture: str | None = None  # as the file has it
    family: str | None = None  # as it is served
    num_parameters: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    stored: dict[str, int] = {}  # type -> values stored in it
    stored_bytes: int = 0
    quantization: str = ""
    has_chat_template: bool | None = None
    tool_format: str | None = None
    reasoning_format: str | None = None
    sampling_defaults: dict[str, float] = {}
    memory: dict[str, Memory] = {}  # by dtype
    devices: list[Fit] = []

    @property
    def fits(self) -> bool:
        """Whether it can be served on some device of this machine."""
        return self.served and any(not fitted.problem for fitted in self.devices)


def probe(name: str, config: Config) -> Probe:
    """Look at an alias, file, directory or hub name, under the configuration's dtype, cache and scheduler."""
    answer = Probe(name=name)
    try:
        place = locate(name, config.model.revision, with_weights=False)
        answer.source = str(place.path)
        _read_files(place.path, answer)
        if not place.is_complete:
            _read_counts(stored_on_hub(name, config.model.revision), answer)
        # Shapes and tokenizer are enough where the weights are still on the hub.
        load_format: LoadFormat = "auto" if place.is_complete else "dummy"
        _read_checkpoint(open_place(place, load_format, config.model.generation_config), config, answer)
        answer.served = True
    except StartupError as error:
        answer.reason = error.message
    if not answer.memory and answer.num_parameters:
        answer.memory = _memory_by_count(answer, answer.num_parameters)
    return answer


def _read_files(path: Path, answer: Probe) -> None:
    """What headers and config.json say, served or not. Raises StartupError for damaged files."""
    if path.suffix == ".gguf":
        answer.format = "gguf"
        _read_gguf(path, answer)
        return
    answer.format = "safetensors"
    raw = read_json(path / "config.json")
    names = raw.get("architectures")
    answer.architecture = ", ".join(map(str, names)) if isinstance(names, list) else raw.get("model_type")
    answer.quantization = quantization_of(path, raw)
    text = raw.get("text_config")
    _read_aliases(raw | text if isinstance(text, dict) else raw, answer)
    if any(path.glob("*.safetensors")):
        entries = [entry for shard in read_shards(path).values() for entry in shard]
        stored: Counter[str] = Counter()
        for entry in entries:
            stored[entry.dtype] += math.prod(entry.shape)
        answer.stored_bytes = sum(entry.num_bytes for entry in entries)
        _read_counts(stored, answer)


def _read_counts(stored: dict[str, int], answer: Probe) -> None:
    answer.stored = dict(Counter(stored).most_common())
    if not answer.quantization:  # packed values are not parameters
        answer.num_parameters = sum(stored.values()) or None


def _read_gguf(path: Path, answer: Probe) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_header(path)
    architecture = str(header.metadata.get("general.architecture", "unknown"))
    prefix = f"{architecture}."
    answer.architecture = architecture
    _read_aliases({key.removeprefix(prefix): value for key, value in header.metadata.items()}, answer)
    stored: Counter[str] = Counter()
    for tensor in header.tensors:
        count = math.prod(tensor.shape)
        try:
            kind = GGMLQuantizationType(tensor.type)
        except ValueError:
            stored[f"type {tensor.type}"] += count
            continue
        stored[kind.name] += count
        values, num_bytes = GGML_QUANT_SIZES[kind]
        answer.stored_bytes += count // values * num_bytes
    answer.stored = dict(stored.most_common())
    answer.num_parameters = stored.total()
    plain = {"F32", "F16", "BF16"}
    answer.quantization = next((kind for kind in answer.stored if kind not in plain), "")


def _read_aliases(values: dict[str, Any], answer: Probe) -> None:
    for field, names in ALIASES.items():
        found = next((values[name] for name in names if isinstance(values.get(name), int)), None)
        if found is not None:
            setattr(answer, field, found)
    if answer.num_kv_heads is None:
        answer.num_kv_heads = answer.num_heads
    if answer.head_dim is None and answer.hidden_size and answer.num_heads:
        answer.head_dim = answer.hidden_size // answer.num_heads


def _read_checkpoint(checkpoint: Checkpoint, config: Config, answer: Probe) -> None:
    """What is known of a checkpoint that is served."""
    architecture = checkpoint.architecture
    answer.family, answer.num_parameters = architecture.family, architecture.num_parameters
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        setattr(answer, field, getattr(architecture, field))
    answer.context_length = architecture.max_position
    answer.sampling_defaults = msgspec.structs.asdict(checkpoint.text.sampling)
    backend = checkpoint.tokenizer()
    text = choose_template(checkpoint.text, config.model.chat_template, backend)
    tokenizer = Tokenizer(backend, text)
    template = ChatTemplate(text, tokenizer)
    answer.has_chat_template = text.chat_template is not None
    formats = AnswerFormat(template, tokenizer, config.model.tool_parser, config.model.reasoning_parser)
    if answer.has_chat_template:
        answer.tool_format = formats.tools.name
        answer.reasoning_format = formats.reasoning.name if formats.reasoning is not None else None
    answer.memory = {dtype: _memory(architecture, width) for dtype, width in BYTES_PER_VALUE.items()}
    answer.devices = [fit(checkpoint, config, device) for device in devices()]


def _memory(architecture: ModelArchitecture, width: int) -> Memory:
    return Memory(weight_bytes(architecture, width, on_gpu=True), architecture.kv_bytes_per_token(width))


def _memory_by_count(answer: Probe, num_parameters: int) -> dict[str, Memory]:
    """As far as a model's figures go that is not served."""
    kv_values = None
    if answer.num_layers and answer.num_kv_heads and answer.head_dim:
        kv_values = 2 * answer.num_layers * answer.num_kv_heads * answer.head_dim
    return {
        dtype: Memory(num_parameters * width, None if kv_values is None else kv_values * width)
        for dtype, width in BYTES_PER_VALUE.items()
    }


def report(answer: Probe) -> str:
    """For people."""
    lines = [answer.name + (f"  ({answer.source})" if answer.source not in ("", answer.name) else "")]
    lines += [f"  {title:<13}{text}" for title, text in _rows(answer)]
    if not answer.served:
        lines.append(f"  not served: {answer.reason}")
    elif not answer.fits:
        lines.append("  served, but it fits no device of this machine")
    else:
        lines.append("  served")
    return "\n".join(lines)


def _rows(answer: Probe) -> Iterator[tuple[str, str]]:
    if answer.architecture:
        family = f", served as {answer.family}" if answer.family else ""
        yield "architecture", f"{answer.architecture}{family} ({answer.format})"
    if answer.num_parameters:
        yield "parameters", f"{answer.num_parameters:,}"
    if answer.num_layers:
        heads = f", {answer.num_heads} heads over {answer.num_kv_heads} of keys and values" if answer.num_heads else ""
        yield "shape", f"{answer.num_layers} layers of {answer.hidden_size}{heads}"
    if answer.context_length:
        yield "context", f"{answer.context_length:,} tokens"
    if answer.stored:
        total = sum(answer.stored.values())
        kinds = ", ".join(f"{kind} {count / total:.0%}" for kind, count in answer.stored.items())
        yield "stored", f"{kinds}; {_size(answer.stored_bytes)}"
    if answer.quantization:
        yield "quantization", answer.quantization
    if answer.has_chat_template is not None:
        thinking = answer.reasoning_format or "none"
        formats = f"template; tools {answer.tool_format}, thinking {thinking}" if answer.has_chat_template else "none"
        yield "chat", formats
    for number, (dtype, memory) in enumerate(answer.memory.items()):
        kv = f", {_size(memory.kv_bytes_per_token)} a token" if memory.kv_bytes_per_token else ""
        yield "" if number else "memory", f"{dtype}: weights {_size(memory.weight_bytes)}{kv}"
    for fitted in answer.devices:
        device = fitted.device
        where = f"{device.description}, {_size(device.available_bytes)} available, {fitted.dtype}".lstrip(", ")
        yield device.name, where
        if fitted.kernels:
            yield "", f"kernels: {fitted.kernels}; weights {_size(fitted.weight_bytes)}"
        if fitted.problem:
            yield "", fitted.problem
            continue
        counts = ", ".join(f"{count} of {length:,}" for length, count in fitted.num_sequences.items())
        yield "", f"KV for {fitted.num_kv_tokens:,} tokens; sequences at once: {counts}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"
