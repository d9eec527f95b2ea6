"""The bodies of POST /v1/embeddings: OpenAI's, and how the served model's hidden states become vectors."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from asyncllm.server.replies import PromptTokensDetails
from asyncllm.server.wire import INT64, CacheSalt, Int64, ModelRequest, Prompt, Timeout, about

Dimensions = Annotated[int, Meta(ge=1, le=INT64)]
PoolingName = Literal["last", "mean"]


class EmbeddingParameters(ModelRequest, kw_only=True):
    """How vectors are made, whoever asks for them."""

    pooling: Annotated[
        PoolingName | None, about("which hidden states: the last token's, or the mean of all; as model.pooling says")
    ] = None
    normalize: Annotated[bool | None, about("scale vectors to length 1", True)] = None
    dimensions: Annotated[
        Dimensions | None, about("numbers to keep, from the front, before they are scaled; all of them unless given")
    ] = None
    add_special_tokens: Annotated[bool | None, about("encode texts with the model's special tokens", True)] = None
    priority: Annotated[Int64 | None, about("lower runs first", 0)] = None
    cache_salt: Annotated[CacheSalt | None, about("only requests with the same salt share cached prefixes")] = None
    timeout: Annotated[Timeout | None, about("seconds, also as header X-Request-Timeout")] = None


class EmbeddingsRequest(EmbeddingParameters, kw_only=True):
    """POST /v1/embeddings"""

    input: Annotated[Prompt, Meta(description="text, a list of texts, token ids or a list of lists of token ids")]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, about("numbers, or base64 of little-endian float32", "float")
    ] = None
    user: Annotated[str | None, about("the client's name for its user")] = None


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of one input."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str  # base64 of little-endian float32 where that was asked for


class EmbeddingsUsage(msgspec.Struct):
    """What a request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingsAbout(msgspec.Struct, kw_only=True):
    """What an answer says behind its vectors."""

    model: str
    usage: EmbeddingsUsage
    pooling: PoolingName


class Embeddings(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings: a vector for each input, in their order."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    pooling: PoolingName
