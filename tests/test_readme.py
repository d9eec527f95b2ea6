"""What the README tells people to type is typed here, against a real server with the embedded model."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncllm.server.routes import ROUTES
from tests.processes import Process, ready_process

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with ready_process(tmp_path_factory.mktemp("readme")) as process:
        yield process


def run(server: Process, *command: str) -> str:
    command = tuple(part.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for part in command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_commands_answer(server: Process) -> None:
    commands = [block for block in blocks("sh") if block.startswith("curl")]
    assert len(commands) == 2
    whole, streamed = (run(server, "sh", "-c", command) for command in commands)
    assert "Paris" in whole and '"finish_reason":"stop"' in whole
    assert " Paris" in streamed and streamed.endswith("data: [DONE]\n\n") and '"usage":{' in streamed


def test_the_python_clients_answer_twice(server: Process) -> None:
    examples = [block for block in blocks("python") if "127.0.0.1:8000" in block]
    assert len(examples) == 2
    for example in examples:
        assert run(server, sys.executable, "-c", example).count("Paris") == 2


@pytest.mark.parametrize("name", ["offline", "embedded_app"])
def test_the_examples_are_shown_as_they_are(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert source.split('"""\n', 1)[1].strip() in [block.strip() for block in blocks("python")]


def test_the_feature_table_names_every_route() -> None:
    missing = [route.path for route in ROUTES if route.path.split("/{")[0] not in README]
    assert not missing


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
