"""What a program gets back: an `Output` or an `Embedding` per prompt, in their order. Plain data; any thread."""

import msgspec

from asyncllm.errors import AsyncLLMError
from asyncllm.router.answers import Call
from asyncllm.types import Floats, TokenLogprobs


class Choice(msgspec.Struct):
    """One of the `n` answers to a prompt."""

    index: int
    text: str
    token_ids: list[int]  # every generated token, the one that stopped it too
    finish_reason: str  # stop, tool_calls, length, timeout or abort
    stop_reason: str | int | None = None  # the stop string, or the stop token's id unless that is an eos
    logprobs: list[TokenLogprobs] | None = None  # parallel to token_ids, where asked for
    # Of an answer in a conversation, what `text` is made of:
    content: str = ""
    reasoning: str = ""  # what the model thought in front of it
    tool_calls: list[Call] = []


class Timings(msgspec.Struct):
    """Seconds a prompt spent waiting, being read, and being answered: the slowest choice of each."""

    queue_s: float
    prefill_s: float
    decode_s: float


class Output:
    """A prompt with its choices, or with the error that kept it from having any."""

    __slots__ = ("choices", "error", "num_cached_tokens", "prompt", "prompt_logprobs", "prompt_token_ids", "timings")

    def __init__(self, prompt: str | None, prompt_token_ids: list[int]) -> None:
        """`prompt`: the text, for a conversation as its template wrote it; None where token ids came in."""
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache
        self.choices: list[Choice] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None  # of every prompt token but the first
        self.timings: Timings | None = None
        self.error: AsyncLLMError | None = None

    @property
    def text(self) -> str:
        """The first choice's text. Raises the error where there is one."""
        if self.error is not None:
            raise self.error
        return self.choices[0].text

    def __repr__(self) -> str:
        answer = f"error={self.error!r}" if self.error is not None else f"choices={self.choices!r}"
        return f"Output(prompt={self.prompt!r}, {answer})"


class Embedding:
    """A prompt with its vector, or with the error that kept it from having one."""

    __slots__ = ("_vector", "error", "num_cached_tokens", "prompt", "prompt_token_ids")

    def __init__(self) -> None:
        self.prompt: str | None = None  # the text; None where token ids came in
        self.prompt_token_ids: list[int] = []
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache
        self.error: AsyncLLMError | None = None
        self._vector: Floats | None = None

    @property
    def vector(self) -> Floats:
        """[dimensions] float32. Raises the error where there is one."""
        if self.error is not None:
            raise self.error
        assert self._vector is not None
        return self._vector

    @vector.setter
    def vector(self, vector: Floats) -> None:
        self._vector = vector

    def __repr__(self) -> str:
        answer = f"error={self.error!r}" if self.error is not None else f"vector={self._vector!r}"
        return f"Embedding(prompt={self.prompt!r}, {answer})"
