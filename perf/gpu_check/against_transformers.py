"""The whole model beside `transformers` on the same device, with the same random weights.

Greedy answers of the engine are read again by the reference in one pass each: every token must be the reference's best,
or so close to it that rounding decides, and its log-probability must be the reference's. Knows both models as wholes.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perf.gpu_check.findings import Findings, Found
from perf.gpu_check.lab import Lab
from perf.gpu_check.models import checkpoint, hugging_face_config
from perf.gpu_check.near_ties import same_tokens
from perf.gpu_check.requests import Request
from perf.gpu_check.session import Answer
from perf.gpu_check.setup import MAIN_MODEL

FLOAT32_MARGIN = 2e-3  # of a logit: the same sums in another order
NOISE_FACTOR = 3.0  # two models that each are so far from the truth may be twice as far apart; and some room


def compare_with_transformers(lab: Lab, findings: Findings, found: Found) -> None:
    """In each precision of the scale; in bf16 the margin is what bf16 does to the reference itself."""
    exact = build_reference(lab, torch.float32)
    for dtype in lab.scale.check_dtypes:
        if findings.late("transformers"):
            found["passed"] = False
            return
        engine = lab.engine(model__dtype=dtype)
        scored = engine.run(lab.requests(seed=8, params=lab.greedy(logprobs=0)), findings.box, at_once=True)
        requests = lab.requests(seed=8, params=lab.greedy(), cache_salt="plain")
        plain = engine.run(requests, findings.box, at_once=True)
        reference = exact if dtype == "float32" else build_reference(lab, getattr(torch, dtype))
        result = found[dtype] = judge(requests, scored.answers, reference, exact)
        # The path with log-probabilities samples from logits the plain one never shows; both must choose alike.
        result["plain_path"] = same_tokens(scored.tokens, plain.tokens)
    found["passed"] = all(found[dtype]["passed"] for dtype in lab.scale.check_dtypes)


def build_reference(lab: Lab, dtype: torch.dtype) -> Any:
    """transformers' model with the weights the engine draws."""
    config = AutoConfig.for_model(**hugging_face_config(lab.shapes))
    with torch.device(lab.scale.device):  # where drawing weights that are about to be replaced takes no time
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    # Drawn in the checkpoint's precision and widened: the engine's float32 weights are these very numbers.
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint(MAIN_MODEL, lab.shapes).tensors()}
    absent = model.load_state_dict(weights, strict=False)
    assert not absent.unexpected_keys and set(absent.missing_keys) <= {"lm_head.weight"}, absent
    return model.eval()


@torch.inference_mode()
def judge(requests: list[Request], answers: list[Answer], reference: Any, exact: Any) -> dict[str, Any]:
    """Hold every answer against the reference; `exact` is the float32 one, by which the reference's noise is known."""
    noise = logprob_error = worst_gap = 0.0
    num_tokens = num_equal = 0
    for request, answer in zip(requests, answers, strict=True):
        logits = _logits(reference, request.prompt, answer.tokens)  # [T, V] float32
        if reference is not exact:
            noise = max(noise, float((logits - _logits(exact, request.prompt, answer.tokens)).abs().max()))
        chosen = torch.tensor(answer.tokens, device=logits.device)
        rows = torch.arange(len(chosen), device=logits.device)
        gaps = logits.max(dim=-1).values - logits[rows, chosen]
        expected = logits.log_softmax(dim=-1)[rows, chosen]
        ours = torch.tensor([entry.logprob for entry in answer.logprobs], device=logits.device)
        num_tokens += len(chosen)
        num_equal += int((gaps == 0).sum())
        worst_gap = max(worst_gap, float(gaps.max()))
        logprob_error = max(logprob_error, float((ours - expected).abs().max()))
    margin = NOISE_FACTOR * noise if reference is not exact else FLOAT32_MARGIN
    return {
        "passed": num_tokens > 0 and worst_gap <= margin and logprob_error <= margin,
        "num_tokens": num_tokens,
        "num_best_of_reference": num_equal,
        "worst_gap": round(worst_gap, 6),
        "logprob_error": round(logprob_error, 6),
        "margin": round(margin, 6),
    }


def _logits(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """The logits that each output token was chosen from: [len(output), V] float32."""
    input_ids = torch.tensor([prompt + output[:-1]], device=model.device)
    logits: torch.Tensor = model(input_ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    return logits
