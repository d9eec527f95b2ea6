"""Where a decode step's time goes on this machine: `python -m perf.profile_step`.

Runs the executor alone (no scheduler, no HTTP) on decode rows, with a clock around each kind of operation, and the same
steps of a hollow model in turns: as many layers and heads, but so narrow that next to nothing is computed. What the
hollow one takes is dispatch (Python, torch, waking threads); what the real one takes above it is compute. The native
decoder has clocks of its own. Floors are measured in the same run. Prints a table for each backend and one JSON line
last. Figures are means over the quietest tenth of the steps: on a machine with neighbours a median tells about the
neighbours.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig, SchedulerConfig
from asyncllm.errors import StartupError
from asyncllm.executor import host
from asyncllm.executor.base import Executor, SlotInit, StepPlan
from asyncllm.executor.build_native import find_native
from asyncllm.models.config import ModelArchitecture
from asyncllm.native.builds import find_library
from asyncllm.native.library import BFLOAT16, ROW_MULTIPLE
from asyncllm.types import SamplingParams
from asyncllm.weights.base import Checkpoint
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.dummy import DummyCheckpoint
from perf import facts, floors

# Native: `products` are those of attention, `mlp` is its products and activation, `norms` also make activations ready
# for the product behind them, `calls` is what the way into C++ and back takes.
KINDS = {
    "native": (
        *("products", "mlp", "head", "attention", "rotation", "norms", "embedding"),
        *("sampling", "calls", "the rest"),
    ),
    "torch": ("products", "head", "attention", "rotation", "norms", "activation", "sampling", "the rest"),
}
HOLLOW_WIDTH, HOLLOW_VOCAB, HOLLOW_CONTEXT = ROW_MULTIPLE, 64, 1  # the least that native kernels take
QUIET_SHARE = 0.1  # of the steps counts


class Clocks:
    """Seconds by kind of operation, each without those inside it."""

    __slots__ = ("_inner_s", "now_s", "spent_s")

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.spent_s: defaultdict[str, float] = defaultdict(float)
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
        spent_s, self.spent_s = self.spent_s, defaultdict(float)
        return spent_s


@contextlib.contextmanager
def clocks_around_operations(now_s: Callable[[], float]) -> Iterator[tuple[Clocks, Clocks]]:
    """Measure our own layers, wherever they are called from, until the block ends; and calls into C++ by the wall."""
    from asyncllm.attention import torch_attention
    from asyncllm.executor.torch_executor import TorchExecutor
    from asyncllm.layers.experts import SparseMLP
    from asyncllm.layers.linear import Linear
    from asyncllm.layers.mlp import GatedMLP, PlainMLP
    from asyncllm.layers.norm import LayerNorm, RMSNorm
    from asyncllm.models.decoder import DecoderForCausalLM
    from asyncllm.native.decoder import NativeDecoder

    def always(kind: str) -> Callable[[Any], str]:
        return lambda _: kind

    clocks, walls = Clocks(now_s), Clocks(time.perf_counter)
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
        (NativeDecoder, "run", always("calls")),
        (NativeDecoder, "compute_logits", always("calls")),
        (NativeDecoder, "likeliest", always("calls")),
        (TorchExecutor, "_sample", always("sampling")),
        (TorchExecutor, "launch", always("the rest")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, kind_of in places:
            function = getattr(owner, name)
            stack.callback(setattr, owner, name, function)
            if owner is NativeDecoder:
                function = walls.timed(function, kind_of)
            setattr(owner, name, clocks.timed(function, kind_of))
        yield clocks, walls


def shared_out(calls_s: float, wall_s: float, parts_s: Mapping[str, float]) -> dict[str, float]:
    """The time of calls into C++, given to the parts that took `parts_s` of their wall; what is left stays theirs."""
    share = calls_s / wall_s
    parts = {part: spent_s * share for part, spent_s in parts_s.items()}
    return parts | {"calls": calls_s - sum(parts.values())}


def hollow(architecture: ModelArchitecture) -> ModelArchitecture:
    """The same operations on next to nothing: layers and heads stay, widths go."""
    return msgspec.structs.replace(
        architecture,
        hidden_size=HOLLOW_WIDTH,
        intermediate_size=HOLLOW_WIDTH,
        head_dim=HOLLOW_WIDTH,
        rotary_dim=HOLLOW_WIDTH if architecture.rotary_dim else 0,
        vocab_size=HOLLOW_VOCAB,
    )


def build(checkpoint: Checkpoint, config: Config) -> Executor:
    """An executor that knows which product is its head."""
    from asyncllm.executor.build import build_executor

    executor = build_executor(config, checkpoint, lambda phase: None)
    model: Any = executor.model  # type: ignore[attr-defined]
    if hasattr(model, "lm_head"):
        model.lm_head._is_head = True
    return executor


def decode_plan(executor: Executor, num_rows: int, context: int) -> StepPlan:
    """A step of greedy rows, each with a token and a context of its own, never computed but as costly to read.

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
        new_slots=[SlotInit(row, SamplingParams(max_tokens=1, temperature=0.0), [row], 1) for row in range(num_rows)],
        block_writes=[(row, c, 1 + row * per_row + c) for row in range(num_rows) for c in range(per_row)],
        banned={},
        logprob_rows={},
        prompt_logprob_rows={},
    )
    executor.launch(plan).wait()
    return msgspec.structs.replace(plan, new_slots=[], block_writes=[])


class Subject(msgspec.Struct):
    """An executor to be measured."""

    executor: Executor
    backend: str  # native, torch
    context: int  # tokens each row attends to

    def step(self, plan: StepPlan, clocks: Clocks, walls: Clocks) -> dict[str, float]:
        """Seconds by kind of operation, with their sum as `step`."""
        model: Any = self.executor.model  # type: ignore[attr-defined]
        before = model.spent_s() if self.backend == "native" else {}
        self.executor.launch(plan).wait()
        spent_s, calls = clocks.take(), walls.take()
        if self.backend == "native":
            parts = {part: until_s - before[part] for part, until_s in model.spent_s().items()}
            spent_s |= shared_out(spent_s["calls"], calls["calls"], parts)
        return {kind: spent_s[kind] for kind in KINDS[self.backend]} | {"step": sum(spent_s.values())}


def measure(
    subjects: Sequence[Subject], num_rows: int, steps: int, now_s: Callable[[], float]
) -> list[dict[str, float]]:
    """Seconds by kind, with their sum as `step`, of each of them, which take turns."""
    plans = [decode_plan(subject.executor, num_rows, subject.context) for subject in subjects]
    taken: list[list[dict[str, float]]] = [[] for _ in subjects]
    with clocks_around_operations(now_s) as (clocks, walls):
        for _ in range(steps):
            for subject, plan, seconds in zip(subjects, plans, taken):
                seconds.append(subject.step(plan, clocks, walls))
    return [quiet_mean(seconds) for seconds in taken]


def quiet_mean(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over the steps that took least, so that the kinds of one step stay together."""
    quiet = sorted(steps, key=lambda step: step["step"])[: max(1, round(len(steps) * QUIET_SHARE))]
    return {kind: sum(step[kind] for step in quiet) / len(quiet) for kind in quiet[0]}


def profile(
    config: Config, backends: Sequence[str], row_counts: Sequence[int], context: int, steps: int
) -> dict[str, Any]:
    """Everything that is printed, as it stands in the JSON line; times in ms.

    With one thread they are its processor time, which neighbours hardly change; else they are the wall's.
    """
    import torch

    now_s = time.thread_time if config.executor.threads == 1 else time.perf_counter
    checkpoint = open_checkpoint(config.model.path)
    narrow = DummyCheckpoint("hollow", hollow(checkpoint.architecture), checkpoint.text, checkpoint.tokenizer)
    subjects: list[Subject] = []
    with torch.inference_mode():
        for backend in backends:
            chosen = msgspec.structs.replace(config.executor, attention_backend=backend)
            config = msgspec.structs.replace(config, executor=chosen)
            subjects.append(Subject(build(checkpoint, config), backend, context))
            subjects.append(Subject(build(narrow, config), backend, HOLLOW_CONTEXT))
        num_threads = torch.get_num_threads()
        read = {threads: floors.read_gb_per_s(threads) for threads in sorted({1, num_threads})}
        described = {subject.backend: _describe(subject, checkpoint, read[num_threads]) for subject in subjects[::2]}
        clock = facts.CpuClock([])
        for num_rows in row_counts:
            means = measure(subjects, num_rows, steps, now_s)
            for backend, real, empty in zip(backends, means[::2], means[1::2]):
                described[backend]["by_rows"][num_rows] = {
                    kind: {"ms": 1e3 * real[kind], "dispatch_ms": 1e3 * min(empty[kind], real[kind])} for kind in real
                }
    return {
        "model": config.model.path,
        "context": context,
        "steps": steps,
        "threads": num_threads,
        "read_gb_per_s": read,
        "backends": described,
        "busy_cores": clock.foreign_cores(),
        "machine": msgspec.to_builtins(facts.machine()),
        "versions": facts.versions(),
    }


def _describe(subject: Subject, checkpoint: Checkpoint, gb_per_s: float) -> dict[str, Any]:
    """What a backend reads and multiplies, and what the machine can do with that; `by_rows` is still empty."""
    import torch

    architecture = checkpoint.architecture
    executor: Any = subject.executor
    weights_bytes = weights_read(subject)
    capacity = executor.capacity
    kv_bytes = (
        subject.context
        * sum(cache.nbytes for cache in executor.kv_caches)
        // (capacity.num_blocks * capacity.block_size)
    )
    library = find_library(host.cpu_flags())
    if subject.backend == "torch" or isinstance(library, str):
        rates = floors.torch_gflop_per_s()
        kinds = list(rates)
    else:
        rates = floors.native_gflop_per_s(library, torch.get_num_threads())
        in_blocks = executor.model.kinds != {BFLOAT16}
        kinds = [kind for kind in rates if kind.startswith("int8") == in_blocks]
    untied = 0 if architecture.tie_word_embeddings else architecture.vocab_size * architecture.hidden_size
    return {
        "facts": executor.facts,
        "weights_bytes": weights_bytes,
        "kv_bytes_per_row": kv_bytes,
        "gflop_per_s": rates,
        "memory_floor_ms": weights_bytes / gb_per_s / 1e6,  # bytes / (GB/s) is ns
        "memory_floor_ms_per_row": kv_bytes / gb_per_s / 1e6,
        # Of experts only some are multiplied; a mixture of kinds goes by the faster one.
        "product_floor_ms_per_row": None
        if architecture.experts is not None
        else 2 * (architecture.num_parameters - untied) / max(rates[kind] for kind in kinds) / 1e6,
        "by_rows": {},
    }


def weights_read(subject: Subject) -> int:
    """Bytes of weights that a step reads at few rows; of a native decoder all it has, an untied embedding's too."""
    from asyncllm.layers.linear import Linear

    executor: Any = subject.executor
    if subject.backend == "native":
        num_bytes: int = executor.model.num_bytes
        return num_bytes
    layers = [layer for layer in executor.model.modules() if isinstance(layer, Linear)]
    num_values = sum(layer.in_features * layer.out_features for layer in layers)
    return num_values * int(executor.kv_caches[0].element_size())  # computed in the weights' dtype


def table(result: dict[str, Any], backend: str) -> str:
    """One line per kind of operation: ms, of which dispatch, for each number of rows."""
    described = result["backends"][backend]
    by_rows = described["by_rows"]
    lines = [described["facts"]["kernels"]]
    lines.append("ms (of which dispatch)  " + "".join(f"{f'{rows} rows':>18}" for rows in by_rows))
    for kind in (*KINDS[backend], "step"):
        cells = [by_rows[rows][kind] for rows in by_rows]
        lines.append(
            f"{kind:<24}" + "".join(f"{cell['ms']:>9.2f} ({cell['dispatch_ms']:>5.2f})" + "  " for cell in cells)
        )
    memory = [described["memory_floor_ms"] + rows * described["memory_floor_ms_per_row"] for rows in by_rows]
    lines.append(f"{'floor: memory':<24}" + "".join(f"{ms:>9.2f}" + " " * 9 for ms in memory))
    if described["product_floor_ms_per_row"] is not None:
        products = [rows * described["product_floor_ms_per_row"] for rows in by_rows]
        lines.append(f"{'floor: products':<24}" + "".join(f"{ms:>9.2f}" + " " * 9 for ms in products))
    rates = ", ".join(f"{rate:.0f} {kind}" for kind, rate in described["gflop_per_s"].items())
    rows, width, out = floors.PRODUCT
    lines.append(f"weights {described['weights_bytes'] / 1e6:.0f} MB; GFLOP/s of {rows} x {width} x {out}: {rates}")
    return "\n".join(lines)


def bandwidth(result: dict[str, Any]) -> str:
    """One line."""
    rates = ", ".join(f"{rate:.1f} with {threads}" for threads, rate in result["read_gb_per_s"].items())
    return f"GB/s read by threads: {rates}; {result['busy_cores']:.1f} cores busy with something else"


def default_backend(config: Config) -> str:
    """What the server would choose here."""
    architecture = open_checkpoint(config.model.path).architecture
    return "torch" if isinstance(find_native(config, architecture, on_gpu=False), str) else "native"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.profile_step", description="Where a decode step's time goes.")
    defaults = ModelConfig()
    parser.add_argument("--model", default=defaults.path, help="as model.path (default %(default)s)")
    parser.add_argument("--dtype", default=defaults.dtype, help="as model.dtype")
    parser.add_argument(
        "--quantization", default=defaults.quantization, choices=("auto", "none"), help="as model.quantization"
    )
    parser.add_argument(
        "--backend", default="", help="native, torch, or both: native,torch; default: what the server would choose"
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
    backends = [part.strip() for part in args.backend.split(",") if part.strip()]
    for backend in backends:
        if backend not in KINDS or backends.count(backend) > 1:
            parser.error(f"--backend: {args.backend} is neither native nor torch nor both")
    num_blocks = max(row_counts) * (args.context // CacheConfig().block_size + 2)
    config = Config(
        model=ModelConfig(path=args.model, dtype=args.dtype, quantization=args.quantization, device="cpu"),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_sequences=max(row_counts)),
        executor=ExecutorConfig(threads=args.threads),
    )
    try:
        result = profile(config, backends or [default_backend(config)], row_counts, args.context, args.steps)
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return 1
    print("\n\n".join([*(table(result, backend) for backend in result["backends"]), bandwidth(result)]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
