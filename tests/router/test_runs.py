"""Several tokens of a choice in one step, as right drafts bring them: streams cannot tell them from tokens of many."""

from collections.abc import AsyncIterator

import pytest

from asyncllm.types import Finished, FinishReason, StepOutput
from tests.fakes_text import END
from tests.router.harness import Bench, choice
from tests.router.test_sink import turns, waiting
from tests.router.test_stream_interval import texts


@pytest.fixture(params=[1])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Events of one token, or of what the test says."""
    made = await Bench(stream_interval=request.param).ready()
    yield made
    await made.close()


def run(bench: Bench, text: str, request_id: int = 1, finished: Finished | None = None, **others: int) -> StepOutput:
    """A step in which a request gets all of this; `others`: a token for further requests, by their number as `r2`."""
    *before, last = text.encode()
    tokens = {int(name[1:]): token for name, token in others.items()} | {request_id: last}
    return bench.engine.step(
        tokens, runs={request_id: before} if before else None, finished=finished and {request_id: finished}
    )


async def test_the_tokens_of_a_run_are_read_in_their_order(bench: Bench) -> None:
    streams = [bench.submit(), bench.submit(public_id="s")]
    bench.drain(run(bench, "a", r2=ord("A")))
    bench.drain(run(bench, "bcd", r2=ord("B")))
    bench.drain(run(bench, "ef", finished=Finished(FinishReason.LENGTH), r2=ord("C")))
    [delta] = await streams[0].collect()
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("abcdef", list(b"abcdef"), "length")
    [[delta]] = [await streams[1].get()]
    assert (delta.text, delta.token_ids) == ("ABC", list(b"ABC"))


@pytest.mark.parametrize(
    ("bench", "events"), [(1, list("abcdefgh")), (3, ["a", "bcdef", "g", "h"])], indirect=["bench"]
)
async def test_a_run_makes_as_many_events_as_its_tokens_or_fewer_where_they_are_told_together(
    bench: Bench, events: list[str]
) -> None:
    consumer = await waiting(bench.submit())
    for text in ("a", "bcdef", "g"):
        bench.drain(run(bench, text))
        await turns()
    bench.drain(run(bench, "h", finished=Finished(FinishReason.LENGTH)))
    await consumer.task
    assert texts(consumer) == events


async def test_a_stop_string_inside_a_run_ends_the_text_there_and_frees_the_request(bench: Bench) -> None:
    stream = bench.submit(choice(stop=("cd",)))
    bench.drain(run(bench, "a"), run(bench, "bcdef"), run(bench, "gh"))
    [delta] = await stream.collect()
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("ab", list(b"abcd"), "stop")
    assert delta.stop_reason == "cd"
    assert bench.engine.aborts == [1]


async def test_a_stop_string_inside_a_run_that_ended_anyway_is_what_ended_it(bench: Bench) -> None:
    stream = bench.submit(choice(stop=("cd",)))
    bench.drain(run(bench, "a"), run(bench, "bcdef", finished=Finished(FinishReason.LENGTH)))
    [delta] = await stream.collect()
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", "cd")
    assert bench.engine.aborts == []


async def test_a_stop_string_may_begin_in_one_run_and_end_in_the_next(bench: Bench) -> None:
    stream = bench.submit(choice(stop=("def",)))
    bench.drain(run(bench, "abcd"), run(bench, "efgh"))
    [delta] = await stream.collect()
    assert (delta.text, delta.token_ids) == ("abc", list(b"abcdef"))


async def test_the_stop_token_behind_a_run_is_counted_and_not_shown(bench: Bench) -> None:
    stream = bench.submit(choice(stop_token_ids=(END,)))
    end = Finished(FinishReason.STOP, stop_token_id=END)
    bench.drain(bench.engine.step({1: END}, runs={1: list(b"abc")}, finished={1: end}))
    [delta] = await stream.collect()
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("abc", [*b"abc", END], "stop")
    assert bench.metrics.finished[0][3] == 4


async def test_tokens_that_come_together_have_no_time_between_them(bench: Bench) -> None:
    bench.submit()
    bench.drain(run(bench, "a"), run(bench, "bcd"), run(bench, "e"))
    assert len(bench.metrics.first_token) == 1
    seconds = [seconds for seconds, count in bench.metrics.inter_token for _ in range(count)]
    assert sorted(seconds) == [0.0, 0.0, 1.0, 1.0]


async def test_a_run_of_a_request_that_is_gone_is_skipped(bench: Bench) -> None:
    stream = bench.submit()
    bench.drain(run(bench, "a"))
    stream.abort()
    bench.drain(run(bench, "bcd"))
    assert bench.metrics.finished == [("abort", 2, 0, 1)]


async def test_a_bug_in_the_text_of_a_run_fails_its_own_request_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [bench.submit(), bench.submit(public_id="s")]
    broken = streams[0].choices[0]._detokenizer
    monkeypatch.setattr(type(broken), "push", _push_unless(broken, type(broken).push))
    bench.drain(run(bench, "bcd", r2=ord("B")))
    with pytest.raises(Exception, match="failed to make text"):
        await streams[0].collect()
    assert [delta.text for delta in await streams[1].get()] == ["B"]


def _push_unless(broken, push):
    def guarded(self, token_id: int) -> str:
        if self is broken:
            raise ValueError("no text")
        return push(self, token_id)

    return guarded
