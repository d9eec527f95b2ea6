"""The sandbox computes what Jinja computes, until its budget is gone: then it stops, and nothing has grown."""

import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from asyncllm.router import template_sandbox
from asyncllm.router.template_functions import LimitExceeded, RenderTimeout
from asyncllm.router.template_sandbox import CompiledTemplate

TEXT = "a bit of text\n" * 8

# Each would run for ages or fill the memory. `text` is 112 characters, `items` a list of ten of them.
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "conditions of loops": "{% for i in text * 999 if i == '' %}{% endfor %}" * 99,
    "loops in macros": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% call m() %}x{% endcall %}{% endcall %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macros in conditions": "{% if text %}{% macro m(n) %}{% if n and m(n - 1) ~ m(n - 1) %}{% endif %}{% endmacro %}"
    "{% endif %}{{ m(60) }}",
    "recursive loops": "{% for i in [60] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}",
    "blocks": "{% block b %}{% for i in range(999) %}{{ loop.cycle(1) }}{% endfor %}{% endblock %}"
    + "{{ self.b() }}" * 90,
}
TOO_MUCH = {
    "sums": "{% set ns = namespace(x=text) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "sums without loops": "{% set x = text %}" + "{% set x = x + x %}" * 99,
    "long sums": "{% set x = text * 99 %}{% set y = " + "+".join("x" * 200) + " %}",
    "joins": "{% set ns = namespace(x=text) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "arguments": "{% macro m(x, n) %}{{ m(x + x, n - 1) if n }}{% endmacro %}{{ m(text, 99) }}",
    "what macros return": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else text * 999 }}{% endmacro %}{{ m(20) }}",
    "blocks that are set": "{% set ns = namespace(x=text) %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "filtered blocks": "{% filter upper %}{% for i in range(99999) %}{{ text }}{% endfor %}{% endfilter %}",
    "products": "{{ text * 10 ** 9 }}",
    "products of lists": "{{ items * 10 ** 9 }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "rounding": "{{ 5 | round(-10 ** 9) }}",
    "wide fields": "{{ '%999999999d' % 5 }}",
    "widths from elsewhere": "{{ '%*d' % (10 ** 9, 5) }}",
    "the format filter": "{{ '%999999999s' | format(text) }}",
    "the format method": "{{ '{:999999999}'.format(text) }}",
    "fields in fields": "{{ '{:{}}'.format(text, 10 ** 9) }}",
    "format_map": "{{ '{x:999999999}'.format_map({'x': text}) }}",
    "padding": "{{ text.center(10 ** 9) }}",
    "padding of safe text": "{{ (text | safe).ljust(10 ** 9) }}",
    "zeros": "{{ text.zfill(10 ** 9) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "the center filter": "{{ text | center(10 ** 9) }}",
    "filters in map": "{{ items | map('center', 10 ** 9) | list }}",
    "indentation": "{{ text | indent(10 ** 9) }}",
    "indented JSON": "{{ items | tojson(indent=10 ** 9) }}",
    "separated JSON": "{% set x = text * 99 %}{{ items | tojson(separators=(x, x)) }}",
    "replacing": "{% set x = text * 999 %}{{ x.replace('t', x) }}",
    "replacing nothing": "{% set x = text * 999 %}{{ x | replace('', x) }}",
    "joining": "{% set x = text * 999 %}{{ x.join(x) }}",
    "the join filter": "{% set x = text * 999 %}{{ x | join(x) }}",
    "joining the same": "{% set x = text * 999 %}{{ range(9999) | map('default', x) | join }}"
    "{{ ([x] * 9999) | join }}",
    "batches": "{{ items | batch(10 ** 9, 'x') | list }}",
    "slices": "{{ items | slice(10 ** 9) | list }}",
    "adding up lists": "{{ [items, items] | sum(start=[]) }}",
    "lists of characters": "{% set x = text * 8000 %}{{ x | list | length }}",
    "filters of characters": "{% set x = text * 8000 %}{{ x | map('upper') | list | length }}",
    "pieces": "{% set x = 'a ' * 400000 %}{{ x.split(' ') | length }}",
    "lines": "{% set x = '\n' * 400000 %}{{ x.splitlines() | length }}",
    "lists in lists": "{% set ns = namespace(x=[text]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "tuples in tuples": "{% set x = (text, text) %}" + "{% set x = (x, x) %}" * 60 + "{{ x }}",
    "dicts in dicts": "{% set x = {} %}" + "{% set x = {1: x, 2: x} %}" * 60 + "{{ x | tojson }}",
    "dicts by call": "{% set x = {} %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
    "dicts from keys": "{% set x = {} %}" + "{% set x = dict.fromkeys(range(9), x) %}" * 30 + "{{ x }}",
    "arguments in arguments": "{% macro m(n) %}{{ m(n - 1, varargs, varargs) if n }}{% endmacro %}{{ m(60, 1) }}",
    "sums of lists": "{% set x = [text] %}" + "{% set x = x + x %}" * 60,
    "copies held": "{% macro m(x, n) %}{{ m(x[1:], n - 1) if n }}{% endmacro %}{{ m(text * 999, 80) }}",
    "lists shown": "{% for i in range(99999) %}{{ items }}{% endfor %}",
    "escaping": "{% autoescape true %}{% for i in range(99999) %}{{ '&' * 999 }}{% endfor %}{% endautoescape %}",
    "constants": "{{ 'x' | center(999999999) }}",
}  # fmt: skip
FORBIDDEN = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "functions": "{{ raise_exception.__globals__.x }}",
    "changes": "{{ items.append(1) }}",
    "bytes": "{{ text.encode() }}",
    "bytes of numbers": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "tables": "{{ text.translate({97: text}) }}",
    "attributes in formats": "{{ '{0.__class__.__mro__}'.format(text) }}",
    "underscores": "{{ namespace(_x=1) }}",
}


def values() -> dict[str, Any]:
    return {"text": TEXT, "items": [TEXT] * 10}


@pytest.mark.parametrize("source", [*ENDLESS.values(), *TOO_MUCH.values()], ids=[*ENDLESS, *TOO_MUCH])
def test_what_grows_without_end_is_stopped_while_it_is_small(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "BUDGET_CHARS", 1_000_000)
    template = CompiledTemplate(source)
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded):
            template.render(values())
        assert tracemalloc.get_traced_memory()[1] < 32_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_runs_without_end_runs_out_of_time(source: str) -> None:
    with pytest.raises(RenderTimeout, match="for more than 0 s"):
        CompiledTemplate(source).render(values(), limit_s=0.0)


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_reaches_out_of_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(SecurityError):
        CompiledTemplate(source).render(values())


def test_time_counts_while_the_thread_works_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter(range(0, 1_000_000, 10))  # ten seconds pass between two looks at the clock
    monkeypatch.setattr(time, "monotonic", lambda: float(next(waits)))
    assert CompiledTemplate("{% for i in range(9) %}{{ i }}{% endfor %}").render({}) == "012345678"


def test_each_render_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "BUDGET_CHARS", 10_000)
    template = CompiledTemplate("{% if more %}{{ text * 999 }}{% endif %}{{ text }}")
    for _ in range(99):
        assert template.render({"text": TEXT}) == TEXT
        with pytest.raises(LimitExceeded):
            template.render({"text": TEXT, "more": True})


def test_threads_render_side_by_side() -> None:
    template = CompiledTemplate("{% for i in range(2000) %}{{ name }}{% endfor %}")
    texts: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=name: texts.update({name: template.render({"name": name})}))
        for name in ("a", "b", "c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: name * 2000 for name in ("a", "b", "c")}


@pytest.mark.parametrize("source", ["{% for %}", "{{ text | urlize }}", "{{ text }", "{% include 'x' %}{% endif %}"])
def test_what_does_not_parse_is_not_compiled(source: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        CompiledTemplate(source)


# --- the same as Jinja -----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["text", "word", "items", "number", "nested", "missing", "'a'", "3", "[1, word]", "{1: word}"])
FILTERS = (
    *("trim", "upper", "list", "length", "string", "first", "escape", "safe", "sort", "indent(2)", "title", "int"),
    *("map('upper') | list", "batch(2, '-') | list", "reverse | list", "unique | list", "center(12)", "truncate(5)"),
)


def expressions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda p: f"({p[0]} + {p[1]})"),
        pair.map(lambda p: f"{p[0]} + {p[1]} + word + {p[0]}"),
        pair.map(lambda p: f"({p[0]} ~ {p[1]})"),
        pair.map(lambda p: f"({p[0]} * {p[1]})"),
        pair.map(lambda p: f"({p[0]} % {p[1]})"),
        pair.map(lambda p: f"({p[0]} if {p[1]} else word)"),
        pair.map(lambda p: f"({p[0]} in {p[1]} or {p[1]} == {p[0]})"),
        pair.map(lambda p: f"[{p[0]}, ({p[1]}, 1)]"),
        pair.map(lambda p: f"{{'a': {p[0]}, 'b': {p[1]}}}"),
        pair.map(lambda p: f"({p[0]} | default({p[1]}, true))"),
        pair.map(lambda p: f"({p[0]} | replace({p[1]}, 'x'))"),
        pair.map(lambda p: f"({p[0]} | join({p[1]}))"),
        pair.map(lambda p: f"m({p[0]}, {p[1]}, word)"),
        pair.map(lambda p: f"({p[0]}).join({p[1]})"),
        pair.map(lambda p: f"({p[0]}).split({p[1]})"),
        pair.map(lambda p: f"({p[0]}).replace(word, {p[1]}, 1)"),
        inner.map(lambda x: f"({x})[1:]"),
        inner.map(lambda x: f"({x})[0]"),
        inner.map(lambda x: f"({x}).strip().center(9, '-')"),
        inner.map(lambda x: f"('<{{:>4}}>{{}}').format({x}, word)"),
        *(inner.map(lambda x, name=name: f"({x} | {name})") for name in FILTERS),
    )


EXPRESSIONS = st.recursive(NAMES, expressions, max_leaves=6)
FRAMES = st.sampled_from([
    "{{ %s }}",
    "{{ %s }}{{ word }}",
    "{% set x = %s %}{{ x }}|{{ x }}",
    "{% for x in %s if x %}{{ loop.index }}{{ x }}{% else %}none{% endfor %}",
    "{% if %s %}yes{% else %}no{% endif %}",
    "{% set x %}{{ %s }}{% endset %}{{ x }}",
    "{% filter upper %}{{ %s }}{% endfilter %}",
    "{% autoescape true %}{{ %s }}{% endautoescape %}",
])  # fmt: skip
MACRO = "{% macro m(a, b) %}<{{ a }}{{ b }}{{ varargs }}>{% endmacro %}"
GIVEN = {
    "text": " Some <text>\n",
    "word": "me",
    "items": ["b", "a", "b"],
    "number": 2,
    "nested": {"k": [1, {"x": "y"}]},
}
PLAIN = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


def outcome(render: Any) -> str:
    try:
        return str(render(GIVEN))
    except Exception as error:
        return type(error).__name__


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's compiler sees that a number cannot be cut
@settings(max_examples=300, deadline=None)
@given(FRAMES, EXPRESSIONS)
def test_whatever_a_template_computes_is_what_jinja_computes(frame: str, expression: str) -> None:
    source = MACRO + frame.replace("%s", expression, 1)
    ours, plain = outcome(CompiledTemplate(source).render), outcome(PLAIN.from_string(source).render)
    # jinja works constants out as it compiles, and there a number that is cut is undefined rather than an error.
    assume((ours, plain) != ("TypeError", ""))
    assert ours == plain
