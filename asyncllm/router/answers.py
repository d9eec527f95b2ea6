"""How the served model writes thinking and tool calls, and the reader that tells them from the text of an answer.

One `AnswerFormat` per model, found in its chat template or named in the configuration; one `Reader` per request, with a
parser per choice, the same for streamed and whole answers. Loop thread only.
"""

import enum
from collections.abc import Callable, Sequence

import msgspec

from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import Part, PartKind
from asyncllm.router.output.reasoning import ReasoningFormat, detect_reasoning, reasoning_format
from asyncllm.router.output.tool_format import detect, tool_format
from asyncllm.router.output.tools import Tool
from asyncllm.router.stream import ChoiceStream, Delta
from asyncllm.router.tokenizer import Tokenizer

TAIL_TOKENS = 64  # of a prompt, enough to see whether its template opened or closed a thinking part
FALLBACK_FORMAT = "hermes"  # where the template does not know tools


class Thinking(enum.Enum):
    """What an answer's text begins with."""

    NONE = "none"  # the model does not think aloud
    OFF = "off"  # the template closed an empty thinking part
    BEGUN = "begun"  # the template opened one
    POSSIBLE = "possible"  # the model may open one


class AnswerFormat:
    """What the text of this model's answers may hold besides content."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, tool_parser: str, reasoning_parser: str) -> None:
        """`tool_parser`, `reasoning_parser`: a format's name, auto or (reasoning) none. Raises ConfigError."""
        self._tokenizer = tokenizer
        detected = detect(template.source, tokenizer)
        self.template_takes_tools = detected is not None
        self.tools: ToolFormat = tool_format(
            (detected or FALLBACK_FORMAT) if tool_parser == "auto" else tool_parser, tokenizer
        )
        self.reasoning: ReasoningFormat | None = None
        self.thinking_start: tuple[int, ...] = ()  # token ids of what stands around the thinking part
        self.thinking_end: tuple[int, ...] = ()
        if reasoning_parser == "auto":
            self.reasoning = detect_reasoning(template.source, tokenizer)
        elif reasoning_parser != "none":
            self.reasoning = reasoning_format(reasoning_parser)
        if self.reasoning is not None:
            self.thinking_start = tuple(tokenizer.encode_prompt(self.reasoning.start, add_special_tokens=False))
            self.thinking_end = tuple(tokenizer.encode_prompt(self.reasoning.end, add_special_tokens=False))

    def visible_tokens(self, with_tools: bool) -> tuple[str, ...]:
        """Special tokens that the reader has to see."""
        shown = self.tools.visible_tokens if with_tools else ()
        return shown + (self.reasoning.visible_tokens(self._tokenizer) if self.reasoning else ())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn with calls, beside those of any turn: what the tools answer comes next."""
        ids = map(self._tokenizer.token_id, self.tools.stop_tokens)
        return tuple(token_id for token_id in ids if token_id is not None)

    def thinking(self, prompt: Sequence[int]) -> "Thinking":
        """What the end of a rendered conversation says about the thinking part of its answer."""
        if self.reasoning is None:
            return Thinking.NONE
        tail = self._tokenizer.decode(list(prompt[-TAIL_TOKENS:]))
        if self.reasoning.is_off(tail):
            return Thinking.OFF
        return Thinking.BEGUN if self.reasoning.begins_inside(tail) else Thinking.POSSIBLE

    def reader(
        self, choices: Sequence[ChoiceStream], tools: Sequence[Tool], max_calls: int | None, thinking: "Thinking"
    ) -> "Reader":
        """The reader of a request's answers. `tools`: those that may be called."""
        reasoning = self.reasoning if thinking in (Thinking.BEGUN, Thinking.POSSIBLE) else None
        if not tools and reasoning is None:
            return Reader(choices, None, self.num_behind_thoughts)
        format_, is_begun = self.tools if tools else None, thinking is Thinking.BEGUN
        return Reader(
            choices, lambda: OutputParser(format_, reasoning, is_begun, tools, max_calls), self.num_behind_thoughts
        )

    def num_behind_thoughts(self, token_ids: Sequence[int], held: str) -> int:
        """How many of these tokens stand behind the end of the thinking part; 0 where that is not in them.

        `held`: text in front of them that may be the beginning of that end.
        """
        if len(self.thinking_end) == 1:
            (end_id,) = self.thinking_end
            return len(token_ids) - token_ids.index(end_id) - 1 if end_id in token_ids else 0
        # Models without a token for it spell it in different ways, some together with the line break behind it.
        end, text = self.reasoning.end.encode() if self.reasoning else b"", held.encode()
        for number, token_id in enumerate(token_ids, 1):
            text = text[-len(end) :] + self._tokenizer.token_bytes(token_id)
            if end in text:
                return len(token_ids) - number
        return 0


class Call(msgspec.Struct):
    """A tool call as the model wrote it; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


class Answer(msgspec.Struct):
    """A whole answer, taken apart."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = []
    finish_reason: str = ""


class Reader:
    """Takes the answers of a request apart, each choice for itself."""

    def __init__(
        self,
        choices: Sequence[ChoiceStream],
        make_parser: Callable[[], OutputParser] | None,
        num_behind_thoughts: Callable[[Sequence[int], str], int],
    ) -> None:
        """`make_parser` None: all text is content. `num_behind_thoughts`: see `AnswerFormat`."""
        self._choices = choices
        self._parsers = [make_parser() for _ in choices] if make_parser else []
        self._num_behind_thoughts = num_behind_thoughts
        self._num_reasoning = [0] * len(choices)  # tokens of thinking parts that have ended
        self._num_read = [0] * len(choices)  # tokens whose text was pushed; in the end, all

    @property
    def is_plain(self) -> bool:
        """Whether text is content, whatever it says."""
        return not self._parsers

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thinking parts so far, their markers included where the model wrote these.

        Exact, but for streams in which stop strings held text back as the part ended: then a few too many, those whose
        text was held.
        """
        # What nobody read yet may hold the end of the thinking part.
        return sum(
            self._num_read[index] if parser.is_thinking else self._num_reasoning[index]
            for index, parser in enumerate(self._parsers)
        )

    def push(self, index: int, text: str, token_ids: Sequence[int] = ()) -> list[Part]:  # hot: once per token
        """What the next text of a choice turns out to be; may come later, where a marker could begin with it.

        `token_ids`: those the text is of, where they are known; otherwise it is one token's.
        """
        if not self._parsers:
            return [Part(PartKind.CONTENT, text)] if text else []
        parser = self._parsers[index]
        held = parser.held if token_ids else ""
        self._num_read[index] += len(token_ids) or 1
        parts = parser.push(text)
        if parser.has_thought and not self._num_reasoning[index]:
            num_tokens = self._choices[index].num_output_tokens
            self._num_reasoning[index] = num_tokens - self._num_behind_thoughts(token_ids, held)
        return parts

    def read(self, delta: Delta) -> tuple[list[Part], str]:
        """What the news of a choice turns out to be, and its finish_reason, empty while it goes on."""
        parts = self.push(delta.index, delta.text, delta.token_ids)
        if delta.finish_reason is None:
            return parts, ""
        rest, reason = self._finish(delta)
        return parts + rest, reason

    def _finish(self, delta: Delta) -> tuple[list[Part], str]:
        """What was held back of a choice that ended, and its finish_reason: a cut answer is no complete call."""
        reason = delta.finish_reason or ""
        if not self._parsers:
            return [], reason
        parser = self._parsers[delta.index]
        self._num_read[delta.index] = self._choices[delta.index].num_output_tokens
        parts = parser.finish()
        return parts, "tool_calls" if reason == "stop" and parser.has_calls else reason

    def whole(self, delta: Delta) -> Answer:
        """All of a choice at once."""
        parts, reason = self.read(delta)
        answer = Answer(finish_reason=reason)
        for part in parts:
            if part.kind is PartKind.CONTENT:
                answer.content += part.text
            elif part.kind is PartKind.REASONING:
                answer.reasoning += part.text
            elif part.kind is PartKind.CALL_BEGIN:
                answer.calls.append(Call(part.id, part.name))
            else:
                answer.calls[part.index].arguments += part.text
        return answer
