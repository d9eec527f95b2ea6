"""The seam between deciding and computing: a step plan goes in, sampled token ids come out.

Columnar on purpose: an executor turns each list into one tensor. No torch here, so that the engine and its tests run
without it. Everything in this module is used on the engine thread only.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from asyncllm.types import Capacity, Floats, SamplingParams, TokenLogprobs

# `Executor.balance_tokens` of torch. Steps of a 135M model in bfloat16 on 2 cores, 200 tokens of context, one row:
# 24 ms for a token, 29 for 5, 37 for 9, 49 for 17, as if reading the weights cost what 16 tokens do. A GPU has some 300
# operations for each byte it reads and needs 2 for each of a bfloat16 weight; this one is not measured.
CPU_BALANCE_TOKENS, GPU_BALANCE_TOKENS = 16, 256
# `Executor.most_prompt_tokens` on a CPU. The kernels compute a prompt of 256 tokens as fast per token as one of 2048.
CPU_PROMPT_TOKENS = 256


class SlotInit(msgspec.Struct):
    """A sequence enters a slot: what the device must know before its first step there."""

    slot: int
    params: SamplingParams
    token_ids: Sequence[int]  # prompt, and whatever was generated before a preemption; owned by the sequence, read only
    num_prompt_tokens: int
    adapter: int = 0  # in the order of lora.adapters, from 1; 0 = none


class StepPlan(msgspec.Struct):
    """One forward pass over rows of one or more query tokens each. Decode rows come first.

    A decode row has exactly one query token: the one its slot sampled last, which may not have reached the host yet.
    All other rows carry their tokens in `token_ids`.

    A row with drafts carries its sequence's last token and guesses at what follows, and samples behind each of these
    query tokens. Its slot then holds the token that the host will come to as the last one: the sample behind the
    longest run of drafts that equal the samples before them. The noise of a sample depends on its position alone, so
    these are the tokens that decode rows would have sampled, whatever the temperature.
    """

    slots: list[int]  # [S]
    num_query_tokens: list[int]  # [S]
    num_computed_tokens: list[int]  # [S], tokens whose KV is in the cache before this step
    samples: list[bool]  # [S], False for a prefill chunk that does not reach the end of the known tokens
    num_decode_rows: int
    token_ids: list[int]  # query tokens of rows num_decode_rows.., flattened
    new_slots: list[SlotInit]  # applied first
    block_writes: list[tuple[int, int, int]]  # (slot, column of the block table, block id), applied second
    banned: dict[int, list[int]]  # row -> token ids that must not be sampled in this step (min_tokens, bad_words)
    logprob_rows: dict[int, int]  # row -> alternatives wanted for the sampled token
    prompt_logprob_rows: dict[int, tuple[int, list[int]]]
    # row -> (alternatives, target ids): logits of the row's first len(targets) query tokens are scored against targets
    masks: dict[int, bytes] = {}  # row that samples -> tokens it may sample, see `Constraint.mask`
    pooled_rows: dict[int, tuple[int, int]] = {}
    # row, never a decode row -> [first, end) of its query tokens whose hidden states, behind the last norm, are summed
    drafts: dict[int, list[int]] = {}  # row, never a decode row, that samples -> its query tokens but the first

    @property
    def num_tokens(self) -> int:
        """Query tokens in the whole step."""
        return self.num_decode_rows + len(self.token_ids)


class StepResult(msgspec.Struct):
    """What a step produced. `token_ids` is parallel to the plan's rows; -1 where one does not sample or has drafts."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] | None = None  # by row
    prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None  # by row, one per target
    replayed: bool = False  # whether a captured graph computed the step
    device_s: float = 0.0  # the device's time for the step; 0 where nobody measured it
    gap_s: float | None = None  # the device's idle time before the step, for whatever reason; None where unknown
    pooled: dict[int, Floats] | None = None  # by row, [hidden] float32: the sum over its pooled tokens
    verified: dict[int, list[int]] | None = None  # by row with drafts: the samples behind each of its query tokens


class StepHandle(Protocol):
    """A step in flight."""

    def wait(self) -> StepResult:
        """Block (GIL released) until the device is done."""
        ...


class Executor(Protocol):
    """Runs plans in order on one device. Built, used and closed on the engine thread."""

    capacity: Capacity
    depth: int  # steps that may be in flight: 1 where launching computes, 2 where the device runs beside the host
    facts: dict[str, str]  # device, dtype, memory: for /health and the start-up log
    balance_tokens: int  # query tokens of a step whose arithmetic takes as long as reading the weights
    most_prompt_tokens: int  # of a step, beyond which more only take longer, and let all others wait

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step; returns at once where the device is asynchronous."""
        ...

    def improve(self) -> bool:
        """Do one piece of work that makes later steps faster, such as capturing a graph; False when none is left.

        Called between steps. May take as long as a few steps.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...
