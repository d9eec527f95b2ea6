"""The embedded model under many schemas at temperature 1: what it finishes is valid, what is cut is a beginning.

`jsonschema` is the judge of the one, the same grammar over single bytes of the other.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.executor.host import cpu_has_bfloat16
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.router.constraint import Grammar, all_but
from asyncllm.router.grammar import Grammars, GrammarSpec
from asyncllm.router.output.markers import ModelMarkers
from asyncllm.router.output.parser import OutputParser
from asyncllm.router.output.parts import PartKind
from asyncllm.router.output.qwen3_coder import Qwen3Coder
from asyncllm.router.output.tools import ToolChoice, check_tools
from asyncllm.router.thinking import ThinkingBudget
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.types import Capacity, Constraint, FinishReason, SamplingParams, Submit
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from tests.engine.harness import Harness, submit
from tests.router.grammars import begins, compiled

pytestmark = pytest.mark.timeout(300)
CPU = torch.device("cpu")
MAX_TOKENS = 64


def record(**properties: Any) -> dict[str, Any]:
    """An object of just these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def short(length: int = 20, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": length, **more}


INTEGER, BOOLEAN = {"type": "integer", "minimum": 0, "maximum": 999}, {"type": "boolean"}
SCHEMAS: dict[str, Any] = {
    "person": record(name=short(minLength=1), age={"type": "integer", "minimum": 0, "maximum": 120}),
    "optional properties": {
        "type": "object",
        "properties": {"a": INTEGER, "b": BOOLEAN},
        "additionalProperties": False,
    },
    "nested three deep": record(a=record(b=record(c=INTEGER, d=short()), e=BOOLEAN), f={"type": "null"}),
    "enum of texts": {"enum": ["red", "green", "blue", "light blue"]},
    "enum of everything": {"enum": ["a", 1, 2.5, None, True, {"k": [1]}, ["x"]]},
    "const object": {"const": {"version": 2, "tags": ["a", "b"], "é": None}},
    "property of one value": record(kind={"const": "point"}, x=INTEGER, y=INTEGER),
    "bounded array": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 5},
    "array of exactly three": {"type": "array", "items": BOOLEAN, "minItems": 3, "maxItems": 3},
    "array of arrays": {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 3},
    "array of records": {"type": "array", "items": record(id=INTEGER, ok=BOOLEAN), "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [INTEGER, short(8), BOOLEAN], "items": False, "minItems": 3},
    "tuple with a tail": {"type": "array", "prefixItems": [short(5)], "items": INTEGER, "minItems": 2, "maxItems": 4},
    "reference": {"$ref": "#/$defs/pair", "$defs": {"pair": record(left=INTEGER, right=INTEGER)}},
    "references in a row": {
        **record(home={"$ref": "#/$defs/address"}, work={"$ref": "#/$defs/address"}),
        "$defs": {"address": record(street=short(), city={"$ref": "#/$defs/city"}), "city": {"enum": ["Rom", "Oslo"]}},
    },
    "recursive tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": record(v={"enum": [1, 2]}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}),
        },
    },
    "anchored reference": {**record(a={"$ref": "#num"}), "$defs": {"n": {"$anchor": "num", **INTEGER}}},
    "any of types": {"anyOf": [INTEGER, short(10), {"type": "null"}]},
    "any of records": {"anyOf": [record(cat=BOOLEAN), record(dog=INTEGER)]},
    "one of tagged records": {
        "oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}],
        "$defs": {
            "circle": record(shape={"const": "circle"}, radius=INTEGER),
            "square": record(shape={"const": "square"}, side=INTEGER),
        },
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"properties": {"b": short(6)}, "required": ["b"]},
        ],
        "maxProperties": 2,
    },
    "list of types": record(id={"type": ["integer", "null"], "maximum": 50, "minimum": 0}),
    "date": record(on=short(10, format="date")),
    "date and time": record(at={"type": "string", "format": "date-time", "maxLength": 25}),
    "time": record(at={"type": "string", "format": "time", "maxLength": 14}),
    "duration": record(d={"type": "string", "format": "duration", "maxLength": 12}),
    "email": record(mail={"type": "string", "format": "email", "maxLength": 30}),
    "hostname": record(host={"type": "string", "format": "hostname", "maxLength": 20}),
    "ipv4": record(address={"type": "string", "format": "ipv4"}),
    "ipv6": record(address={"type": "string", "format": "ipv6"}),
    "uuid": record(id={"type": "string", "format": "uuid"}),
    "uri": record(link={"type": "string", "format": "uri", "maxLength": 30}),
    "unicode keys": record(**{"größe": INTEGER, "日本": BOOLEAN, "emoji 😀": {"enum": ["да", "нет"]}}),
    "keys to be escaped": record(**{'a"b': INTEGER, "c\\d": BOOLEAN, "e\nf": {"type": "null"}}),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"}),
    "pattern within": record(code={"type": "string", "pattern": "x[0-9]", "maxLength": 12}),
    "unicode pattern": record(word={"type": "string", "pattern": "^[A-ZÄÖÜ][a-zäöüß]{2,8}$"}),
    "lengths": record(word={"type": "string", "minLength": 5, "maxLength": 8}),
    "lengths in characters": record(word={"type": "string", "pattern": "^[α-ω日本]+$", "minLength": 2, "maxLength": 4}),
    "open bounds": {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5},
    "fractions": record(p={"type": "number", "minimum": 0, "maximum": 1}),
    "negative fractions": {"type": "number", "minimum": -2.5, "exclusiveMaximum": -1.25},
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 25}, "minItems": 2, "maxItems": 4},
    "multiples of a fraction": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
    "map of numbers": {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 3},
    "map by pattern": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": INTEGER},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "properties beside others": {
        "type": "object",
        "properties": {"name": INTEGER},
        "required": ["name"],
        "additionalProperties": short(8),
        "maxProperties": 3,
    },
    "at least one of": {
        "type": "object",
        "properties": {"a": INTEGER, "b": BOOLEAN},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "annotated": {"title": "T", "description": "D", "examples": [1], "$comment": "c", **record(a=INTEGER)},
    "anything": {},
    "text": {"type": "string", "maxLength": 60},
}
CALLED = record(word=short(6, minLength=1), many={"enum": [True, None]})
TOOL = check_tools([{"type": "function", "function": {"name": "f", "parameters": CALLED}}])


def is_call(text: str) -> bool:
    """Whether Qwen3-Coder's parser finds one whole call that obeys."""
    parser = OutputParser(Qwen3Coder(ModelMarkers()), None, False, TOOL)
    parts = parser.push(text) + parser.finish()
    arguments = "".join(part.text for part in parts if part.kind is PartKind.CALL_ARGUMENTS)
    return parser.has_calls and Draft202012Validator(CALLED).is_valid(json.loads(arguments))


FORCED = Qwen3Coder(ModelMarkers()).grammar(TOOL, ToolChoice("required", ("f",), is_named=True))
OTHERS: dict[str, tuple[GrammarSpec, Callable[[str], bool]]] = {
    "json_object": (GrammarSpec("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "regex": (GrammarSpec("regex", "[a-z]{3,8}( [a-z]{3,8}){2}"), re.compile("[a-z]{3,8}( [a-z]{3,8}){2}").fullmatch),  # type: ignore[dict-item]
    "choice": (GrammarSpec("choice", '["yes", "no, never"]'), lambda text: text in ("yes", "no, never")),
    "call": (GrammarSpec("lark", FORCED), is_call),
    "lark": (GrammarSpec("lark", 'start: "(" /[0-9]/+ ")"'), re.compile("\\([0-9]+\\)").fullmatch),  # type: ignore[dict-item]
}


ANSWER = record(name=short(8), colour={"enum": ["red", "green"]})
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"top_k": 5, "repetition_penalty": 1.3},
    {"top_p": 0.5, "min_p": 0.1, "frequency_penalty": 0.5},
    {"temperature": 1.5, "logit_bias": ((0, -100.0), (5, 20.0)), "min_tokens": 60},
]


class Outcome:
    """One run of the engine with everything these tests look at: steps of many rows are what is cheap."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint("smollm2-135m-instruct")
        self.tokenizer = Tokenizer(checkpoint.tokenizer(), checkpoint.text)
        self._grammars = Grammars(self.tokenizer)
        asked = "<|im_start|>user\nSend me some data as JSON.<|im_end|>\n<|im_start|>assistant\n"
        self._prompt = self.tokenizer.encode_prompt(asked)
        self.machine = Harness()
        self.request_ids: dict[str, int] = {}
        self._submits: list[Submit] = []
        for name, schema in SCHEMAS.items():
            self._add(name, self.compiled(GrammarSpec("json_schema", json.dumps(schema))).constraint())
        for name, (spec, _) in OTHERS.items():
            self._add(name, self.compiled(spec).constraint())
        answer = self.compiled(GrammarSpec("json_schema", json.dumps(ANSWER)))
        for index, sampling in enumerate(SAMPLING):
            self._add(f"sampling {index}", answer.constraint(), **sampling)
        self.end = tuple(self.tokenizer.encode_texts(["</think>\n"])[0])
        thoughts = all_but(self.tokenizer.eos_token_ids, self.tokenizer.vocab_size)
        choice = self.compiled(GrammarSpec("choice", '["yes", "no"]')).constraint()
        self._add("thinking", ThinkingBudget(choice, self.end, 10, thoughts))
        # Where a processor has no products in bfloat16, they take longer than those in float32.
        dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        architecture = checkpoint.architecture
        capacity = Capacity(1000, 16, 64, 512, architecture.vocab_size)
        model = load_model(checkpoint, TorchAttention(), dtype, CPU)
        executor = TorchExecutor(model, architecture, capacity, CPU, dtype, {})
        scheduler = Scheduler(capacity, SchedulerConfig(max_sequences=64), CacheConfig())
        for command in self._submits:
            scheduler.add(command)
        self.machine.executor, self.machine.scheduler = executor, scheduler  # type: ignore[assignment]
        self.machine.run()

    def compiled(self, spec: GrammarSpec) -> Grammar:
        return self._grammars.compile(spec, "guide")

    def _add(self, name: str, constraint: Constraint, **sampling: Any) -> None:
        request_id = self.request_ids[name] = len(self._submits) + 1
        params = SamplingParams(
            max_tokens=MAX_TOKENS, seed=request_id, stop_token_ids=self.tokenizer.eos_token_ids, **sampling
        )
        self._submits.append(submit(request_id, self._prompt, params, constraint=constraint))

    def tokens(self, name: str) -> list[int]:
        return self.machine.tokens[self.request_ids[name]]

    def raw(self, token_ids: list[int]) -> bytes:
        """Their bytes, without the token that ends a turn."""
        eos = self.tokenizer.eos_token_ids
        return b"".join(self.tokenizer.token_bytes(token_id) for token_id in token_ids if token_id not in eos)

    def reason(self, name: str) -> FinishReason:
        return self.machine.finished[self.request_ids[name]].reason


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return Outcome()


def test_what_is_finished_is_valid_and_what_is_cut_is_a_beginning(outcome: Outcome) -> None:
    assert len(SCHEMAS) >= 45
    specs = {name: GrammarSpec("json_schema", json.dumps(schema)) for name, schema in SCHEMAS.items()}
    specs |= {name: spec for name, (spec, _) in OTHERS.items()}
    wrong, num_finished = [], 0
    for name, spec in specs.items():
        raw, reason = outcome.raw(outcome.tokens(name)), outcome.reason(name)
        if reason is FinishReason.LENGTH:
            is_right = begins(compiled(spec.kind, spec.text), raw)
        else:
            num_finished += 1
            is_right = reason is FinishReason.STOP and is_valid(name, raw)
        if not is_right:
            wrong.append((name, reason, raw))
    assert not wrong
    assert num_finished >= 0.8 * len(specs), "schemas this small finish"


def is_valid(name: str, raw: bytes) -> bool:
    if name in OTHERS:
        return bool(OTHERS[name][1](raw.decode()))
    validator = Draft202012Validator(SCHEMAS[name], format_checker=Draft202012Validator.FORMAT_CHECKER)
    return validator.is_valid(json.loads(raw))


def test_sampling_parameters_and_log_probabilities_go_together_with_a_grammar(outcome: Outcome) -> None:
    for index in range(len(SAMPLING)):
        # The last one asks for more tokens than the text has.
        assert outcome.reason(f"sampling {index}") is FinishReason.STOP
        Draft202012Validator(ANSWER).validate(json.loads(outcome.raw(outcome.tokens(f"sampling {index}"))))
    first = outcome.machine.logprobs[outcome.request_ids["sampling 0"]][0]
    assert first.token_id not in first.top_token_ids, "the model itself would rather have begun otherwise"
    assert first.logprob < min(first.top_logprobs)


def test_thinking_is_free_and_cut_and_the_answer_obeys(outcome: Outcome) -> None:
    tokens, num_end = outcome.tokens("thinking"), len(outcome.end)
    assert num_end > 1
    assert tuple(tokens[10 : 10 + num_end]) == outcome.end
    assert outcome.raw(tokens[10 + num_end :]) in (b"yes", b"no")
    assert outcome.reason("thinking") is FinishReason.STOP
