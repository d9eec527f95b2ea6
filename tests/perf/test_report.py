"""From cells to medians, ratios and the JSON line."""

import math

import msgspec
import pytest

from perf.client import RequestOptions
from perf.compare import CompareParams
from perf.facts import Memory
from perf.load import LoadResult, summarise
from perf.report import Cell, Report, ServerFacts, medians, ratios, soak_table, table
from perf.soak import BLOCK_SIZE, SOAK_CONCURRENCY, SOAK_STEP, SoakResult, soak_blocks


def make_cell(
    server: str, concurrency: int, turn: int, speed: float, foreign_cores: float = 0.0, failed: int = 0
) -> Cell:
    empty: LoadResult = summarise([], RequestOptions(), peak=0)
    result = msgspec.structs.replace(empty, output_tokens_per_s=speed, num_ok=8 - failed, num_failed=failed)
    return Cell(server, concurrency, turn, result, foreign_cores, client_cores=0.1, server_cores=1.5)


CELLS = [
    *(make_cell("asyncllm", 1, turn, speed) for turn, speed in enumerate([30.0, 50.0, 40.0])),
    *(make_cell("asyncllm", 8, turn, speed) for turn, speed in enumerate([160.0, 180.0, 90.0])),
    *(make_cell("transformers", 1, turn, 20.0) for turn in range(3)),
    *(make_cell("transformers", 8, turn, 21.0) for turn in range(3)),
    *(make_cell("transformers_cb", 1, turn, 10.0) for turn in range(3)),
    *(make_cell("transformers_cb", 8, turn, 80.0, foreign_cores=0.5) for turn in range(3)),
]


def make_report(cells: list[Cell] = CELLS, soak: SoakResult | None = None) -> Report:
    servers = {
        name: ServerFacts([2.0, 3.0], [2.5, 3.5], Memory(100, 60, 100), Memory(120, 80, 150))
        for name in ("asyncllm", "transformers", "transformers_cb")
    }
    return Report(CompareParams("model"), cells, servers, soak)


def test_a_figure_is_the_median_of_its_rounds_and_shows_their_spread() -> None:
    figures = medians(CELLS, "asyncllm")

    assert figures["1"]["output_tokens_per_s"] == 40.0
    assert figures["8"]["output_tokens_per_s"] == 160.0
    assert figures["8"]["output_tokens_per_s_by_round"] == [160.0, 180.0, 90.0]


def test_the_ratio_is_to_the_best_other_server_at_each_concurrency() -> None:
    assert ratios(CELLS) == {"ratio_1": 2.0, "ratio_8": 2.0, "scaling_8": 4.0}


def test_without_a_competitor_a_ratio_is_unknown() -> None:
    assert ratios([make_cell("asyncllm", 1, 0, 40.0)]) == {"ratio_1": None}


def test_the_json_line_has_the_promised_keys() -> None:
    soak = SoakResult([0, 100, 200], [10, 20, 25], 0, 5)
    figures = msgspec.json.decode(msgspec.json.encode(make_report(soak=soak).to_json()))

    assert {"asyncllm", "transformers", "transformers_cb", "machine", "versions", "parameters"} <= set(figures)
    assert (figures["ratio_1"], figures["ratio_8"], figures["scaling_8"]) == (2.0, 2.0, 4.0)
    assert (figures["rss_start_bytes"], figures["rss_end_bytes"]) == (100, 120)
    assert figures["memory_soak"]["growth_bytes"] == 5
    assert figures["servers"]["transformers"]["start_s"] == [2.0, 3.0]
    assert figures["max_foreign_cores"] == 0.5


def test_failures_of_cells_and_soak_are_added_up() -> None:
    soak = SoakResult([0, 100], [10, 20], 3, None)

    assert make_report([make_cell("asyncllm", 1, 0, 40.0, failed=2)], soak).num_failed == 5


def test_the_table_marks_noisy_and_failed_cells() -> None:
    cells = [*CELLS, make_cell("transformers", 32, 0, 20.0, failed=4)]
    lines = table(cells, make_report().servers).splitlines()
    marked = {tuple(line.split()[:2]): line for line in lines if line.rstrip().endswith("~") or "FAILED" in line}

    assert set(marked) == {("transformers_cb", "8"), ("transformers", "32")}
    assert marked["transformers", "32"].endswith("FAILED 4")


def test_the_soak_table_shows_growth_behind_the_first_step() -> None:
    text = soak_table(SoakResult([0, 100, 200], [2**20, 2**21, 3 * 2**20], 0, 2**20))

    assert "growth behind the first step: +1.00 MiB, 0 failed" in text


@pytest.mark.parametrize("num_tokens", [17, 192, 1500])
def test_a_soak_writes_every_kv_block_before_the_first_look_and_never_waits_for_one(num_tokens: int) -> None:
    blocks_per_request = math.ceil(num_tokens / BLOCK_SIZE)

    assert SOAK_CONCURRENCY * blocks_per_request < soak_blocks(num_tokens - 1, 1) < SOAK_STEP * blocks_per_request
