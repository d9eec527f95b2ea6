"""When does prompt lookup pay? Answers that repeat their prompt and answers that do not, with drafts and without.

    python -m perf.speculation [--rounds 3] [--concurrency 1,8] [--output-tokens 160] [--drafts 8]

One engine in this process, greedy, prompts found in the prefix cache. `edit` asks for a passage with a small change,
`summarise` for a shorter one, `free` for a story. Within a round both ways take turns, and who begins changes from
round to round. `same` says how many texts are equal with and without: in float32 all of them, in bfloat16 rounding
tips near ties over. Prints a line per cell, and one JSON line last; `--no-auto-off` shows what automatic off saves.
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from asyncllm import AsyncLLM
from perf import facts

PASSAGES = (
    "The harbour of Lindholm was built in 1743, when the old quay had become too small for the grain ships. A storm in "
    "the winter of 1798 took away half of the outer wall, and the town had to borrow money to build it again. The new "
    "wall was made of granite from the quarries of Arnby, and it still stands. When the railway came in 1869, most of "
    "the trade moved to the larger port of Westhaven, and Lindholm became a quiet town. Today the harbour is used by "
    "fishing boats and by visitors, who come for the museum of navigation and for the summer regatta.",
    "Every Tuesday the council of the village meets in the old school, which has had no pupils since 1991. The first "
    "point of the last meeting was the road to the mill: after the floods in spring, two of its bridges can carry no "
    "lorries any more. Mrs Halloran, who owns the mill, offered to pay a third of the repair if the work is done "
    "before the harvest. The second point was the street lamps, which are to be switched off between one and five in "
    "the morning. Nobody spoke against it, and the council agreed to try it until the end of the year.",
)
PROMPTS = {
    "edit": (
        "Fix the spelling mistakes in this text and return the whole text.\n\n{}",
        "Repeat the following text word for word, but write every year in brackets.\n\n{}",
        "Rewrite this text with every sentence as a line of its own. Change nothing else.\n\n{}",
        "Return this text unchanged, with a title in front of it.\n\n{}",
    ),
    "summarise": (
        "Summarise this text in three sentences, in its own words.\n\n{}",
        "Which facts does this text name? Quote the sentences that name them.\n\n{}",
    ),
    "free": (
        "Write a story about a fisherman who finds a map. It has nothing to do with this: {:.40}",
        "Explain to a child why the sky is blue, without this phrase: {:.40}",
    ),
}


def conversations(workload: str, count: int) -> list[list[dict[str, str]]]:
    """`count` different chats of a workload, as far as it has so many."""
    templates = PROMPTS[workload]
    pairs = [(template, passage) for passage in PASSAGES for template in templates]
    return [
        [{"role": "user", "content": template.format(passage)}]
        for template, passage in (pairs[number % len(pairs)] for number in range(count))
    ]


async def run(llm: AsyncLLM, chats: list[Any], output_tokens: int, drafts: int) -> tuple[float, list[str]]:
    """Answer all chats at once: tokens per second, and the texts."""
    begin_s = time.perf_counter()
    outputs = await llm.chat(chats, temperature=0.0, max_tokens=output_tokens, speculative_tokens=drafts)
    seconds = time.perf_counter() - begin_s
    choices = [output.choices[0] for output in outputs]
    return sum(len(choice.token_ids) for choice in choices) / seconds, [choice.text for choice in choices]


async def cell(llm: AsyncLLM, workload: str, concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
    """One workload at one concurrency, both ways."""
    chats = conversations(workload, concurrency)
    await run(llm, chats, 1, 0)  # fills the prefix cache
    stats = llm.serving.metrics
    before = stats.stats
    speeds: dict[int, list[float]] = {0: [], options.drafts: []}
    texts: dict[int, list[str]] = {}
    for number in range(options.rounds):
        ways = [0, options.drafts]
        for drafts in ways if number % 2 == 0 else ways[::-1]:
            speed, texts[drafts] = await run(llm, chats, options.output_tokens, drafts)
            speeds[drafts].append(speed)
    after = stats.stats
    num_draft_tokens = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = sum(after.num_accepted_tokens) - sum(before.num_accepted_tokens)
    without, with_drafts = (statistics.median(speeds[drafts]) for drafts in (0, options.drafts))
    return {
        "workload": workload,
        "concurrency": concurrency,
        "tokens_per_s": round(without, 1),
        "tokens_per_s_with_drafts": round(with_drafts, 1),
        "ratio": round(statistics.median(b / a for a, b in zip(speeds[0], speeds[options.drafts])), 2),
        "ratios": [round(b / a, 2) for a, b in zip(speeds[0], speeds[options.drafts])],
        "draft_tokens": num_draft_tokens,
        "accepted": round(num_accepted / num_draft_tokens, 2) if num_draft_tokens else None,
        "same": f"{sum(a == b for a, b in zip(texts[0], texts[options.drafts]))}/{len(chats)}",
    }


async def measure(options: argparse.Namespace) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Every cell; the engine's facts, and the cells."""
    concurrencies = [int(part) for part in options.concurrency.split(",")]
    cells = []
    async with AsyncLLM(
        options.model,
        dtype=options.dtype,
        max_sequences=max(concurrencies),
        disable_by_batch_size=max(concurrencies),
        prompt_lookup_min=options.lookup_min,
        prompt_lookup_max=options.lookup_max,
        auto_off=options.auto_off,
        max_context_length=1024,
    ) as llm:
        for workload in options.workloads.split(","):
            for concurrency in concurrencies:
                cells.append(await cell(llm, workload, concurrency, options))
                print("  ".join(f"{name} {value}" for name, value in cells[-1].items()), flush=True)
        return llm.facts, cells


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="When prompt lookup pays.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workloads", default=",".join(PROMPTS))
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--drafts", type=int, default=8, help="tokens guessed per step, 1 to 16")
    parser.add_argument("--lookup-min", type=int, default=3)
    parser.add_argument("--lookup-max", type=int, default=8)
    parser.add_argument("--auto-off", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    engine, cells = asyncio.run(measure(options))
    machine = facts.machine()
    report = {
        "bench": "speculation",
        "cells": cells,
        "parameters": vars(options),
        "engine": {name: engine[name] for name in ("device", "dtype", "threads") if name in engine},
        "machine": {"cpu": machine.cpu, "cores": machine.cores},
        "versions": facts.versions(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
