"""Every format without a tokenizer, and texts cut in every way."""

import random
from collections.abc import Iterable, Sequence

from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.gemma import Gemma, Gemma4
from asyncllm.router.output.hermes import Hermes
from asyncllm.router.output.llama3 import Llama3Json
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.mistral import Mistral
from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import Part, PartKind, merge
from asyncllm.router.output.pythonic import Pythonic
from asyncllm.router.output.qwen3_coder import Qwen3Coder
from asyncllm.router.output.reasoning import ReasoningFormat
from asyncllm.router.output.tools import Tool, check_tools

PLAIN = ModelMarkers()
FORMATS: dict[str, ToolFormat] = {
    form.name: form(PLAIN) for form in (Hermes, Llama3Json, Pythonic, Mistral, Gemma, Gemma4, Qwen3Coder)
}


def tool(name: str, **parameters: object) -> dict[str, object]:
    """A tool as clients define it; `parameters` are its properties."""
    schema = {"type": "object", "properties": parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS: list[Tool] = check_tools(
    [
        tool("f", n={"type": "integer"}, l={"type": ["array", "null"]}),
        tool("g"),
        tool("get_weather", city={"type": "string"}),
    ]
)


class Result:
    """What a parser made of a text."""

    def __init__(self, parser: OutputParser, parts: Iterable[Part]) -> None:
        self.parser = parser
        self.pieces = list(parts)
        self.parts = merge(self.pieces)

    @property
    def content(self) -> str:
        return "".join(part.text for part in self.parts if part.kind is PartKind.CONTENT)

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if part.kind is PartKind.REASONING)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Names and arguments."""
        names = [part.name for part in self.parts if part.kind is PartKind.CALL_BEGIN]
        return [
            (name, "".join(p.text for p in self.parts if p.kind is PartKind.CALL_ARGUMENTS and p.index == index))
            for index, name in enumerate(names)
        ]

    @property
    def shape(self) -> tuple[object, ...]:
        """Everything but the ids, which are random."""
        parts = tuple((part.kind, part.text, part.index, part.name) for part in self.parts)
        return (*parts, self.parser.num_calls, self.parser.is_broken, self.parser.is_full)


def read(
    pieces: str | Sequence[str],
    form: str | None = "hermes",
    reasoning: ReasoningFormat | None = None,
    in_reasoning: bool = False,
    max_calls: int | None = None,
) -> Result:
    """Parse a text, given at once or in pieces."""
    parser = OutputParser(FORMATS[form] if form else None, reasoning, in_reasoning, TOOLS, max_calls)
    parts: list[Part] = []
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    return Result(parser, parts)


def cut(text: str, random_: random.Random) -> list[str]:
    """The text in random pieces, some of them empty."""
    pieces, position = [], 0
    longest = random_.choice([1, 3, 8, 40])
    while position < len(text):
        end = position + random_.randint(0, longest)
        pieces.append(text[position:end])
        position = end
    return pieces
