"""The parts depend on the text alone, whatever its pieces are; and nothing of it is lost."""

import json
import random

import pytest

from asyncllm.router.output.parts import PartKind
from asyncllm.router.output.reasoning import reasoning_format
from tests.router.output.harness import FORMATS, cut, read

THINK = reasoning_format("think")

TEXTS = {
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>{\\"\\u00e9", "b": [{"c": null}]}}\n</tool_call>',
        'Well.\n<tool_call>{"arguments": {"a": -1.5}, "name": "g"}</tool_call>\n\n<tool_call>{"name":"f"}</tool_call>',
        '<tool_call>{"name": "nobody", "arguments": {"a": 1}}</tool_call> after',
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call> after <tool_call>{"name": "g"}',
        '<tool_call>{"name": "f", "arguments": {"a": [1, 2',
        '<tool_call><tool_call>{"name": "f", "arguments": "{\\"a\\": 1}", "id": 3}</tool_call></tool_ <tool',
        '  <think>\n\n so <tool_call>\n\n</think>\n\nYes <tool_call>{"name": "f", "arguments": {}, "x": 1}</tool_call>',
        '<tool_call>{"' + "x" * 300 + '<tool_call>{"name": "f"}</tool_call>": 1}',
    ],
    "llama3_json": [
        '{"name": "f", "parameters": {"a": "x; {"}}; {"name": "g", "parameters": {}}\n{"name": "f"}',
        '<|python_tag|>{"name": "f", "parameters": {"a": {}}} and <|python_tag|>print(1)',
        ' {"name": "Bob", "parameters": {"a": 1}}; {"name": "f"}',
        '<|python_start|>{"name": "f"}<|python_end|> so <|python_start|>{"name": "g", "parameters": {!<|python_end|>',
        '{"answer": [1, 2, {"name": "f"}]} <|python_t',
        '{"name": "f", "parameters": {"a": 1,}}; <|python_tag|>{"name": "g", "parameters": {}}',
    ],
    "pythonic": [
        "[f(a=1, b='it\\'s \\u00e9 \\x41', c=[1, (2, 3), {'k': None}]), g( )] then",
        '<|python_start|>[f(a="""two "lines"\n""", b=True,), g(x=-.5)]<|python_end|> [f(a=1)]',
        "[1] is a footnote, [f](x) a link",
        "[f(a=foo + 1), g()] tail <|python_end|> more",
        "[f(a=" + "9" * 5000 + "<|python_end|> more",
        "[f(1)]",
        '[f(a="open',
        "[f(a=1), h(b=2)]",
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        'Hm [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{"b": "[TOOL_CALLS]"} end',
        '[TOOL_CALLS]nobody[ARGS]{"a": "[TOOL_CALLS]f[ARGS]{}"} [TOOL_CALLS]f{"a": 2}[TOOL_',
        '[TOOL_CALLS]f[ARGS]{"a": 1]}[TOOL_CALLS][{"name": "f"}; ',
        "[TOOL_CALLS]" + "f" * 80 + "[ARGS]{}",
    ],
    "gemma": [
        '<start_function_call>call:f{a:1,b:<escape>x}"\n<escape>,c:[<escape>y<escape>,{k:true}]}<end_function_call>ok',
        "Now <start_function_call>call:g{}<end_function_call><start_function_call>call:h{a:1}<end_function_call>",
        "<start_function_call>call:f{a:London,b:2}<end_function_call> then",
        "<start_function_call>call:f{a:<escape>cut <esc",
    ],
    "gemma4": ['<|tool_call>call:f{a:<|"|>x<|"|>,b:{<|"|>k<|"|>:null}}<tool_call|><|tool_call>call:f{"a":"b"}'],
    "qwen3_coder": [
        '<tool_call>\n<function=f>\n<parameter=a>\n</x>\n\n"é"\n</parameter>\n<parameter=n>\n1_0\n</parameter>\n</function>'
        "\n</tool_call> then <tool_call>\n<function=g>\n</function>\n</tool_call>",
        "So <function=f>\n<parameter=l>[1, {'k': None}]</parameter></function>\n</tool_call><function=g></function>",
        "<tool_call>\n<function=h>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call> after",
        "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\nis all</tool_call><tool_call><function=g>\n</func",
        "<tool_call>\n<function=f>\n<parameter=a>\nnever ends\n</param",
        '<function=f>\n{}</function> <tool_call>\n{"name": "f"}\n</tool_call>',
        "<function=f>\n<parameter=l>\n[1, 2\n</parameter>\n<parameter="
        + "k" * 300
        + ">\n1\n</parameter></function></tool_call>!",
    ],
}
CASES = [(form, text) for form, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize(("form", "text"), CASES)
def test_single_characters_make_the_same_parts_as_the_whole(form: str, text: str) -> None:
    assert read(list(text), form, THINK).shape == read(text, form, THINK).shape


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("in_reasoning", [False, True])
@pytest.mark.parametrize("max_calls", [None, 1])
def test_random_texts_make_the_same_parts_however_they_are_cut(
    form: str, in_reasoning: bool, max_calls: int | None
) -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    for _ in range(60):
        text = mutated("".join(random_.choices(TEXTS[form], k=random_.randint(1, 2))), random_)
        text = random_.choice(["", "\n", "<think>\nhm\n\n</think>\n\n", "a\n\n</think>\n"]) + text
        whole = read(text, form, THINK, in_reasoning, max_calls).shape
        for _ in range(4):
            pieces = cut(text, random_)
            assert read(pieces, form, THINK, in_reasoning, max_calls).shape == whole, (seed, text, pieces)


@pytest.mark.parametrize("form", FORMATS)
def test_calls_of_an_unbroken_answer_have_json_objects_as_arguments(form: str) -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    num_calls = 0
    for _ in range(200):
        result = read(mutated(random_.choice(TEXTS[form]), random_), form)
        if result.parser.has_calls:
            num_calls += 1
            assert all(isinstance(json.loads(text), dict) for _, text in result.calls), (seed, result.parts)
    assert num_calls


@pytest.mark.parametrize("form", FORMATS)
def test_a_text_that_calls_nothing_is_content_as_written(form: str) -> None:
    seed = random.randrange(2**32)
    random_ = random.Random(seed)
    num_texts = 0
    for _ in range(300):
        text = mutated(
            random_.choice(TEXTS[form]).replace('"f"', '"h"').replace("f(", "h(").replace("=f>", "=h>"), random_
        )
        result = read(cut(text, random_), form)
        if not result.parser.num_calls:
            num_texts += 1
            assert result.content == text, seed
    assert num_texts


@pytest.mark.parametrize("form", FORMATS)
def test_plain_text_is_held_back_only_as_far_as_a_marker_may_begin(form: str) -> None:
    text = "Prices < 5 are {low} or [not]; see <b> for more."
    result = read(list(text), form)
    assert result.content == text
    assert len(result.pieces) > len(text) * 0.6


def mutated(text: str, random_: random.Random) -> str:
    """The text with a few characters dropped, doubled or swapped, maybe cut short."""
    characters = list(text)
    for _ in range(random_.choice([0, 0, 1, 3])):
        if not characters:
            break
        place = random_.randrange(len(characters))
        kind = random_.randrange(3)
        if kind == 0:
            del characters[place]
        elif kind == 1:
            characters.insert(place, random_.choice("{}[]\"'\\:,;()<>=x1 \n"))
        else:
            characters[place] = random_.choice("{}[]\"'\\:,;()<>=x1 \n")
    return "".join(characters)[: random_.choice([len(characters), random_.randint(0, len(characters))])]


def test_parts_of_a_call_come_in_order() -> None:
    kinds = [part.kind for part in read(TEXTS["hermes"][1]).parts]
    assert kinds == [PartKind.CONTENT, *[PartKind.CALL_BEGIN, PartKind.CALL_ARGUMENTS] * 2]
