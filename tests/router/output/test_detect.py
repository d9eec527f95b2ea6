import pytest
import tokenizers

from asyncllm.errors import ConfigError
from asyncllm.router.output.tool_format import TOOL_FORMATS, detect, tool_format
from asyncllm.router.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ '<tool_call>\\n{\"name\": \"' }}", "hermes"),
        ("{{ '<tool_call>\\n<function=' + name }}", None),
        ("{{ '<tool_call>\\n<function=' + name + '>\\n<parameter=' + key + '>\\n' }}", "qwen3_coder"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("Respond in the format {\"name\": function name, \"parameters\": dictionary", "llama3_json"),
        ("<|python_start|> {\"name\": function name, \"parameters\": dictionary", "llama3_json"),
        ("Example Format: [func_name1(params_name1=params_value1", "pythonic"),
        ("{{ '<|python_start|>' }}", "pythonic"),
        ('{{ "[TOOL_CALLS] [" }}', "mistral"),
        ("{{ '<start_function_call>call:' }}", "gemma"),
        ("{{- '<|tool_call>call:' + function['name'] }}", "gemma4"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_template_says_which_format_it_is(source: str, name: str | None, smollm2: Tokenizer) -> None:
    assert detect(source, smollm2) == name


def test_the_embedded_model_has_no_template_for_tools(smollm2: Tokenizer) -> None:
    assert detect(smollm2.text.chat_template or "", smollm2) is None


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_every_format_is_found_by_its_name(name: str, smollm2: Tokenizer) -> None:
    form = tool_format(name, smollm2)
    assert form.name == name
    assert form.visible_tokens == ()


def test_an_unknown_name_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="hermes, llama3_json"):
        tool_format("xml", smollm2)


def test_markers_that_are_special_tokens_have_to_be_visible(smollm2: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(smollm2._backend.to_str())
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"])
    tokenizer = Tokenizer(backend, smollm2.text)
    assert tool_format("mistral", tokenizer).visible_tokens == ("[TOOL_CALLS]", "[ARGS]")
    assert tool_format("llama3_json", tokenizer).visible_tokens == ("<|python_tag|>",)
    assert tool_format("hermes", tokenizer).visible_tokens == ()
