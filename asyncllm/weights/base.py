"""What every checkpoint offers, whatever its file format: facts, a tokenizer, and named tensors.

Torch-free at import, so that the loop thread can read text facts without paying for torch. Any thread.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from asyncllm.models.config import ModelArchitecture

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from asyncllm.layers.blocks import BlockRows


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's makers sample: counts where a request names no value. Neutral unless the checkpoint says more."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __str__(self) -> str:
        """What is not neutral, as in `temperature 0.6, top_p 0.95`; "neutral" where all is."""
        neutral = SamplingDefaults()
        said = [
            f"{name} {getattr(self, name):g}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(neutral, name)
        ]
        return ", ".join(said) or "neutral"


class TextFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint says about text: the chat template, the tokens that mean something, how to sample."""

    chat_template: str | None = None  # Jinja source
    named_templates: dict[str, str] = {}  # further ones, such as tool_use
    template_origin: str = "chat template"  # where they are, for error messages
    bos_token: str | None = None
    eos_token: str | None = None
    named_tokens: dict[str, str] = {}  # further tokens that templates call by a name, such as pad_token
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # all of them end a turn; the tokenizer's own first
    add_bos: bool = False  # whether plain text is encoded with a leading bos
    special_tokens: tuple[str, ...] = ()  # control tokens; never to be read out of a user's text
    sampling: SamplingDefaults = SamplingDefaults()


class Checkpoint(Protocol):
    """An opened model file or directory. Opening reads headers only; tensors stream later."""

    name: str  # default served name
    source: str  # the file or directory it is in, for messages
    architecture: ModelArchitecture
    text: TextFacts
    num_bytes: int  # of all tensors as stored

    def tokenizer(self) -> "Tokenizer":
        """A fresh tokenizer, which adds no bos or eos by itself unless `text.add_bos`."""
        ...

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every weight once, by its Hugging Face name, in file order; quantized ones as float32.

        At most one tensor (or one mapped shard) is held at a time. Raises StartupError on damaged files.
        """
        ...


@runtime_checkable
class BlockCheckpoint(Protocol):
    """A checkpoint that can also hand out weights in the blocks it stores them in."""

    def tensors_in_blocks(self) -> "Iterator[tuple[str, torch.Tensor | BlockRows]]":
        """As `Checkpoint.tensors`, but quantized matrices come in blocks of the kinds that `layers.blocks` knows."""
        ...

    def num_bytes_in_blocks(self, bytes_per_value: int) -> int:
        """Of all tensors so handed out; those that are not in such blocks with `bytes_per_value`."""
        ...
