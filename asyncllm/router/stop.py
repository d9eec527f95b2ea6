"""Stop strings in a stream of text: shows what cannot be part of a stop any more, holds back the rest.

The rule: the text ends at the earliest place where some stop string occurs, judged by where the occurrence starts; of
two that start together, the one completed first (the shorter) is reported. So the answer does not depend on how the
text was cut into pieces. Knows text only; one matcher per choice. Loop thread only.
"""

from functools import lru_cache


@lru_cache(maxsize=1024)
def _failure_table(stop: str) -> tuple[int, ...]:
    """Knuth-Morris-Pratt: entry k is the longest proper prefix of `stop` that ends its first k characters."""
    table = [0] * (len(stop) + 1)
    length = 0
    for k in range(1, len(stop)):
        while length and stop[k] != stop[length]:
            length = table[length]
        if stop[k] == stop[length]:
            length += 1
        table[k + 1] = length
    return tuple(table)


class StopMatcher:
    """Finds the first of several stop strings in text that comes in pieces.

    One automaton per stop says after each character how long the stop's prefix at the end of the text is: that is both
    the match (the whole stop) and the text to hold back, at an amortised constant cost per character and stop.
    """

    __slots__ = ("_best", "_firsts", "_held", "_include", "_lengths", "_stops", "_tables", "matched")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        """`include`: the stop string itself is part of the output."""
        self._stops = stops
        self._include = include
        self._tables = [_failure_table(stop) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._lengths = [0] * len(stops)  # of each stop's prefix at the end of the text
        self._held = ""
        self._best: tuple[int, int] | None = None  # start in `_held` and stop: complete, but an earlier start may win
        self.matched: str | None = None

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def push(self, text: str, armed: bool = True) -> str:  # hot
        """Take the next piece; returns what may be shown now. Once `matched` is set, nothing follows.

        A stop that is completed while not `armed` (min_tokens is not reached) is ordinary text; one that begins there
        and is completed later counts.
        """
        if self.matched is not None:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        offset = len(self._held)
        self._held += text
        for position, character in enumerate(text, offset):
            self._step(position, character, armed)
            if self._best is not None and self._is_decided(position):
                return self._settle()
        # With a match that still waits for an earlier start, that start is the longest prefix, so it is held too.
        keep = max(self._lengths)
        shown = self._held[: len(self._held) - keep]
        if self._best is not None:
            self._best = (self._best[0] - len(shown), self._best[1])
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """The text is over: returns what was held back, up to a match that was complete."""
        if self._best is not None:
            return self._settle()
        shown, self._held = self._held, ""
        return shown

    def _step(self, position: int, character: str, armed: bool) -> None:
        for i, stop in enumerate(self._stops):
            table, length = self._tables[i], self._lengths[i]
            while length and stop[length] != character:
                length = table[length]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                start = position + 1 - length
                if armed and (self._best is None or start < self._best[0]):
                    self._best = (start, i)
                length = table[length]
            self._lengths[i] = length

    def _is_decided(self, position: int) -> bool:
        """Whether no stop can be completed any more that starts before the best one."""
        assert self._best is not None
        return position + 1 - max(self._lengths) >= self._best[0]

    def _settle(self) -> str:
        assert self._best is not None
        start, index = self._best
        self.matched = self._stops[index]
        shown = self._held[: start + len(self.matched) if self._include else start]
        self._held, self._best = "", None
        return shown
