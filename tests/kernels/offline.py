"""Compile every kernel that ships, without a GPU: `python -m tests.kernels.offline [arch ...] [--only part-of-a-name]`.

The production wrappers run on tensors without memory under a Triton driver that compiles for a given architecture and
launches nothing; so signatures, specialisations and options are those that ship. One JSON line per kernel says what
ptxas made of it. Knows the driver and the binaries; the shapes are in `cases`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.kernels.cases import CASES

# Bytes of shared memory that a program may have; Triton refuses a kernel that wants more, as it would on the device.
MAX_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
NUM_WORKERS = 2
SOURCE = Path(__file__).read_bytes()
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Kernel = dict[str, Any]


class CompileOnlyDriver:
    """What Triton asks of a driver, for a device that is not there. Keeps every binary it is told to load."""

    def __init__(self) -> None:
        self.arch = 0
        self.num_warps = 0  # of the kernel being loaded
        self.loaded: list[tuple[str, bytes, int, int]] = []  # name, cubin, shared bytes, warps
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Each architecture is a device of its own, so that compiled kernels are not mistaken for each other."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[device]}

    def launcher_cls(self, source: object, metadata: Any) -> Any:
        self.num_warps = metadata.num_warps
        return lambda *arguments: None

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads per program at most; nobody reads the first four."""
        self.loaded.append((name, cubin, shared, self.num_warps))
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


_driver = CompileOnlyDriver()


def _compile(task: tuple[int, int]) -> list[Kernel]:
    """Compile the kernels of case `task[1]` for architecture `task[0]`; those seen before are left out."""
    _driver.arch, index = task
    case = CASES[index]
    driver.set_active(_driver)
    _driver.loaded.clear()
    case.run(_driver.arch >= 90)  # programmatic dependent launches begin with Hopper
    return [
        {"kernel": name, "case": case.name, "arch": _driver.arch, "warps": warps, "shared": shared, **_inspected(cubin)}
        for name, cubin, shared, warps in _driver.loaded
    ]


def _inspected(cubin: bytes) -> Kernel:
    """`_inspect`, once for each binary: taking one apart takes longer than compiling it."""
    binary = hashlib.sha256(cubin + SOURCE).hexdigest()[:32]
    known = Path(os.environ["TRITON_CACHE_DIR"], f"{binary}.json")
    if not known.exists():
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as file:
            json.dump(_inspect(cubin), file)
        os.replace(file.name, known)
    return {**json.loads(known.read_text()), "binary": binary}


def _inspect(cubin: bytes) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("-sass", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources is not None, usage
    registers, stack, local = map(int, resources.groups())
    accesses = re.findall(r"\b(?:LDG|LDGSTS|STG)\.\S+", sass)
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": sum("128" in access for access in accesses if not access.startswith("STG")),
        # One element of 16 bits per thread: what remains where the compiler could not prove an alignment.
        "narrow_accesses": sum(bool(re.search(r"\.[US](?:8|16)\b", access)) for access in accesses),
    }


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run(
        [BINARIES / "cuobjdump", option, path], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def compile_all(archs: list[int], only: str) -> Iterator[Kernel]:
    """Every distinct kernel of the cases whose name contains `only`; compiled anew, unless TRITON_CACHE_DIR is set."""
    tasks = [(arch, index) for arch in archs for index, case in enumerate(CASES) if only in case.name]
    seen: set[tuple[int, str]] = set()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(NUM_WORKERS, mp_context=context) as pool:
            for kernels in pool.map(_compile, tasks):
                for kernel in kernels:
                    key = (kernel["arch"], kernel.pop("binary"))
                    if key not in seen:
                        seen.add(key)
                        yield kernel


def main() -> None:
    """Print one JSON line per kernel."""
    assert "TRITON_INTERPRET" not in os.environ, "interpreted kernels are never compiled: unset TRITON_INTERPRET"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    for kernel in compile_all(arguments.archs, arguments.only):
        print(json.dumps(kernel), flush=True)


if __name__ == "__main__":
    main()
