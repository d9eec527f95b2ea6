"""Lists of cores, and real threads that keep to them."""

import os
import threading

import pytest

from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.engine import Engine
from asyncllm.errors import ConfigError
from asyncllm.threads import available_cores, parse_cores, pin, show_cores
from tests.fakes import FakeExecutor, small_capacity

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin threads")
KEY = "executor.engine_cores"


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with cores 0-15, of which this process may not use 5."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)) - {5}, raising=False)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("", set()), ("  ", set()), ("2", {2}), ("2,4", {2, 4}), ("0-1,4", {0, 1, 4}), (" 0 - 2 , 2-3 ", {0, 1, 2, 3})],
)
def test_a_list_of_cores_is_read(sixteen_cores: None, text: str, cores: set[int]) -> None:
    assert parse_cores(text, KEY) == cores


@pytest.mark.parametrize("cores", [{2}, {0, 1, 4}, {0, 2, 3, 4, 9}])
def test_cores_are_shown_as_they_are_read(sixteen_cores: None, cores: set[int]) -> None:
    assert parse_cores(show_cores(cores), KEY) == cores


def test_cores_are_shown_in_ranges() -> None:
    assert (show_cores({5, 0, 2, 1}), show_cores(())) == ("0-2,5", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-x", "expected cores such as 2 or 2,4-7"),
        ("-1", "expected cores such as 2 or 2,4-7"),
        ("1,,2", "expected cores such as 2 or 2,4-7"),
        ("1;2", "expected cores such as 2 or 2,4-7"),
        ("\u0662", "expected cores such as 2 or 2,4-7"),
        ("4-2", "the range 4-2 is empty"),
        ("16", "this process may not use core 16; it may use 0-4,6-15"),
        ("4-7", "this process may not use core 5; it may use 0-4,6-15"),
        ("0-999999999", "this process may not use core 999999999"),
    ],
)
def test_a_wrong_list_is_refused_with_its_key_and_what_would_do(sixteen_cores: None, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cores(text, KEY)
    assert caught.value.message.startswith(f"{KEY} = {text}: {message}")


def test_a_system_that_cannot_pin_says_so_and_takes_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert parse_cores("", KEY) == set()
    with pytest.raises(ConfigError, match="cannot pin threads to cores; leave it empty"):
        parse_cores("0", KEY)


@needs_affinity
def test_pinning_moves_the_calling_thread_and_those_it_starts_and_no_other() -> None:
    before = available_cores()
    seen: list[frozenset[int]] = []

    def body() -> None:
        pin({min(before)})
        seen.append(available_cores())
        child = threading.Thread(target=lambda: seen.append(available_cores()))
        child.start()
        child.join()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [{min(before)}] * 2
    assert available_cores() == before


@needs_affinity
@pytest.mark.parametrize("is_pinned", [True, False])
def test_the_engine_thread_is_on_its_cores_before_the_executor_is_made(is_pinned: bool) -> None:
    before, seen = available_cores(), []

    def make_executor(report: object) -> FakeExecutor:
        seen.append(os.sched_getaffinity(threading.get_native_id()))
        return FakeExecutor(small_capacity())

    cores = {max(before)} if is_pinned else ()
    engine = Engine(make_executor, SchedulerConfig(), CacheConfig(), cores=cores)
    engine.start(lambda: None)
    engine.stop()
    assert engine.join(30.0)
    assert seen == [{max(before)} if is_pinned else before]
    assert available_cores() == before
