"""What a run measures and on what: the settings handed to every part, and the two sizes of a run.

A rehearsal takes the same path through the same code on a CPU, with shapes so small that Triton's interpreter can
follow: nothing is to be executed for the first time on a borrowed GPU. Torch-free.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from asyncllm.config import ENV_PREFIX, Config

PEER_SECONDS = 120.0  # that the workload gets more for every peer of the command line
PARTS = ("correct", "decode", "workload", "http")
CHECKS = (
    "transformers",
    "graphs",
    "overlap",
    "mixed_rows",
    "prefix_cache",
    "preemption",
    "aborts",
    "batch_invariance",
    "embedded",
    "experts",
    "kernels",
)
MAIN_MODEL = "qwen3-0.6b"


class Scale(msgspec.Struct, frozen=True):
    """How much of everything. Seconds are what a part may take before it stops by itself."""

    part_seconds: dict[str, float]
    device: str
    dtype: str
    max_batched_tokens: int
    block_size: int
    # correct
    check_layers: int
    check_dtypes: tuple[str, ...]  # in which logits and tokens are compared with transformers
    check_prompt_tokens: tuple[int, ...]  # in all as many as a captured prefill: padded ones may round differently
    check_output_tokens: int
    check_max_batch: int
    num_aborts: int
    experts_check_rows: tuple[int, ...]
    kernel_tests: tuple[str, ...]
    # ceilings
    copy_bytes: int
    read_bytes: int
    gemm_size: int
    skinny_rows: tuple[int, ...]
    beyond_l2_bytes: int  # weights rotated through, so that none is found in the cache
    # decode
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    main_context: int
    num_steps: int
    kv_gib: float  # 0 = what the device has left
    prefill_graph_tokens: int  # captured where no prompts are computed: the fewest the configuration allows
    other_models: dict[str, tuple[int, ...]]  # batches at the main context
    experts_rows: tuple[int, ...]  # tokens of a step through a layer of experts
    experts_dense_rows: int  # up to which the dense way is measured beside
    pdl_batches: tuple[int, ...]
    attention_batches: tuple[int, ...]
    profile_batches: tuple[int, ...]
    # workload
    num_requests: int
    min_tokens: int  # of prompts and answers alike
    max_tokens: int
    max_prompt_token_id: int
    workload_seconds: float  # of one run
    peer_seconds: float
    # http
    num_streams: int
    stream_prompt_tokens: int
    stream_output_tokens: int
    closed_loop_requests: int
    idle_requests: int  # one after the other
    rate_seconds: float
    load_shares: tuple[float, ...]  # of the measured saturation


FULL = Scale(
    part_seconds={"correct": 145.0, "decode": 140.0, "workload": 105.0, "http": 90.0},
    device="cuda",
    dtype="bfloat16",
    max_batched_tokens=2048,
    block_size=16,
    check_layers=4,
    check_dtypes=("float32", "bfloat16"),
    check_prompt_tokens=(5, 16, 33, 64, 100, 129, 200, 349),
    check_output_tokens=64,
    check_max_batch=64,
    num_aborts=1000,
    experts_check_rows=(1, 17, 64, 300, 2048),
    kernel_tests=("tests/attention", "tests/layers"),
    copy_bytes=4 * 2**30,
    read_bytes=8 * 2**30,
    gemm_size=8192,
    skinny_rows=(1, 8, 16, 32, 64),
    beyond_l2_bytes=400 * 2**20,
    batches=(1, 8, 32, 64, 128, 256),
    contexts=(256, 1024, 4096),
    main_context=1024,
    num_steps=64,
    kv_gib=0.0,
    prefill_graph_tokens=0,
    other_models={"llama-3.2-1b": (1, 32, 256), "llama-3.1-8b": (1, 32)},
    experts_rows=(1, 8, 32, 64, 256, 2048),
    experts_dense_rows=64,
    pdl_batches=(1, 8, 32),
    attention_batches=(1, 8, 32, 128, 256),
    profile_batches=(1, 256),
    num_requests=256,
    min_tokens=100,
    max_tokens=1024,
    max_prompt_token_id=10000,
    workload_seconds=25.0,
    peer_seconds=40.0,
    num_streams=40,
    stream_prompt_tokens=128,
    stream_output_tokens=256,
    closed_loop_requests=400,
    idle_requests=20,
    rate_seconds=5.0,
    load_shares=(0.25, 0.5, 0.75, 0.9),
)

REHEARSAL = Scale(
    part_seconds=dict.fromkeys(PARTS, 240.0),
    device="cpu",
    dtype="float32",  # bf16 products are silently wrong in Triton's interpreter
    max_batched_tokens=10,
    block_size=4,
    check_layers=1,
    check_dtypes=("float32",),
    check_prompt_tokens=(3, 7),
    check_output_tokens=3,
    check_max_batch=2,
    num_aborts=4,
    experts_check_rows=(3,),
    kernel_tests=("tests/executor/test_noise.py",),
    copy_bytes=2**20,
    read_bytes=2**20,
    gemm_size=64,
    skinny_rows=(1,),
    beyond_l2_bytes=2**14,
    batches=(1, 2),
    contexts=(8, 16),
    main_context=16,
    num_steps=2,
    kv_gib=2**-8,
    prefill_graph_tokens=0,
    other_models={"llama-3.2-1b": (1,)},
    experts_rows=(2,),
    experts_dense_rows=2,
    pdl_batches=(1,),
    attention_batches=(2,),
    profile_batches=(1, 2),
    num_requests=2,
    min_tokens=2,
    max_tokens=4,
    max_prompt_token_id=300,
    workload_seconds=60.0,
    peer_seconds=60.0,
    num_streams=2,
    stream_prompt_tokens=4,
    stream_output_tokens=4,
    closed_loop_requests=3,
    idle_requests=2,
    rate_seconds=0.5,
    load_shares=(0.5,),
)


class Setup(msgspec.Struct, frozen=True):
    """One run, as its parts are told; travels to their processes as JSON."""

    directory: str  # for what the parts leave to each other; gone at the end
    rehearse: bool = False
    backend: str = "triton"  # executor.attention_backend
    peers: dict[str, str] = {}  # name -> command

    @property
    def scale(self) -> Scale:
        """How much to measure."""
        return REHEARSAL if self.rehearse else FULL

    def part_seconds(self, name: str) -> float:
        """What a part may take."""
        peers = PEER_SECONDS * len(self.peers) if name == "workload" else 0.0
        return self.scale.part_seconds[name] + peers

    def settings(self, keys: dict[str, Any] | None = None) -> dict[str, Any]:
        """What is set of the configuration, such as {"executor.overlap": False}; `keys` are laid over it."""
        scale = self.scale
        return {
            "model.load_format": "dummy",
            "model.dtype": scale.dtype,
            "model.device": scale.device,
            "cache.block_size": scale.block_size,
            "scheduler.max_batched_tokens": scale.max_batched_tokens,
            "executor.attention_backend": self.backend,
        } | (keys or {})

    def config(self, keys: dict[str, Any] | None = None) -> Config:
        """The configuration of an engine in this process."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in self.settings(keys).items():
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = value
        return msgspec.convert(tables, Config)

    def environment(self, keys: dict[str, Any] | None = None) -> dict[str, str]:
        """The same for a server process: every key has a variable."""
        return {
            f"{ENV_PREFIX}{key.replace('.', '__').upper()}": str(value) for key, value in self.settings(keys).items()
        }


class Box:
    """A stretch of time that must not be exceeded; loops look at it between rounds."""

    __slots__ = ("_clock", "_end_s")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, not below zero."""
        return max(0.0, self._end_s - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self.left_s == 0.0

    def part(self, seconds: float) -> "Box":
        """A box within this one."""
        return Box(min(seconds, self.left_s), self._clock)
