"""`model.chat_template` names a template of the checkpoint's, a built-in one or a file."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from asyncllm.errors import StartupError
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.output.tool_format import detect
from asyncllm.router.template_choice import BUILT_IN, choose_template
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.weights.base import TextFacts
from tests.fakes_text import END, byte_text, byte_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
TEXTS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello."
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "generic": "Be brief.\n\nUser: Hi\n\nAssistant: Hello.<|end|>\n\nUser: Bye\n\nAssistant:",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] Be brief.\n\nHi[/INST] Hello.<|end|>[INST] Bye[/INST]",
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chosen(setting: str, **changes: object) -> TextFacts:
    return choose_template(byte_text(chat_template=None, **changes), setting, byte_tokenizer())


def rendered(text: TextFacts, messages: list[dict[str, Any]] = TURNS, **options: Any) -> str:
    return ChatTemplate(text, Tokenizer(byte_tokenizer(), text)).render(messages, **options)


def test_every_built_in_template_is_known_here() -> None:
    assert set(BUILT_IN) == set(TEXTS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_template_writes_what_its_models_know(name: str) -> None:
    assert rendered(chosen(name)) == TEXTS[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_text_begins_with_bos_where_the_tokenizer_would_add_it(name: str) -> None:
    assert rendered(chosen(name, add_bos=True)) == "<s>" + TEXTS[name]


def test_a_model_without_bos_and_eos_can_be_talked_to() -> None:
    for name in BUILT_IN:
        text = chosen(name, bos_token=None, eos_token=None)
        assert rendered(text) == TEXTS[name].replace("<|end|>", "")


def test_chatml_shows_tools_and_calls_in_the_format_of_hermes() -> None:
    text = chosen("chatml")
    assert detect(text.chat_template or "", Tokenizer(byte_tokenizer(), text)) == "hermes"
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    shown = rendered(text, turns, tools=[TOOL])
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in shown
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n" in shown
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert shown.endswith(f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n")


def test_the_other_built_in_templates_leave_tools_to_the_system_prompt() -> None:
    for name in set(BUILT_IN) - {"chatml"}:
        text = chosen(name)
        assert detect(text.chat_template or "", Tokenizer(byte_tokenizer(), text)) is None


def test_the_end_of_a_built_in_templates_turn_ends_the_answer() -> None:
    backend = byte_tokenizer()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    text = choose_template(byte_text(), "chatml", backend)
    assert text.eos_token_ids == (END, backend.token_to_id("<|im_end|>"))
    assert choose_template(text, "chatml", backend).eos_token_ids == text.eos_token_ids


def test_a_model_that_lacks_the_end_of_turns_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen("gemma").eos_token_ids == (END,)
        chosen("generic")
    assert [record.message for record in caplog.records] == [
        "model.chat_template = gemma: this model has no token <end_of_turn>, and may not end its turns"
    ]


def test_nothing_named_leaves_the_checkpoints_own() -> None:
    text = byte_text(named_templates={"tool_use": "x"})
    assert choose_template(text, "", byte_tokenizer()) is text


def test_a_template_of_the_checkpoints_comes_before_a_built_in_one() -> None:
    text = chosen("chatml", named_templates={"chatml": "its own", "tool_use": "x"})
    assert rendered(text, tools=[TOOL]) == rendered(text) == "its own"


def test_a_file_takes_the_place_of_the_checkpoints_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("mine: {{ messages | length }} ü", encoding="utf-8")
    text = choose_template(byte_text(named_templates={"tool_use": "x"}), str(file), byte_tokenizer())
    assert rendered(text, tools=[TOOL]) == "mine: 4 ü"


def test_a_broken_file_stops_the_start_with_its_name_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}\n{% if %}")
    with pytest.raises(StartupError, match=r"mine\.jinja: the chat template is broken in line 2: "):
        rendered(chosen(str(file)))
    file.write_bytes(b"\xff")
    with pytest.raises(StartupError, match=r"mine\.jinja: not readable as UTF-8 text"):
        chosen(str(file))


def test_a_name_that_nothing_has_stops_the_start_with_those_there_are() -> None:
    with pytest.raises(StartupError, match=r"model\.chat_template = qwen: neither a file nor one of rag, chatml"):
        chosen("qwen", named_templates={"rag": "x"})
