"""The thinking part in front of a model's answer. Loop thread only."""

import msgspec

from asyncllm.errors import ConfigError, show
from asyncllm.router.output.collector import Collector
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.reader import Markers, Parse, Reader
from asyncllm.router.tokenizer import Tokenizer

BREAKS = "\r\n"


class ReasoningFormat(msgspec.Struct, frozen=True):
    """What stands around the thinking part, which is at the very beginning of the text or not at all."""

    name: str
    start: str
    end: str

    def visible_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Special tokens that have to be shown in the text for the part to be found."""
        return ModelMarkers.of(tokenizer).specials((self.start, self.end))

    def begins_inside(self, prompt: str) -> bool:
        """Whether the template opened the part itself. `prompt`: rendered, or its last 200 characters."""
        return prompt.rstrip().endswith(self.start)

    def is_off(self, prompt: str) -> bool:
        """Whether the template wrote an empty part, so that the model does not think."""
        head = prompt.rstrip().removesuffix(self.end)
        return len(head) < len(prompt.rstrip()) and head.rstrip().endswith(self.start)

    def parse(self, reader: Reader, out: Collector, inside: bool) -> Parse[str]:
        """Read up to the end of the part; line breaks next to the markers are left out. Returns content in front.

        `inside`: the prompt opened it already; a model that opens it again is understood. Where the end is missing
        all of the text is reasoning, since that is what a model cut short in its thoughts has written.
        """
        if inside:
            out.begin_reasoning()
        space = yield from reader.space()
        held = ""
        if (yield from reader.literal(self.start)):
            out.begin_reasoning()
            yield from reader.space(BREAKS)
        elif inside:
            held = space.lstrip(BREAKS)
        else:
            return space

        def emit(text: str) -> None:
            nonlocal held
            text = held + text
            kept = text.rstrip(BREAKS)
            held = text[len(kept) :]
            out.reasoning(kept)

        if (yield from reader.until(Markers(self.end), emit)):
            reader.take(len(self.end))
            out.end_reasoning()
            yield from reader.space(BREAKS)
        else:
            out.reasoning(held)
        return ""


_FORMATS = {
    form.name: form
    for form in (ReasoningFormat("think", "<think>", "</think>"), ReasoningFormat("magistral", "[THINK]", "[/THINK]"))
}
REASONING_FORMATS = tuple(_FORMATS)


def reasoning_format(name: str) -> ReasoningFormat:
    """A format by its name. Raises ConfigError for an unknown one."""
    if name not in _FORMATS:
        raise ConfigError(f"reasoning_format = {show(name)}: expected one of {', '.join(REASONING_FORMATS)}.")
    return _FORMATS[name]


def detect_reasoning(template_source: str, tokenizer: Tokenizer) -> ReasoningFormat | None:
    """The format that a chat template or the vocabulary knows; None where the model does not think.

    Mistral's templates leave the part to the system prompt, so there the tokens decide.
    """
    for form in _FORMATS.values():
        is_token = all(tokenizer.token_id(marker) is not None for marker in (form.start, form.end))
        if form.end in template_source or is_token:
            return form
    return None
