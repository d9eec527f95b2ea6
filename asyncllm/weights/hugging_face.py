"""Reads the JSON files beside Hugging Face weights: architecture, chat template, special tokens.

Knows the keys of config.json, generation_config.json and tokenizer_config.json, old and new. Torch-free. Any thread.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights.base import TextFacts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# "architectures" entry of config.json -> family, the key of models/registry.py.
FAMILIES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
DTYPES = ("float32", "bfloat16", "float16")


class _LlamaConfig(msgspec.Struct):
    """What is used of config.json, with transformers' defaults where it leaves keys out."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # since transformers 5: holds rope_theta as well
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    hidden_act: str = "silu"
    torch_dtype: str | None = None
    dtype: str | None = None  # since transformers 5


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; StartupError where it is missing or is none."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise StartupError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise StartupError(f"{file}: not valid JSON") from None
    if not isinstance(value, dict):
        raise StartupError(f"{file}: not a JSON object")
    return value


def architecture(directory: Path) -> ModelArchitecture:
    """config.json as facts. Raises StartupError naming what is served where the model is not."""
    file = directory / "config.json"
    raw = read_json(file)
    names = raw.get("architectures") or []
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        found = ", ".join(map(str, names)) or str(raw.get("model_type"))
        raise StartupError(f"{file}: architecture {show(found)} is not served; served: {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise StartupError(f"{file}: quantization {show(str(method))} is not served in safetensors; use a .gguf file")
    try:
        config = msgspec.convert(raw, _LlamaConfig)
    except msgspec.ValidationError as error:
        raise StartupError(f"{file}: {error}") from None
    if config.hidden_act != "silu":
        raise StartupError(f"{file}: hidden_act {show(config.hidden_act)} is not served; served: silu")
    if config.use_sliding_window:
        raise StartupError(f"{file}: use_sliding_window = true is not served yet")
    if min(config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.vocab_size) < 1:
        raise StartupError(f"{file}: sizes must be positive")
    dtype = config.dtype or config.torch_dtype or "float32"
    if dtype not in DTYPES:
        raise StartupError(f"{file}: dtype {show(dtype)} is not served; served: {', '.join(DTYPES)}")
    return ModelArchitecture(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=_rope_theta(file, config),
        max_position=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=family == "qwen3",
        dtype=dtype,
    )


def _rope_theta(file: Path, config: _LlamaConfig) -> float:
    """The base, from either place; any scaling is refused, since ignoring it would answer wrongly in silence."""
    for table in (config.rope_parameters, config.rope_scaling):
        kind = (table or {}).get("rope_type", (table or {}).get("type", "default"))
        if kind != "default":
            raise StartupError(f"{file}: rope scaling {show(str(kind))} is not served; served: default (none)")
    nested = (config.rope_parameters or {}).get("rope_theta")
    theta = nested if nested is not None else config.rope_theta
    if theta is None:
        return 10000.0
    if not isinstance(theta, int | float) or theta <= 0:
        raise StartupError(f"{file}: rope_theta = {show(theta)}: expected a positive number")
    return float(theta)


def text_facts(directory: Path, tokenizer: "Tokenizer") -> TextFacts:
    """Chat template and special tokens, from whichever of the files say so."""
    settings = _optional_json(directory / "tokenizer_config.json")
    bos_token = _token_text(settings.get("bos_token"))
    eos_token = _token_text(settings.get("eos_token"))
    bos_id = tokenizer.token_to_id(bos_token) if bos_token else None
    eos_id = tokenizer.token_to_id(eos_token) if eos_token else None
    ends: list[Any] = [eos_id]
    for name in ("generation_config.json", "config.json"):
        listed = _optional_json(directory / name).get("eos_token_id")
        ends += listed if isinstance(listed, list) else [listed]
    eos_ids = tuple(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if eos_token is None and eos_ids:
        eos_token = tokenizer.id_to_token(eos_ids[0])
    added = tokenizer.get_added_tokens_decoder()
    return TextFacts(
        chat_template=_chat_template(directory, settings),
        bos_token=bos_token,
        eos_token=eos_token,
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        # What the tokenizer does is the fact; the add_bos_token setting of its config is often out of date.
        add_bos=bos_id is not None and bos_id in tokenizer.encode("", add_special_tokens=True).ids[:1],
        special_tokens=tuple(added[index].content for index in sorted(added) if added[index].special),
    )


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _token_text(value: object) -> str | None:
    """A token is written as its text, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the setting; of several named templates the one called default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise StartupError(f"{file}: not readable as UTF-8 text") from None
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
