"""Pooled requests: sums that come step by step, what is observed of them, and vectors."""

import math

import numpy as np
import pytest

from asyncllm.errors import AsyncLLMError, ContextLengthExceeded
from asyncllm.router.pooling import VectorForm, vector
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.types import Finished, FinishReason, Pooling
from tests.router.harness import Bench, choice

LENGTH = Finished(FinishReason.LENGTH)


async def test_sums_of_all_steps_are_added_up(bench: Bench) -> None:
    stream = bench.submit(
        choice(max_tokens=0, pooling=Pooling.MEAN), choice("Other", prompt_index=1, max_tokens=0, pooling=Pooling.LAST)
    )
    assert [submit.pooling for submit in bench.engine.submits] == [Pooling.MEAN, Pooling.LAST]
    bench.drain(
        bench.engine.step(pooled={1: [1, 2]}),
        bench.engine.step(pooled={1: [10, 20], 2: [5, 6]}, finished={2: LENGTH}),
        bench.engine.step(pooled={1: [100, 200]}, finished={1: LENGTH}),
    )
    await stream.collect()
    assert [each.finish_reason for each in stream.choices] == ["length", "length"]
    assert [each.pooled.tolist() for each in stream.choices if each.pooled is not None] == [[111, 222], [5, 6]]


async def test_sums_wake_nobody_before_the_end(bench: Bench) -> None:
    stream = bench.submit(choice(max_tokens=0, pooling=Pooling.MEAN))
    bench.drain(bench.engine.step(pooled={1: [1, 2]}))
    assert not any(each.has_news for each in stream.choices)
    bench.drain(bench.engine.step(pooled={1: [1, 2]}, finished={1: LENGTH}))
    (delta,) = await stream.get()
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [], "length")


async def test_a_pooled_request_has_a_prefill_and_no_token(bench: Bench) -> None:
    stream = bench.submit(choice(max_tokens=0, pooling=Pooling.MEAN))
    assert bench.router.queue.num_waiting_tokens == 2
    bench.drain(
        bench.engine.step(started={1: 0}, pooled={1: [1, 2]}),  # at second 1
        bench.engine.step(pooled={1: [1, 2]}, finished={1: LENGTH}),  # at second 2
    )
    await stream.collect()
    assert stream.choices[0].timings() == (1.0, 1.0, 0.0)
    assert (bench.metrics.first_token, bench.metrics.inter_token) == ([], [])
    assert bench.metrics.finished == [("length", 2, 0, 0)]
    assert (bench.router.queue.num_waiting, bench.router.queue.num_waiting_tokens) == (0, 0)


async def test_sums_of_a_request_that_is_gone_are_dropped(bench: Bench) -> None:
    stream = bench.submit(choice(max_tokens=0, pooling=Pooling.LAST))
    stream.abort()
    bench.drain(bench.engine.step(pooled={1: [1, 2]}, finished={1: LENGTH}))
    assert stream.choices[0].pooled is None
    assert bench.router.num_streams == 0


SUMS = np.array([3, -4, 12, 0], dtype=np.float32)


def test_a_vector_is_cut_before_it_is_scaled() -> None:
    assert vector(SUMS, 9, VectorForm(Pooling.LAST, 2, True)).tolist() == pytest.approx([0.6, -0.8], rel=1e-7)
    assert vector(SUMS, 9, VectorForm(Pooling.LAST, 3, False)).tolist() == [3, -4, 12]
    assert vector(SUMS, 4, VectorForm(Pooling.MEAN, 4, False)).tolist() == [0.75, -1, 3, 0]


def test_a_scaled_vector_has_length_one_whatever_its_size() -> None:
    for factor in (1e-20, 1.0, 1e20):
        assert math.hypot(*vector(SUMS * np.float32(factor), 4, VectorForm(Pooling.MEAN, 4, True))) == pytest.approx(1)


def test_a_vector_of_nothing_stays_one() -> None:
    assert vector(SUMS * 0, 4, VectorForm(Pooling.LAST, 4, True)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_what_is_no_number_is_no_vector(wrong: float) -> None:
    with pytest.raises(AsyncLLMError, match="not finite"):
        vector(np.array([1, wrong, 0, 0], dtype=np.float32), 4, VectorForm(Pooling.LAST, 4, True))


class Indexed(ContextLimit, frozen=True):
    def exceeded(self, what: str, index: int = 0) -> ContextLengthExceeded:
        return ContextLengthExceeded(what, param=str(index))


async def test_a_limit_hears_which_of_several_texts_is_too_long(bench: Bench) -> None:
    for texts, wrong in ((["a", "b" * 6, "c" * 5], "1"), (["a", "b", "c" * 5_000], "2")):
        with pytest.raises(ContextLengthExceeded) as raised:
            await bench.router.encode_prompts(texts, num_bytes=20, limit=Indexed(4, "input"))
        assert raised.value.param == wrong
