"""What crosses the two rings: frozen messages to the engine, one columnar output per step back.

Plain data, no behaviour beyond arithmetic; no torch, no asyncio. Times are `time.monotonic()` seconds.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class FinishReason(Enum):
    """Why a sequence ended; the values are the words of the wire."""

    STOP = "stop"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ABORT = "abort"
    ERROR = "error"


class Pooling(Enum):
    """Which hidden states of a prompt make its embedding; the values are the words of the wire."""

    LAST = "last"  # its last token's
    MEAN = "mean"  # all of them


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens; validated by the server, so the engine may trust every field."""

    max_tokens: int  # >= 1, already fits the context behind the prompt (0: score the prompt, generate nothing)
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # int64; drawn by the server where the client gave none
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # eos included unless ignore_eos
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logprobs: int | None = None  # alternatives per generated token; 0 = the sampled token alone; None = none
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    speculative_tokens: int | None = None  # drafts to verify in a step at most, 0 = none; None = as configured

    @property
    def has_penalties(self) -> bool:
        """Whether token counts are needed to sample."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class Constraint(Protocol):
    """What a sequence's next token may be, by the tokens before it. Made on the loop, then the engine thread's alone.

    Its state depends on accepted tokens only, so a preempted sequence goes on with it as it is. What it raises ends its
    own sequence with an error.
    """

    def mask(self) -> bytes | None:
        """One bit per token, set where it may come next, in little-endian 32-bit words; None: anything may.

        Missing words forbid their tokens; bits beyond the model's vocabulary mean nothing.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The sequence goes on with this token. Raises ValueError for one it forbids."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow: the sequence has ended by itself."""
        ...


class Submit(msgspec.Struct, frozen=True):
    """loop -> engine: generate behind this prompt."""

    request_id: int  # unique for the life of the process, > 0
    prompt_token_ids: Sequence[int]  # best an array: the garbage collector looks at every element of a list
    params: SamplingParams
    arrival_s: float
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    after: int = 0  # a sibling's request_id: wait until it has computed the shared prompt; 0 = none
    constraint: Constraint | None = None  # this sequence's own
    pooling: Pooling | None = None  # hand out sums of the prompt's hidden states; with max_tokens = 0
    adapter: int = 0  # in the order of lora.adapters, from 1; 0 = none


class Abort(msgspec.Struct, frozen=True):
    """loop -> engine: free this request; harmless if it already ended."""

    request_id: int
    sent_s: float = 0.0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of one position under the raw model (before temperature and penalties)."""

    token_id: int  # the token that stands there
    logprob: float
    rank: int  # 1 = most probable
    top_token_ids: list[int]  # most probable first
    top_logprobs: list[float]


class Finished(msgspec.Struct, frozen=True):
    """The last word about a request, once."""

    reason: FinishReason
    stop_token_id: int | None = None  # the last token of token_ids, where that token is what stopped it
    error: str | None = None  # for ERROR: a sentence for the client


class Started(msgspec.Struct, frozen=True):
    """A request left the queue for the first time."""

    num_cached_tokens: int  # prompt tokens found in the prefix cache
    scheduled_s: float


class StepStats(msgspec.Struct):
    """What one step cost and how full the engine was after it. Counters of the engine's life are cumulative."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_used_blocks: int = 0  # held by sequences
    num_cached_blocks: int = 0  # free, but findable by their prefix
    num_blocks: int = 0
    num_scheduled_tokens: int = 0  # query tokens of this step
    num_decode_rows: int = 0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    commit_s: float = 0.0
    device_s: float = 0.0  # 0 = not measured
    gap_s: float | None = None  # the device's idle time before this step while there was work; None = unknown
    wakes_s: list[float] | None = None  # push -> pick-up of each command taken since the last output; None = none was
    aborts_s: list[float] | None = None  # the same for aborts, sent -> blocks freed
    num_steps: int = 0  # cumulative from here on
    num_graph_steps: int = 0
    num_preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_drafts: int = 0  # rows with drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: tuple[int, ...] = ()  # draft tokens that were right, by their place in a draft
    num_output_stalls: int = 0  # times the outputs ring was full
    device_busy_s: float = 0.0  # sum of device_s
    device_gap_s: float = 0.0  # sum of gap_s


class StepOutput(msgspec.Struct):
    """engine -> loop, one per step. Columns are parallel; the rest is sparse and None when nobody needs it."""

    request_ids: list[int]  # each once
    token_ids: list[int]  # its last token in this step
    finished: dict[int, Finished]
    logprobs: dict[int, TokenLogprobs] | None = None  # of the token in this step's columns
    prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None  # next positions of the prompt, in order
    started: dict[int, Started] | None = None
    pooled: dict[int, Floats] | None = None  # [hidden], sums of hidden states: a request's are to be added up
    runs: dict[int, list[int]] | None = None  # tokens of this step in front of the one in the columns: drafts, right
    stats: StepStats | None = None
    committed_s: float = 0.0


MIN_SAMPLES = 64  # a step may sample so many tokens, however few sequences can run


class Capacity(msgspec.Struct, frozen=True):
    """What an executor can hold, fixed after load."""

    num_blocks: int  # block 0 is the null block and never handed out
    block_size: int  # tokens
    max_sequences: int
    max_context_length: int  # tokens of prompt plus output
    vocab_size: int
    hidden_size: int = 0  # numbers of a hidden state

    @property
    def max_samples(self) -> int:
        """Tokens a step may sample: one of each sequence, or more of fewer sequences that have drafts to verify."""
        return max(self.max_sequences, MIN_SAMPLES)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens the KV cache holds when full."""
        return (self.num_blocks - 1) * self.block_size


class StartupPhase(msgspec.Struct, frozen=True):
    """engine -> loop: a phase of start-up began (`seconds` None) or ended."""

    name: str
    seconds: float | None = None


class EngineReady(msgspec.Struct, frozen=True):
    """engine -> loop: weights are loaded, the KV cache is allocated, the first step may run."""

    capacity: Capacity
    facts: dict[str, str]  # device, dtype, kv_memory and the like, for /health and the log


class EngineDead(msgspec.Struct, frozen=True):
    """engine -> loop: the thread ended by an error; nothing else will come."""

    message: str  # for clients: one sentence, no paths
    during_startup: bool = False
    detail: str = ""  # for the log, as all below: the traceback
    phase: str = ""  # of the step loop: schedule, launch, wait, commit and the like; empty before it
    step: int = 0  # that was in this phase, from 1; 0 = none was
    request_ids: list[int] = []  # in the steps in flight, oldest first: a device tells late which of them failed


EngineOutput = StepOutput | StartupPhase | EngineReady | EngineDead
EngineCommand = Submit | Abort
