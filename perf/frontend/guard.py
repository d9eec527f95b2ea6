"""The guard: our loop's CPU per token over that of the bare writer (yardstick (a)), within the same half minute.

    python -m perf.frontend.guard

A ratio of processor times, so that neither a slow machine nor a busy one changes the verdict. A test holds it to LIMIT.
Whoever makes the text path faster lowers MEASURED with it: a gain that is not written down here is not guarded.
"""

import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from perf.frontend import cells, lab
from perf.frontend.cells import Plan
from perf.frontend.figures import num_tokens
from perf.frontend.frames import typical_frame
from perf.frontend.measure import warm_up

NUM_STREAMS = 64
NUM_ROUNDS = 3
STEP_S = 0.004
WINDOW_S = 0.8

MEASURED = 1.6  # the ratio as it is; python -m perf.frontend.guard measures it
LIMIT = MEASURED * 4 / 3


def ratios(directory: Path) -> list[float]:
    """Ours over the limit, of interleaved short rounds."""
    plan = Plan(num_streams=NUM_STREAMS, step_s=STEP_S, window_s=WINDOW_S, ramp_s=0.2, num_tokens=2000)
    found = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(lab.start_ours(directory, NUM_STREAMS, plan.num_tokens))
        limit = stack.enter_context(lab.start_yardstick("limit", directory, typical_frame(ours)))
        warm_up(ours)
        for _ in range(NUM_ROUNDS):
            mine, bare = cells.run(ours, plan), cells.run(limit, plan)
            per_frame = bare.outcome.loop_ns / bare.outcome.num_events
            found.append(mine.outcome.loop_ns / num_tokens(mine) / per_frame)
    return found


def main() -> int:
    """Measure once; 1 where the limit is broken."""
    with tempfile.TemporaryDirectory() as directory:
        found = ratios(Path(directory))
    ratio = statistics.median(found)
    print(json.dumps({"bench": "frontend-guard", "ratio": round(ratio, 3), "rounds": found, "limit": round(LIMIT, 3)}))
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
