"""Chat templates are found where transformers finds them, and in GGUF metadata."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from asyncllm.errors import StartupError
from asyncllm.weights.chat_templates import of_directory, of_gguf
from asyncllm.weights.hugging_face import text_facts
from tests.fakes_text import byte_tokenizer

NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "none": ({}, {}),
    "setting": ({"chat_template": "setting"}, {}),
    "settings with names": ({"chat_template": NAMED}, {}),
    "file": ({"chat_template": "setting"}, {"chat_template.jinja": "file ü"}),
    "files with names": (
        {"chat_template": NAMED},
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools of a file"},
    ),
    "names only": ({"chat_template": NAMED}, {"additional_chat_templates/rag.jinja": "rag"}),
}


def directory(path: Path, settings: dict[str, Any], files: dict[str, str]) -> Path:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    for name, text in {**files, "tokenizer_config.json": json.dumps(settings)}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_templates_are_those_that_transformers_finds(
    layout: tuple[dict[str, Any], dict[str, str]], tmp_path: Path
) -> None:
    expected = PreTrainedTokenizerFast.from_pretrained(directory(tmp_path, *layout)).chat_template
    expected = {"default": expected} if isinstance(expected, str) else expected or {}
    found = of_directory(tmp_path, layout[0])
    assert found.sources == expected
    assert (found.default, found.others) == (expected.pop("default", None), expected)


def test_templates_and_tokens_are_facts_of_the_checkpoint(tmp_path: Path) -> None:
    settings = {"chat_template": NAMED, "pad_token": {"content": "<|end|>"}, "unk_token": None}
    text = text_facts(directory(tmp_path, settings, {}), Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    assert (text.chat_template, text.named_templates) == ("plain", {"tool_use": "tools"})
    assert text.template_origin == str(tmp_path / "tokenizer_config.json")
    assert text.named_tokens == {"pad_token": "<|end|>"}


def test_templates_of_a_gguf_file_have_names_behind_a_dot() -> None:
    metadata = {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.ggml.model": "gpt2",
    }
    found = of_gguf(Path("m.gguf"), metadata)
    assert (found.default, found.others, found.origin) == ("plain", {"tool_use": "tools"}, "m.gguf")
    assert of_gguf(Path("m.gguf"), {}).default is None


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(StartupError, match=r"chat_template\.jinja: not readable as UTF-8 text"):
        of_directory(tmp_path, {})
