"""Sampling parameters that a request leaves out are the model's own, where its makers recommend any."""

import pytest

from asyncllm.types import SamplingParams
from asyncllm.weights.base import SamplingDefaults
from tests.server.harness import FACTS, Server, running, with_facts

RECOMMENDED = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1)
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampled_with(server: Server) -> tuple[float, ...]:
    """The parameters that the last request reached the executor with."""
    params: SamplingParams = [slot.params for plan in server.executor.plans for slot in plan.new_slots][-1]
    return tuple(getattr(params, name) for name in NAMES)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_what_a_request_leaves_out_is_the_models_own(path: str) -> None:
    async with running(facts=with_facts(FACTS, sampling=RECOMMENDED)) as server:
        turn = {"role": "user", "content": "hi"}
        body = {"prompt": "hi", "max_tokens": 2} if path == "/v1/completions" else {"messages": [turn], "max_tokens": 2}
        if path == "/v1/responses":
            body = {"input": "hi", "max_output_tokens": 16}
        status, answer = await server.post(path, body)
        assert status == 200, answer
        assert sampled_with(server) == (0.6, 0.95, 20, 0.05, 1.1)
        if path == "/v1/responses":
            assert (answer["temperature"], answer["top_p"]) == (0.6, 0.95)


async def test_what_a_request_names_counts_even_where_it_is_neutral() -> None:
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    async with running(facts=with_facts(FACTS, sampling=RECOMMENDED)) as server:
        await server.complete(prompt="hi", max_tokens=2, **neutral)
        assert sampled_with(server) == (0.0, 1.0, 0, 0.0, 1.0)


async def test_a_model_that_recommends_nothing_samples_neutrally_and_health_says_so() -> None:
    async with running() as server:
        await server.complete(prompt="hi", max_tokens=2)
        assert sampled_with(server) == (1.0, 1.0, 0, 0.0, 1.0)
        _, health = await server.get("/health")
        assert health["details"]["sampling defaults"] == "neutral"
    async with running(facts=with_facts(FACTS, sampling=SamplingDefaults(temperature=0.6))) as server:
        _, health = await server.get("/health")
        assert health["details"]["sampling defaults"] == "temperature 0.6"
