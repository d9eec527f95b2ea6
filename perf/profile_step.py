"""Where a decode step's time goes on this machine: `python -m perf.profile_step`.

Runs the executor alone (no scheduler, no HTTP) on decode rows, with a clock around each kind of operation, and the same
steps of a hollow model in turns: as many layers and heads, but so narrow that next to nothing is computed. What the
hollow one takes is dispatch (Python, torch, waking threads); what the real one takes above it is compute. Floors are
measured in the same run. Prints a table and one JSON line last. Figures are means over the quietest tenth of the steps:
on a machine with neighbours a median tells about the neighbours.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig, SchedulerConfig
from asyncllm.executor.base import Executor, SlotInit, StepPlan
from asyncllm.models.config import ModelArchitecture
from asyncllm.types import SamplingParams
from asyncllm.weights.base import Checkpoint
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.dummy import DummyCheckpoint
from perf import facts

KINDS = ("products", "head", "attention", "rotation", "norms", "activation", "sampling", "the rest")
HOLLOW_HEAD_DIM, HOLLOW_WIDTH, HOLLOW_VOCAB = 2, 32, 64
QUIET_SHARE = 0.1  # of the steps counts
READ_BYTES = 256 * 2**20  # far more than any cache of a small machine
PRODUCT = (512, 576, 3072)  # rows, in, out: a chunk of a prompt of a small model


class Clocks:
    """Seconds by kind of operation, each without those inside it."""

    __slots__ = ("_inner_s", "now_s", "spent_s")

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.spent_s = dict.fromkeys(KINDS, 0.0)
        self._inner_s = 0.0  # what the operations inside the current one have taken so far

    def timed(self, function: Callable[..., Any], kind_of: Callable[..., str]) -> Callable[..., Any]:
        """`function`, measured; `kind_of` is given its first argument."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            outer_s, self._inner_s = self._inner_s, 0.0
            start_s = self.now_s()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = self.now_s() - start_s
                self.spent_s[kind_of(args[0])] += took_s - self._inner_s
                self._inner_s = outer_s + took_s

        return measured

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        spent_s, self.spent_s = self.spent_s, dict.fromkeys(KINDS, 0.0)
        return spent_s


@contextlib.contextmanager
def clocks_around_operations(now_s: Callable[[], float]) -> Iterator[Clocks]:
    """Measure our own layers, wherever they are called from, until the block ends."""
    from asyncllm.attention import torch_attention
    from asyncllm.executor.torch_executor import TorchExecutor
    from asyncllm.layers.experts import SparseMLP
    from asyncllm.layers.linear import Linear
    from asyncllm.layers.mlp import GatedMLP, PlainMLP
    from asyncllm.layers.norm import LayerNorm, RMSNorm
    from asyncllm.models.decoder import DecoderForCausalLM

    def always(kind: str) -> Callable[[Any], str]:
        return lambda _: kind

    clocks = Clocks(now_s)
    places: list[tuple[Any, str, Callable[[Any], str]]] = [
        (Linear, "forward", lambda layer: "head" if getattr(layer, "_is_head", False) else "products"),
        (DecoderForCausalLM, "compute_logits", always("head")),
        (SparseMLP, "forward", always("products")),
        (GatedMLP, "forward", always("activation")),
        (PlainMLP, "forward", always("activation")),
        (RMSNorm, "forward", always("norms")),
        (RMSNorm, "add_norm", always("norms")),
        (LayerNorm, "forward", always("norms")),
        (LayerNorm, "add_norm", always("norms")),
        (torch_attention.TorchAttentionStep, "forward", always("attention")),
        (torch_attention.TorchAttention, "begin", always("attention")),
        (torch_attention, "rotate", always("rotation")),
        (TorchExecutor, "_sample", always("sampling")),
        (TorchExecutor, "launch", always("the rest")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, kind_of in places:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, clocks.timed(getattr(owner, name), kind_of))
        yield clocks


def hollow(architecture: ModelArchitecture) -> ModelArchitecture:
    """The same operations on next to nothing: layers and heads stay, widths go."""
    return msgspec.structs.replace(
        architecture,
        hidden_size=HOLLOW_WIDTH,
        intermediate_size=HOLLOW_WIDTH,
        head_dim=HOLLOW_HEAD_DIM,
        rotary_dim=HOLLOW_HEAD_DIM if architecture.rotary_dim else 0,
        vocab_size=HOLLOW_VOCAB,
    )


def build(checkpoint: Checkpoint, config: Config) -> Executor:
    """An executor that knows which product is its head."""
    from asyncllm.executor.build import build_executor

    executor = build_executor(config, checkpoint, lambda phase: None)
    executor.model.lm_head._is_head = True  # type: ignore[attr-defined]
    return executor


def decode_plan(executor: Executor, num_rows: int, context: int) -> StepPlan:
    """A step of greedy rows, each with a context of its own, which was never computed but costs the same to read.

    Also seats the rows, at a first step that is not measured.
    """
    capacity = executor.capacity
    per_row = -(-(context + 1) // capacity.block_size)
    plan = StepPlan(
        slots=list(range(num_rows)),
        num_query_tokens=[1] * num_rows,
        num_computed_tokens=[context] * num_rows,
        samples=[True] * num_rows,
        num_decode_rows=num_rows,
        token_ids=[],
        new_slots=[SlotInit(row, SamplingParams(max_tokens=1, temperature=0.0), [0], 1) for row in range(num_rows)],
        block_writes=[(row, c, 1 + row * per_row + c) for row in range(num_rows) for c in range(per_row)],
        banned={},
        logprob_rows={},
        prompt_logprob_rows={},
    )
    executor.launch(plan).wait()
    return msgspec.structs.replace(plan, new_slots=[], block_writes=[])


def measure(
    executors: Sequence[Executor], num_rows: int, context: int, steps: int, now_s: Callable[[], float]
) -> list[dict[str, float]]:
    """Seconds by kind, with their sum as `step`, of each executor."""
    plans = [decode_plan(executor, num_rows, context) for executor in executors]
    taken: list[list[dict[str, float]]] = [[] for _ in executors]
    with clocks_around_operations(now_s) as clocks:
        for _ in range(steps):
            for executor, plan, seconds in zip(executors, plans, taken):
                executor.launch(plan).wait()
                spent_s = clocks.take()
                seconds.append(spent_s | {"step": sum(spent_s.values())})
    return [quiet_mean(seconds) for seconds in taken]


def quiet_mean(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over the steps that took least, so that the kinds of one step stay together."""
    quiet = sorted(steps, key=lambda step: step["step"])[: max(1, round(len(steps) * QUIET_SHARE))]
    return {kind: sum(step[kind] for step in quiet) / len(quiet) for kind in (*KINDS, "step")}


def floors(now_s: Callable[[], float]) -> dict[str, float]:
    """What the machine can do at best: bytes read and bfloat16 operations a second."""
    import torch

    read = torch.zeros(READ_BYTES // 4)
    rows, width, out = PRODUCT
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    linear = _linear(width, out)
    return {
        "read_gb_per_s": READ_BYTES / _best_s(read.sum, now_s) / 1e9,
        "bf16_gflop_per_s": 2 * rows * width * out / _best_s(lambda: linear(x), now_s) / 1e9,
    }


def _linear(width: int, out: int) -> Callable[..., Any]:
    import torch

    from asyncllm.layers.linear import Linear

    linear = Linear(width, out)
    linear.weight = torch.nn.Parameter(torch.randn(out, width, dtype=torch.bfloat16), requires_grad=False)
    linear.prepare(fused=False)
    return linear


def _best_s(run: Callable[[], Any], now_s: Callable[[], float]) -> float:
    times_s = []
    for _ in range(30):
        start_s = now_s()
        run()
        times_s.append(now_s() - start_s)
    return min(times_s)


def profile(config: Config, row_counts: Sequence[int], context: int, steps: int) -> dict[str, Any]:
    """Everything that is printed, as it stands in the JSON line; times in ms.

    With one thread they are its processor time, which neighbours hardly change; else they are the wall's.
    """
    import torch

    now_s = time.thread_time if config.executor.threads == 1 else time.perf_counter
    checkpoint = open_checkpoint(config.model.path)
    narrow = DummyCheckpoint("hollow", hollow(checkpoint.architecture), checkpoint.text, checkpoint.tokenizer)
    with torch.inference_mode():
        executors = [build(checkpoint, config), build(narrow, config)]
        machine_floors = floors(now_s)
        clock = facts.CpuClock([])
        by_rows = {}
        for num_rows in row_counts:
            real, empty = measure(executors, num_rows, context, steps, now_s)
            by_rows[num_rows] = {
                kind: {"ms": 1e3 * real[kind], "dispatch_ms": 1e3 * min(empty[kind], real[kind])} for kind in real
            }
    return {
        "model": config.model.path,
        "facts": executors[0].facts,
        "context": context,
        "steps": steps,
        "weights_bytes": weights_read(executors[0]),
        "kv_bytes_per_row": context * checkpoint.architecture.kv_bytes_per_token(2),
        "floors": machine_floors,
        "by_rows": by_rows,
        "busy_cores": clock.foreign_cores(),
        "machine": msgspec.to_builtins(facts.machine()),
        "versions": facts.versions(),
    }


def weights_read(executor: Executor) -> int:
    """Bytes of weights that a step reads at few rows: every product's."""
    from asyncllm.layers.linear import Linear

    model: Any = executor.model  # type: ignore[attr-defined]
    return sum(layer.num_bytes for layer in model.modules() if isinstance(layer, Linear))


def table(result: dict[str, Any]) -> str:
    """One line per kind of operation: ms, of which dispatch, for each number of rows."""
    by_rows = result["by_rows"]
    lines = ["ms (of which dispatch)  " + "".join(f"{f'{rows} rows':>18}" for rows in by_rows)]
    for kind in (*KINDS, "step"):
        cells = [by_rows[rows][kind] for rows in by_rows]
        lines.append(
            f"{kind:<24}" + "".join(f"{cell['ms']:>9.2f} ({cell['dispatch_ms']:>5.2f})" + "  " for cell in cells)
        )
    read, product = result["floors"]["read_gb_per_s"], result["floors"]["bf16_gflop_per_s"]
    floor = [
        (result["weights_bytes"] + rows * result["kv_bytes_per_row"]) / read / 1e6 for rows in by_rows
    ]  # bytes / (GB/s) is ns
    lines.append(f"{'floor: memory':<24}" + "".join(f"{ms:>9.2f}" + " " * 9 for ms in floor))
    weights_mb = result["weights_bytes"] / 1e6
    lines.append(f"{read:.1f} GB/s read, {product:.0f} GFLOP/s bfloat16; weights of one row: {weights_mb:.0f} MB")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.profile_step", description="Where a decode step's time goes.")
    defaults = ModelConfig()
    parser.add_argument("--model", default=defaults.path, help="as model.path (default %(default)s)")
    parser.add_argument("--dtype", default=defaults.dtype, help="as model.dtype")
    parser.add_argument(
        "--quantization", default=defaults.quantization, choices=("auto", "none"), help="as model.quantization"
    )
    parser.add_argument("--rows", default="1,8,32", help="decode rows of a step (default %(default)s)")
    parser.add_argument("--context", type=int, default=200, help="tokens each row attends to (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each model and number of rows")
    parser.add_argument("--threads", type=int, default=0, help="as executor.threads; 1 counts processor time")
    args = parser.parse_args(argv)
    try:
        row_counts = [int(part) for part in args.rows.split(",")]
    except ValueError:
        parser.error(f"--rows: {args.rows} is no list of numbers")
    if min(row_counts) < 1 or args.context < 1 or args.steps < 1:
        parser.error("--rows, --context and --steps are at least 1")
    num_blocks = max(row_counts) * (args.context // CacheConfig().block_size + 2)
    config = Config(
        model=ModelConfig(path=args.model, dtype=args.dtype, quantization=args.quantization, device="cpu"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_sequences=max(row_counts)),
        executor=ExecutorConfig(threads=args.threads, attention_backend="torch"),
    )
    result = profile(config, row_counts, args.context, args.steps)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
