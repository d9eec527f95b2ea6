"""A router over a scripted engine, and the few things that tests say to it."""

import msgspec

from asyncllm.config import ApiConfig, Config, SchedulerConfig
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.router import Router
from asyncllm.router.stream import ChoiceInput, RequestStream
from asyncllm.router.tokenizer import Tokenizer
from asyncllm.types import Pooling, SamplingParams
from tests.fakes_text import RecordingMetrics, ScriptedEngine, byte_text, byte_tokenizer


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.look_s = 0.0  # that every look at it takes

    def __call__(self) -> float:
        self.now_s += self.look_s
        return self.now_s


class Bench:
    """Router, engine and metrics of one test."""

    def __init__(self, *, room: int = 1_000_000, stream_interval: int = 1, **scheduler: object) -> None:
        self.engine = ScriptedEngine(room)
        self.metrics = RecordingMetrics()
        self.clock = Clock()
        text = byte_text()
        self.tokenizer = Tokenizer(byte_tokenizer(), text)
        self.template = ChatTemplate(text, self.tokenizer)
        api = ApiConfig(stream_interval=stream_interval)
        config = Config(scheduler=msgspec.convert(scheduler, SchedulerConfig), api=api)
        self.router = Router(self.engine, self.tokenizer, self.template, config, self.metrics, clock=self.clock)
        self.router.start()

    async def ready(self) -> "Bench":
        self.engine.ready()
        await self.router.wait_ready()
        return self

    def submit(self, *choices: ChoiceInput, public_id: str = "r", **options: object) -> RequestStream:
        return self.router.submit(public_id, choices or [choice()], **options)

    def drain(self, *outputs: object) -> None:
        """Outputs and the wake-up, both at once: the loop need not run."""
        self.engine.outputs.extend(outputs)
        self.router.drain()

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    async def close(self) -> None:
        await self.router.close(1.0)


def choice(
    prompt: str = "Hi",
    *,
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
    skip_special_tokens: bool = True,
    prompt_index: int = 0,
    pooling: Pooling | None = None,
    **params: object,
) -> ChoiceInput:
    return ChoiceInput(
        prompt_token_ids=list(prompt.encode()),
        params=SamplingParams(**({"max_tokens": 100} | params)),
        stop=stop,
        include_stop=include_stop,
        skip_special_tokens=skip_special_tokens,
        prompt_index=prompt_index,
        pooling=pooling,
    )
