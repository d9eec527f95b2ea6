"""The real model in float32: drafts change no token, greedy and drawn, in chunks, with warm prefixes and preempted."""

import asyncio

from asyncllm import AsyncLLM

PASSAGE = "The wheel of the mill turns when the river is high. The wheel of the mill"
PROMPTS = [PASSAGE, PASSAGE + " turns when", "one two three four " * 5]
PARAMS = [{"temperature": 0.0}, {"temperature": 0.3, "seed": 5}, {"temperature": 0.0}]


async def answers() -> tuple[list[list[tuple]], int, int]:
    """Of the same prompts without drafts and with, and how many drafts were right, and preemptions."""
    ways = []
    async with AsyncLLM(
        dtype="float32",
        threads=1,
        max_sequences=3,
        max_context_length=64,
        block_size=4,
        num_blocks=20,
        max_chunk_tokens=9,
        prompt_lookup_min=2,
        auto_off=False,
    ) as llm:
        for drafts in (0, 5):
            params = [each | {"max_tokens": 16, "speculative_tokens": drafts} for each in PARAMS]
            outputs = await llm.generate(PROMPTS, params)
            ways.append([(output.choices[0].token_ids, output.choices[0].finish_reason) for output in outputs])
        stats = llm.serving.metrics.stats
        return ways, sum(stats.num_accepted_tokens), stats.num_preemptions


def test_drafts_change_no_token() -> None:
    (without, drafted), num_accepted, num_preemptions = asyncio.run(answers())
    assert drafted == without
    assert num_accepted >= 5
    assert num_preemptions > 0
