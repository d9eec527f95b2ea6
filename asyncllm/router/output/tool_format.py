"""The formats in which models write tool calls, and which of them a model uses. Any thread."""

from asyncllm.errors import ConfigError, show
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.gemma import Gemma, Gemma4
from asyncllm.router.output.hermes import Hermes
from asyncllm.router.output.llama3 import Llama3Json
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.mistral import Mistral
from asyncllm.router.output.pythonic import Pythonic
from asyncllm.router.output.qwen3_coder import Qwen3Coder
from asyncllm.router.tokenizer import Tokenizer

_FORMATS: dict[str, type[ToolFormat]] = {
    form.name: form for form in (Hermes, Llama3Json, Pythonic, Mistral, Gemma, Gemma4, Qwen3Coder)
}
TOOL_FORMATS = tuple(_FORMATS)

# What only this format's templates say; the first that fits counts.
_SIGNS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<start_function_call>", "gemma"),
    ("<|tool_call>call:", "gemma4"),
    ("[func_name1(", "pythonic"),
    ('{"name": function name, "parameters":', "llama3_json"),
    ("<|python_tag|>", "llama3_json"),
    ("<|python_start|>", "pythonic"),
)


def tool_format(name: str, tokenizer: Tokenizer) -> ToolFormat:
    """A format by its name. Raises ConfigError for an unknown one."""
    if name not in _FORMATS:
        raise ConfigError(f"tool_format = {show(name)}: expected one of {', '.join(TOOL_FORMATS)}.")
    return _FORMATS[name](ModelMarkers.of(tokenizer))


def detect(template_source: str, tokenizer: Tokenizer) -> str | None:
    """The format that a chat template asks for.

    None where it knows no tools, or only in a way that is not known here: see `fallback`.
    """
    for sign, name in _SIGNS:
        if sign in template_source:
            return name
    if "<tool_call>" not in template_source:
        return None
    if "<function=" not in template_source:
        return "hermes"
    return "qwen3_coder" if "<parameter=" in template_source else None
