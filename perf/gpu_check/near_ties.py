"""Whether two runs of the same requests agree, token for token or up to rounding.

Another batch shape takes other kernels, which round differently; in bf16 that moves a logit by about a hundredth. Two
greedy runs may therefore part where the two best tokens were that close, and nowhere else. Pure.
"""

from collections.abc import Sequence
from typing import Any

from perf.gpu_check.session import Answer

# Log-probabilities that rounding may move past each other: a few units in the last place of logits around 4.
MARGINS = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}


def same_tokens(left: Sequence[list[int]], right: Sequence[list[int]]) -> dict[str, Any]:
    """Exact agreement: for runs that make the same batches with the same kernels."""
    changed = [index for index, (one, other) in enumerate(zip(left, right, strict=True)) if one != other]
    found: dict[str, Any] = {"passed": not changed and all(left), "num_sequences": len(left), "changed": len(changed)}
    if changed:
        first = changed[0]
        found["first"] = {"sequence": first, "position": first_difference(left[first], right[first])}
    return found


def same_up_to_rounding(left: Sequence[Answer], right: Sequence[Answer], margin: float) -> dict[str, Any]:
    """Greedy agreement up to the first near tie of each sequence; `left` carries log-probabilities of alternatives."""
    changed, wrong, largest = 0, [], 0.0
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        position = first_difference(one.tokens, other.tokens)
        if position is None:
            continue
        changed += 1
        gap = _gap(one, other, position)
        if gap is None or gap > margin:
            wrong.append({"sequence": index, "position": position, "gap": gap})
        else:
            largest = max(largest, gap)
    return {
        "passed": not wrong and all(answer.tokens for answer in left),
        "num_sequences": len(left),
        "changed_by_rounding": changed - len(wrong),
        "largest_tie": round(largest, 5),
        "margin": margin,
        "wrong": wrong[:4],
    }


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position where two sequences part, or where one ends."""
    for position, (one, other) in enumerate(zip(left, right)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _gap(one: Answer, other: Answer, position: int) -> float | None:
    """How much less likely the other's token was here; None where it was not even among the alternatives."""
    if position >= min(len(one.tokens), len(other.tokens), len(one.logprobs)):
        return None
    entry = one.logprobs[position]
    alternatives = dict(zip(entry.top_token_ids, entry.top_logprobs))
    alternative = alternatives.get(other.tokens[position])
    return None if alternative is None else abs(entry.logprob - alternative)
