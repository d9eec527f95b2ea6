"""The embedded model on the device, where its file is installed: real weights, so real words can be expected."""

from asyncllm.errors import StartupError
from asyncllm.weights.checkpoint import EMBEDDED_MODEL, open_checkpoint
from perf.gpu_check.findings import Findings, Found
from perf.gpu_check.lab import Lab
from perf.gpu_check.near_ties import MARGINS, same_up_to_rounding
from perf.gpu_check.requests import Request
from perf.gpu_check.session import EngineSession, Run

PROMPT, EXPECTED = "The capital of France is", "Paris"
NUM_BLOCKS = 256
NUM_ALTERNATIVES = 8


def embedded_model_answers(lab: Lab, findings: Findings, found: Found) -> None:
    """Greedy words of the kernels and graphs against those of plain torch on the same device."""
    try:
        checkpoint = open_checkpoint(EMBEDDED_MODEL)
    except StartupError as error:
        found |= {"passed": True, "skipped": error.message}
        return
    tokenizer = checkpoint.tokenizer()
    params = lab.greedy(logprobs=NUM_ALTERNATIVES)
    request = Request(tokenizer.encode(PROMPT).ids, params)

    def run(backend: str) -> Run:
        keys = {
            "model.load_format": "auto",
            "model.max_context_length": 512,
            "cache.num_blocks": NUM_BLOCKS,
            "scheduler.max_sequences": 4,
            "executor.attention_backend": backend,
        }
        with EngineSession(lab.setup.config(keys), checkpoint, debug=True) as session:
            return session.run([request], findings.box)

    # The interpreter would take minutes over 30 layers; a rehearsal has plain torch answer alone.
    reference = run("torch")
    ours = reference if lab.setup.rehearse else run(lab.setup.backend)
    found |= same_up_to_rounding(ours.answers, reference.answers, MARGINS[lab.scale.dtype])
    found["text"] = tokenizer.decode(ours.tokens[0])
    found["passed"] &= EXPECTED in found["text"]
