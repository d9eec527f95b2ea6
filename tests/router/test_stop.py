"""Stop strings against a brute-force reading of the same rule."""

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncllm.router.stop import StopMatcher


def cut(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The rule, read plainly: earliest start wins, of two that start together the shorter."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, length, stop = min(found)
    return text[: start + (length if include else 0)], stop


def run(pieces: list[str], stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.finish(), matcher.matched


letters = st.text("ab", min_size=1, max_size=4)
stop_sets = st.lists(letters, min_size=1, max_size=4).map(tuple)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=12), stop_sets, st.booleans())
def test_however_text_is_cut_the_output_is_that_of_the_whole(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    assert run(pieces, stops, include) == cut("".join(pieces), stops, include)


@settings(max_examples=1000, deadline=None)
@given(st.text("ab", max_size=12), stop_sets)
def test_exactly_the_longest_suffix_that_may_become_a_stop_is_held(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops, False)
    shown = ""
    for position, character in enumerate(text):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        seen = text[: position + 1]
        if any(stop in seen for stop in stops):
            continue  # complete, and only waits for one that starts earlier
        needed = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
        assert matcher.num_held == needed
        assert shown == seen[: len(seen) - needed]


def test_stop_string_split_over_three_pieces_is_not_shown() -> None:
    matcher = StopMatcher(("<end>",), False)
    assert [matcher.push(piece) for piece in ("Hi <e", "n", "d> and more")] == ["Hi ", "", ""]
    assert matcher.matched == "<end>"


def test_false_alarm_is_shown_as_soon_as_it_is_one() -> None:
    matcher = StopMatcher(("\n\nUser:",), False)
    assert [matcher.push(piece) for piece in ("one\n", "\n", "two")] == ["one", "", "\n\ntwo"]


def test_nothing_is_shown_behind_a_stop() -> None:
    matcher = StopMatcher(("x",), True)
    assert matcher.push("abxcd") == "abx"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_match_inside_an_earlier_candidate_waits_for_it() -> None:
    matcher = StopMatcher(("bc", "abcd"), False)
    assert matcher.push("-abc") == "-"
    assert matcher.matched is None
    assert matcher.push("e") == "a"
    assert matcher.matched == "bc"


def test_waiting_match_counts_when_the_text_ends() -> None:
    assert run(["-abc"], ("bc", "abcd")) == ("-a", "bc")


def test_stop_completed_before_it_is_armed_is_text() -> None:
    matcher = StopMatcher(("ab",), False)
    assert matcher.push("ab-a", armed=False) == "ab-"
    assert matcher.push("b", armed=True) == ""
    assert matcher.matched == "ab"


def test_unarmed_match_still_holds_back_the_next_one() -> None:
    matcher = StopMatcher(("aa",), False)
    assert matcher.push("aa", armed=False) == "a"
    assert matcher.push("a") == ""
    assert matcher.matched == "aa"
