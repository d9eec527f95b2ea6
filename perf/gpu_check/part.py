"""One part of the check in a process of its own: `python -m perf.gpu_check.part NAME SETUP.json OUT.json`.

A CUDA error poisons its whole process, and a hang never ends: in processes of their own, neither takes the other parts
along. `perf.gpu_check` starts this; nobody else needs to.
"""

import sys
from pathlib import Path

import msgspec

from perf.gpu_check.findings import Findings
from perf.gpu_check.setup import Box, Setup


def main(name: str, setup_file: Path, out: Path) -> int:
    """Run the part; what it found is in `out`, whatever happens."""
    setup = msgspec.json.decode(setup_file.read_bytes(), type=Setup)
    findings = Findings(name, out, Box(setup.part_seconds(name)))
    findings.save()
    # Imported late and one by one: a part must run where another one's libraries are missing.
    if name == "correct":
        from perf.gpu_check.correct import run
    elif name == "decode":
        from perf.gpu_check.decode import run
    elif name == "workload":
        from perf.gpu_check.workload import run
    else:
        from perf.gpu_check.over_http import run
    run(setup, findings)
    findings.save()
    return 1 if findings.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
