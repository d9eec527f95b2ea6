"""The proof on a GPU, as far as a machine without one can hold it: arithmetic, verdicts, and a rehearsal of it all."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asyncllm.types import TokenLogprobs
from perf.gpu_check import __main__ as gpu_check
from perf.gpu_check import report, scrape
from perf.gpu_check.findings import Findings, Found
from perf.gpu_check.kernel_tests import REPOSITORY, parse_counts
from perf.gpu_check.models import QWEN3_06B, architecture, hugging_face_config, synthetic_tokenizer, write_directory
from perf.gpu_check.near_ties import same_tokens, same_up_to_rounding
from perf.gpu_check.peers import PeerError, last_figures, run_peer
from perf.gpu_check.requests import make_workload
from perf.gpu_check.roofline import Ceilings, attention_bytes, ideal_step_s, ideal_workload_s, step_bytes
from perf.gpu_check.session import Answer
from perf.gpu_check.setup import CHECKS, FULL, PARTS, Box, Setup

pytestmark = pytest.mark.alone
H200 = Ceilings(copy_bytes_per_s=4.3e12, read_bytes_per_s=4.1e12, gemm_flops_per_s=790e12)
SETUP = Setup(directory="unused")
REHEARSAL_TIMEOUT_S = 600


# --- pure parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "gigabytes", "milliseconds"), [(1, 1.31, 0.305), (8, 2.13, 0.496), (32, 4.95, 1.151), (256, 31.3, 7.38)]
)
def test_the_roofline_of_a_step_is_the_one_published(batch: int, gigabytes: float, milliseconds: float) -> None:
    assert step_bytes(QWEN3_06B, "bfloat16", batch, 1024) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert ideal_step_s(QWEN3_06B, "bfloat16", batch, 1024, H200) * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_an_untied_embedding_table_is_not_streamed() -> None:
    assert step_bytes(architecture("llama-3.1-8b"), "bfloat16", 0, 0) / 1e9 == pytest.approx(15.01, rel=0.001)
    assert step_bytes(architecture("llama-3.2-1b"), "bfloat16", 0, 0) / 1e9 == pytest.approx(2.471, rel=0.001)


def test_attention_reads_the_keys_and_values_of_one_layer() -> None:
    assert attention_bytes(QWEN3_06B, "bfloat16", 256, 1024) * 28 == 256 * 1024 * 114_688


def test_the_workload_is_the_known_one() -> None:
    workload = make_workload(FULL)
    assert len(workload.prompts) == 256
    assert sum(map(len, workload.prompts)) == 142_827
    assert sum(workload.max_tokens) == 133_966
    lengths = [(len(prompt), output) for prompt, output in zip(workload.prompts, workload.max_tokens)]
    # Within a few percent of the floor of the table, which counts prefill apart.
    assert 133_966 / ideal_workload_s(QWEN3_06B, "bfloat16", lengths, H200) == pytest.approx(36_100, rel=0.03)


def test_the_requests_of_a_workload_end_by_their_length_alone() -> None:
    requests = make_workload(FULL).requests(0.6, "salt")
    assert not any(request.params.stop_token_ids for request in requests)
    assert len({request.params.seed for request in requests}) == 256


def test_the_parts_fit_eight_minutes() -> None:
    assert sum(FULL.part_seconds.values()) <= 480


def test_a_figure_is_held_against_both_bounds() -> None:
    lower = report.Goal("ms", (), must=1.1, ambitious=0.6)
    assert [report.verdict(lower, value) for value in (0.6, 0.7, 1.2, None)] == [
        "ambitious",
        "must",
        "below must",
        "not measured",
    ]
    higher = report.Goal("tok/s", (), must=20.0, ambitious=32.0, higher_is_better=True)
    assert [report.verdict(higher, value) for value in (33.0, 20.0, 19.0)] == ["ambitious", "must", "below must"]
    assert report.verdict(report.Goal("gap", (), ambitious=15.0), 16.0) == "below ambitious"
    assert report.verdict(report.Goal("plain", ()), 1.0) == ""


def parts_of(**figures: Any) -> dict[str, Any]:
    steps = {f"b{batch}_c1024": {"ms": ms, "of_roofline": 0.5} for batch, ms in ((1, 0.61), (256, 8.0))}
    correct = {name: {"passed": True} for name in CHECKS}
    return {"correct": correct, "decode": {"qwen3-0.6b": {"greedy": steps}}} | figures


def test_the_headline_has_every_figure_and_none_for_what_is_missing() -> None:
    assert report.headline(SETUP, parts_of()) == {
        "correct": True,
        "decode_ms_b1": 0.61,
        "decode_ms_b8": None,
        "decode_ms_b32": None,
        "decode_ms_b128": None,
        "decode_ms_b256": 8.0,
        "nano_vllm_tokens_per_s": None,
        "http_40_tokens_per_s": None,
    }
    assert report.headline(SETUP, {})["correct"] is None


def test_correct_means_that_every_check_ran_and_passed() -> None:
    for name in CHECKS:
        for found in ({}, {"passed": False}, {"passed": None}):
            assert report.is_correct({"correct": parts_of()["correct"] | {name: found}}) is False
    assert report.is_correct({"correct": parts_of()["correct"] | {"errors": {"graphs": "boom"}}}) is False


def test_the_table_names_figures_failures_and_what_was_killed() -> None:
    broken = {"errors": {"asyncllm": "Traceback\nValueError: boom"}, "killed": "still running after 120 s"}
    text = report.table(SETUP, parts_of(workload=broken))
    lines = {line.partition("  ")[0]: line for line in text.splitlines()}
    assert (
        "0.61" in lines["decode step, batch 1, context 1024"] and "50%" in lines["decode step, batch 1, context 1024"]
    )
    assert lines["decode step, batch 256, context 1024"].endswith("ambitious")
    assert "error in workload, asyncllm: ValueError: boom" in text and "workload was killed: still running" in text


def answer(tokens: list[int], second: int, gap: float) -> Answer:
    entries = [TokenLogprobs(token, -1.0, 1, [token, second], [-1.0, -1.0 - gap]) for token in tokens]
    return Answer(tokens, entries)


def test_exact_agreement_says_where_two_runs_part() -> None:
    assert same_tokens([[1, 2]], [[1, 2]])["passed"]
    assert same_tokens([[1, 2], [3]], [[1, 4], [3]])["first"] == {"sequence": 0, "position": 1}
    assert not same_tokens([[]], [[]])["passed"]


def test_runs_may_part_at_a_near_tie_and_nowhere_else() -> None:
    assert same_up_to_rounding([answer([1, 2], 7, 0.05)], [Answer([1, 7])], 0.1)["changed_by_rounding"] == 1
    assert not same_up_to_rounding([answer([1, 2], 7, 0.5)], [Answer([1, 7])], 0.1)["passed"]
    assert not same_up_to_rounding([answer([1, 2], 7, 0.05)], [Answer([1, 8])], 0.1)["passed"]
    assert not same_up_to_rounding([answer([1, 2], 7, 0.05)], [Answer([1])], 0.1)["passed"]


METRICS = """# HELP asyncllm:step_gap_seconds gaps
asyncllm:step_gap_seconds_bucket{le="0.001",model_name="m"} %d
asyncllm:step_gap_seconds_bucket{le="0.002",model_name="m"} %d
asyncllm:step_gap_seconds_bucket{le="+Inf",model_name="m"} %d
asyncllm:device_busy_seconds_total{model_name="m"} %g
asyncllm:device_gap_seconds_total{model_name="m"} %g
"""


def look(loop_s: float, *values: float) -> scrape.Look:
    return scrape.Look(*scrape.parse(METRICS % values), loop_s, 0.0)


def test_a_run_is_the_difference_of_two_looks() -> None:
    found = scrape.differences(look(1.0, 5, 5, 5, 1.0, 1.0), look(1.5, 5, 15, 15, 10.0, 2.0), 1000)
    assert found["device_busy_fraction"] == 0.9
    assert found["step_gap_s_p50"] == pytest.approx(0.0015)
    assert found["loop_cpu_us_per_token"] == 500.0
    assert scrape.differences(look(1.0, 5, 5, 5, 1.0, 1.0), look(1.0, 5, 5, 5, 1.0, 1.0), 0)["step_gap_s_p99"] is None


def test_the_main_thread_s_processor_time_is_told_from_the_others() -> None:
    started_s = time.process_time()
    while time.process_time() < started_s + 0.03:  # above a tick of 10 ms
        pass
    assert scrape.thread_seconds(os.getpid())[os.getpid()] > 0


def test_pytest_s_last_line_is_read_as_numbers() -> None:
    text = "noise 9 passed\n3 failed, 120 passed, 2 skipped, 1 error in 12.34s"
    assert parse_counts(text) == {"num_failed": 3, "num_passed": 120, "num_skipped": 2, "num_errors": 1}


def test_every_token_of_the_synthetic_tokenizer_has_a_text_of_its_own() -> None:
    tokenizer = synthetic_tokenizer(1000)
    assert tokenizer.get_vocab_size() == 1000
    assert len({tokenizer.decode([index], skip_special_tokens=False) for index in range(260, 1000)}) == 740


def test_the_directory_opens_as_the_model_it_was_written_for(tmp_path: Path) -> None:
    from asyncllm.weights.checkpoint import open_checkpoint

    shapes = architecture("qwen3-0.6b", tiny=True)
    write_directory(tmp_path, shapes)
    assert open_checkpoint(str(tmp_path), load_format="dummy").architecture == shapes
    assert hugging_face_config(QWEN3_06B)["architectures"] == ["Qwen3ForCausalLM"]


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_section_that_fails_keeps_what_it_found_and_the_next_one_runs(tmp_path: Path) -> None:
    def fail(found: Found) -> None:
        found["half"] = 1
        raise ValueError("boom")

    findings = Findings("decode", tmp_path / "out.json", Box(60.0))
    findings.run("first", fail)
    findings.run("second", lambda found: found.update(whole=2))
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["first"] == {"half": 1} and written["second"] == {"whole": 2}
    assert written["errors"]["first"].endswith("ValueError: boom\n")


def test_a_section_beyond_the_time_is_named_and_not_begun(tmp_path: Path) -> None:
    findings = Findings("decode", tmp_path / "out.json", Box(0.0))
    assert findings.run("late", lambda found: found.update(never=1)) == {}
    assert json.loads((tmp_path / "out.json").read_text())["out_of_time"] == ["late"]


def test_a_peer_is_a_command_that_reads_the_workload_and_prints_its_figure(tmp_path: Path) -> None:
    workload = tmp_path / "workload.json"
    workload.write_text('{"max_tokens": [3, 4]}')
    program = (
        "import json, os; w = json.load(open(os.environ['WORKLOAD'])); print('loading'); "
        "print(json.dumps({'tokens_per_s': sum(w['max_tokens'])})); print('bye')"
    )
    found: Found = {}
    run_peer(f"{sys.executable} -c {shlex.quote(program)}", workload, Box(60.0), found)
    assert found == {"tokens_per_s": 7}


def test_a_peer_without_a_figure_is_reported_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"exited with 3 .*\nno GPU"):
        run_peer("echo no GPU; exit 3", tmp_path, Box(60.0), {})
    with pytest.raises(PeerError, match="did not end in time"):
        run_peer("sleep 600", tmp_path, Box(0.0), {})
    assert last_figures('{"tokens_per_s": "fast"}\n{"other": 1}\n{broken') is None


def test_the_command_line_takes_parts_and_peers_and_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    args = gpu_check.parse_arguments(["--parts", "decode,http", "--peer", "vllm=python bench.py --fast=1"])
    assert args.parts == ("decode", "http") and args.peer == [("vllm", "python bench.py --fast=1")]
    assert gpu_check.parse_arguments([]).parts == PARTS
    for wrong in (["--parts", "decode,all"], ["--peer", "vllm"], ["--peer", "asyncllm=x"]):
        with pytest.raises(SystemExit):
            gpu_check.parse_arguments(wrong)
    assert "unknown part 'all'" in capsys.readouterr().err


def test_without_a_cuda_device_one_line_says_so() -> None:
    command = [sys.executable, "-m", "perf.gpu_check"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpu-check needs a CUDA device and finds none; --rehearse runs everything on a CPU\n"


class Stuck(gpu_check.Run):
    """A run whose parts leave half a figure and then hang, with a child in a session of its own."""

    PROGRAM = (
        "import json, subprocess, sys, time; child = subprocess.Popen(['sleep', '600'], start_new_session=True); "
        "open(sys.argv[3], 'w').write(json.dumps({'child': child.pid, 'errors': {}})); time.sleep(600)"
    )

    def command(self, name: str, setup_file: Path, found_file: Path) -> list[str]:
        return [sys.executable, "-c", self.PROGRAM, name, str(setup_file), str(found_file)]

    def limit_s(self, name: str) -> float:
        return 3.0


def test_a_part_that_hangs_is_killed_with_its_children_and_leaves_its_figures(tmp_path: Path) -> None:
    run = Stuck(Setup(str(tmp_path), rehearse=True), tmp_path / "out.json", "abc")
    run.part("decode", tmp_path / "setup.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["parts"]["decode"]["killed"] == "still running after 3 s"
    stat = Path(f"/proc/{written['parts']['decode']['child']}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert not run.is_clean and written["correct"] is None


# --- the rehearsal --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts, two processes at a time: on a CPU nothing here is measured, so they may share it."""
    directory = tmp_path_factory.mktemp("rehearsal")
    peer = f'fake={sys.executable} -c \'print("{{\\"tokens_per_s\\": 1.5}}")\''
    command = [sys.executable, "-m", "perf.gpu_check", "--rehearse", "--commit", "abc", "--peer", peer]
    running = {
        parts: subprocess.Popen(
            [*command, "--parts", parts, "--out", str(directory / f"{parts}.json")],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for parts in ("correct,http", "decode,workload")
    }
    merged: dict[str, Any] = {"parts": {}, "last_lines": []}
    for parts, process in running.items():
        output, errors = process.communicate(timeout=REHEARSAL_TIMEOUT_S)
        written = json.loads((directory / f"{parts}.json").read_text())
        assert process.returncode == 0, (output + errors)[-3000:]
        merged["parts"] |= written.pop("parts")
        merged |= {key: value for key, value in written.items() if value is not None}
        merged["last_lines"].append(json.loads(output.strip().rpartition("\n")[2]))
    return merged


@pytest.mark.timeout(REHEARSAL_TIMEOUT_S)
def test_a_rehearsal_runs_every_section_of_every_part(rehearsals: dict[str, Any]) -> None:
    parts = rehearsals["parts"]
    assert set(parts) == set(PARTS)
    assert all(not found["errors"] and not found["out_of_time"] for found in parts.values())
    assert set(CHECKS) <= set(parts["correct"])
    assert {"ceilings", "qwen3-0.6b", "attention", "llama-3.2-1b", "pdl", "skinny_gemm"} <= set(parts["decode"])
    assert parts["decode"]["experts"]["n2"]["dense_us"] > 0 and parts["decode"]["experts"]["n2"]["us_tiles_of_16"] > 0
    assert {"greedy", "temperature_0.6", "profile"} <= set(parts["decode"]["qwen3-0.6b"])
    assert parts["decode"]["qwen3-0.6b"]["profile"]["b1"]["kernels_per_step"] > 0
    assert parts["workload"]["transformers"]["is_complete"] and parts["workload"]["fake"] == {"tokens_per_s": 1.5}
    assert parts["http"]["streams"]["num_failed"] == 0 and parts["http"]["load_0.5"]["num_failed"] == 0


@pytest.mark.timeout(REHEARSAL_TIMEOUT_S)
def test_a_rehearsal_s_json_has_the_headline_and_says_what_it_was(rehearsals: dict[str, Any]) -> None:
    assert rehearsals["correct"] is True and rehearsals["rehearsal"] is True and rehearsals["commit"] == "abc"
    assert rehearsals["decode_ms_b1"] > 0 and rehearsals["nano_vllm_tokens_per_s"] > 0
    assert rehearsals["http_40_tokens_per_s"] > 0
    assert {"machine", "versions", "config", "scale", "seconds"} <= set(rehearsals)
    assert all(set(line) == set(report.headline(SETUP, {})) for line in rehearsals["last_lines"])
