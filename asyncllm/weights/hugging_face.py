"""Reads the JSON files beside Hugging Face weights: architecture, chat template, special tokens.

Knows the keys of generation_config.json and tokenizer_config.json, old and new; those of config.json are in
`families.py`. Torch-free. Any thread.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncllm.errors import StartupError, show
from asyncllm.models.config import ModelArchitecture
from asyncllm.weights import chat_templates
from asyncllm.weights.base import TextFacts
from asyncllm.weights.families import read_architecture
from asyncllm.weights.quantization import quantization_of
from asyncllm.weights.sampling_defaults import sampling_defaults

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # beside bos_token and eos_token


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
    if method := quantization_of(directory, raw):
        raise StartupError(f"{file}: quantization {show(method)} is not served in safetensors; use a .gguf file")
    return read_architecture(file, raw)


def text_facts(directory: Path, tokenizer: "Tokenizer", generation_config: bool = True) -> TextFacts:
    """Chat template and special tokens, from whichever of the files say so.

    Without `generation_config`, its file adds neither ends of turns nor sampling defaults.
    """
    generation = _optional_json(directory / "generation_config.json") if generation_config else {}
    settings = _optional_json(directory / "tokenizer_config.json")
    bos_token = _token_text(settings.get("bos_token"))
    eos_token = _token_text(settings.get("eos_token"))
    bos_id = tokenizer.token_to_id(bos_token) if bos_token else None
    eos_id = tokenizer.token_to_id(eos_token) if eos_token else None
    ends: list[Any] = [eos_id]
    for listed in (generation.get("eos_token_id"), _optional_json(directory / "config.json").get("eos_token_id")):
        ends += listed if isinstance(listed, list) else [listed]
    eos_ids = tuple(dict.fromkeys(end for end in ends if isinstance(end, int)))
    if eos_token is None and eos_ids:
        eos_token = tokenizer.id_to_token(eos_ids[0])
    added = tokenizer.get_added_tokens_decoder()
    templates = chat_templates.of_directory(directory, settings)
    return TextFacts(
        chat_template=templates.default,
        named_templates=templates.others,
        template_origin=templates.origin,
        bos_token=bos_token,
        eos_token=eos_token,
        named_tokens={name: token for name in NAMED_TOKENS if (token := _token_text(settings.get(name))) is not None},
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        # What the tokenizer does is the fact; the add_bos_token setting of its config is often out of date.
        add_bos=bos_id is not None and bos_id in tokenizer.encode("", add_special_tokens=True).ids[:1],
        special_tokens=tuple(added[index].content for index in sorted(added) if added[index].special),
        sampling=sampling_defaults(generation, str(directory / "generation_config.json")),
    )


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _token_text(value: object) -> str | None:
    """A token is written as its text, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
