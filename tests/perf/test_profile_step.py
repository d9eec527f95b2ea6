"""Where a decode step's time goes, on a tiny model: what is measured adds up, and nothing stays patched."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from asyncllm.executor.host import cpu_flags
from asyncllm.layers.linear import Linear
from asyncllm.native.builds import find_library
from asyncllm.native.decoder import NativeDecoder
from asyncllm.native.library import PARTS
from perf import floors, profile_step
from perf.profile_step import KINDS, Clocks, quiet_mean, shared_out
from tests.weights.tiny import llama, save_gguf

NEEDS_NATIVE = pytest.mark.skipif(
    isinstance(find_library(cpu_flags()), str), reason="no native kernels for this processor"
)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a profile of a tiny model, which native kernels can run."""
    monkeypatch.setattr(floors, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(floors, "PRODUCT", (8, 32, 32))
    model = llama(vocab_size=96, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    save_gguf(tmp_path / "model.gguf", model, Kind.Q4_1)
    return ["--model", str(tmp_path), "--rows", "1,3", "--context", "20", "--steps", "2", "--threads", "1"]


def test_an_operation_inside_another_is_counted_once() -> None:
    now_s = iter([0.0, 1.0, 4.0, 10.0])  # outer begins, inner begins, inner ends, outer ends
    clocks = Clocks(lambda: next(now_s))
    inner = clocks.timed(lambda kind: kind, lambda kind: kind)
    outer = clocks.timed(lambda kind: inner("norms"), lambda kind: kind)
    assert outer("attention") == "norms"
    spent_s = clocks.take()
    assert (spent_s["attention"], spent_s["norms"]) == (7.0, 3.0)
    assert sum(clocks.take().values()) == 0.0


def test_the_quiet_mean_is_that_of_the_fastest_steps_whole() -> None:
    kinds = KINDS["torch"]
    steps = [dict.fromkeys(kinds, float(i)) | {"step": float(i * len(kinds))} for i in range(20, 0, -1)]
    assert quiet_mean(steps)["step"] == 1.5 * len(kinds)
    assert quiet_mean(steps)["head"] == 1.5


def test_parts_of_a_call_share_its_time_as_they_shared_its_wall() -> None:
    assert shared_out(5.0, 10.0, {"mlp": 6.0, "head": 2.0}) == {"mlp": 3.0, "head": 1.0, "calls": 1.0}


def test_every_part_of_a_native_step_has_a_kind() -> None:
    assert set(PARTS) < set(KINDS["native"])


@pytest.mark.parametrize("backends", [["torch"], pytest.param(["native", "torch"], marks=NEEDS_NATIVE)])
def test_a_tiny_model_is_profiled_and_the_layers_are_left_as_they_were(
    arguments: list[str], backends: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    forward, native_forward = Linear.forward, NativeDecoder.forward
    assert profile_step.main([*arguments, "--backend", ",".join(backends)]) == 0
    assert Linear.forward is forward and NativeDecoder.forward is native_forward
    *printed, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert list(result["backends"]) == backends and list(result["read_gb_per_s"]) == ["1"]
    for backend, described in result["backends"].items():
        assert described["facts"]["kernels"].startswith(backend)
        for cells in described["by_rows"].values():
            kinds = [kind for kind in cells if kind != "step"]
            assert kinds == list(KINDS[backend])
            assert cells["step"]["ms"] == pytest.approx(sum(cells[kind]["ms"] for kind in kinds))
            assert all(cells[kind]["ms"] > 0 for kind in kinds)
            assert all(0 <= cells[kind]["dispatch_ms"] <= cells[kind]["ms"] for kind in kinds)
        assert described["memory_floor_ms"] > 0 and described["product_floor_ms_per_row"] > 0
        assert all(rate > 0 for rate in described["gflop_per_s"].values())
    tables = "\n".join(printed).split("\n\n")
    assert len(tables) == len(backends) + 1 and tables[-1].startswith("GB/s read")
    for backend, table in zip(backends, tables):
        rows = [row.split("  ")[0] for row in table.splitlines()]
        assert rows[2:-1] == [*KINDS[backend], "step", "floor: memory", "floor: products"]


@NEEDS_NATIVE
def test_the_native_backend_reads_fewer_bytes_and_is_what_is_profiled_unless_told_otherwise(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    read = {}
    for backend in ("", "torch"):
        assert profile_step.main([*arguments, "--backend", backend]) == 0
        read |= json.loads(capsys.readouterr().out.splitlines()[-1])["backends"]
    assert list(read) == ["native", "torch"]
    assert 0 < read["native"]["weights_bytes"] < 0.5 * read["torch"]["weights_bytes"]


def test_a_backend_that_cannot_run_the_model_says_why(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_step.main([*arguments, "--backend", "native", "--dtype", "float32"]) == 1
    assert "native cannot run this model: the model's dtype is float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--rows", "1,many"), ("--backend", "cuda"), ("--backend", "torch,torch")]
)
def test_an_option_that_makes_no_sense_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.main([option, value])
    assert f"{option}: {value}" in capsys.readouterr().err
