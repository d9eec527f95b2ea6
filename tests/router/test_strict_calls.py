"""Calls of strict functions in free text: what a model wants to write is free, until it calls."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache

import jsonschema
import pytest
import tokenizers

from asyncllm.router.grammar import Grammars, GrammarSpec
from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import PartKind, merge
from asyncllm.router.output.tool_format import TOOL_FORMATS, tool_format
from asyncllm.router.output.tools import ToolChoice, check_tools
from asyncllm.router.strict_calls import CallStarts, StrictCalls
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.weights.checkpoint import open_checkpoint
from tests.fakes import allows

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = check_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
        {"type": "function", "function": {"name": "loose", "parameters": SCHEMA}},
    ]
)
SCHEMAS = {"weather": SCHEMA, "loose": {"type": "object"}}
AUTO = ToolChoice("auto")
# Calls that break the schema, and calls of nobody, as each format writes them.
WRONG = {
    "hermes": [
        'So: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 9}}\n</tool_call> and on',
        '<tool_call>{"arguments": {"town": 1}, "name": "weather"}</tool_call><tool_call>{"name": "who"}</tool_call>',
    ],
    "llama3_json": [
        '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "weather", "parameters": {}}',
        ' Well, <|python_tag|>{"name": "weather", "parameters": {"days": "2"}} {"name": "weather"}',
        '\n\n{"type": "function", "name": "weather", "parameters": {"city": null}}',
    ],
    "pythonic": [
        '[weather(city="Oslo", days=9), weather(x=1)]',
        " [weather(days=[1]), who()] <|python_start|>[weather(city=1)]",
    ],
    "mistral": [
        'Hm [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": {}}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]weather{"days": 0}',
    ],
    "gemma": ["A <start_function_call>call:weather{city:<escape>Oslo<escape>,days:9}<end_function_call> B"],
    "gemma4": ['A <|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_call>call:weather{}<tool_call|>'],
    "qwen3_coder": [
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call> so",
        "Sure <function=weather>\n<parameter=days>\nnine\n</parameter>\n</function> <function=weather></function>",
    ],
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The embedded model's, with every format's markers as text, as tokens, or as special tokens."""
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    backend = checkpoint.tokenizer()
    made = Tokenizer(checkpoint.tokenizer(), checkpoint.text)
    if kind != "text":
        markers = sorted({marker for name in TOOL_FORMATS for marker in tool_format(name, made).markers})
        backend.add_tokens([tokenizers.AddedToken(marker, special=kind == "special") for marker in markers])
    return Tokenizer(backend, checkpoint.text)


@cache
def strict_calls(name: str, kind: str) -> Callable[[], StrictCalls]:
    """Makes constraints of the tools in a format."""
    tokenizer = tokenizer_of(kind)
    form, grammars = tool_format(name, tokenizer), grammars_of(kind)
    sources = form.free_calls(TOOLS, AUTO)
    calls = {start: grammars.compile(GrammarSpec("lark", text), "tools") for start, text in sources.behind.items()}
    opening = grammars.compile(GrammarSpec("lark", sources.opening), "tools") if sources.opening else None
    starts = CallStarts(tokenizer, form, tokenizer.vocab_size)
    return lambda: StrictCalls(starts, calls, opening)


@cache
def grammars_of(kind: str) -> Grammars:
    return Grammars(tokenizer_of(kind))


def written(constraint: StrictCalls, wish: Sequence[int], kind: str, random_: random.Random) -> list[int]:
    """What comes of a model that wants to write `wish`: where it may not, it takes some token that it may."""
    tokenizer, token_ids = tokenizer_of(kind), []
    left = list(reversed(wish))
    for _ in range(250):
        mask = constraint.mask()
        if not left and mask is None:
            break
        token_id = left.pop() if left else tokenizer.eos_token_ids[0]
        if mask is not None and not allows(mask, token_id):
            allowed = [i for i in range(tokenizer.vocab_size) if allows(mask, i)]
            assert allowed
            closing = [i for i in allowed if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b")", b'"}', b"\n")]
            token_id = random_.choice(closing if closing and random_.random() < 0.7 else allowed)
        constraint.accept(token_id)
        token_ids.append(token_id)
    return token_ids


@pytest.mark.parametrize("kind", ["text", "token", "special"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_obey_their_schemas_whatever_the_model_wants_to_write(name: str, kind: str) -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    tokenizer = tokenizer_of(kind)
    num_calls = 0
    for wrong in WRONG[name] * 2:
        text = wrong if random_.random() < 0.5 else wrong.replace("weather", "loose", 1)
        wish = tokenizer.encode_prompt(text, add_special_tokens=False)
        if random_.random() < 0.3:  # markers spelled out, though there are tokens for them
            wish = [token_id for byte in text for token_id in tokenizer.encode_texts([byte])[0]]
        token_ids = written(strict_calls(name, kind)(), wish, kind, random_)
        detokenizer = tokenizer.detokenizer(True, tool_format(name, tokenizer).visible_tokens)
        parser = OutputParser(tool_format(name, tokenizer), None, False, TOOLS)
        shown = "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])
        parts = merge(parser.push(shown) + parser.finish())
        called = [part.name for part in parts if part.kind is PartKind.CALL_BEGIN]
        texts = [part.text for part in parts if part.kind is PartKind.CALL_ARGUMENTS]
        num_calls += len(called)
        if parser.is_broken:  # 250 tokens did not do
            texts.pop()
        for function, arguments in zip(called, texts):
            validator = jsonschema.Draft202012Validator(SCHEMAS[function])
            assert validator.is_valid(json.loads(arguments)), (seed, shown)
    assert num_calls, seed


@pytest.mark.parametrize("kind", ["text", "token", "special"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_text_without_calls_is_free_and_costs_no_mask(name: str, kind: str) -> None:
    tokenizer, constraint = tokenizer_of(kind), strict_calls(name, kind)()
    text = 'Prices < 5 are {low} or [not]; see <b> {"a": 1} </tool_call> for <toolbar, <|python, [TOOL_ 日本.\n'
    for number, token_id in enumerate([*tokenizer.encode_texts([text])[0], *tokenizer.eos_token_ids]):
        mask = constraint.mask()
        # Where a call may open, the first token tells.
        assert mask is None or (number == 0 and name in ("llama3_json", "pythonic") and allows(mask, token_id))
        constraint.accept(token_id)
        assert not constraint.is_done


def test_a_token_that_leads_into_a_call_leads_no_further_than_its_start() -> None:
    tokenizer, constraint = tokenizer_of("text"), strict_calls("hermes", "text")()
    for token_id in tokenizer.encode_texts(["x <tool_call"])[0]:
        assert constraint.mask() is None
        constraint.accept(token_id)
    mask = constraint.mask()
    assert mask is not None
    refused = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if not allows(mask, i)}
    assert refused and all(text.startswith(b">") and len(text) > 1 for text in refused)
    (end,) = tokenizer.encode_texts([">"])[0]
    constraint.accept(end)
    forced = constraint.mask()
    assert forced is not None
    assert [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if allows(forced, i)] == [b"\n"]


def test_behind_a_call_text_is_free_again() -> None:
    tokenizer, constraint = tokenizer_of("token"), strict_calls("hermes", "token")()
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    for _ in range(2):
        token_ids = tokenizer.encode_prompt(call, add_special_tokens=False)
        for token_id in token_ids:
            mask = constraint.mask()
            assert mask is None or allows(mask, token_id)
            constraint.accept(token_id)
        assert constraint.mask() is None
