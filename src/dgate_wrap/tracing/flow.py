"""Who reads whom in a trace, and label tensors that are carried back along it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace
from .families import Family, Indexing, Mixing
from .nodes import names, op_name, shape_of, tensor_of
from .operations import describe, varying_nodes

LIKE = names("type_as view_as expand_as reshape_as")
"""Operations that read only the kind or shape of their second operand."""


class StuckError(Exception):
    """No weights can be told whose zeroing makes a value zero; the message says why."""


class ConflictError(StuckError):
    """One weight would have to serve several groups."""


class Flow:
    """Who reads whom in a trace: families, ancestors and uses of parameters, each found once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self.varying = varying_nodes(trace)
        self._position = {n: i for i, n in enumerate(self.nodes)}
        self._above: dict[Node, int] = {}
        for node in self.nodes:
            self._above[node] = functools.reduce(
                int.__or__, (self._above[n] | 1 << self._position[n] for n in node.all_input_nodes), 0
            )
        self._parameters = sum(1 << self._position[n] for n, s in trace.sources.items() if s.kind == "parameter")
        self._families: dict[Node, Family] = {}
        self.output = next(n for n in reversed(self.nodes) if n.op == "output")

    def family(self, node: Node) -> Family | None:
        """Return the family of a node; ``None`` for placeholders and the like."""
        if node.op != "call_function":
            return None
        if node not in self._families:
            self._families[node] = describe(node, self.varying)
        return self._families[node]

    def is_above(self, node: Node, other: Node) -> bool:
        """Tell whether a node is an ancestor of another."""
        return bool(self._above[other] >> self._position[node] & 1)

    def above(self, node: Node) -> set[Node]:
        """Return all ancestors of a node."""
        return {n for n in self.nodes[: self._position[node]] if self.is_above(n, node)}

    def is_learned(self, node: Node) -> bool:
        """Tell whether a value is computed from parameters alone, and constants."""
        own = self._above[node] | 1 << self._position[node]
        return node not in self.varying and bool(own & self._parameters)

    def between(self, node: Node, other: Node) -> list[Node]:
        """Return the nodes that lie on a way from a node to another, the other one included."""
        start, end = self._position[node] + 1, self._position[other]
        return [n for n in self.nodes[start:end] if self.is_above(node, n) and self.is_above(n, other)] + [other]

    def sites(self, name: str) -> set[Node]:
        """Return the nodes that read a parameter, where its value first meets data, and that reach the output."""
        starts = [n for n, s in self.trace.sources.items() if s.name == name and s.kind == "parameter"]
        return set[Node]().union(*(self.meets(n) for n in starts))

    def meets(self, node: Node) -> set[Node]:
        """Return the nodes where a constant first meets data, of those that reach the output; data meets itself."""
        if node in self.varying:
            return {node}
        front, found = [node], set[Node]()
        while front:
            for user in front.pop().users:
                if user not in self.varying:
                    front.append(user)
                elif self.is_above(user, self.output):
                    found.add(user)
        return found

    def escapes(self, start: Iterable[Node], gates: Collection[Node]) -> bool:
        """Tell whether anything but the way through ``gates`` leads from nodes to the output."""
        front, seen = list(start), set(gates)
        while front:
            node = front.pop()
            if node is self.output:
                return True
            if node not in seen:
                seen.add(node)
                front.extend(n for n in node.users if self.is_above(n, self.output) or n is self.output)
        return False


def value_inputs(node: Node) -> list[Node]:
    """Return the nodes whose values a node reads."""
    name = op_name(node)
    if name.startswith("new_") or name in ("zeros_like", "ones_like", "full_like", "empty_like"):
        return []
    return list(node.all_input_nodes)[: 1 if name in LIKE else None]


def is_floating(node: Node) -> bool:
    """Tell whether a node gives one tensor of numbers with a fraction: the only ones that weights make."""
    return isinstance(tensor_of(node), Tensor) and (tensor_of(node).is_floating_point() or tensor_of(node).is_complex())


def axis_labels(node: Node, axis: int) -> Tensor:
    """Label every index along an axis of a node's value."""
    shape = shape_of(node)
    return torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)


def reduce_labels(need: Tensor, axes: list[int], *, keepdim: bool = False) -> Tensor:
    """Return the one label along axes; refuse if there are several."""
    axes = [a for a in axes if need.shape[a] != 1 or not keepdim]
    if not axes:
        return need
    if need.numel() == 0:
        raise StuckError("an example without elements says nothing")
    for axis in axes:
        need = need.narrow(axis, 0, 1) if need.stride(axis) == 0 else need
    high = need.amax(axes, keepdim=keepdim)
    low = need.masked_fill(need < 0, torch.iinfo(torch.int64).max).amin(axes, keepdim=keepdim)
    if bool(((high >= 0) & (high != low)).any()):
        raise ConflictError("one weight serves several groups")
    return high


def fit_labels(need: Tensor, node: Node, *, grow: bool = False) -> Tensor:
    """Return labels in the shape of an operand that was broadcast; ``grow`` also expands axes of size 1."""
    shape = shape_of(node)
    extra = need.dim() - len(shape)
    need = reduce_labels(need, list(range(extra)))
    need = reduce_labels(need, [a for a, n in enumerate(shape) if n == 1], keepdim=True)
    return need.expand(shape) if grow else need


def labels_along(need: Tensor, axis: int) -> Tensor:
    """Return the labels along one axis, one for all of the others; refuse if there are several."""
    return reduce_labels(need, [a for a in range(need.dim()) if a != axis % need.dim()])


def unmix_labels(family: Mixing, need: Tensor) -> Tensor:
    """Return the labels of what was pooled or reduced: the same all along the mixed axes."""
    gone = [a for a, b in enumerate(family.out_axis) if b is None]
    for a in gone:
        need = need.unsqueeze(a)
    return reduce_labels(need, sorted(family.mixed), keepdim=True).expand(shape_of(family.x))


def label_part(node: Node, shape: tuple[int, ...]) -> Tensor:
    """Label the elements that a select or slice takes 0, the others -1."""
    axis = cast(int, (*node.args, *[0] * (2 - len(node.args)))[1]) % len(shape)
    index = torch.arange(shape[axis])
    taken = cast(Any, node.target)(index, 0, *node.args[2:])
    labels = torch.full((shape[axis],), -1).scatter(0, taken.reshape(-1), 0)
    return labels.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)


def merge_labels(a: Tensor, b: Tensor) -> Tensor:
    """Join two labellings of one parameter; refuse if they disagree."""
    a, b = torch.broadcast_tensors(a, b)
    if bool(((a >= 0) & (b >= 0) & (a != b)).any()):
        raise ConflictError("one weight serves several groups")
    return torch.where(a >= 0, a, b)


def unchoose_labels(family: Indexing, need: Tensor) -> Tensor:
    """Return the labels of what data choose among: the same all along the axes that they choose along."""
    shape = shape_of(family.x)
    if family.same_axes:
        axes = sorted(family.axes)
        return reduce_labels(need, axes, keepdim=True).expand([-1 if a not in axes else n for a, n in enumerate(shape)])
    first, last = min(family.axes), max(family.axes)
    if last - first + 1 != len(family.axes):
        raise StuckError("data choose along axes that are not neighbours")
    need = reduce_labels(need, list(range(first, first + need.dim() - len(shape) + len(family.axes))))
    for axis in range(first, last + 1):
        need = need.unsqueeze(axis)
    return need.expand(shape)
