"""Events out of bytes, however the network cut them."""

import random

import pytest

from perf.sse import SseReader, decode_chunk

STREAM = b': hello\n\ndata: {"a":1}\n\nevent: x\ndata: caf\xc3\xa9 data: no\r\n\r\ndata:tight\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a":1}', b"caf\xc3\xa9 data: no", b"tight", b"[DONE]"]


def test_whole_events_are_read_and_comments_skipped() -> None:
    assert SseReader().feed(STREAM) == EVENTS


def test_events_survive_a_cut_at_every_byte() -> None:
    reader = SseReader()

    assert [event for i in range(len(STREAM)) for event in reader.feed(STREAM[i : i + 1])] == EVENTS


@pytest.mark.parametrize("seed", range(50))
def test_events_survive_random_cuts(seed: int) -> None:
    cuts = sorted(random.Random(seed).sample(range(1, len(STREAM)), 5))
    pieces = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
    reader = SseReader()

    assert [event for piece in pieces for event in reader.feed(piece)] == EVENTS


def test_an_unfinished_line_waits_for_its_end() -> None:
    reader = SseReader()

    assert reader.feed(b"data: ha") == []
    assert reader.feed(b"lf\n") == [b"half"]


@pytest.mark.parametrize(
    ("event", "has_text"),
    [
        (b'{"choices":[{"text":" a","finish_reason":null}]}', True),
        (b'{"choices":[{"delta":{"content":" a"}}]}', True),
        (b'{"choices":[{"delta":{"reasoning_content":"hm"}}]}', True),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
        (b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', False),
        (b'{"choices":[{"text":"","finish_reason":"length","logprobs":null}],"usage":{"total_tokens":3}}', False),
    ],
)
def test_only_generated_text_counts_as_text(event: bytes, has_text: bool) -> None:
    assert decode_chunk(event).choices[0].has_text is has_text
