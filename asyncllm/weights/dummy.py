"""Random weights in a model's shapes, for load tests on machines that have no checkpoint: `load_format = "dummy"`.

Knows names and shapes from the model itself, by way of the loader, so that a new family works here by itself. Reads
config.json and the tokenizer, never a weight file. Torch-free at import. Opened on any thread, streamed on the engine
thread.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from asyncllm.models.config import BYTES_PER_VALUE, ModelArchitecture
from asyncllm.weights.base import TextFacts
from asyncllm.weights.hugging_face import architecture, text_facts
from asyncllm.weights.safetensors import load_tokenizer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

STD = 0.02  # of every matrix, as models are initialised for training: activations neither vanish nor overflow


class DummyCheckpoint:
    """A `Checkpoint` without a file. The same weights every time on one kind of device: a seed per tensor name."""

    def __init__(
        self, name: str, architecture: ModelArchitecture, text: TextFacts, tokenizer: "Callable[[], Tokenizer]"
    ) -> None:
        """`tokenizer` makes a fresh one at each call."""
        self.name = self.source = name
        self.architecture = architecture
        self.text = text
        self.num_bytes = architecture.num_parameters * BYTES_PER_VALUE[architecture.dtype]
        self._tokenizer = tokenizer

    @classmethod
    def of_directory(cls, directory: Path, name: str, generation_config: bool = True) -> "DummyCheckpoint":
        """Shapes, chat template and tokenizer of a Hugging Face directory, whose weights need not be there."""
        shapes = architecture(directory)
        tokenizer = load_tokenizer(directory)
        serialized = tokenizer.to_str()
        text = text_facts(directory, tokenizer, generation_config)
        return cls(name, shapes, text, lambda: type(tokenizer).from_str(serialized))

    def tokenizer(self) -> "Tokenizer":
        """A fresh tokenizer."""
        return self._tokenizer()

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every weight the model needs: norms are ones, all else is normal with standard deviation `STD`, never zero.

        Drawn on the GPU where there is one, since a CPU takes a minute over 8 billion numbers. CPU and GPU draw
        different numbers from the same seed.
        """
        import torch

        from asyncllm.attention.torch_attention import TorchAttention
        from asyncllm.models.registry import build_model
        from asyncllm.weights.loader import targets_of

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, self.architecture.dtype)
        generator = torch.Generator(device)
        with torch.device("meta"):
            model = build_model(self.architecture, TorchAttention())
        for name, target in targets_of(model).items():
            if target.optional:
                continue
            shape = target.destination.shape
            if len(shape) == 1 and name.endswith(".weight"):  # a norm: the only weight that is a vector
                yield name, torch.ones(shape, dtype=dtype, device=device)
                continue
            generator.manual_seed(zlib.crc32(name.encode()))
            values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)
            # A draw may round to zero in float16; "never zero" makes a parameter that nobody filled stand out.
            yield name, values.masked_fill_(values == 0, STD)
