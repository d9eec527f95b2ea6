"""Drafts without a draft model: what followed the last time that a sequence went as it goes now, and when that pays.

An answer that edits, quotes or sums up its prompt repeats whole passages of it. Knows tokens and costs; knows nothing
of plans or blocks. Engine thread only.
"""

from array import array

from asyncllm.config import SpeculativeConfig

# Earlier places that are compared before the longest match so far is taken.
MAX_COMPARED = 8
# Tokens indexed per look-up: 0.5 ms. A long prompt is indexed over some steps; its beginning can be found meanwhile.
MAX_INDEXED = 2048
# What a row with drafts costs beside its draft tokens, in tokens: attention of its own, and more that is sampled.
ROW_COST_TOKENS = 2
MEMORY = 8  # rows after which a gain has lost most of its weight
HOPE = 0.8  # share of drafts that is taken to be right until some were verified


class PromptLookup:
    """Finds where a sequence had the same last tokens before. A look-up costs the same however long the sequence is.

    Places are numbers of tokens: at place p, the tokens before it end at p - 1 and the one behind it is tokens[p].
    """

    __slots__ = ("_latest", "_longest", "_num_indexed", "_previous", "_shortest", "_tokens")

    def __init__(self, tokens: "array[int]", shortest: int, longest: int) -> None:
        """`tokens` ("I") are the sequence's own and grow; a match is `shortest` to `longest` tokens long."""
        self._tokens = tokens
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[bytes, int] = {}  # the last `shortest` tokens -> the latest place behind them
        self._previous = array("I", [0]) * shortest  # by place: the one before it with the same tokens; 0 = none
        self._num_indexed = shortest - 1  # the last place that is in the index

    def find(self, num_tokens: int) -> list[int]:  # hot: once per token
        """The `num_tokens` tokens behind the longest match, the latest of several; empty where nothing matches.

        A match close to the end is taken for the beginning of a repetition and goes on in circles.
        """
        tokens, shortest = self._tokens, self._shortest
        end = len(tokens)
        self._index(min(end - 1, self._num_indexed + MAX_INDEXED))
        place, best, best_length = self._latest.get(tokens[end - shortest : end].tobytes(), 0), 0, 0
        for _ in range(MAX_COMPARED):
            if not place:
                break
            length = shortest
            while length < self._longest and length < place and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = place, length
                if length == self._longest:
                    break
            place = self._previous[place]
        if not best:
            return []
        draft = tokens[best : best + num_tokens].tolist()
        while len(draft) < num_tokens:
            draft += draft[: num_tokens - len(draft)]
        return draft

    def _index(self, last: int) -> None:  # hot
        """Enter every place up to `last`; the sequence's end, which would match itself, is not among them."""
        tokens, shortest, latest, previous = self._tokens, self._shortest, self._latest, self._previous
        for place in range(self._num_indexed + 1, last + 1):
            key = tokens[place - shortest : place].tobytes()
            previous.append(latest.get(key, 0))
            latest[key] = place
        self._num_indexed = max(self._num_indexed, last)


class Drafter:
    """The drafts of one sequence. Where they cost more than they save, they are compared with what comes, not computed.

    Costs and gains are counted in decode rows of a step in which B sequences run. A step of n tokens takes as long as
    reading the weights does, W tokens' worth, plus n; so a token costs (W + B) / B as a decode row's, and 1 as one more
    in a row that is computed anyway: that is B / (W + B) decode rows.
    """

    __slots__ = (
        "_auto_off",
        "_balance_tokens",
        "_gain",
        "_guess",
        "_guessed_at",
        "_is_new",
        "_lookup",
        "_miss",
        "_num_tokens",
        "_tokens",
    )

    def __init__(
        self, tokens: "array[int]", num_tokens: int, config: SpeculativeConfig, balance_tokens: int, depth: int
    ) -> None:
        """`num_tokens`: of a draft; `balance_tokens`, `depth`: the executor's."""
        self._tokens = tokens
        self._num_tokens = num_tokens
        self._lookup = PromptLookup(tokens, config.prompt_lookup_min, config.prompt_lookup_max)
        self._auto_off = config.auto_off
        self._balance_tokens = balance_tokens
        # Whose last token must be on the host before it is planned misses a step of a device that runs ahead.
        self._miss = float(depth - 1)
        self._gain = 1.0  # per row, on average; begins with what is hoped for, but not above this
        self._is_new = True  # until the first draft tells how many run beside it
        self._guess: list[int] = []  # what is compared while it does not pay
        self._guessed_at = 0

    @property
    def pays(self) -> bool:
        """Whether drafts save more than they cost."""
        return self._gain >= 0.0 or not self._auto_off

    def draft(self, num_running: int) -> list[int]:  # hot: once per committed row
        """What may come next, once more tokens are known; empty where that is not known, or does not pay."""
        if self._is_new:  # beside many others a few wrong drafts cost more than short answers ever win back
            self._is_new = False
            self._gain = min(self._gain, HOPE * self._num_tokens - self._cost(self._num_tokens, num_running))
        if self._guess:
            known = self._tokens[self._guessed_at : self._guessed_at + len(self._guess)].tolist()
            num_right = count_right(self._guess, known)
            if num_right == len(known) < len(self._guess):
                return []
            self.observe(len(self._guess), num_right, num_running)
            self._guess = []
        draft = self._lookup.find(self._num_tokens)
        if not draft:
            self._average(-self._miss)
        elif not self.pays:
            self._guess, self._guessed_at = draft, len(self._tokens)
            return []
        return draft

    def observe(self, num_drafts: int, num_right: int, num_running: int) -> None:
        """A row's drafts were verified while so many sequences ran."""
        self._average(num_right - self._cost(num_drafts, num_running) - self._miss)

    def _cost(self, num_drafts: int, num_running: int) -> float:
        """Of a row with drafts, in tokens that such a step makes."""
        return (num_drafts + ROW_COST_TOKENS) * num_running / (num_running + self._balance_tokens)

    def _average(self, gain: float) -> None:
        if gain:  # a row that finds nothing and misses nothing says nothing
            self._gain += (gain - self._gain) / MEMORY


def count_right(draft: list[int], sampled: list[int]) -> int:
    """How many tokens at the beginning of a draft are those sampled."""
    for place, (guess, token_id) in enumerate(zip(draft, sampled)):
        if guess != token_id:
            return place
    return min(len(draft), len(sampled))
