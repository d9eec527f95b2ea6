"""Generation parameters as a program writes them: the fields, types and rules of the HTTP API, checked where made.

Knows the wire's structs and rules; adds none but what a program can do and a client cannot. Any thread.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from asyncllm.errors import InvalidRequest, show
from asyncllm.server import params
from asyncllm.server.embeddings_wire import EmbeddingParameters
from asyncllm.server.wire import Count, GenerationRequest


class SamplingParams(GenerationRequest, kw_only=True):
    """How to generate: the parameters of POST /v1/completions under the same names, with the same defaults.

    `max_tokens` is 16 behind a prompt and what the context leaves behind a conversation. Raises InvalidRequest, which
    names the field, the value and the rule.
    """

    max_completion_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None  # alternatives beside each generated token

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Hold every field against its type, then against the others; fields may have been set since the last time."""
        for field in msgspec.structs.fields(self):
            if (value := getattr(self, field.name)) is not None:
                setattr(self, field.name, _checked(field.name, value, field.type))
        params.check_common(self, chat=False)
        if params.resolve_max_tokens(self, chat=False) == 0 and self.prompt_logprobs is None:
            raise InvalidRequest(
                "max_tokens = 0 needs prompt_logprobs: there would be nothing to answer.", param="max_tokens"
            )


Params = SamplingParams | Mapping[str, Any]


def params_of(given: Any, fields: dict[str, Any], count: int) -> list[SamplingParams]:
    """The parameters of each of `count` prompts, from what the caller wrote in one way or the other."""
    if given is not None and fields:
        raise InvalidRequest(f"params and {next(iter(fields))} = … say the same: give one of them.", param="params")
    if given is None:
        return [_made(fields)] * count
    if isinstance(given, SamplingParams | Mapping):
        return [_made(given)] * count
    if not isinstance(given, Sequence):
        raise _no_params(given)
    if len(given) != count:
        raise InvalidRequest(f"params holds {len(given)} items for {count} prompts.", param="params")
    made = {id(item): _made(item) for item in given}  # thousands of prompts mostly share a few
    return [made[id(item)] for item in given]


def embedding_params(fields: Mapping[str, Any]) -> EmbeddingParameters:
    """How vectors are made, by the keywords of a call. Raises InvalidRequest."""
    known = [name for name in EmbeddingParameters.__struct_fields__ if name != "model"]
    _check_names(fields, known, "embedding parameter")
    kinds = {field.name: field.type for field in msgspec.structs.fields(EmbeddingParameters)}
    given = {name: value for name, value in fields.items() if value is not None}
    return EmbeddingParameters(**{name: _checked(name, value, kinds[name]) for name, value in given.items()})


def _check_names(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise InvalidRequest(f"{show(name)!r} is no {what}{hint}", param=str(name), code="unknown_parameter")


def _made(given: Any) -> SamplingParams:
    if isinstance(given, Mapping):
        _check_names(given, SamplingParams.__struct_fields__, "generation parameter")
        made = SamplingParams(**given)
    elif isinstance(given, SamplingParams):
        given.check()
        made = given
    else:
        raise _no_params(given)
    if made.stream is not None:
        raise InvalidRequest("stream is no parameter here: use the method stream or stream_chat.", param="stream")
    return made


def _no_params(given: object) -> InvalidRequest:
    return InvalidRequest(
        f"params = {show(given)}: expected SamplingParams or a dict, or a list with one for each prompt.",
        param="params",
        code="invalid_type",
    )


def _checked(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        rule, _, location = str(error).partition(" - at ")
        place = name + location.strip("`").removeprefix("$") if location.startswith("`$") else name
        rule = rule.replace("`", "").replace("Expected ", "expected ")
        code = "invalid_type" if ", got " in rule else "invalid_value"
        raise InvalidRequest(f"{place} = {show(value)}: {rule}.", param=name, code=code) from None
