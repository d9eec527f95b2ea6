"""Compiles Jinja for `template_sandbox`: what Jinja's compiler writes, with calls that keep the sandbox's books.

Knows the shape of the code, nothing of the budget. Everything a template can make something with passes one of
`tick`, `text`, `charged`, `summed` and `weighed`; no other node of the language makes anything new.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.ext import Extension
from jinja2.parser import Parser

# Their results are numbers, or were there before; so common that a call more would show.
FREE_FILTERS = ("abs", "attr", "count", "d", "default", "first", "float", "last", "length", "random", "round", "safe")
MAX_TERMS = 16  # of a sum that is charged as a whole


class GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks what a model learns from; rendering sees its body only."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body; what it sets stays inside."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Generator(CodeGenerator):
    """Jinja's code generator; each method wraps the one of the same name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._paid_for: set[int] = set()  # ids of nodes whose value goes into one that is charged at once

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """Bodies of loops, macros and blocks: whatever may run more than once. A condition's body has a soft frame."""
        if not frame.soft_frame:
            self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """The condition of a loop also runs for items that never reach its body."""
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("ticks"), node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write("environment.charged(")
            super()._output_child_pre(node, frame, finalize)
        else:
            self._paid_for.add(id(node))
            self.write("environment.text(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_post(node, frame, finalize)
        self.write(")")

    @optimizeconst
    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """A chain of `+`, the way most templates write a turn, is charged once, and not what it is made of."""
        left, terms = node.left, [node.right]
        while isinstance(left, nodes.Add) and len(terms) < MAX_TERMS:
            terms.append(left.right)
            left = left.left
        self._paid_for.update(map(id, (left, *terms)))
        is_paid_for = id(node) in self._paid_for and len(terms) < MAX_TERMS
        self.write("(" if is_paid_for else "environment.summed(")
        self.visit(left, frame)
        for term in reversed(terms):
            self.write(" + ")
            self.visit(term, frame)
        self.write(")")

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`~`, which asks before it joins: it may have any number of operands."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            return self._call("charged", node, frame, super().visit_Concat)
        self.write("environment.join_output([")
        for part in node.nodes:
            self.write("environment.text(")
            self._paid_for.add(id(part))
            self.visit(part, frame)
            self.write("), ")
        return self.write("])")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Slices are copies."""
        self._call("charged" if isinstance(node.arg, nodes.Slice) else "", node, frame, super().visit_Getitem)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        """All but the free ones make something."""
        self._call("" if node.name in FREE_FILTERS else "charged", node, frame, super().visit_Filter)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """`[a, b]`"""
        self._call(_weighed(node.items), node, frame, super().visit_List)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """`(a, b)`, unless it is what a loop or an assignment unpacks into."""
        self._call(_weighed(node.items) if node.ctx == "load" else "", node, frame, super().visit_Tuple)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """`{"a": b}`"""
        self._call(_weighed([pair.value for pair in node.items]), node, frame, super().visit_Dict)

    def visit_Name(self, node: nodes.Name, frame: Frame) -> None:
        """The arguments of a macro that it does not name come in containers, too."""
        is_container = node.ctx == "load" and node.name in ("varargs", "kwargs")
        self._call("weighed" if is_container else "", node, frame, super().visit_Name)

    def _call(self, method: str, node: Any, frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        """The node's code as an argument of this method of the sandbox; bare where none is named, or needed."""
        if method == "charged" and id(node) in self._paid_for:
            method = ""
        self.write(f"environment.{method}(" if method else "")
        visit(node, frame)
        self.write(")" if method else "")


def _weighed(items: list[nodes.Expr]) -> str:
    return "" if all(isinstance(item, nodes.Const) for item in items) else "weighed"
