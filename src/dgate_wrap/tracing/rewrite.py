"""Write operations otherwise, so that one rule serves them all: those of many operands as chains of those of two."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode


class OpenSteps(TorchFunctionMode):
    """Leaves open how many numbers ``torch.linspace`` gives, which torch would take for a constant.

    A tensor filled with a number of its own stands for each in the trace, until it is put back into the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[float, tuple[Any, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linspace:
            start, end, *steps = (*args, *[None] * 3)[:3]
            named = {"start": start, "end": end, "steps": steps[0]} | (kwargs or {})
            start, end, count = (named.pop(name) for name in ("start", "end", "steps"))
            if isinstance(count, torch.SymInt) and not isinstance(start, Tensor) and not isinstance(end, Tensor):
                mark = _MARK + len(self._ends)
                self._ends[mark] = start, end
                dtype = named.pop("dtype", None) or torch.get_default_dtype()
                return torch.full((count,), mark, dtype=dtype, **named)
        return func(*args, **(kwargs or {}))

    def restore(self, graph: Graph) -> None:
        """Put what was asked for in the place of what stands for it."""
        aten: Any = torch.ops.aten
        for node in graph.find_nodes(op="call_function", target=aten.full.default):
            size, fill = node.args
            if fill in self._ends:
                node.target, node.args = aten.linspace.default, (*self._ends[fill], size[0])


_MARK = 271828.1828
"""The first of the numbers that stand for others; no code is likely to have it."""


def letters(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """Return the letters of operands and of the result of an einsum, given how many axes they have, for ``...`` too."""
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    hidden = [n - len(t.replace("...", "")) if "..." in t else 0 for n, t in zip(dims, terms, strict=True)]
    dots = "".join(spare[: max(hidden)])
    terms = [t.replace("...", dots[len(dots) - k :]) for t, k in zip(terms, hidden, strict=True)]
    if len(sides) == 2:
        return terms, sides[1].replace("...", dots)
    found = "".join(terms)
    return terms, dots + "".join(sorted(c for c in set(found) if found.count(c) == 1 and c not in dots))


def split_einsums(graph_module: GraphModule) -> None:
    """Replace every einsum of three or more operands by pairwise ones, from left to right, in place.

    One that sums nothing, of operands with the same axes, is a product element by element.

    A letter is summed over as soon as no later operand and no output has it. The results agree up to rounding.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        operands = cast("list[Node]", node.args[1]) if node.target is torch.ops.aten.einsum.default else []
        if len(operands) < 2:
            continue
        terms, out = letters(cast(str, node.args[0]), [n.meta["val"].dim() for n in operands])
        if any(len(set(t)) < len(t) for t in terms) or (len(operands) == 2 and {*terms, out} != {out}):
            continue
        left, axes = operands[0], terms[0]
        with graph.inserting_before(node):
            for i in range(1, len(operands)):
                later = set("".join(terms[i + 1 :]) + out)
                last = i == len(operands) - 1
                made = out if last else "".join(c for c in dict.fromkeys(axes + terms[i]) if c in later)
                left = _insert(graph_module, f"{axes},{terms[i]}->{made}", left, operands[i], node)
                axes = made
        node.replace_all_uses_with(left)
        graph.erase_node(node)
    graph_module.recompile()


def _insert(graph_module: GraphModule, equation: str, a: Node, b: Node, like: Node) -> Node:
    terms, out = equation.split("->")
    aten: Any = torch.ops.aten
    alone = {*terms.split(","), out} == {out}  # nothing is summed: a product element by element
    call = (aten.mul.Tensor, (a, b)) if alone else (aten.einsum.default, (equation, [a, b]))
    node = graph_module.graph.call_function(*call)
    sizes: dict[str, Any] = {}
    for axes, n in zip(terms.split(","), (a, b), strict=True):
        for letter, size in zip(axes, n.meta["val"].shape, strict=True):
            if letter not in sizes or (isinstance(sizes[letter], int) and sizes[letter] == 1):
                sizes[letter] = size
    held = a.meta["val"] if isinstance(a.meta["val"], FakeTensor) else a.meta["val"].to("meta")
    node.meta = {**like.meta, "val": held.new_empty([sizes[letter] for letter in out], dtype=like.meta["val"].dtype)}
    return node
