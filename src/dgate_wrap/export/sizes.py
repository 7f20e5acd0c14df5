"""How sizes that stay open are told inside of a forward that is written anew."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..tracing.symbolic import Symbolic, is_open
from .steps import UnwritableError


class Sizes:
    """Tells sizes by the axes of what has been made, by numbers that the forward is given, or by their formulas.

    Args:
        symbolic: The graph with open sizes.
        graph: The graph that is written.
        made: Per node of the first, what has been made for it in the second; grows.
        example: How large the open sizes are in the example.
        numbers: The whole numbers that the forward is given, as they are in the example; placeholders are made of them.
    """

    def __init__(
        self,
        symbolic: Symbolic,
        graph: Graph,
        made: Mapping[Node, Any],
        example: Mapping[Any, int],
        numbers: Sequence[int],
    ) -> None:
        self._symbolic, self._graph, self._made, self._example = symbolic, graph, made, example
        self._free = [(n, graph.placeholder(f"n{i}")) for i, n in enumerate(numbers)]
        self._named: dict[Any, Node] = {}

    def told(self, value: Any) -> Any:
        """Return a node for a size that is open."""
        if not is_open(value):
            return int(value)
        return self._size(value.node.expr)

    def _size(self, expression: Any) -> Any:
        """Return a node for a size: that of an axis, or such a size and a number more or less, or times as large."""
        if expression.is_number:
            return int(expression)
        axes = [
            (tensor, axis, n.node.expr)
            for tensor in self._made
            if isinstance(held := tensor.meta.get("val"), Tensor) and isinstance(self._made[tensor], Node)
            for axis, n in enumerate(cast("list[Any]", list(held.shape)))
            if is_open(n)
        ]

        def size(tensor: Node, axis: int) -> Any:
            return self._graph.call_function(torch.ops.aten.sym_size.int, (self._made[tensor], axis))

        for tensor, axis, found in axes:
            if _same_number(found, expression):
                return size(tensor, axis)
        for tensor, axis, found in axes:
            if (more := found - expression).is_number:
                return self._graph.call_function(operator.sub, (size(tensor, axis), int(more)))
            if (times := found / expression).is_Integer:
                return self._graph.call_function(operator.floordiv, (size(tensor, axis), int(times)))
        given = self._given_number(expression)
        return self._computed(expression) if given is None else given

    def _given_number(self, expression: Any) -> Node | None:
        """Return a number that the part is given, if one is as large in the example; of several, the next one."""
        if expression not in self._named:
            here = self._example.get(expression)
            found = next((p for p in self._free if p[0] == here), None)
            if found is None:
                return None
            self._free.remove(found)
            self._named[expression] = found[1]
        return self._named[expression]

    def _computed(self, expression: Any) -> Any:
        """Return a node for a size that is computed from others: as the graph computes it, or by its formula."""
        for node in self._symbolic.graph.nodes:
            held = node.meta.get("val")
            same = isinstance(held, torch.SymInt) and held.node.expr == expression
            if node.op == "call_function" and same and not any(_holds_tensor(a) for a in node.all_input_nodes):
                args = [self.told(a.meta["val"]) if isinstance(a, Node) else a for a in node.args]
                return self._graph.call_function(node.target, tuple(args), dict(node.kwargs))
        function = _FORMULAS.get(type(expression).__name__)
        if function is None or not expression.args:
            raise UnwritableError(f"the size {expression} cannot be told from its inputs")
        parts = [self._size(part) for part in expression.args]
        return functools.reduce(lambda a, b: self._graph.call_function(function, (a, b)), parts)


_FORMULAS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
"""How the size of an axis is computed, by the kind of its formula."""


def _holds_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _same_number(a: Any, b: Any) -> bool:
    """Tell whether two sizes are the same, whatever the open sizes are: ``(s * t + t - 1) // t`` is ``s``."""
    if a == b:
        return True
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    rotated = (itertools.islice(itertools.cycle(_PRIMES), i, None) for i in range(len(_PRIMES)))
    draws = [dict(zip(names, primes, strict=False)) for primes in rotated]
    with contextlib.suppress(ZeroDivisionError):  # sizes that a model cannot have
        return bool(names) and a.free_symbols <= b.free_symbols and all(a.subs(d) == b.subs(d) for d in draws)
    return False


_PRIMES = (769, 2, 3079, 7, 1543, 97, 12289, 31, 193, 6151, 3, 389, 19)
"""Small and large: the sizes of patches and windows, which formulas divide by, are smaller than an image."""
