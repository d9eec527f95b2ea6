"""Part 1: is what the engine says right, and does nothing that should not matter change it?

Each check drives real engines and compares tokens. Where two runs make the same batches they must agree to the last
token; where they cannot, they may part at near ties only. Knows requests and answers; no tensors.
"""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from asyncllm.types import FinishReason, SamplingParams
from perf.gpu_check.against_transformers import compare_with_transformers
from perf.gpu_check.embedded import embedded_model_answers
from perf.gpu_check.experts import experts_agree
from perf.gpu_check.findings import Findings, Found
from perf.gpu_check.kernel_tests import KernelTests
from perf.gpu_check.lab import Lab
from perf.gpu_check.near_ties import MARGINS, same_tokens, same_up_to_rounding
from perf.gpu_check.requests import Request
from perf.gpu_check.setup import Setup

NUM_ALTERNATIVES = 8  # enough that the token of a near tie is among them

Check = Callable[[Lab, Findings, Found], None]


def run(setup: Setup, findings: Findings) -> None:
    """All checks. Those that pass say `passed`: true; whoever merges the parts counts the others."""
    # Compiling kernels takes cores, the checks take the device: they run side by side.
    with KernelTests(setup) as kernel_tests, Lab(setup) as lab:
        for name, check in _CHECKS.items():
            findings.run(name, lambda found, check=check: check(lab, findings, found))  # type: ignore[misc]
        findings.run("kernels", lambda found: kernel_tests.finish(findings.box, found))


def graphs_change_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """Captured graphs against eager steps: the same batches, so the same tokens."""
    requests = lab.requests(seed=1)
    replayed = lab.engine().run(requests, findings.box, at_once=True)
    eager = lab.engine(executor__disable_cuda_graph=True).run(requests, findings.box, at_once=True)
    found |= same_tokens(replayed.tokens, eager.tokens)
    found["graph_share"] = replayed.figures()["graph_share"]


def overlap_changes_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """Two steps in flight against one."""
    requests = lab.requests(seed=2)
    ahead = lab.engine().run(requests, findings.box, at_once=True)
    behind = lab.engine(executor__overlap=False).run(requests, findings.box, at_once=True)
    found |= same_tokens(ahead.tokens, behind.tokens)


def mixed_rows_change_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """Rows with penalties, limits and log-probabilities between plain ones, two steps in flight against one."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "frequency_penalty": 0.7, "logprobs": 0},
        {"temperature": 1.0, "min_p": 0.05},
        {"logit_bias": ((7, 3.0), (11, -100.0))},
        {"temperature": 0.6},
    )
    requests = [
        Request(prompt, lab.greedy(seed=index, **kinds[index % len(kinds)]))
        for index, prompt in enumerate(lab.prompts(seed=3))
    ]
    ahead = lab.engine().run(requests, findings.box, at_once=True)
    behind = lab.engine(executor__overlap=False).run(requests, findings.box, at_once=True)
    found |= same_tokens(ahead.tokens, behind.tokens)
    found["logprobs_complete"] = all(
        len(answer.logprobs) == (len(answer.tokens) if request.params.logprobs is not None else 0)
        for request, answer in zip(requests, ahead.answers, strict=True)
    )
    found["passed"] &= found["logprobs_complete"]


def warm_prefix_changes_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """The same prompts twice: the second time their beginnings come from the cache, and prefill computes less."""
    requests = lab.requests(seed=4, params=lab.greedy(logprobs=NUM_ALTERNATIVES))
    engine = lab.engine()
    cold = engine.run(requests, findings.box, at_once=True)
    warm = engine.run(requests, findings.box, at_once=True)
    found |= same_up_to_rounding(cold.answers, warm.answers, MARGINS[lab.scale.dtype])
    found["cached_tokens"] = sum(answer.started.num_cached_tokens for answer in warm.answers if answer.started)
    block_size = lab.scale.block_size
    expected = sum((len(request.prompt) - 1) // block_size * block_size for request in requests)
    found["passed"] &= found["cached_tokens"] == expected


def preemption_changes_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """A pool that cannot hold all sequences to their end, against one that can."""
    requests = lab.requests(seed=5, params=lab.greedy(logprobs=NUM_ALTERNATIVES))
    lengths = [len(request.prompt) + request.params.max_tokens for request in requests]
    block_size = lab.scale.block_size
    num_prompt_blocks = sum(-(-len(request.prompt) // block_size) for request in requests)
    # Room for the longest alone, and for all prompts with the margin that admission keeps, but not for all answers.
    num_blocks = max(-(-max(lengths) // block_size), num_prompt_blocks) + 1
    roomy = lab.engine().run(requests, findings.box, at_once=True)
    tiny = lab.engine(cache__num_blocks=num_blocks).run(requests, findings.box, at_once=True)
    found |= same_up_to_rounding(roomy.answers, tiny.answers, MARGINS[lab.scale.dtype])
    found["num_preemptions"] = tiny.stats.num_preemptions
    found["passed"] &= found["num_preemptions"] > 0


def aborts_leak_nothing(lab: Lab, findings: Findings, found: Found) -> None:
    """Requests that are aborted after a random number of tokens, some before their first; the pool must be whole."""
    rng = random.Random(6)
    max_tokens = lab.scale.check_output_tokens
    prompts = lab.prompts(
        6, tuple(rng.randrange(1, max(lab.scale.check_prompt_tokens)) for _ in range(lab.scale.num_aborts))
    )
    requests = [Request(prompt, SamplingParams(max_tokens=max_tokens, seed=i)) for i, prompt in enumerate(prompts)]
    abort_after = {index: rng.randrange(max_tokens) for index in range(len(requests))}
    done = lab.engine().run(requests, findings.box, abort_after=abort_after)
    reasons = [answer.finished.reason for answer in done.answers if answer.finished]
    found["num_requests"] = len(requests)
    found["num_aborted"] = sum(reason is FinishReason.ABORT for reason in reasons)
    found["num_used_blocks"] = done.stats.num_used_blocks
    found["num_running"] = done.stats.num_running + done.stats.num_waiting
    # Some end by themselves: the abort of a request's last tokens comes too late.
    found["passed"] = (
        done.is_complete
        and len(reasons) == len(requests)
        and found["num_aborted"] > 0
        and found["num_used_blocks"] == found["num_running"] == 0
    )


def batch_changes_little(lab: Lab, findings: Findings, found: Found) -> None:
    """One text with one seed, alone and in a full batch of itself: reported, since bf16 may part there by nature.

    What must hold in any precision is that all rows of the batch end, and that running it again changes nothing.
    """
    (prompt,) = lab.prompts(7, (max(lab.scale.check_prompt_tokens),))
    params = msgspec.structs.replace(lab.greedy(), temperature=1.0, seed=77)
    # Salts keep the cache out of it: a warm prefix would make other batches.
    alone, first, second = (
        [Request(prompt, params, f"{name}{index}") for index in range(count)]
        for name, count in (("alone", 1), ("first", lab.scale.check_max_batch), ("second", lab.scale.check_max_batch))
    )
    engine = lab.engine()
    single = engine.run(alone, findings.box, at_once=True).tokens[0]
    once = engine.run(first, findings.box, at_once=True).tokens
    again = engine.run(second, findings.box, at_once=True).tokens
    found |= same_tokens(once, again)
    found["batch"] = len(once)
    found["changed_against_alone"] = sum(tokens != single for tokens in once)
    found["different_texts_in_batch"] = len({tuple(tokens) for tokens in once})


_CHECKS: dict[str, Check] = {
    "transformers": compare_with_transformers,
    "graphs": graphs_change_nothing,
    "overlap": overlap_changes_nothing,
    "mixed_rows": mixed_rows_change_nothing,
    "prefix_cache": warm_prefix_changes_nothing,
    "preemption": preemption_changes_nothing,
    "aborts": aborts_leak_nothing,
    "batch_invariance": batch_changes_little,
    "embedded": embedded_model_answers,
    "experts": experts_agree,
}
