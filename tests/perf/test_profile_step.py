"""Where a decode step's time goes, on a tiny model: what is measured adds up, and nothing stays patched."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from asyncllm.layers.linear import Linear
from perf import profile_step
from perf.profile_step import KINDS, Clocks, quiet_mean
from tests.weights.tiny import llama, save_gguf


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
    steps = [dict.fromkeys(KINDS, float(i)) | {"step": float(i * len(KINDS))} for i in range(20, 0, -1)]
    assert quiet_mean(steps)["step"] == 1.5 * len(KINDS)
    assert quiet_mean(steps)["head"] == 1.5


def test_a_tiny_model_is_profiled_and_the_layers_are_left_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_step, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(profile_step, "PRODUCT", (8, 32, 32))
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=96, hidden_size=64, intermediate_size=96), Kind.Q4_1)
    forward = Linear.forward
    arguments = ["--model", str(tmp_path), "--rows", "1,3", "--context", "20", "--steps", "2", "--threads", "1"]
    assert profile_step.main(arguments) == 0
    assert Linear.forward is forward
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    for cells in result["by_rows"].values():
        assert cells["step"]["ms"] == pytest.approx(sum(cells[kind]["ms"] for kind in KINDS))
        assert all(cells[kind]["ms"] > 0 for kind in KINDS)
        assert all(0 <= cells[kind]["dispatch_ms"] <= cells[kind]["ms"] for kind in KINDS)
    assert result["weights_bytes"] > 0 and result["floors"]["read_gb_per_s"] > 0
    assert [row.split("  ")[0] for row in table[1:-2]] == [*KINDS, "step"]


def test_rows_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.main(["--rows", "1,many"])
    assert "--rows: 1,many" in capsys.readouterr().err
