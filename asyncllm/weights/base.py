"""What every checkpoint offers, whatever its file format: facts, a tokenizer, and named tensors.

Torch-free at import, so that the loop thread can read text facts without paying for torch. Any thread.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import msgspec

from asyncllm.models.config import ModelArchitecture

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


class TextFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint says about text: the chat template and the tokens that mean something."""

    chat_template: str | None = None  # Jinja source
    bos_token: str | None = None
    eos_token: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # all of them end a turn; the tokenizer's own first
    add_bos: bool = False  # whether plain text is encoded with a leading bos
    special_tokens: tuple[str, ...] = ()  # control tokens; never to be read out of a user's text


class Checkpoint(Protocol):
    """An opened model file or directory. Opening reads headers only; tensors stream later."""

    name: str  # default served name
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
