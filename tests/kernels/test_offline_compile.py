"""What ptxas makes of every kernel that ships, on architectures that are not here.

One model's shapes on Hopper always; with `-m kernels`, every shape on every architecture, which takes minutes. CI has
every shape on Hopper, and one model's on the others.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(3600)
ATTENTION = {"_attend_kernel", "_prefill_kernel"}
EXPERTS = {"_gate_up", "_down"}
# Each moves 16-bit elements in rows of whole vectors: one element per access means that an alignment was lost.
STREAMING = ATTENTION | EXPERTS | {"_norm_rope_store", "_rms_norm", "_gate", "_combine"}

Kernel = dict[str, Any]


def compile_offline(arch: int, only: str) -> list[Kernel]:
    """In a process of its own: there kernels are compiled, in this one they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What one run has compiled, and one parameter of another, is not compiled again: CI meets a model's kernels twice.
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "offline-kernels")
    command = [sys.executable, "-m", "tests.kernels.offline", str(arch), "--only", only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, "Qwen3-0.6B"), id="sm_90-one-model"),
        *(
            pytest.param((arch, "Qwen3-0.6B"), id=f"sm_{arch}-one-model", marks=pytest.mark.kernels)
            for arch in (80, 100)
        ),
        *(pytest.param((arch, ""), id=f"sm_{arch}", marks=pytest.mark.kernels) for arch in (80, 90, 100)),
    ],
)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """Every kernel of the cases, compiled for one architecture."""
    return compile_offline(*request.param)


def launched_kernels() -> set[str]:
    """Names of all kernels that the package's code launches: what stands before the grid in `kernel[grid](...)`."""
    names = set()
    for path in (ROOT / "asyncllm").rglob("*.py"):
        source = path.read_text()
        if "triton.jit" in source:
            calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
            subscripts = (function.value for function in calls if isinstance(function, ast.Subscript))
            names |= {value.id for value in subscripts if isinstance(value, ast.Name)}
    return names


def test_every_kernel_that_is_launched_is_compiled(kernels: list[Kernel]) -> None:
    assert launched_kernels() - {kernel["kernel"] for kernel in kernels} == set()


def test_no_kernel_spills_or_needs_a_stack(kernels: list[Kernel]) -> None:
    spilling = [kernel for kernel in kernels if kernel["stack"] or kernel["local"] or kernel["spills"]]
    assert spilling == []


@pytest.mark.parametrize("names", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_products_load_sixteen_bytes_at_a_time(kernels: list[Kernel], names: set[str]) -> None:
    products = [kernel for kernel in kernels if kernel["kernel"] in names]
    assert {kernel["kernel"] for kernel in products} == names
    assert [kernel for kernel in products if kernel["wide_loads"] == 0] == []


def test_streaming_kernels_move_no_lone_element(kernels: list[Kernel]) -> None:
    streaming = [kernel for kernel in kernels if kernel["kernel"] in STREAMING]
    assert streaming
    assert [kernel for kernel in streaming if kernel["narrow_accesses"]] == []
