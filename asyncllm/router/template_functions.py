"""What chat templates may call: functions and filters as in `transformers`, and how much the multiplying ones make.

An estimate takes what the method or filter is given and returns an upper bound of the characters it makes, so that the
sandbox can refuse before anything is made. Those for what no chat template needs refuse at once. Any thread.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.filters
import jinja2.utils
from jinja2.sandbox import SecurityError

Estimate = Callable[..., int]

ITEM_CHARS = 64  # what an item of a list, or a step, counts as: its memory, roughly
LONG_CHARS = 64 * 1024  # a shorter text may be split into whatever it likes
MAX_DIGITS = 300  # of rounding
# Fields that are wider than any table in a prompt, or whose width comes from elsewhere: in `format`, and with `%`.
WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(?:\d{4}|\{)")
WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{4}|\*)")

# Made for web pages: slow on long text, and of no use in a prompt.
MISSING_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr")
# They look at every item of what they are given.
SEQUENCE_FILTERS = (
    *("batch", "dictsort", "groupby", "items", "join", "list", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("select", "selectattr", "slice", "sort", "sum", "unique", "urlencode"),
)


class LimitExceeded(Exception):
    """A template would take too long or make too much; the message is a sentence about it."""


class RenderTimeout(LimitExceeded):
    """It took too long; with more time, it might have come to an end."""


TOO_MUCH = "it does more than any prompt can need"
TOO_LARGE = "it computes a number that is too large"


class Namespace(jinja2.utils.Namespace):
    """As in transformers: no attribute may begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's own, so that `namespace(self=1)` works
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # without its attributes, which may be namespaces, each of them twice


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


class TemplateDict:
    """`dict` without the attributes of a class."""

    def __init__(self, weighed: Callable[[Any], Any]) -> None:
        """`weighed`: see `Sandbox.weighed`."""
        self._weighed = weighed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A dict, as Python makes it."""
        return self._weighed(dict(*args, **kwargs))

    def fromkeys(self, *args: Any) -> Any:
        """A dict with one value for all keys."""
        return self._weighed(dict.fromkeys(*args))


def raise_exception(message: str) -> None:
    """The template's own objection."""
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    """The time of day, for templates that tell the model."""
    return datetime.now().strftime(form)


def check_fields(pattern: re.Pattern[str], text: str) -> None:
    """Refuse formatting whose fields are wide."""
    if pattern.search(text):
        raise LimitExceeded(TOO_MUCH)


def _format(text: Any, *args: Any, **kwargs: Any) -> int:
    check_fields(WIDE_PERCENT, str(text))
    return 0


def _padded(text: Any, width: int = 80, *fill: Any) -> int:
    return width


def _tabs(text: str, tabsize: int = 8) -> int:
    return text.count("\t") * tabsize


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    times = str(text).count(str(old))
    return (times if count is None or count < 0 else min(times, count)) * len(str(new))


def _joined(separator: str, items: list[str]) -> int:
    return sum(map(len, items)) + len(separator) * len(items)


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    if len(text) < LONG_CHARS:
        return 0
    num_pieces = len(text) // 2 if sep is None else text.count(sep)
    return ITEM_CHARS * (num_pieces if maxsplit < 0 else min(num_pieces, maxsplit))


def _lines(text: str, keepends: bool = False) -> int:
    return 0 if len(text) < LONG_CHARS else ITEM_CHARS * text.count("\n")


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    return (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _batches(items: Any, length: int, fill_with: Any = None) -> int:
    return 0 if fill_with is None else ITEM_CHARS * length


def _slices(items: Any, number: int, fill_with: Any = None) -> int:
    return ITEM_CHARS * number


def _total(items: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise LimitExceeded("it adds up what are no numbers")
    return 0


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    if abs(precision) > MAX_DIGITS:
        raise LimitExceeded(TOO_LARGE)
    return 0


def _refused(*args: Any, **kwargs: Any) -> int:
    raise SecurityError("it calls a method that templates may not call")


# Methods of str, whatever object they are called on: bytes have the same, so nothing may become bytes.
METHODS: Mapping[str, Estimate] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("split", "rsplit"), _split),
    **dict.fromkeys(("encode", "fromkeys", "maketrans", "to_bytes", "translate"), _refused),
    "expandtabs": _tabs,
    "join": _joined,
    "replace": _replaced,
    "splitlines": _lines,
}
FILTERS: Mapping[str, Estimate] = {
    "batch": _batches,
    "center": _padded,
    "format": _format,
    "indent": _indented,
    "replace": _replaced,
    "round": _rounded,
    "slice": _slices,
    "sum": _total,
}
