"""Fakes for the router's tests: an engine that a test scripts by hand, a tokenizer of bytes, metrics that remember."""

from collections import Counter, deque
from collections.abc import Callable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncllm.types import (
    Capacity,
    EngineOutput,
    EngineReady,
    Finished,
    FinishReason,
    Started,
    StepOutput,
    StepStats,
    Submit,
    TokenLogprobs,
)
from asyncllm.weights.base import TextFacts

CAPACITY = Capacity(num_blocks=257, block_size=16, max_sequences=8, max_context_length=2048, vocab_size=300)
BOS, END, START = 256, 257, 258  # ids of ByteTokenizer's special tokens; START may open a turn
SPECIALS = ("<s>", "<|end|>", "<|start|>")
CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


class ScriptedEngine:
    """The engine's handle without an engine: records what comes, and hands out what the test says."""

    def __init__(self, room: int = 1_000_000) -> None:
        """`room`: submits that fit into the ring."""
        self.room = room
        self.submits: list[Submit] = []
        self.aborts: list[int] = []
        self.outputs: deque[EngineOutput] = deque()
        self.notify: Callable[[], None] = lambda: None
        self.is_started = False
        self.is_alive = False
        self.now_s = 0.0

    def start(self, notify: Callable[[], None]) -> None:
        self.notify = notify
        self.is_started = self.is_alive = True

    def submit(self, submit: Submit, /) -> bool:
        if len(self.submits) >= self.room:
            return False
        self.submits.append(submit)
        return True

    def abort(self, request_id: int) -> None:
        self.aborts.append(request_id)

    def flush(self) -> None:
        pass

    def pop_output(self) -> EngineOutput | None:
        return self.outputs.popleft() if self.outputs else None

    @property
    def num_queued_commands(self) -> int:
        return 0

    @property
    def num_queued_outputs(self) -> int:
        return len(self.outputs)

    def stop(self) -> None:
        self.is_alive = False

    def join(self, timeout_s: float) -> bool:
        return not self.is_alive

    # --- the script --------------------------------------------------------------------------------------------------

    def push(self, *outputs: EngineOutput) -> None:
        """Put outputs into the ring and call the router, once, as the engine thread would."""
        self.outputs.extend(outputs)
        self.notify()

    def ready(self) -> None:
        self.push(EngineReady(CAPACITY, {"device": "none"}))

    def step(
        self,
        tokens: dict[int, int] | None = None,
        *,
        finished: dict[int, Finished] | None = None,
        started: dict[int, int] | None = None,
        logprobs: dict[int, TokenLogprobs] | None = None,
        prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None,
        pooled: dict[int, list[float]] | None = None,
        runs: dict[int, list[int]] | None = None,
        stats: StepStats | None = None,
    ) -> StepOutput:
        """One step, a second after the one before: a token per request id; `started`: id -> cached tokens."""
        self.now_s += 1.0
        tokens = tokens or {}
        return StepOutput(
            request_ids=list(tokens),
            token_ids=list(tokens.values()),
            finished=finished or {},
            started=started and {i: Started(cached, self.now_s) for i, cached in started.items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled and {i: np.array(sums, dtype=np.float32) for i, sums in pooled.items()},
            runs=runs,
            stats=stats,
            committed_s=self.now_s,
        )

    def say(self, request_id: int, text: str, finish: FinishReason | None = None) -> list[StepOutput]:
        """Steps that generate this text byte by byte; the last one ends the request, if `finish` is given."""
        raw = text.encode()
        steps = [self.step({request_id: byte}) for byte in raw]
        if finish is not None:
            steps[-1].finished[request_id] = Finished(finish)
        return steps


def byte_tokenizer() -> Tokenizer:
    """Token = byte, so that any cut through a character can be made; three special tokens behind them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return backend


def byte_text(**changes: object) -> TextFacts:
    """What goes with it."""
    facts: dict[str, object] = {
        "chat_template": CHATML,
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "bos_token_id": BOS,
        "eos_token_ids": (END,),
        "special_tokens": SPECIALS,
    }
    return TextFacts(**(facts | changes))  # type: ignore[arg-type]


class RecordingMetrics:
    """Remembers what was observed."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.queue: list[float] = []
        self.first_token: list[float] = []
        self.inter_token: list[tuple[float, int]] = []
        self.finished: list[tuple[str, int, int, int]] = []  # reason, prompt, cached, output tokens
        self.rejected: Counter[str] = Counter()
        self.num_wakeups = 0
        self.ring_depth = (0, 0)

    def observe_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def observe_queue(self, seconds: float) -> None:
        self.queue.append(seconds)

    def observe_first_token(self, seconds: float) -> None:
        self.first_token.append(seconds)

    def observe_inter_token(self, seconds: float, count: int = 1) -> None:
        self.inter_token.append((seconds, count))

    def observe_finished(
        self,
        reason: str,
        e2e_s: float,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        prefill_s: float,
        decode_s: float,
    ) -> None:
        self.finished.append((reason, prompt_tokens, cached_tokens, output_tokens))

    def count_rejected(self, reason: str) -> None:
        self.rejected[reason] += 1

    def observe_wakeup(self, seconds: float) -> None:
        self.num_wakeups += 1

    def set_ring_depth(self, requests: int, outputs: int) -> None:
        self.ring_depth = (requests, outputs)
