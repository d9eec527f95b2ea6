"""Where a checkpoint keeps its chat templates: files and settings, in the order in which transformers reads them.

Knows names and places; what a template says is the router's matter. Torch-free. Any thread.
"""

from pathlib import Path
from typing import Any

import msgspec

from asyncllm.errors import StartupError

DEFAULT = "default"
GGUF_KEY = "tokenizer.chat_template"


class ChatTemplates(msgspec.Struct, frozen=True):
    """Jinja sources by name, and where they are, for error messages."""

    sources: dict[str, str]
    origin: str

    @property
    def default(self) -> str | None:
        """The one that needs no name."""
        return self.sources.get(DEFAULT)

    @property
    def others(self) -> dict[str, str]:
        """The named ones."""
        return {name: source for name, source in self.sources.items() if name != DEFAULT}


def of_directory(directory: Path, settings: dict[str, Any]) -> ChatTemplates:
    """Those of Hugging Face: chat_template.jinja and additional_chat_templates, or else tokenizer_config.json.

    `settings`: what is in tokenizer_config.json. Raises StartupError for a file that is not UTF-8 text.
    """
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    sources = {name: read_template(file) for name, file in files.items() if file.is_file()}
    if sources:
        where = files[DEFAULT] if DEFAULT in sources else directory / "additional_chat_templates"
        return ChatTemplates(sources, str(where))
    return ChatTemplates(_of_setting(settings.get("chat_template")), f"{directory / 'tokenizer_config.json'}")


def of_gguf(path: Path, metadata: dict[str, Any]) -> ChatTemplates:
    """Those in a GGUF file's metadata: `tokenizer.chat_template`, and named ones behind a dot."""
    named = {key.removeprefix(GGUF_KEY + "."): value for key, value in metadata.items() if key.startswith(GGUF_KEY)}
    named = {DEFAULT if name == GGUF_KEY else name: value for name, value in named.items()}
    return ChatTemplates({name: value for name, value in named.items() if isinstance(value, str)}, str(path))


def read_template(file: Path) -> str:
    """Its text. Raises StartupError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise StartupError(f"{file}: not readable as UTF-8 text") from None


def _of_setting(value: object) -> dict[str, str]:
    """One template, or a list of them with names."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        return {}
    return {name: source for name, source in value.items() if isinstance(name, str) and isinstance(source, str)}
