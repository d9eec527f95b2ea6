"""What the checks of part 1 share: engines by what is special about them, and seeded requests.

An engine is kept for the next check that wants the same one, and replaced if it died.
"""

import random
from typing import Any

import msgspec

from asyncllm.models.config import ModelArchitecture
from asyncllm.types import SamplingParams
from perf.gpu_check.models import architecture, checkpoint
from perf.gpu_check.requests import Request
from perf.gpu_check.session import EngineSession
from perf.gpu_check.setup import MAIN_MODEL, Setup

ROOMY_BLOCKS = 4096  # of KV, where the size of the cache is not the point; few enough to check after every step


class Lab:
    """The main model with fewer layers, in engines of different settings. A context manager: it closes them all."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.scale = setup.scale
        self.shapes: ModelArchitecture = msgspec.structs.replace(
            architecture(MAIN_MODEL, setup.rehearse), num_layers=self.scale.check_layers
        )
        self._sessions: dict[tuple[tuple[str, Any], ...], EngineSession] = {}  # by their settings

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.close()

    def engine(self, **keys: Any) -> EngineSession:
        """An engine with these keys, such as executor__overlap=False; all its invariants are asserted at each step."""
        scale = self.scale
        settings = {
            "model.max_context_length": max(scale.check_prompt_tokens) + scale.check_output_tokens,
            "cache.num_blocks": ROOMY_BLOCKS,
            "scheduler.max_sequences": scale.check_max_batch,
            "scheduler.max_queued": 2048,
            "executor.cuda_graph_max_bs": scale.check_max_batch,
        } | {key.replace("__", "."): value for key, value in keys.items()}
        key = tuple(sorted(settings.items()))
        session = self._sessions.get(key)
        if session is None or session.is_dead:
            config = self.setup.config(settings)
            session = EngineSession(config, checkpoint(MAIN_MODEL, self.shapes), debug=True)
            self._sessions[key] = session
        return session

    def prompts(self, seed: int, lengths: tuple[int, ...] | None = None) -> list[list[int]]:
        """Random token ids of the scale's lengths; another seed shares no prefix."""
        rng = random.Random(seed)
        return [
            [rng.randrange(self.shapes.vocab_size) for _ in range(length)]
            for length in lengths or self.scale.check_prompt_tokens
        ]

    def requests(self, seed: int, params: SamplingParams | None = None, cache_salt: str = "") -> list[Request]:
        """One request per prompt length, greedy unless told otherwise, each with a seed of its own."""
        params = params or self.greedy()
        return [
            Request(prompt, msgspec.structs.replace(params, seed=1000 * seed + index), cache_salt)
            for index, prompt in enumerate(self.prompts(seed))
        ]

    def greedy(self, **fields: Any) -> SamplingParams:
        """Greedy for as many tokens as the scale says."""
        return SamplingParams(**{"max_tokens": self.scale.check_output_tokens, "temperature": 0.0} | fields)
