"""Rules of the generation parameters that a type cannot say, and their way into `SamplingParams`.

Nothing here waits or computes: a request is refused or turned into parameters before any work begins.
"""

import re
import secrets
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from asyncllm.errors import ContextLengthExceeded, InvalidRequest, show
from asyncllm.router.output.history import check_calls
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server import structured
from asyncllm.server.wire import ChatCompletionRequest, CompletionRequest, GenerationRequest, Message
from asyncllm.types import SamplingParams
from asyncllm.weights.base import SamplingDefaults

MASK64 = 2**64 - 1
MAX_MESSAGES = 4096
RENAMED = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "functions": "tools",
    "function_call": "tool_choice",
}
ROLES = {"developer": "system", "function": "tool"}  # as templates know them
LATER = "is not supported by this version of asyncllm; leave it out."


def resolve_max_tokens(request: GenerationRequest, *, chat: bool) -> int | None:
    """The one value of max_completion_tokens, max_tokens and max_new_tokens, or None where none is given."""
    minimum = 1 if chat else 0
    names = ("max_completion_tokens", "max_tokens", "max_new_tokens")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    for name, value in given.items():
        if value < minimum:
            raise InvalidRequest(f"{name} = {value}: expected an integer >= {minimum}.", param=name)
    if len(set(given.values())) > 1:
        pairs = ", ".join(f"{name} = {value}" for name, value in given.items())
        raise InvalidRequest(f"{pairs}: these are synonyms and must agree.", param=next(iter(given)))
    return next(iter(given.values()), None)


def check_common(request: GenerationRequest, *, chat: bool) -> None:
    """Rules between fields, alike for chat and completions."""
    max_tokens = resolve_max_tokens(request, chat=chat)
    if request.min_tokens and max_tokens is not None and request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens = {request.min_tokens}: must not exceed max_tokens = {max_tokens}.", param="min_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream = true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed; set stream = false.", param="prompt_logprobs")
    for name, successor in RENAMED.items():
        if getattr(request, name, None) is not None:
            raise InvalidRequest(
                f"{name} is not supported any more: use {successor}.", param=name, code="unsupported_parameter"
            )
    if structured.wanted_of(request) is not None:
        structured.check_beside_grammar(request)


def check_chat(request: ChatCompletionRequest) -> None:
    """Rules of POST /v1/chat/completions."""
    check_common(request, chat=True)
    for name in ("audio", "web_search_options", "prediction", "reasoning"):
        if (value := getattr(request, name)) is not None:
            raise InvalidRequest(f"{name} = {show(value)}: {name} {LATER}", param=name, code="unsupported_parameter")
    if request.modalities not in (None, ["text"]):
        raise InvalidRequest(f"modalities = {show(request.modalities)}: this model reads and writes text only.",
                             param="modalities", code="unsupported_parameter")  # fmt: skip
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs = true.", param="top_logprobs")
    if len(request.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(request.messages)} turns: at most {MAX_MESSAGES}.", param="messages")


def check_completion(request: CompletionRequest) -> None:
    """Rules of POST /v1/completions."""
    check_common(request, chat=False)
    n, best_of = request.n or 1, request.best_of
    if best_of is not None and best_of < n:
        raise InvalidRequest(f"best_of = {best_of}: must be at least n = {n}.", param="best_of")
    if best_of is not None and best_of > n and request.stream:
        raise InvalidRequest("best_of cannot be streamed; set stream = false.", param="best_of")
    if request.suffix:
        raise InvalidRequest(f"suffix = {show(request.suffix)}: suffix {LATER}", param="suffix",
                             code="unsupported_parameter")  # fmt: skip
    if resolve_max_tokens(request, chat=False) == 0 and not request.echo:
        raise InvalidRequest("max_tokens = 0 needs echo = true: there would be nothing to answer.", param="max_tokens")


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them: what their role may hold, nothing else that a client could smuggle in."""
    rendered = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise InvalidRequest(
                f"{where}.role = {show(message.role)}: expected system, developer, user, assistant or tool.",
                param=f"{where}.role",
            )
        if message.function_call is not None:
            raise InvalidRequest(f"{where}.function_call is not supported any more: use tool_calls.",
                                 param=f"{where}.function_call", code="unsupported_parameter")  # fmt: skip
        turn: dict[str, Any] = {"role": ROLES.get(message.role, message.role)}
        if message.tool_calls and message.role == "assistant":
            turn["content"] = "" if message.content is None else _text(message.content, f"{where}.content")
            turn["tool_calls"] = message.tool_calls
        elif message.tool_calls is not None and message.role != "assistant":
            raise InvalidRequest(f"{where}.tool_calls belongs to an assistant's message.", param=f"{where}.tool_calls")
        else:
            turn["content"] = _text(message.content, f"{where}.content")
        if message.name:
            turn["name"] = message.name
        if turn["role"] == "tool":
            turn["tool_call_id"] = message.tool_call_id or message.name
        thought = message.reasoning_content or message.reasoning
        if thought and message.role == "assistant":
            turn["reasoning_content"] = thought
        rendered.append(check_calls(turn, where))
    return rendered


def template_kwargs(given: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """What the chat template is told beside the messages; the client's own word on thinking comes last."""
    kwargs: dict[str, Any] = {}
    if effort is not None:
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return kwargs | (given or {})


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """The text of a message. Parts are joined by newlines, as vLLM joins them for templates that take strings."""
    if content is None:
        raise InvalidRequest(f"{where} is required.", param=where, code="missing_required_parameter")
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise InvalidRequest(
                f"{where}[{index}].type = {show(kind)}: this model reads text only.",
                param=f"{where}[{index}].type",
                code="unsupported_content",
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{index}].text = {show(text)}: expected a string.",
                                 param=f"{where}[{index}].text", code="invalid_type")  # fmt: skip
        texts.append(text)
    return "\n".join(texts)


def prompts_of(
    prompt: str | list[str | int | list[int]] | None, vocab_size: int, limit: ContextLimit | None = None
) -> list[str | Sequence[int]]:
    """The prompts of a completion request: one string, many, one list of token ids, or many.

    Raises InvalidRequest for an empty or mixed prompt and for ids outside the vocabulary, ContextLengthExceeded for
    more ids than `limit`.
    """
    if prompt is None:
        raise InvalidRequest("prompt is required.", param="prompt", code="missing_required_parameter")
    if isinstance(prompt, str):
        prompts: list[str | Sequence[int]] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [_prompt_ids(prompt, vocab_size, limit)]
    elif all(isinstance(item, str) for item in prompt):
        prompts = prompt  # type: ignore[assignment]
    elif all(isinstance(item, list) for item in prompt):
        prompts = [_prompt_ids(item, vocab_size, limit) for item in prompt]  # type: ignore[arg-type]
    else:
        raise mixed("prompt")
    if not prompts or not all(prompts):
        raise InvalidRequest("prompt is empty: at least one token is needed.", param="prompt")
    return prompts


def _prompt_ids(values: list[Any], vocab_size: int, limit: ContextLimit | None) -> Sequence[int]:
    """How many there are is looked at first."""
    if limit is not None and len(values) > limit.num_tokens:
        raise limit.exceeded(f"your prompt has {len(values)} tokens")
    return packed_ids(values, vocab_size, "prompt", "prompt")


def packed_ids(values: list[Any], vocab_size: int, name: str, param: str) -> Sequence[int]:
    """Token ids as an array, 27 ns each. Raises InvalidRequest, for ids outside the vocabulary with `name` in it."""
    try:
        ids = array("I", values)
        wrong = max(ids, default=0) >= vocab_size
    except TypeError:
        raise mixed(param) from None
    except OverflowError:
        wrong = True
    if wrong:
        first = next((value for value in values if isinstance(value, int) and not 0 <= value < vocab_size), values)
        raise InvalidRequest(f"{name} holds token id {show(first)}: expected 0 … {vocab_size - 1}.", param=name)
    return ids


def mixed(param: str) -> InvalidRequest:
    """The error for what is neither texts nor token ids."""
    return InvalidRequest(
        f"{param} mixes strings, numbers and lists: expected a string, a list of strings, a list of token ids or a "
        "list of such lists.",
        param=param,
        code="invalid_type",
    )


def check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    """Token ids in `logit_bias` and `stop_token_ids` exist."""
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(request, name) or ():
            if token >= vocab_size:
                raise InvalidRequest(
                    f"{name} holds token id {show(token)}: the vocabulary has ids 0 … {vocab_size - 1}.", param=name
                )


def fit_max_tokens(asked: int | None, default: int | None, num_prompt_tokens: int, context: int, param: str) -> int:
    """How many tokens may follow the prompt; refused, not clamped, where they do not fit.

    `default` None means: what is left of the context.
    """
    left = context - num_prompt_tokens
    if left < (0 if asked == 0 else 1):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, your prompt has {num_prompt_tokens} "
            "tokens and leaves no room to answer. Please shorten it.",
            param=param,
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, you asked for "
            f"{num_prompt_tokens + asked} tokens ({num_prompt_tokens} in the prompt, {asked} in the answer). Please "
            f"lower max_tokens to {left}.",
            param="max_tokens",
        )
    return asked


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """The stop strings as a tuple, without repeats."""
    stop = request.stop
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    eos_token_ids: tuple[int, ...],
    defaults: SamplingDefaults,
    bad_words: tuple[tuple[int, ...], ...],
    seed: int,
) -> SamplingParams:
    """The request's parameters with the model's defaults in place of what it left out.

    Raises InvalidRequest where min_tokens does not fit the tokens that are left.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens = {min_tokens}: only {max_tokens} tokens may be generated here.", param="min_tokens"
        )
    stop_token_ids = tuple(
        dict.fromkeys([*(request.stop_token_ids or ()), *(() if request.ignore_eos else eos_token_ids)])
    )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=max(defaults.top_k if request.top_k is None else request.top_k, 0),
        min_p=_or(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        seed=_int64(seed),
        logit_bias=tuple((request.logit_bias or {}).items()),
        stop_token_ids=stop_token_ids,
        bad_words=bad_words,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        speculative_tokens=request.speculative_tokens,
    )


def first_seed(request: GenerationRequest) -> int:
    """The seed of a prompt's first choice: the client's, or a random one."""
    return secrets.randbits(63) if request.seed is None else request.seed


def with_seed(sampling: SamplingParams, seed: int) -> SamplingParams:
    """The same parameters with another seed, wrapped into 64 bits."""
    return msgspec.structs.replace(sampling, seed=_int64(seed))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _int64(value: int) -> int:
    """Wrap like a 64-bit signed integer, so that seed + i never leaves the type."""
    value &= MASK64
    return value - 2**64 if value >= 2**63 else value


def request_timeout(body: float | None, header: str | None, max_s: float) -> float | None:
    """Seconds this request asks for: the body's word, else the header's; None leaves it to the router's default.

    Raises InvalidRequest where it is no positive number or over the server's maximum.
    """
    asked = body
    if asked is None and header is not None:
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header.strip()) or float(header) <= 0:
            raise InvalidRequest(f"X-Request-Timeout = {show(header)}: expected seconds, above 0.", param="timeout")
        asked = float(header)
    if asked is not None and max_s and asked > max_s:
        raise InvalidRequest(f"timeout = {asked:g}: at most {max_s:g} s (scheduler.max_timeout_s).", param="timeout")
    return asked
