"""From the commit of a token to its bytes in the socket: which event belongs to which step, and how long it took.

Pure. In a window where the same streams decode in every step, a stream's n-th event belongs to the n-th commit behind
some first one. That first one is the latest for which no event arrives before its commit.
"""

from bisect import bisect_right
from collections.abc import Sequence


def commit_to_socket_s(commits_s: Sequence[float], arrivals_s: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of every event; `commits_s` ascending and reaching back before the first arrival."""
    seconds: list[float] = []
    for times_s in arrivals_s:
        if not times_s:
            continue
        first = min(bisect_right(commits_s, time_s) - 1 - number for number, time_s in enumerate(times_s))
        if first < 0:
            continue
        seconds += [time_s - commit_s for time_s, commit_s in zip(times_s, commits_s[first:])]
    return seconds
