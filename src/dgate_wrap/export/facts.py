"""Which elements of a graph are known constants, and which ones nobody reads: the two proofs that a cut rests on."""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing import Trace
from ..tracing.operations import (
    Barrier,
    Contraction,
    Creation,
    Family,
    Lookup,
    Mixing,
    Movement,
    Pick,
    Pointwise,
    describe,
    is_tensor,
    shape_of,
    source_indices,
    varying_nodes,
)


class Facts:
    """Constants and liveness of every element of a traced model.

    ``values[node]`` is the value of one run. ``unknown[node]`` marks the elements that depend on the model's inputs;
    every other element is the constant found in ``values``. ``live[node]`` marks the unknown elements that reach an
    output. A product with a known zero is zero, which holds for finite activations.

    Args:
        trace: The traced model.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self.values = trace.run()
        inputs = {n for n, s in trace.sources.items() if s.kind == "input"}
        self.varying = varying_nodes(self.nodes, inputs)
        self.families: dict[Node, Family] = {
            n: describe(n, self.varying) for n in self.nodes if n.op == "call_function"
        }
        self._maps: dict[Node, list[Tensor]] = {}
        self.unknown: dict[Node, Any] = {}
        self.live: dict[Node, Any] = {}
        for node in self.nodes:
            self._find_unknown(node)
        for node in reversed(self.nodes):
            self._find_live(node)

    def needed(self, node: Node) -> Tensor:
        """Mark the elements of a tensor-valued node that are neither constant nor unread."""
        return self.live[node] & self.unknown[node]

    def outputs(self, node: Node) -> list[Node]:
        """Return the tensor-valued nodes that hold a node's results: itself, or what is picked from it."""
        return [node] if is_tensor(node) else [u for u in node.users if isinstance(self.families.get(u), Pick)]

    def movement_map(self, node: Node) -> list[Tensor]:
        """Return, per result of a movement, where each element comes from; see `source_indices`."""
        if node not in self._maps:
            family = self.families[node]
            assert isinstance(family, Movement)
            self._maps[node] = source_indices(family)
        return self._maps[node]

    # forward: which elements depend on the input

    def _find_unknown(self, node: Node) -> None:
        value = self.values.get(node)
        if node.op == "placeholder":
            self.unknown[node] = _full(value, self.trace.sources[node].kind == "input")
        elif node.op == "get_attr":
            self.unknown[node] = _full(value, False)
        elif node.op == "call_function":
            known = node not in self.varying
            self.unknown[node] = _full(value, False) if known else self._unknown(self.families[node], node)
        self.live[node] = _full(value, False)

    @singledispatchmethod
    def _unknown(self, family: Family, node: Node) -> Any:
        return _full(self.values[node], True)

    @_unknown.register
    def _(self, family: Movement, node: Node) -> Any:
        flat = torch.cat([*(self.unknown[n].flatten() for n in family.inputs), torch.zeros(1, dtype=torch.bool)])
        moved = [flat[m] for m in self.movement_map(node)]
        return moved[0] if is_tensor(node) else moved

    @_unknown.register
    def _(self, family: Pointwise, node: Node) -> Any:
        out = torch.zeros(shape_of(node), dtype=torch.bool)
        for n in family.operands:
            out |= self.unknown[n] & ~self._absorbed(family, n)
        return out

    def _absorbed(self, family: Pointwise, operand: Node) -> Tensor:
        """Mark where an operand is multiplied by a known zero."""
        out = torch.zeros((), dtype=torch.bool)
        if family.product:
            for n in family.operands:
                if n is not operand:
                    out = out | (~self.unknown[n] & (self.values[n] == 0))
        return out

    @_unknown.register
    def _(self, family: Contraction, node: Node) -> Any:
        return family.apply(self.unknown[family.x].float(), self._pattern(family)) > 0.5

    def _pattern(self, family: Contraction) -> Tensor:
        return (self.values[family.weight] != 0).float()

    @_unknown.register
    def _(self, family: Mixing, node: Node) -> Any:
        mixed = self.unknown[family.x]
        for axis in family.mixed:
            mixed = mixed.any(axis, keepdim=True)
        if family.scale is not None:
            shape = [-1 if a == 1 else 1 for a in range(mixed.dim())]
            mixed = mixed & (self.values[family.scale] != 0).view(shape)
        gone = [a for a, b in enumerate(family.out_axis) if b is None]
        shape = [n for a, n in enumerate(mixed.shape) if a not in gone]
        results = self.values[node]
        if isinstance(results, Tensor):
            return mixed.reshape(shape).expand(results.shape).clone()
        return [mixed.expand(r.shape).clone() if _same_axes(r, mixed) else _full(r, True) for r in results]

    @_unknown.register
    def _(self, family: Lookup, node: Node) -> Any:
        return self.unknown[family.indices].unsqueeze(-1).expand(shape_of(node)).clone()

    @_unknown.register
    def _(self, family: Pick, node: Node) -> Any:
        return self.unknown[family.source][family.index]

    @_unknown.register
    def _(self, family: Creation, node: Node) -> Any:
        return _full(self.values[node], False)

    # backward: which elements reach an output

    def _find_live(self, node: Node) -> None:
        if node.op == "output":
            for n in node.all_input_nodes:
                self.live[n] = _full(self.values[n], True)
        elif node.op == "call_function" and node in self.varying:
            live, unknown = self.live[node], self.unknown[node]
            if isinstance(live, Tensor):
                live = live & unknown
                if live.any():
                    self._live(self.families[node], node, live)
            elif isinstance(live, list):
                parts = [a & b for a, b in zip(live, unknown, strict=True) if isinstance(a, Tensor)]
                if any(bool(p.any()) for p in parts):
                    self._live(self.families[node], node, parts)

    def _mark(self, node: Node, mask: Any) -> None:
        if isinstance(self.live[node], Tensor):
            self.live[node] = self.live[node] | mask
        elif isinstance(self.live[node], list):
            self.live[node] = _full(self.values[node], True)

    @singledispatchmethod
    def _live(self, family: Family, node: Node, live: Any) -> None:
        for n in family.inputs if isinstance(family, Barrier) else ():
            self._mark(n, _full(self.values[n], True))

    @_live.register
    def _(self, family: Movement, node: Node, live: Any) -> None:
        sizes = [torch.Size(shape_of(n)) for n in family.inputs]
        flat = torch.zeros(sum(s.numel() for s in sizes) + 1, dtype=torch.bool)
        for m, part in zip(self.movement_map(node), [live] if isinstance(live, Tensor) else live, strict=True):
            flat[m[part]] = True
        for n, size, part in zip(family.inputs, sizes, flat[:-1].split([s.numel() for s in sizes]), strict=True):
            self._mark(n, part.view(size))

    @_live.register
    def _(self, family: Pointwise, node: Node, live: Any) -> None:
        for n in family.operands:
            reached = live & ~self._absorbed(family, n)
            self._mark(n, reached.float().sum_to_size(shape_of(n)) > 0)

    @_live.register
    def _(self, family: Contraction, node: Node, live: Any) -> None:
        with torch.enable_grad():
            x = torch.zeros(shape_of(family.x), requires_grad=True)
            out = family.apply(x, self._pattern(family))
        [reached] = torch.autograd.grad(out, x, live.float())
        self._mark(family.x, reached > 0.5)

    @_live.register
    def _(self, family: Mixing, node: Node, live: Any) -> None:
        if isinstance(live, list):
            first, *others = live
            if any(bool(o.any()) for o in others):  # indices of a pooling, statistics of a norm
                self._mark(family.x, _full(self.values[family.x], True))
            live = first
        for axis in sorted(a for a, b in enumerate(family.out_axis) if b is None):
            live = live.unsqueeze(axis)
        for axis in family.mixed:
            live = live.any(axis, keepdim=True)
        self._mark(family.x, live.expand(shape_of(family.x)))

    @_live.register
    def _(self, family: Lookup, node: Node, live: Any) -> None:
        self._mark(family.indices, live.any(-1))

    @_live.register
    def _(self, family: Pick, node: Node, live: Any) -> None:
        parts = self.live[family.source]
        parts[family.index] = parts[family.index] | live


def _full(value: Any, fill: bool) -> Any:
    """Return a mask, or a list of masks, of the shapes of a value; ``None`` for what is no tensor."""
    if isinstance(value, Tensor):
        return torch.full(value.shape, fill, dtype=torch.bool)
    if isinstance(value, tuple | list):
        return [_full(v, fill) for v in value]
    return None


def _same_axes(result: Tensor, x: Tensor) -> bool:
    return result.dim() == x.dim() and all(b in (1, a) for a, b in zip(result.shape, x.shape, strict=True))
