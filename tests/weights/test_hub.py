"""Hub names, against a hub on this machine: the real client, in processes whose environment is a user's."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncllm.weights.hub import logging_bar
from asyncllm.weights.progress import Progress
from tests.weights.adapters import save_adapter
from tests.weights.hub_server import TOKEN, Hub, hub_server
from tests.weights.test_safetensors import edit_json
from tests.weights.tiny import llama, save_gguf, save_llama

PROGRAM = """
import logging, sys
from asyncllm.errors import StartupError
from asyncllm.weights.checkpoint import open_checkpoint
logging.basicConfig(level="INFO", format="%(message)s")
try:
    checkpoint = open_checkpoint(*sys.argv[1:])
    num_tensors = len(list(checkpoint.tensors()))
except StartupError as error:
    sys.exit(error.message)
print(checkpoint.name, num_tensors, checkpoint.architecture.hidden_size)
"""


ADAPTER_PROGRAM = """
import sys
from asyncllm.errors import StartupError
from asyncllm.weights.lora import open_adapter
try:
    adapter = open_adapter("sql", *sys.argv[1:])
except StartupError as error:
    sys.exit(error.message)
print(adapter.name, adapter.rank, len(adapter.layers))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded model, beside files that nobody wants."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_llama(directory, shard_size="30KB")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (directory / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (directory / "modeling.py").write_text("raise SystemExit")
    return directory


class User:
    """Opens models in processes of their own, with one cache."""

    def __init__(self, home: Path, program: str = PROGRAM) -> None:
        self.home, self.program = home, program
        self.said = ""  # by the last process, on standard error

    def open(self, *arguments: str, **environment: str) -> str:
        """What the process printed; `said` where it printed nothing."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", self.program, *arguments],
            env=inherited | {"HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said = done.stderr
        return done.stdout

    def refusal(self, *arguments: str, **environment: str) -> str:
        """The one line it ended with."""
        assert self.open(*arguments, **environment) == ""
        assert "Traceback" not in self.said
        return self.said.strip().splitlines()[-1]

    def snapshot(self, commit: str) -> set[str]:
        """Names of the files in the cache."""
        [directory] = self.home.glob(f"hub/models--*/snapshots/{commit}")
        return {file.name for file in directory.iterdir()}


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path / "home")


def test_a_hub_name_is_fetched_once_with_the_files_it_takes_and_serves_offline(
    hub: Hub, model: Path, user: User
) -> None:
    commit = hub.add("owner/tiny", model)
    assert user.open("owner/tiny", HF_ENDPOINT=hub.url) == "tiny 21 48\n"
    wanted = {file.name for file in model.iterdir()} - {"pytorch_model.bin", "consolidated.safetensors", "modeling.py"}
    assert user.snapshot(commit) == wanted
    assert sorted(name for name, _ in hub.sent) == sorted(wanted)
    assert "%|" not in user.said, "no progress bar where there is no terminal"
    hub.sent.clear()
    assert user.open("owner/tiny", HF_ENDPOINT=hub.url) == "tiny 21 48\n"
    assert hub.sent == []
    assert user.open("owner/tiny", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == "tiny 21 48\n"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, model: Path, user: User, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_llama(other, hidden_size=64)
    hub.add("owner/tiny", model)
    commit = hub.add("owner/tiny", other, "v2")
    for revision in ("v2", commit):
        assert user.open("owner/tiny", revision, HF_ENDPOINT=hub.url) == "tiny 21 64\n"
    assert user.open("owner/tiny", HF_ENDPOINT=hub.url) == "tiny 21 48\n"
    assert user.refusal("owner/tiny", "v3", HF_ENDPOINT=hub.url).endswith(
        "the hub has no owner/tiny at v3: no such revision"
    )


def test_a_gated_model_wants_a_token_and_a_missing_one_says_so(hub: Hub, model: Path, user: User) -> None:
    hub.add("owner/gated", model)
    hub.gated.add("owner/gated")
    assert "access is gated; accept its terms and set HF_TOKEN" in user.refusal("owner/gated", HF_ENDPOINT=hub.url)
    assert user.open("owner/gated", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN) == "gated 21 48\n"
    said = user.refusal("owner/missing", HF_ENDPOINT=hub.url)
    assert "the hub has no owner/missing: no such model on the hub (or it is private: set HF_TOKEN)" in said


def test_a_hub_that_cannot_be_reached_is_one_line(user: User) -> None:
    said = user.refusal("owner/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "not in the local cache, and the hub cannot be reached" in said


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, user: User, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    save_gguf(directory / "tiny.gguf", llama(vocab_size=259))
    with (directory / "tiny.gguf").open("ab") as file:
        file.write(bytes(24 * 2**20))  # longer than what the client writes at once
    commit = hub.add("owner/tiny", directory)
    hub.cut_after["tiny.gguf"] = 16 * 2**20
    assert user.open("owner/tiny/tiny.gguf", HF_ENDPOINT=hub.url) == "tiny 21 48\n"
    [first, second] = [range_ for name, range_ in hub.sent if name == "tiny.gguf"]
    assert first == "" and second.startswith("bytes=") and int(second[6:].partition("-")[0]) >= 8 * 2**20
    [fetched] = user.home.glob(f"hub/models--owner--tiny/snapshots/{commit}/tiny.gguf")
    assert fetched.read_bytes() == (directory / "tiny.gguf").read_bytes()


def test_a_model_that_is_not_served_is_refused_before_its_weights_are_fetched(
    hub: Hub, model: Path, user: User
) -> None:
    hub.add("owner/tiny", model)
    edit_json(model / "config.json", architectures=["MambaForCausalLM"])
    assert "architecture MambaForCausalLM is not served" in user.refusal("owner/tiny", HF_ENDPOINT=hub.url)
    assert not any(name.endswith(".safetensors") for name, _ in hub.sent)


def test_pickles_on_the_hub_are_never_fetched(hub: Hub, model: Path, user: User) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    hub.add("owner/old", model)
    assert "no .safetensors file" in user.refusal("owner/old", HF_ENDPOINT=hub.url)
    assert not any(name.endswith((".bin", ".py")) for name, _ in hub.sent)


def test_a_gguf_file_on_the_hub_is_named_behind_its_repository(hub: Hub, user: User, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    save_gguf(directory / "tiny-q8.gguf", llama(vocab_size=259))
    shutil.copy(directory / "tiny-q8.gguf", directory / "tiny-f16.gguf")
    commit = hub.add("owner/tiny-gguf", directory)
    assert user.open("owner/tiny-gguf/tiny-q8.gguf", HF_ENDPOINT=hub.url) == "tiny-q8 21 48\n"
    assert user.snapshot(commit) == {"tiny-q8.gguf"}
    assert "name one: owner/tiny-gguf/FILE.gguf" in user.refusal("owner/tiny-gguf", HF_ENDPOINT=hub.url)
    said = user.refusal("owner/tiny-gguf/none.gguf", HF_ENDPOINT=hub.url)
    assert said.endswith("owner/tiny-gguf on the hub has no file none.gguf")


def test_a_cache_laid_out_by_the_client_is_read_offline(model: Path, user: User) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = user.home / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (repository / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(number))
    assert user.open("owner/tiny", HF_HUB_OFFLINE="1") == "tiny 21 48\n"
    sorted((repository / "snapshots" / commit).glob("model-*"))[1].unlink()
    said = user.refusal("owner/tiny", HF_HUB_OFFLINE="1")
    assert "model-00002" in said and "is missing" in said


def test_an_adapter_on_the_hub_is_fetched_without_anything_else(hub: Hub, tmp_path: Path) -> None:
    adapter, user = tmp_path / "adapter", User(tmp_path / "home", ADAPTER_PROGRAM)
    save_adapter(adapter, llama(), 1, r=4, target_modules=["q_proj"])
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    commit = hub.add("owner/sql", adapter)
    assert user.open("owner/sql", HF_ENDPOINT=hub.url) == "sql 4 2\n"
    assert user.snapshot(commit) == {"adapter_config.json", "adapter_model.safetensors"}
    assert user.open("owner/sql", HF_HUB_OFFLINE="1") == "sql 4 2\n"
    (adapter / "adapter_model.safetensors").unlink()
    hub.add("owner/old", adapter)
    assert "no adapter_model.safetensors" in user.refusal("owner/old", HF_ENDPOINT=hub.url)
    assert "the hub has no owner/missing" in user.refusal("owner/missing", HF_ENDPOINT=hub.url)


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_long_load_writes_a_line_now_and_then_and_a_short_one_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asyncllm.weights")
    clock = Clock()
    with Progress("loading big", 4 * 2**30, is_terminal=False, clock=clock) as progress:
        for _ in range(4):
            clock.now_s += 4.0
            progress.advance(2**30)
    assert caplog.messages == ["loading big: 2.0 of 4.0 GiB, 256 MiB/s", "loading big: 4.0 of 4.0 GiB, 256 MiB/s"]


def test_a_terminal_gets_a_bar_and_no_lines(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "asyncllm.weights")
    monkeypatch.setattr("asyncllm.weights.progress.BAR_DELAY_S", 0.0)
    with Progress("loading big", 4 * 2**30, is_terminal=True) as progress:
        progress.advance(2 * 2**30)
        assert progress._bar.n == 2 * 2**30
    assert caplog.messages == []
    assert "loading big" in capsys.readouterr().err


def test_a_long_download_writes_lines_of_its_bytes_and_nothing_else(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "asyncllm.weights")
    clock = Clock()
    bar = logging_bar("downloading owner/tiny", clock)
    options: dict[str, Any] = {"unit": "B", "total": 4 * 2**30, "disable": None}
    transfer = bar(name="huggingface_hub.snapshot_download.transfer", **options)
    written = bar(name="huggingface_hub.snapshot_download", **options)
    files = bar(total=3)
    for _ in range(4):
        clock.now_s += 4.0
        for each in (transfer, written):
            each.update(2**30)
            each.refresh()
        files.update(1)
        files.refresh()
    for each in (transfer, written, files):
        each.close()
    assert caplog.messages[:2] == [
        "downloading owner/tiny: 2.0 of 4.0 GiB, 256 MiB/s",
        "downloading owner/tiny: 4.0 of 4.0 GiB, 256 MiB/s",
    ]
    assert len(caplog.messages) == 2
    assert capsys.readouterr().err == ""
