"""Embeddings of the served SmolLM2, from text to vector, against the hidden states of transformers."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from asyncllm import LLM
from asyncllm.types import Pooling
from tests.models.test_embedded import reference

__all__ = ["reference"]  # a fixture
pytestmark = pytest.mark.timeout(300)

TEXTS = [
    "The capital of France is Paris.",
    "Paris is the capital of France.",
    "Sodium chloride dissolves in water, and the solution conducts electricity. " * 5,
    "No",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options = {"max_context_length": 512, "num_blocks": 96, "max_sequences": 4, "max_batched_tokens": 48}
    with LLM("smollm2-135m-instruct", dtype="float32", **options) as llm:
        yield llm


def expected(reference: LlamaForCausalLM, token_ids: list[int], pooling: Pooling) -> torch.Tensor:
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([token_ids])).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden[-1] if pooling is Pooling.LAST else hidden.mean(0), dim=0)


@pytest.mark.parametrize("pooling", Pooling)
def test_vectors_are_those_of_transformers(llm: LLM, reference: LlamaForCausalLM, pooling: Pooling) -> None:
    for lap in range(2):  # in chunks and in mixed batches, then behind a cached prefix where there is one
        outputs = llm.embed(TEXTS, pooling=pooling.value)
        assert pooling is Pooling.MEAN or lap == 0 or outputs[2].num_cached_tokens > 0
        for output in outputs:
            ours = torch.from_numpy(output.vector)
            torch.testing.assert_close(
                ours, expected(reference, output.prompt_token_ids, pooling), rtol=1e-3, atol=1e-5
            )


def test_what_means_the_same_is_near(llm: LLM) -> None:
    same, other, far, _ = (torch.from_numpy(output.vector) for output in llm.embed(TEXTS, pooling="mean"))
    assert float(same @ other) > float(same @ far)
