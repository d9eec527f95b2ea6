"""Which chat template a model gets: its own, or the one that `model.chat_template` names.

Knows the built-in templates (`templates/`) and where their turns end. At start-up; any thread.
"""

import logging
from pathlib import Path

import msgspec
import tokenizers

from asyncllm.errors import StartupError, show
from asyncllm.weights.base import TextFacts
from asyncllm.weights.chat_templates import read_template

DIRECTORY = Path(__file__).parent / "templates"
BUILT_IN = tuple(sorted(file.stem for file in DIRECTORY.glob("*.jinja")))
# What the model writes at the end of its turn, where that is not the end of the text.
ENDS_OF_TURNS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}

log = logging.getLogger("asyncllm.router")


def choose_template(text: TextFacts, setting: str, tokenizer: tokenizers.Tokenizer) -> TextFacts:
    """The facts with the template of `model.chat_template`: one of the checkpoint's, a built-in one, or a file.

    Raises StartupError for a setting that is none of these.
    """
    if not setting:
        return text
    if setting in text.named_templates:
        return _with_template(text, text.named_templates[setting], text.template_origin)
    if setting in BUILT_IN:
        return _with_built_in(text, setting, tokenizer)
    if not Path(setting).is_file():
        names = ", ".join((*text.named_templates, *BUILT_IN))
        raise StartupError(f"model.chat_template = {show(setting)}: neither a file nor one of {names}")
    return _with_template(text, read_template(Path(setting)), setting)


def _with_built_in(text: TextFacts, name: str, tokenizer: tokenizers.Tokenizer) -> TextFacts:
    source = read_template(DIRECTORY / f"{name}.jinja")
    if text.add_bos:
        source = "{{- bos_token -}}" + source  # chat text is encoded as the template wrote it, without one
    ends, end = text.eos_token_ids, ENDS_OF_TURNS.get(name)
    if end is not None:
        end_id = tokenizer.token_to_id(end)
        if end_id is None:
            log.warning("model.chat_template = %s: this model has no token %s, and may not end its turns", name, end)
        elif end_id not in ends:
            ends = (*ends, end_id)
    text = msgspec.structs.replace(text, eos_token_ids=ends)
    return _with_template(text, source, f"built-in chat template {name}")


def _with_template(text: TextFacts, source: str, origin: str) -> TextFacts:
    return msgspec.structs.replace(text, chat_template=source, named_templates={}, template_origin=origin)
