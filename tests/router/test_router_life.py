"""Start, limits, shutdown and death."""

import asyncio

import msgspec
import pytest

from asyncllm.errors import CapacityError, ContextLengthExceeded, InvalidRequest, Overloaded, StartupError, Unavailable
from asyncllm.router.stream import ChoiceInput
from asyncllm.types import EngineDead, EngineReady, Finished, FinishReason, SamplingParams, StartupPhase, StepStats
from tests.fakes_text import CAPACITY, END, START
from tests.router.harness import Bench, choice

LONG = 1_000_000  # bytes of a request whose text goes to the pool
LENGTH = Finished(FinishReason.LENGTH)


# --- start -----------------------------------------------------------------------------------------------------------


async def test_requests_before_readiness_are_told_what_is_going_on() -> None:
    bench = Bench()
    bench.drain(StartupPhase("load weights"), StartupPhase("load weights", 1.5), StartupPhase("allocate cache"))
    assert bench.router.phases == {"load weights": 1.5, "allocate cache": None}
    with pytest.raises(Unavailable, match="allocate cache") as caught:
        bench.submit()
    assert (caught.value.code, caught.value.retry_after_s) == ("not_ready", 1.0)
    assert bench.metrics.rejected == {"not_ready": 1}


async def test_readiness_brings_capacity_and_facts() -> None:
    bench = Bench()
    waiting = asyncio.ensure_future(bench.router.wait_ready())
    await asyncio.sleep(0)
    assert (bench.router.state, waiting.done()) == ("starting", False)
    bench.engine.push(EngineReady(CAPACITY, {"device": "cpu"}))
    await waiting
    assert (bench.router.state, bench.router.facts) == (
        "ready",
        {"device": "cpu", "sampling defaults": "neutral"},
    )
    assert bench.router.accepting() is CAPACITY


async def test_a_token_that_the_model_does_not_know_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.engine.push(EngineReady(msgspec.structs.replace(CAPACITY, vocab_size=100), {}))
    await bench.router.wait_ready()
    assert f"the tokenizer has {bench.tokenizer.vocab_size} tokens and the model 100" in caplog.text
    bench.submit(ChoiceInput([1, 99], SamplingParams(max_tokens=4)))
    with pytest.raises(InvalidRequest, match="token 100 of the tokenizer, but this model knows only 100"):
        bench.submit(ChoiceInput([1, 100], SamplingParams(max_tokens=4)))


async def test_failed_start_reaches_those_who_wait_for_readiness() -> None:
    bench = Bench()
    bench.drain(EngineDead("The file is broken.", during_startup=True))
    with pytest.raises(StartupError, match="file is broken"):
        await bench.router.wait_ready()
    assert bench.router.state == "dead"


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_full_queue_refuses_all_choices_or_none() -> None:
    bench = await Bench(max_queued=3).ready()
    bench.submit(choice(), choice())
    with pytest.raises(Overloaded, match="max_queued = 3") as caught:
        bench.submit(choice(), choice())
    assert caught.value.retry_after_s == 1.0
    assert len(bench.engine.submits) == 2
    assert bench.metrics.rejected == {"max_queued": 1}
    bench.submit()


async def test_queue_limit_counts_what_waits_and_not_what_runs() -> None:
    bench = await Bench(max_queued=2).ready()
    bench.submit(choice(), choice())
    bench.drain(bench.engine.step(started={1: 0, 2: 0}))
    bench.submit(choice(), choice())
    with pytest.raises(Overloaded):
        bench.submit()


async def test_requests_that_leave_while_waiting_make_room() -> None:
    bench = await Bench(max_queued=1).ready()
    for end in (lambda s: s.abort(), lambda s: bench.router.abort("r"), lambda s: bench.router.abort_all()):
        end(bench.submit())
    bench.submit()
    bench.drain(bench.engine.step(finished={4: Finished(FinishReason.ERROR, error="no")}))
    bench.submit()
    assert (bench.router.queue.num_waiting, bench.router.queue.num_waiting_tokens) == (1, 2)


async def test_waiting_prompt_tokens_are_limited_and_a_shared_prompt_counts_once() -> None:
    bench = await Bench(max_queued_tokens=10).ready()
    bench.submit(choice("123456"), choice("123456"))
    with pytest.raises(Overloaded, match="max_queued_tokens = 10"):
        bench.submit(choice("12345"))
    bench.submit(choice("1234"))
    assert bench.metrics.rejected == {"max_queued_tokens": 1}


async def test_full_ring_takes_back_the_choices_that_went_in() -> None:
    bench = await Bench(room=2).ready()
    with pytest.raises(Overloaded, match="ring is full"):
        bench.submit(choice(), choice(), choice())
    assert bench.engine.aborts == [1, 2]
    assert (bench.router.num_streams, bench.router.queue.num_waiting) == (0, 0)
    assert bench.metrics.finished == []
    await asyncio.wait_for(bench.router.wait_idle(), 1)


async def test_prompt_larger_than_the_whole_cache_is_refused_at_once(bench: Bench) -> None:
    with pytest.raises(CapacityError, match="4096"):
        bench.submit(choice("x" * 4096))
    bench.submit(choice("x" * 4096, max_tokens=0))


async def test_retry_after_is_the_waiting_work_over_the_measured_rate() -> None:
    bench = await Bench(max_queued=2).ready()
    for step in range(1, 4):  # 100 tokens a second
        stats = StepStats(num_running=1, num_scheduled_tokens=100, num_steps=step, wait_s=1.0)
        bench.drain(bench.engine.step(stats=stats))
    bench.submit(choice("x" * 1500), choice("y" * 1500, prompt_index=1))
    with pytest.raises(Overloaded) as caught:
        bench.submit()
    assert caught.value.retry_after_s == pytest.approx(30.0)


async def test_too_many_requests_at_the_tokenizer_are_refused() -> None:
    bench = await Bench(max_queued=1).ready()
    first = asyncio.create_task(bench.router.encode_prompts(["a"], num_bytes=LONG))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="to be tokenized"):
        await bench.router.encode_prompts(["b"], num_bytes=LONG)
    [short] = await bench.router.encode_prompts(["c"], num_bytes=1)
    assert list(short) == [99], "a short one needs no thread"
    assert list(map(list, await first)) == [[97]]


# --- text in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, LONG])
async def test_prompts_are_tokenized_and_ids_pass_through(bench: Bench, num_bytes: int) -> None:
    prompts = ["a<|end|>", [1, 2], "b"]
    encoded = await bench.router.encode_prompts(prompts, num_bytes=num_bytes)
    assert list(map(list, encoded)) == [[97, END], [1, 2], [98]]
    with pytest.raises(ContextLengthExceeded) as caught:
        await bench.router.encode_prompts(["a" * 30_000], num_bytes=num_bytes)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("num_bytes", [1, LONG])
async def test_conversations_are_rendered_and_tokenized(bench: Bench, num_bytes: int) -> None:
    token_ids = await bench.router.render_chat([{"role": "user", "content": "<|end|>"}], num_bytes=num_bytes)
    assert list(token_ids) == [START, *b"user\n<|end|>", END, 10, START, *b"assistant\n"]
    with pytest.raises(InvalidRequest):
        await bench.router.render_chat(
            [{"role": "user", "content": "x"}], template_kwargs={"bos_token": "y"}, num_bytes=num_bytes
        )


async def test_bad_words_are_banned_with_and_without_a_space(bench: Bench) -> None:
    banned = ((110, 111), (121, 101, 115))
    assert await bench.router.encode_bad_words(["no", " yes"]) == banned
    assert await bench.router.encode_bad_words(["no", " yes", *["no"] * 5000]) == banned


# --- shutdown --------------------------------------------------------------------------------------------------------


async def test_draining_refuses_new_work_and_waits_for_the_old(bench: Bench) -> None:
    stream = bench.submit()
    bench.router.begin_drain()
    with pytest.raises(Unavailable) as caught:
        bench.submit()
    assert caught.value.code == "shutting_down"
    idle = asyncio.ensure_future(bench.router.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    bench.drain(bench.engine.step({1: 97}, finished={1: LENGTH}))
    await idle
    assert (await stream.collect())[0].text == "a"


async def test_requests_that_do_not_finish_in_time_are_aborted_with_their_text(bench: Bench) -> None:
    stream = bench.submit()
    bench.drain(*bench.engine.say(1, "so far"))
    bench.router.begin_drain()
    assert await bench.router.close(1.0)
    assert [(d.text, d.finish_reason) for d in await stream.collect()] == [("so far", "abort")]
    assert not bench.engine.is_alive


async def test_router_that_never_started_closes() -> None:
    bench = Bench()
    assert await bench.router.close(1.0)
    assert bench.router.state == "draining"


# --- death -----------------------------------------------------------------------------------------------------------


async def test_death_of_the_engine_ends_every_stream_with_an_error(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [bench.submit(choice(), choice()), bench.submit()]
    bench.drain(bench.engine.step({1: 97}))
    dead = asyncio.ensure_future(bench.router.wait_dead())
    bench.engine.push(EngineDead("the engine stopped: RuntimeError", detail="Traceback: device lost"))
    assert await dead == "the engine stopped: RuntimeError"
    assert [delta.text for delta in await streams[0].get()] == ["a"]
    for stream in streams:
        with pytest.raises(Unavailable) as caught:
            await stream.get()
        assert caught.value.code == "engine_dead"
        assert "Traceback" not in caught.value.message
    assert "device lost" in caplog.text
    assert bench.router.state == "dead"


async def test_dead_engine_takes_nothing(bench: Bench) -> None:
    bench.drain(EngineDead("gone"))
    with pytest.raises(Unavailable) as caught:
        bench.submit()
    assert caught.value.code == "engine_dead"
    with pytest.raises(Unavailable):
        await bench.router.encode_prompts(["a"], num_bytes=1)
    with pytest.raises(Unavailable):
        await bench.router.render_chat([], num_bytes=1)
