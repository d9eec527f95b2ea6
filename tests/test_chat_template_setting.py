"""`model.chat_template`, from the option to the prompt, by the one way in which servers and programs start."""

from pathlib import Path

import pytest

from asyncllm import LLM
from asyncllm.errors import StartupError
from tests.fakes_llm import OPTIONS, Devices, fake_devices
from tests.server.harness import says

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return fake_devices(monkeypatch)


def test_a_conversation_is_written_as_the_setting_says(devices: Devices, tmp_path: Path) -> None:
    devices.next_token = says("hello")
    with LLM(**OPTIONS, chat_template="generic") as llm:
        assert llm.chat(USER)[0].prompt == "User: hi\n\nAssistant:"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }} and go")
    with LLM(**OPTIONS, chat_template=str(file)) as llm:
        assert llm.chat(USER)[0].prompt == "hi and go"


def test_a_setting_that_cannot_be_used_stops_the_start_with_its_line(devices: Devices, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"model\.chat_template = nobody: neither a file nor one of chatml, gemma"):
        LLM(**OPTIONS, chat_template="nobody")
    file = tmp_path / "broken.jinja"
    file.write_text("\n\n{% for %}")
    with pytest.raises(StartupError, match=r"broken\.jinja: the chat template is broken in line 3"):
        LLM(**OPTIONS, chat_template=str(file))
