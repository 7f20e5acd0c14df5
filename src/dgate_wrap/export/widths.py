"""Which indices of every axis of every tensor stay: one growing boolean vector per (tensor, axis).

The vectors start from the elements that are needed and only ever grow, until every operation of the graph can run on
the tensors that are left; so the search ends. Each index remembers why it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import singledispatchmethod

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.capture import operation, where
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
    shape_of,
)
from .facts import Facts

NEEDED = 0
"""Reason of an index that carries something which depends on the input and reaches an output."""

_ROUNDING = 1e-9
"""Relative difference below which a constant counts as the same everywhere; the analysis runs in float64."""


@dataclass(frozen=True)
class Columns:
    """Stands for the input channels of a grouped weight, which lie in another axis for each group of rows."""

    weight: Node


@dataclass(frozen=True)
class Fold:
    """Constants of removed input channels that a contraction must be given in another way.

    Args:
        node: The contraction.
        values: The constant of each input channel, float64, 0 where nothing is folded.
        carrier: The kept constant channel that takes them over, or ``None`` if they go into the bias.
    """

    node: Node
    values: Tensor
    carrier: int | None


class Widths:
    """The kept indices of every axis, found as the least fixed point of what the operations demand.

    Args:
        facts: Constants and liveness.
        can_bias: Whether the bias of a contraction may be changed, or made.
        can_carry: Whether the weight of a contraction may be changed.
        can_regroup: Whether a contraction's number of groups may be changed.
        follows: Whether a movement in the user's code follows smaller tensors, or has its sizes written down.
    """

    def __init__(
        self,
        facts: Facts,
        *,
        can_bias: Callable[[Node], bool],
        can_carry: Callable[[Node], bool],
        can_regroup: Callable[[Node], bool],
        follows: Callable[[Node], bool],
    ) -> None:
        self.facts = facts
        self._can_bias, self._can_carry, self._can_regroup, self._follows = can_bias, can_carry, can_regroup, follows
        self.reasons: list[str] = ["the model's output depends on it"]
        self._ids: dict[str, int] = {self.reasons[0]: NEEDED}
        self.keep: dict[Hashable, list[Tensor]] = {}
        self.why: dict[Hashable, list[Tensor]] = {}
        self.folds: dict[Node, Fold] = {}
        self._changed = True
        self._start()
        self._settle()
        while self._fill_empty():
            self._settle()

    def reason(self, text: str) -> int:
        """Return the number of a reason."""
        if text not in self._ids:
            self._ids[text] = len(self.reasons)
            self.reasons.append(text)
        return self._ids[text]

    def full(self, key: Hashable) -> bool:
        """Tell whether every index of every axis of a tensor stays."""
        return all(bool(k.all()) for k in self.keep[key])

    def _start(self) -> None:
        for node in self.facts.nodes:
            value = self.facts.values.get(node)
            if not isinstance(value, Tensor):
                continue
            self.keep[node] = [torch.zeros(n, dtype=torch.bool) for n in value.shape]
            self.why[node] = [torch.full((n,), -1) for n in value.shape]
            source = self.facts.trace.sources.get(node)
            if source is not None and source.kind == "input":
                self._keep_whole(node, self.reason("it is an input of the model"))
            elif (source is not None and source.kind == "constant") or node.op == "get_attr":
                self._keep_whole(node, self.reason("it is a constant that the forward makes"))
            elif source is not None and not node.users:
                self._keep_whole(node, self.reason("the traced forward does not use it"))
            elif self.facts.unknown[node].any():
                needed = self.facts.needed(node)
                for axis in range(needed.dim()):
                    others = [a for a in range(needed.dim()) if a != axis]
                    self._grow(node, axis, needed.any(others) if others else needed, NEEDED)
        for node in self.facts.nodes:
            if node.op == "output":
                for n in node.all_input_nodes:
                    for out in self.facts.outputs(n):
                        self._keep_whole(out, self.reason("it is an output of the model"))

    def _settle(self) -> None:
        """Apply every operation's demand until none changes anything; only then see where constants have to go."""
        self._changed = True
        while self._changed:
            while self._changed:
                self._changed = False
                for node, family in self.facts.families.items():
                    self._demand(family, node)
            self.folds.clear()
            for node, family in self.facts.families.items():
                if isinstance(family, Contraction):
                    self._fold(family, node)

    def _fill_empty(self) -> bool:
        """Keep the first index of every axis that would be left empty: a layer never becomes empty."""
        reason = self.reason("it is the last one of a layer, which never becomes empty")
        found = False
        for key, vectors in self.keep.items():
            for axis, kept in enumerate(vectors):
                if kept.numel() and not kept.any():
                    first = torch.zeros_like(kept)
                    first[0] = True
                    self._grow(key, axis, first, reason)
                    found = True
        return found

    def _grow(self, key: Hashable, axis: int, mask: Tensor, why: int | Tensor) -> None:
        kept = self.keep[key][axis]
        new = mask & ~kept
        if new.any():
            self.why[key][axis] = torch.where(new, why, self.why[key][axis])
            self.keep[key][axis] = kept | new
            self._changed = True

    def _keep_whole(self, key: Hashable, why: int) -> None:
        for axis in range(len(self.keep[key])):
            self._keep_axis(key, axis, why)

    def _keep_axis(self, key: Hashable, axis: int, why: int) -> None:
        self._grow(key, axis, torch.ones_like(self.keep[key][axis]), why)

    def _link(self, a: Hashable, axis_a: int, b: Hashable, axis_b: int, meeting: int | None = None) -> None:
        """Keep the same indices on two axes; ``meeting`` is the reason that is given for what the other one needs."""
        for (k, i), (m, j) in (((a, axis_a), (b, axis_b)), ((b, axis_b), (a, axis_a))):
            why = self.why[k][i]
            if meeting is not None:
                why = torch.where(why == NEEDED, meeting, why)
            self._grow(m, j, self.keep[k][i], why)

    def _says(self, node: Node, what: str) -> int:
        return self.reason(f"{what} ({operation(node)}, {where(node)})")

    # what each family of operations demands

    @singledispatchmethod
    def _demand(self, family: Family, node: Node) -> None:
        assert isinstance(family, Barrier | Creation)
        what = (
            "an operation without a rule meets it" if isinstance(family, Barrier) else "its size is written in the code"
        )
        inputs = [o for n in family.inputs for o in self.facts.outputs(n)] if isinstance(family, Barrier) else []
        for n in [*inputs, *self.facts.outputs(node)]:
            self._keep_whole(n, self._says(node, what))

    @_demand.register
    def _(self, family: Pick, node: Node) -> None:
        """The node that it picks from speaks for it."""

    @_demand.register
    def _(self, family: Pointwise, node: Node) -> None:
        shape = shape_of(node)
        meeting = (
            self._says(node, "it is added to, or multiplied by, something alive") if len(family.operands) > 1 else None
        )
        for n in family.operands:
            offset = len(shape) - len(shape_of(n))
            for axis, size in enumerate(shape_of(n)):
                if size == shape[axis + offset]:
                    self._link(n, axis, node, axis + offset, meeting)
                else:
                    self._keep_axis(n, axis, NEEDED)

    @_demand.register
    def _(self, family: Mixing, node: Node) -> None:
        results = [o for o in self.facts.outputs(node) if o in self.keep and len(self.keep[o]) > 0]
        for axis, out_axis in enumerate(family.out_axis):
            mixed = axis in family.mixed
            if mixed:
                self._keep_axis(family.x, axis, self._says(node, "the operation works over the whole axis"))
            for out in results if out_axis is not None else ():
                assert out_axis is not None
                if out_axis >= len(self.keep[out]):  # a statistic with axes of its own
                    self._keep_whole(out, NEEDED)
                elif mixed or self.keep[out][out_axis].numel() != self.keep[family.x][axis].numel():
                    self._keep_axis(out, out_axis, NEEDED)
                else:
                    self._link(family.x, axis, out, out_axis)
        for parameter, axis, x_axis in family.parameters:
            self._link(family.x, x_axis, parameter, axis)

    @_demand.register
    def _(self, family: Lookup, node: Node) -> None:
        self._keep_axis(family.table, 0, self._says(node, "any row may be looked up"))
        self._link(family.table, 1, node, len(self.keep[node]) - 1)
        for axis in range(len(self.keep[node]) - 1):
            self._link(family.indices, axis, node, axis)

    @_demand.register
    def _(self, family: Movement, node: Node) -> None:
        results = self.facts.outputs(node)
        everything = [*family.inputs, *results]
        if all(self.full(n) for n in everything):
            return
        if not self._follows(node):
            for n in everything:
                self._keep_whole(n, self._says(node, "the sizes of this step are written in the code"))
            return
        maps = self.facts.movement_map(node)
        inside = torch.cat([self._elements(n).flatten() for n in family.inputs])
        inside_why = torch.cat([self.element_why(n).flatten() for n in family.inputs])
        back = torch.full_like(inside_why, -1)
        for out in results:
            index = self._result_index(node, out)
            m = maps[index]
            constant = m < 0
            arrives = inside[m] & ~constant
            self._grow_elements(out, arrives, torch.where(arrives, inside_why[m], -1))
            leaves = self._elements(out) & ~constant
            back.scatter_reduce_(0, m[leaves], self.element_why(out)[leaves], "amax")
        sizes = [torch.Size(shape_of(n)) for n in family.inputs]
        for n, size, part in zip(family.inputs, sizes, back.split([s.numel() for s in sizes]), strict=True):
            self._grow_elements(n, (part >= 0).view(size), part.view(size))

    def _result_index(self, node: Node, out: Node) -> int:
        family = self.facts.families[out]
        return family.index if out is not node and isinstance(family, Pick) else 0

    def _elements(self, key: Hashable) -> Tensor:
        """Mark the elements all of whose indices stay."""
        return _outer(self.keep[key], torch.logical_and, torch.ones((), dtype=torch.bool))

    def element_why(self, key: Hashable, axes: Collection[int] | None = None) -> Tensor:
        """Return, per element, the latest reason of its indices, on some axes or on all."""
        why = [w if axes is None or a in axes else torch.full_like(w, -1) for a, w in enumerate(self.why[key])]
        return _outer(why, torch.maximum, torch.full((), -1))

    def _grow_elements(self, key: Hashable, mask: Tensor, why: Tensor) -> None:
        for axis in range(mask.dim()):
            others = [a for a in range(mask.dim()) if a != axis]
            if others:
                self._grow(key, axis, mask.any(others), why.amax(others))
            else:
                self._grow(key, axis, mask, why)

    @_demand.register
    def _(self, family: Contraction, node: Node) -> None:
        x, weight, bias = family.x, family.weight, family.bias
        if family.spatial:
            for key in (x, node, weight):
                for axis in range(2, len(self.keep[key])):
                    self._keep_axis(key, axis, NEEDED)
            self._link(x, 0, node, 0)
        else:
            for axis in range(family.x_axis):
                self._link(x, axis, node, axis)
        if bias is not None:
            self._link(bias, 0, node, family.out_axis)
        if x not in self.facts.varying:
            self._keep_axis(x, family.x_axis, self._says(node, "it is computed from parameters alone"))
        if family.groups == 1:
            self._link(weight, family.w_out, node, family.out_axis)
            self._link(weight, family.w_in, x, family.x_axis)
        else:
            self._demand_groups(family, node)

    def _demand_groups(self, family: Contraction, node: Node) -> None:
        """Keep whole groups, with the same number of inputs and of outputs in each."""
        weight, groups = family.weight, family.groups
        ends = ((family.x, family.x_axis), (node, family.out_axis))
        by_row, by_column = reversed(ends) if family.w_out == 0 else ends
        columns = Columns(weight)
        if columns not in self.keep:
            size = self.keep[by_column[0]][by_column[1]].numel()
            self.keep[columns] = [torch.zeros(size, dtype=torch.bool)]
            self.why[columns] = [torch.full((size,), -1)]
        self._link(columns, 0, *by_column)
        self._link(weight, 0, *by_row)
        self._keep_axis(weight, 1, NEEDED)
        equal = self._says(node, "the groups of a grouped convolution stay equally wide")
        used = torch.stack([self.keep[k][a].view(groups, -1).any(1) for k, a in ends]).any(0)
        if not self._can_regroup(node):
            used = torch.ones_like(used)
        if not used.any():
            return
        for key, axis in ends:
            kept = self.keep[key][axis].view(groups, -1)
            width = max(1, int(kept.sum(1).max()))
            missing = torch.where(used, width - kept.sum(1), 0)
            free = ~kept
            self._grow(key, axis, (free & (free.cumsum(1) <= missing.unsqueeze(1))).flatten(), equal)

    def _fold(self, family: Contraction, node: Node) -> None:
        """Say where the constants of removed input channels go; keep the channels that have nowhere to go."""
        x = family.x
        removed = ~self.keep[x][family.x_axis]
        if not removed.any():
            return
        others = [a for a in range(len(shape_of(x))) if a != family.x_axis]
        value = self.facts.values[x].double()
        known = ~self.facts.unknown[x].any(others) if others else ~self.facts.unknown[x]
        low, high = (value.amin(others), value.amax(others)) if others else (value, value)
        constants = self._contributes(family, node) & known & ((low != 0) | (high != 0))
        fold = constants & removed
        uneven = fold & ((high - low) > _ROUNDING * torch.maximum(high.abs(), low.abs()))
        self._grow(
            x, family.x_axis, uneven, self._says(node, "it is a constant that differs from position to position")
        )
        fold = fold & ~uneven
        if not fold.any():
            return
        values = torch.where(fold, (high + low) / 2, 0.0)
        if not family.padded and self._can_bias(node):
            self.folds[node] = Fold(node, values, None)
        elif family.groups == 1 and self._can_carry(node):
            self._carry(family, node, values, constants & ~uneven, (high + low) / 2)
        else:
            self._grow(x, family.x_axis, fold, self._says(node, "it is a constant that cannot be folded here"))

    def _contributes(self, family: Contraction, node: Node) -> Tensor:
        """Mark the input channels that have a nonzero weight towards an output channel that stays."""
        weight = self.facts.values[family.weight] != 0
        rows = self.keep[node][family.out_axis]
        weight = weight.flatten(2).any(2) if weight.dim() > 2 else weight
        if family.groups == 1:
            return weight.movedim(family.w_out, 0)[rows].any(0)
        w = weight.view(family.groups, -1, weight.shape[1])
        if family.w_out == 0:
            return (w & rows.view(family.groups, -1, 1)).any(1).flatten()
        return (w & rows.view(family.groups, 1, -1)).any(2).flatten()

    def _carry(self, family: Contraction, node: Node, values: Tensor, candidates: Tensor, constants: Tensor) -> None:
        """Let one kept constant channel stand for all removed ones; keep the largest if none is kept."""
        x = family.x
        largest = values.abs().max()
        kept = candidates & self.keep[x][family.x_axis] & (constants.abs() >= largest / 16)
        if kept.any():
            self.folds[node] = Fold(node, values, int(torch.where(kept, constants.abs(), -1).argmax()))
        else:
            one = torch.zeros_like(candidates)
            one[int(values.abs().argmax())] = True
            self._grow(x, family.x_axis, one, self._says(node, "it carries the constants of all removed channels"))


def _outer(vectors: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Tensor:
    """Combine one vector per axis into a tensor over all axes."""
    out = start
    for axis, v in enumerate(vectors):
        out = combine(out, v.view([-1 if a == axis else 1 for a in range(len(vectors))]))
    return out
