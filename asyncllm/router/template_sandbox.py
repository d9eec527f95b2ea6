"""Jinja for chat templates: what `transformers` renders, in a sandbox that also limits time and memory.

A template is a program of an unknown author, driven by what clients send. Jinja's own sandbox keeps it from attributes
and from changing anything; here it also works on a budget. Each round of a loop and each macro looks at the clock;
whatever is made is charged; and what multiplies is estimated first, since one `"x" * 10**10` would not come back to be
charged. So between two looks at the clock a template does what its own length says, with what it has paid for. Any
thread; holds one Jinja environment per thread.
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.filters import do_join, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import pass_eval_context
from markupsafe import Markup

from asyncllm.router import template_functions as functions
from asyncllm.router.template_code import GenerationTag, Generator
from asyncllm.router.template_functions import ITEM_CHARS, TOO_LARGE, TOO_MUCH, LimitExceeded, RenderTimeout

MAX_RENDER_S = 2.0  # of the thread's own CPU time
BUDGET_CHARS = 128 * 1024 * 1024  # of text made in one render, however short-lived: 16 times the largest body
MAX_INT_BITS = 65536
MAX_WIDTH = 1024  # characters of one level of JSON's indentation, or of its separators
JSON_BATCH = 1024  # pieces of JSON between two looks at the clock


class CompiledTemplate:
    """A template, ready to be rendered in any thread."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateSyntaxError; SyntaxError or RecursionError for one nested too deeply."""
        self._code = Sandbox().compile(source)
        self._local = threading.local()

    def render(self, values: dict[str, Any], limit_s: float = MAX_RENDER_S) -> str:
        """The text. Raises LimitExceeded, RenderTimeout, jinja2.TemplateError, and what a confused template raises."""
        template: jinja2.Template | None = getattr(self._local, "template", None)
        if template is None:
            sandbox = Sandbox()
            template = sandbox.template_class.from_code(sandbox, self._code, sandbox.make_globals(None))
            self._local.template, self._local.sandbox = template, sandbox
        sandbox = self._local.sandbox
        sandbox.begin(limit_s)
        # Not `template.render`: it compiles a Python function per frame to beautify the traceback of an error.
        return sandbox.join_output(template.root_render_func(template.new_context(values)))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one thread, with the budget of the render that runs in it."""

    code_generator_class = Generator
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.begin(MAX_RENDER_S)  # compiling computes constants
        self.concat = self.join_output  # type: ignore[method-assign]
        self.globals |= {
            "dict": functions.TemplateDict(self.weighed),
            "namespace": functions.Namespace,
            "raise_exception": functions.raise_exception,
            "strftime_now": functions.strftime_now,
        }
        del self.globals["lipsum"]
        for name in functions.MISSING_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": self._tojson, "join": self._join}
        for name in {*functions.FILTERS, *functions.SEQUENCE_FILTERS}:
            self.filters[name] = self._limited(name, self.filters[name])

    def begin(self, limit_s: float) -> None:
        """A new budget."""
        self._left_chars = BUDGET_CHARS
        self._limit_s = limit_s
        self._started_s = time.thread_time()
        self._look_s = time.monotonic() + limit_s

    def reserve(self, num_chars: int) -> None:
        """Raises LimitExceeded where so much cannot be paid for."""
        if num_chars > self._left_chars:
            raise LimitExceeded(TOO_MUCH)

    def _look(self) -> None:
        """What is left is looked at closely."""
        if self._left_chars < 0:
            raise LimitExceeded(TOO_MUCH)
        # The clock of the thread is a system call, so it is asked last: a thread that waited is not to blame for that.
        used_s = time.thread_time() - self._started_s
        if used_s >= self._limit_s:
            raise RenderTimeout(f"it runs for more than {self._limit_s:g} s")
        self._look_s = time.monotonic() + self._limit_s - used_s

    # --- what compiled templates call --------------------------------------------------------------------------------

    def tick(self) -> None:  # hot: once per round of a loop
        """A step."""
        self._left_chars -= ITEM_CHARS
        if self._left_chars < 0 or time.monotonic() > self._look_s:
            self._look()

    @property
    def ticks(self) -> bool:
        """A step, as a condition that holds."""
        self.tick()
        return True

    def text(self, value: Any) -> str:  # hot: once per output
        """What a value looks like, paid for."""
        shown = value if type(value) is str else str(value)
        self._left_chars -= len(shown)
        if self._left_chars < 0:
            self._look()
        return shown

    def summed(self, value: Any) -> Any:  # hot: once per chain of +
        """A sum, paid for."""
        return self.weighed(value) if isinstance(value, list | tuple) else self.charged(value)

    def charged(self, value: Any) -> Any:  # hot: once per call, filter and slice
        """The value, paid for."""
        kind = type(value)
        if kind is str or kind is Markup:
            self._left_chars -= len(value)
        elif kind is list or kind is tuple:
            self._left_chars -= ITEM_CHARS * len(value)
        else:
            return value
        if self._left_chars < 0:
            self._look()
        return value

    def weighed(self, container: Any) -> Any:
        """A container that the template made, paid for.

        It may hold the same thing many times, and things that do: as text it must fit into what is left.
        """
        self.reserve(self._weight(container))
        return self.charged(container)

    def _weight(self, container: Any) -> int:
        """Characters of it all, at most; no more than one budget is counted."""
        weight, stack = 0, [container]
        while stack and weight <= BUDGET_CHARS:
            value = stack.pop()
            weight += ITEM_CHARS
            if isinstance(value, str):
                weight += len(value)
            elif isinstance(value, dict):
                stack += value
                stack += value.values()
            elif isinstance(value, list | tuple):
                stack += value
        return weight

    def join_output(self, pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block."""
        if type(pieces) is not list:
            pieces = list(pieces)
        self._left_chars -= sum(map(len, pieces))
        if self._left_chars < 0:
            self._look()
        return "".join(pieces)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # hot
        """Call a method, a macro or a function."""
        kind = type(obj)
        if kind is Macro:
            return context.call(obj, *args, **kwargs)  # paid for by `join_output`
        if kind is BuiltinMethodType:
            # Of a text, a list or a dict: nothing that Jinja's own `call` would have to look at.
            if kwargs:
                kwargs.pop("_loop_vars", None)
                kwargs.pop("_block_vars", None)
            if (estimate := functions.METHODS.get(obj.__name__)) is not None:
                args = self._estimated(estimate, obj, args, kwargs)
            return self.charged(obj(*args, **kwargs))
        if kind is MethodType and isinstance(obj.__self__, Markup) and obj.__name__ in functions.METHODS:
            args = self._estimated(functions.METHODS[obj.__name__], obj, args, {})
        if not self.is_safe_callable(obj):
            raise SecurityError(f"{obj!r} may not be called")
        return self.charged(context.call(obj, *args, **kwargs))

    def _estimated(
        self, estimate: functions.Estimate, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments, where the result can be paid for."""
        if method.__name__ == "join":
            args = (list(*args),)  # an iterator can be read once only
        self.reserve(estimate(method.__self__, *args, **kwargs))
        return args

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        """A filter by its name, as `map` calls it."""
        return self.charged(super().call_filter(*args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products, powers, and `%` of texts."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if operator != "%" and (bits * right if operator == "**" else bits + right.bit_length()) > MAX_INT_BITS:
                raise LimitExceeded(TOO_LARGE)
        elif operator == "%" and isinstance(left, str):
            functions.check_fields(functions.WIDE_PERCENT, left)
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            self.reserve(times * self._weight(repeated))
        return self.charged(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` in a sandbox of its own; None for everything else."""
        if type(value) not in (BuiltinMethodType, MethodType) or value.__name__ not in ("format", "format_map"):
            return None
        if isinstance(value.__self__, str):
            functions.check_fields(functions.WIDE_FIELD, value.__self__)
        return super().wrap_str_format(value)

    # --- filters -----------------------------------------------------------------------------------------------------

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that asks first whether it may."""
        estimate = functions.FILTERS.get(name, lambda *args, **kwargs: 0)
        is_sequence = name in functions.SEQUENCE_FILTERS
        behind_context = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            given = args[behind_context:]
            self.reserve(estimate(*given, **kwargs))
            if is_sequence and given and hasattr(given[0], "__len__"):
                self._left_chars -= ITEM_CHARS * len(given[0])
                self.reserve(0)
            return function(*args, **kwargs)

        return limited

    @pass_eval_context
    def _join(self, eval_context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        """Jinja's, for what can be paid for."""
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.reserve(self._weight(items) + len(str(d)) * len(items))
        return do_join(eval_context, items, d)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as it is; Jinja's own filter escapes it for HTML."""
        width = max(len(indent) if isinstance(indent, str) else indent or 0, *map(len, separators or ("",)))
        if width > MAX_WIDTH:
            raise LimitExceeded(TOO_MUCH)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return encoder.encode(value)
        # Indented JSON is written in Python, a microsecond a piece: 8 MB of it take seconds.
        pieces, batches = iter(encoder.iterencode(value)), []
        while batch := list(islice(pieces, JSON_BATCH)):
            self.tick()
            batches.append(self.charged("".join(batch)))
        return "".join(batches)
