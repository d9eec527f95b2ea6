"""Embeddings: vectors made of the sums of hidden states that pooled requests bring back. Any thread."""

import msgspec
import numpy as np

from asyncllm.errors import AsyncLLMError
from asyncllm.types import Floats, Pooling


class VectorForm(msgspec.Struct, frozen=True):
    """What a request's vectors are to be."""

    pooling: Pooling
    num_dimensions: int  # how many of the hidden state's numbers are kept, from the front
    normalize: bool  # to length 1, behind the cut


def vector(sums: Floats, num_tokens: int, form: VectorForm) -> Floats:
    """The vector [num_dimensions] of a prompt of so many tokens, from the sums [hidden] of its hidden states.

    Raises AsyncLLMError where the model computed something else than numbers.
    """
    values = sums[: form.num_dimensions].astype(np.float64)
    if form.pooling is Pooling.MEAN:
        values /= num_tokens
    length = float(np.linalg.norm(values))
    if not np.isfinite(length):
        raise AsyncLLMError("The model's hidden states are not finite numbers; model.dtype may be too narrow for it.")
    if form.normalize and length:
        values /= length
    return values.astype(np.float32)
