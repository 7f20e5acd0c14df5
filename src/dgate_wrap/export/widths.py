"""Which indices of every axis of every tensor stay: one growing boolean vector per (tensor, axis).

The vectors start from the elements that are needed and only ever grow, until every operation of the graph can run on
the tensors that are left; so the search ends. Each index remembers why it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import singledispatchmethod
from itertools import pairwise, product
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.capture import operation, owner, where
from ..tracing.families import (
    Attention,
    Barrier,
    Bilinear,
    Contraction,
    Creation,
    Family,
    Halves,
    Indexing,
    Lookup,
    Mixing,
    Movement,
    NormedWeight,
    Pick,
    Pointwise,
    Product,
    Ranking,
    Recurrence,
)
from ..tracing.operations import is_tensor, op_name, shape_of
from .constants import rounding
from .facts import Facts

NEEDED = 0
"""Reason of an index that carries something which depends on the input and reaches an output."""


@dataclass(frozen=True)
class Columns:
    """Stands for the input channels of a grouped weight, which lie in another axis for each group of rows."""

    weight: Node


@dataclass(frozen=True)
class Units:
    """Stands for the units of one layer and direction of a recurrence, or for what it gives to the next layer."""

    node: Node
    layer: int
    projected: bool = False


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


@dataclass(frozen=True)
class Frozen:
    """What has to stay whole for the user's code to run.

    Args:
        reshapes: Modules whose own code has sizes written in it: their reshapes and slices stay whole.
        modules: Modules whose own code computes with sizes in other ways: all that it makes and reads stays whole.
    """

    reshapes: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.reshapes or self.modules)


class Widths:
    """The kept indices of every axis, found as the least fixed point of what the operations demand.

    Args:
        facts: Constants and liveness.
        can_bias: Whether the bias of a contraction may be changed, or made.
        can_carry: Whether the weight of a contraction may be changed.
        can_regroup: Whether a contraction's number of groups may be changed.
        can_rescale: Whether the weight and the epsilon of a normalization may be changed.
        can_select: Whether an input of the model may be cut along an axis.
        scattered: Contractions that compute only the outputs that some weight leads to, and scatter them.
        rewrite: Whether forwards may be written anew, in which lengths, numbers of groups and scales become others.
        frozen: What has to stay whole for the user's code to run.
    """

    def __init__(
        self,
        facts: Facts,
        *,
        can_bias: Callable[[Node], bool],
        can_carry: Callable[[Node], bool],
        can_regroup: Callable[[Node], bool],
        can_rescale: Callable[[Node], bool],
        can_select: Callable[[Node, int], bool],
        scattered: Collection[Node] = (),
        rewrite: bool = False,
        frozen: Frozen | None = None,
    ) -> None:
        self.facts = facts
        self._can_bias, self._can_carry, self._can_regroup = can_bias, can_carry, can_regroup
        self._can_rescale, self._can_select = can_rescale, can_select
        self.scattered = frozenset(scattered)
        self._rewrite = rewrite
        self._written: set[int] = set()
        self._frozen = frozen or Frozen()
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

    @property
    def held_by_code(self) -> bool:
        """Whether anything stays only since a number is written in the code, which a rewritten forward could change."""
        return any(int(i) in self._written for vectors in self.why.values() for w in vectors for i in w.unique())

    def share(self, node: Node, axes: Collection[int]) -> float:
        """Return which share of the elements along some axes stays."""
        kept = [self.keep[node][axis] for axis in axes]
        return math.prod(int(k.sum()) for k in kept) / math.prod(k.numel() for k in kept)

    def some_weight(self, node: Node) -> Tensor:
        """Mark the outputs of a contraction to which some weight leads."""
        family = cast(Contraction, self.facts.families[node])
        return (self.facts.values[family.weight] != 0).movedim(family.w_out, 0).flatten(1).any(1)

    def rows(self, node: Node) -> Tensor:
        """Mark the outputs that a contraction computes."""
        family = cast(Contraction, self.facts.families[node])
        if node in self.scattered:
            return self.keep[family.weight][family.w_out]
        return self.keep[node][family.out_axis]

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
            self._start_at(node)
        for node in self.facts.nodes:
            if node.op == "call_function" and (owner(node) or "") in self._frozen.modules:
                for n in (node, *(n for n in node.all_input_nodes if n in self.facts.varying)):
                    self._keep_results(n, self._says(node, "the code computes with its size"))
            if node.op == "output":
                for n in node.all_input_nodes:
                    self._keep_results(n, self.reason("it is an output of the model"))

    def _start_at(self, node: Node) -> None:
        """Keep what a tensor needs to hold, whatever operations demand of it."""
        source = self.facts.trace.sources.get(node)
        if source is not None and source.kind == "input":
            self._start_from(node)
            for axis in range(len(self.keep[node])):
                if not self._can_select(node, axis):
                    self._keep_axis(node, axis, self.reason("it is an input of the model"))
        elif (source is not None and source.kind == "constant") or node.op == "get_attr":
            self._keep_whole(node, self.reason("it is a constant that the forward makes"))
        elif source is not None and not node.users:
            self._keep_whole(node, self.reason("the traced forward does not use it"))
        elif node in self.facts.varying and self.facts.unknown[node].any():
            self._start_from(node)
        elif node not in self.facts.varying:
            self._start_beyond(node)

    def _start_beyond(self, node: Node) -> None:
        """Keep what slices leave out of a table: positions beyond the example's length, which other inputs reach."""
        users = [n for n in node.users if isinstance(self.facts.families.get(n), Movement)]
        if len(users) < len(node.users) or any(op_name(n) not in ("slice", "narrow") for n in users):
            return
        read = torch.zeros_like(self.facts.values[node], dtype=torch.bool)
        for user in users:
            read.view(-1)[self.facts.movement_map(user)[0].flatten()] = True
        for axis in range(read.dim()):
            others = [a for a in range(read.dim()) if a != axis]
            beyond = ~(read.any(others) if others else read)
            self._grow(node, axis, beyond, self.reason("the traced forward does not use it"))

    def _keep_results(self, node: Node, why: int) -> None:
        for out in self.facts.outputs(node):
            self._keep_whole(out, why)

    def _follows(self, node: Node) -> bool:
        """Tell whether the user's code follows smaller tensors in a movement, or has its sizes written down."""
        return (owner(node) or "") not in self._frozen.reshapes

    def _start_from(self, node: Node) -> None:
        """Keep what is neither constant nor unread."""
        needed = self.facts.needed(node)
        for axis in range(needed.dim()):
            others = [a for a in range(needed.dim()) if a != axis]
            self._grow(node, axis, needed.any(others) if others else needed, NEEDED)

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

    def _written_down(self, node: Node, what: str) -> int:
        """Return the number of a reason that holds for the user's code only."""
        number = self._says(node, what)
        self._written.add(number)
        return number

    # what each family of operations demands

    @singledispatchmethod
    def _demand(self, family: Family, node: Node) -> None:
        assert isinstance(family, Barrier)
        for n in (*family.inputs, node):
            for out in self.facts.outputs(n):
                self._keep_whole(out, self._says(node, "an operation without a rule meets it"))

    @_demand.register
    def _(self, family: Creation, node: Node) -> None:
        if not self._follows(node) or not uniform(node):
            self._keep_whole(node, self._says(node, "its size is written in the code"))

    @_demand.register
    def _(self, family: Pick, node: Node) -> None:
        """The node that it picks from speaks for it."""

    @_demand.register
    def _(self, family: Pointwise, node: Node) -> None:
        several = len(family.operands) > 1
        meeting = self._says(node, "it is added to, or multiplied by, something alive") if several else None
        for n in family.operands:
            self._broadcast(n, node, meeting)

    def _broadcast(self, n: Node, node: Node, meeting: int | None) -> None:
        """Link the axes of an operand with those of a result to which it is broadcast."""
        shape = shape_of(node)
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
            if mixed and family.groups > 1 and axis == 1:
                mixed = False
                self._demand_whole_groups(family, node)
            elif mixed and family.averages and (self._rewrite or self._can_rescale(node)):
                self._keep_nonzero(family.x, axis, node)
                mixed = family.kind == "reduction"
            elif mixed and family.keeps_zero and family.kind == "reduction":
                self._keep_nonzero(family.x, axis, node)
            elif mixed:
                says = self._written_down if family.averages else self._says
                self._keep_axis(family.x, axis, says(node, "the operation works over the whole axis"))
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

    def _demand_whole_groups(self, family: Mixing, node: Node) -> None:
        """Keep or remove the groups of a group normalization as a whole."""
        kept = self.keep[family.x][1].view(family.groups, -1)
        kept = kept.any(1, keepdim=True).expand(kept.shape)
        self._grow(family.x, 1, kept.flatten(), self._says(node, "it is normalized together with something alive"))
        if not (self._rewrite or self._can_regroup(node)):
            self._keep_axis(family.x, 1, self._written_down(node, "the number of groups is written in the code"))

    def _keep_nonzero(self, x: Node, axis: int, node: Node) -> None:
        """Keep what adds a constant to a sum along an axis."""
        if all(bool(k.any()) for o in self.facts.outputs(node) for k in self.keep[o]):
            others = [a for a in range(len(self.keep[x])) if a != axis]
            adds = self.facts.nonzero_constant(x)
            self._grow(x, axis, adds.any(others) if others else adds, self._says(node, "it adds a constant to a sum"))

    @_demand.register
    def _(self, family: Lookup, node: Node) -> None:
        self._keep_axis(family.table, 0, self._says(node, "any row may be looked up"))
        for n in node.all_input_nodes:
            if n is not family.table:
                self._keep_whole(n, NEEDED)
        for i, out in enumerate(self.facts.outputs(node)):
            for axis in range(len(self.keep[out]) - (i == 0)):
                self._keep_axis(out, axis, NEEDED)
            if i == 0:
                self._link(family.table, 1, out, -1)

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
        for n, out in product(family.inputs, results):
            if 0 in (*shape_of(n), *shape_of(out)):
                self._link_empty(n, out)
        if op_name(node) in ("expand", "expand_as"):
            self._broadcast(family.inputs[0], node, None)  # copies of what stays need not all stay
            return
        self._move(node, family.inputs, results)

    def _link_empty(self, a: Node, b: Node) -> None:
        """Link the axes of two tensors of which one has no elements, whose other sizes have to agree nevertheless."""
        for axis, (m, n) in enumerate(zip(shape_of(a), shape_of(b), strict=False)):
            if m == n:
                self._link(a, axis, b, axis)

    def _move(self, node: Node, inputs: tuple[Node, ...], results: list[Node]) -> None:
        """Keep every element that comes from, or ends up in, one that stays."""
        maps = self.facts.movement_map(node)
        inside = torch.cat([self._elements(n).flatten() for n in inputs])
        inside_why = torch.cat([self.element_why(n).flatten() for n in inputs])
        back = torch.full_like(inside_why, -1)
        for out in results:
            index = self._result_index(node, out)
            m = maps[index]
            constant = m < 0
            arrives = inside[m] & ~constant
            self._grow_elements(out, arrives, torch.where(arrives, inside_why[m], -1))
            leaves = self._elements(out) & ~constant
            back.scatter_reduce_(0, m[leaves], self.element_why(out)[leaves], "amax")
        sizes = [torch.Size(shape_of(n)) for n in inputs]
        for n, size, part in zip(inputs, sizes, back.split([s.numel() for s in sizes]), strict=True):
            self._grow_elements(n, (part >= 0).view(size), part.view(size))

    @_demand.register
    def _(self, family: Indexing, node: Node) -> None:
        places = family.moved
        if op_name(node) in ("gather", "scatter", "scatter_add"):  # an index for every element
            self._demand_elementwise(family, node)
            return
        for n in family.indices:
            self._keep_whole(n, NEEDED)
        said = self._says(node, "it may be picked by an index")
        for n in (*places, *([node] if family.same_axes else [])):
            for axis in family.axes if n is not family.source or family.adds else ():
                self._keep_axis(n, axis, said)
        if family.adds:
            for n in places:
                for axis in range(len(self.keep[node])):
                    if axis not in family.axes:
                        self._link(n, axis, node, axis)
        elif not all(self.full(n) for n in (*places, node)):
            self._move(node, places, [node])

    def _demand_elementwise(self, family: Indexing, node: Node) -> None:
        """Link the axes that nothing is picked along, of x, the indices, what is written and the result."""
        said = self._says(node, "it may be picked by an index")
        everything = [family.x, *family.indices, *([family.source] if family.source is not None else []), node]
        for axis in range(len(self.keep[node])):
            even = len({self.keep[n][axis].numel() for n in everything}) == 1
            for a, b in pairwise(everything):
                if axis in family.axes or not even:
                    self._keep_axis(a, axis, said)
                    self._keep_axis(b, axis, said)
                else:
                    self._link(a, axis, b, axis)

    @_demand.register
    def _(self, family: Ranking, node: Node) -> None:
        x, axis = family.x, family.axis
        self._keep_axis(x, axis, self._says(node, "everything along the axis is compared"))
        for out in self.facts.outputs(node):
            for a in range(len(self.keep[x])):
                if a == axis:
                    if family.keeps_axis:
                        self._keep_axis(out, a, NEEDED)
                elif len(self.keep[out]):
                    self._link(x, a, out, a if family.keeps_axis or a < axis else a - 1)

    @_demand.register
    def _(self, family: Halves, node: Node) -> None:
        for axis in range(len(self.keep[node])):
            if axis != family.axis:
                self._link(family.x, axis, node, axis)
        self._link_blocks(family.x, family.axis, node, family.axis, 2)

    def _link_blocks(self, a: Hashable, axis_a: int, b: Hashable, axis_b: int, blocks: int) -> None:
        """Keep in every block of one axis the same indices as on another."""
        kept, why = self.keep[a][axis_a].view(blocks, -1), self.why[a][axis_a].view(blocks, -1)
        self._grow(b, axis_b, kept.any(0), why.amax(0))
        self._grow(a, axis_a, self.keep[b][axis_b].repeat(blocks), self.why[b][axis_b].repeat(blocks))

    @_demand.register
    def _(self, family: NormedWeight, node: Node) -> None:
        for axis in range(len(self.keep[node])):
            if axis != family.axis:
                self._keep_axis(family.v, axis, self._says(node, "the weight is normalized over it"))
            self._link(family.v, axis, node, axis)
        for axis, size in enumerate(shape_of(family.g)):
            if size == shape_of(family.v)[family.axis] and (size > 1 or axis == family.axis):
                self._link(family.g, axis, family.v, family.axis)
            else:
                self._keep_axis(family.g, axis, NEEDED)

    @_demand.register
    def _(self, family: Bilinear, node: Node) -> None:
        last = len(self.keep[node]) - 1
        for x, axis in ((family.x1, 1), (family.x2, 2)):
            for a in range(last):
                self._link(x, a, node, a)
            self._link(x, last, family.weight, axis)
            constant = self.facts.nonzero_constant(x).flatten(0, -2).any(0)
            used = (self.facts.values[family.weight] != 0).movedim(axis, 0).flatten(1).any(1)
            self._grow(x, last, constant & used, self._says(node, "it is a constant that cannot be folded here"))
        self._link(family.weight, 0, node, last)
        if family.bias is not None:
            self._link(family.bias, 0, node, last)

    @_demand.register
    def _(self, family: Product, node: Node) -> None:
        a, b = family.a, family.b
        places: dict[str, list[tuple[Node, int]]] = {}
        for n, axes in ((a, family.a_axes), (b, family.b_axes), (node, family.out_axes)):
            for axis, letter in enumerate(axes):
                places.setdefault(letter, []).append((n, axis))
        for letter, found in places.items():
            size = max(self.keep[n][axis].numel() for n, axis in found)
            full = [(n, axis) for n, axis in found if self.keep[n][axis].numel() == size]
            for n, axis in found:
                if (n, axis) not in full:
                    self._keep_axis(n, axis, NEEDED)
                elif len(found) == 1:
                    self._keep_axis(n, axis, self._says(node, "the operation works over the whole axis"))
            for (n, i), (m, j) in pairwise(full):
                self._link(n, i, m, j)
            if letter not in family.out_axes and len(found) > 1:
                self._keep_constants(family, node, letter, full[0])
        if family.addend is not None:
            self._broadcast(family.addend, node, None)
        for n in family.inputs:
            if n not in (a, b, family.addend):
                self._keep_whole(n, NEEDED)

    def _keep_constants(self, family: Product, node: Node, letter: str, place: tuple[Node, int]) -> None:
        """Keep the indices along a summed axis where two constants meet: their product has nowhere else to go."""
        if not all(bool(k.any()) for k in self.keep[node]) or self.keep[place[0]][place[1]].all():
            return
        a, b = (self.facts.nonzero_constant(n) for n in (family.a, family.b))
        if a.any() and b.any():
            adds = torch.einsum(f"{family.a_axes},{family.b_axes}->{letter}", a.float(), b.float()) > 0
            self._grow(*place, adds, self._says(node, "it adds a constant to a sum"))

    @_demand.register
    def _(self, family: Attention, node: Node) -> None:
        query, key, value = family.query, family.key, family.value
        out = self.facts.outputs(node)[0] if not is_tensor(node) else node
        for extra in self.facts.outputs(node):
            if extra is not out:
                self._keep_whole(extra, NEEDED)
        ndim = len(self.keep[out])
        self._link(query, -1, key, -1)
        if not (self._rewrite or node.kwargs.get("scale") is not None):
            self._keep_axis(query, -1, self._written_down(node, "scores are scaled by the width of queries and keys"))
        self._link(value, -1, out, -1)
        self._link(query, -2, out, -2)
        self._link(key, -2, value, -2)
        for axis in range(ndim - 2):
            back = axis - ndim
            if back == -3 and family.repeats > 1:
                self._link(key, back, value, back)
                self._share_heads(family, node, out)
                self._link(query, back, out, back)
                continue
            for n in (query, key, value):
                if self.keep[n][back].numel() == self.keep[out][back].numel():
                    self._link(n, back, out, back)
                else:
                    self._keep_axis(n, back, NEEDED)
        for n in family.inputs:
            if n not in (query, key, value):
                for axis in range(len(self.keep[n])):
                    back = axis - len(self.keep[n])
                    other = (key, -2) if back == -1 else (out, back)
                    if self.keep[n][axis].numel() == self.keep[other[0]][other[1]].numel():
                        self._link(n, axis, *other)
                    else:
                        self._keep_axis(n, axis, NEEDED)

    def _share_heads(self, family: Attention, node: Node, out: Node) -> None:
        """Keep the same number of query heads for every key-value head that stays."""
        said = self._says(node, "query heads share keys and values in equal numbers")
        kept = self.keep[out][-3].view(-1, family.repeats)
        self._grow(family.value, -3, kept.any(1), NEEDED)
        groups = self.keep[family.value][-3]
        width = max(1, int(kept.sum(1).max()))
        missing = torch.where(groups, width - kept.sum(1), 0)
        free = ~kept
        self._grow(out, -3, (free & (free.cumsum(1) <= missing.unsqueeze(1))).flatten(), said)

    @_demand.register
    def _(self, family: Recurrence, node: Node) -> None:
        cells = range(len(family.layers))
        for layer in cells:
            self._demand_cell(family, node, layer)
        results = self.facts.outputs(node)
        by_index = {self._result_index(node, o): o for o in results}
        last = list(cells)[-family.directions :]
        if (first := by_index.get(0)) is not None:
            self._join([self._ends(family, node, layer) for layer in last], first, -1)
            for axis in range(len(self.keep[first]) - 1):
                self._link(family.x, axis, first, axis)
        self._keep_batch(family, by_index)
        for index, out in by_index.items():
            live = self.facts.needed(out)
            for layer in cells if index else ():
                if family.single or bool(live[layer].any()):
                    cell = family.single or index == 2
                    self._link(Units(node, layer) if cell else self._ends(family, node, layer), 0, out, -1)
        for i, state in enumerate(family.states):
            for layer in cells:
                key = Units(node, layer) if i else self._ends(family, node, layer)
                if self.facts.unknown[state].any() or bool((self.facts.values[state] != 0).any()) or layer == 0:
                    self._link(key, 0, state, -1)
        self._even_out(family, node)

    def _keep_batch(self, family: Recurrence, results: dict[int, Node]) -> None:
        for n in (family.x, *family.states, *results.values()):
            for axis in range(len(self.keep[n]) - 1):
                self._keep_axis(n, axis, NEEDED)

    def _ends(self, family: Recurrence, node: Node, layer: int) -> Units:
        return Units(node, layer, projected=family.layers[layer].w_hr is not None)

    def _join(self, parts: list[Units], key: Hashable, axis: int) -> None:
        """Link an axis with the units that it holds one after another."""
        sizes = [self.keep[u][0].numel() for u in parts]
        self._grow(key, axis, torch.cat([self.keep[u][0] for u in parts]), torch.cat([self.why[u][0] for u in parts]))
        kept, why = self.keep[key][axis].split(sizes), self.why[key][axis].split(sizes)
        for u, k, w in zip(parts, kept, why, strict=True):
            self._grow(u, 0, k, w)

    def _demand_cell(self, family: Recurrence, node: Node, layer: int) -> None:
        w_ih, w_hh, b_ih, b_hh, w_hr = family.layers[layer]
        units, ends = Units(node, layer), self._ends(family, node, layer)
        for key, size in ((units, shape_of(w_ih)[0] // family.gates), (ends, shape_of(w_hh)[1])):
            if key not in self.keep:
                self.keep[key] = [torch.zeros(size, dtype=torch.bool)]
                self.why[key] = [torch.full((size,), -1)]
        needed = self.facts.units.get(node)
        for key, i in ((ends, 0), (units, 1)):
            if needed is not None:
                self._grow(key, 0, needed[layer][i], NEEDED)
        for parameter in (w_ih, w_hh, b_ih, b_hh):
            if parameter is not None:
                self._link_blocks(parameter, 0, units, 0, family.gates)
        self._link(w_hh, 1, ends, 0)
        if w_hr is not None:
            self._link(w_hr, 0, ends, 0)
            self._link(w_hr, 1, units, 0)
        if layer < family.directions:
            self._link(w_ih, 1, family.x, -1)
            others = list(range(len(self.keep[family.x]) - 1))
            constant = self.facts.nonzero_constant(family.x).any(others)
            used = (self.facts.values[w_ih] != 0).any(0)
            said = self._says(node, "it is a constant that cannot be folded here")
            self._grow(family.x, -1, constant & used, said)
        else:
            below = layer - layer % family.directions - family.directions
            self._join([self._ends(family, node, below + d) for d in range(family.directions)], w_ih, 1)

    def _even_out(self, family: Recurrence, node: Node) -> None:
        """Keep the same number of units in every layer and direction."""
        said = self._says(node, "all layers and directions stay equally wide")
        units = [Units(node, layer) for layer in range(len(family.layers))]
        ends = [self._ends(family, node, layer) for layer in range(len(family.layers))]
        narrow = self._at_least(ends, 1, said)
        # torch tells a projection by its being narrower than the units
        self._at_least(units, narrow + 1 if ends != units else 1, said)

    def _at_least(self, keys: list[Units], width: int, why: int) -> int:
        """Keep in each of several vectors as many indices as in the widest, and at least ``width``."""
        width = max(width, *(int(self.keep[k][0].sum()) for k in keys), 1)
        for key in keys:
            kept = self.keep[key][0]
            free = ~kept
            self._grow(key, 0, free & (free.cumsum(0) <= width - int(kept.sum())), why)
        return width

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
        for axis in range(mask.dim() if mask.any() else 0):
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
            for axis in range(len(self.keep[x])):
                if axis != family.x_axis:
                    self._link(x, axis, node, axis)
        if node in self.scattered:
            rows = self.keep[node][family.out_axis] & self.some_weight(node)
            self._grow(weight, family.w_out, rows, self.why[node][family.out_axis])
            self._grow(node, family.out_axis, self.keep[weight][family.w_out], NEEDED)
            if bias is not None:
                self._link(bias, 0, weight, family.w_out)
        elif bias is not None:
            self._link(bias, 0, node, family.out_axis)
        if x not in self.facts.varying:
            self._keep_axis(x, family.x_axis, self._says(node, "it is computed from parameters alone"))
        if family.groups == 1:
            if node not in self.scattered:
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
        if not used.any():
            return
        if not (self._rewrite or self._can_regroup(node)):
            equal = self._written_down(node, "the number of groups is written in the code")
            used = torch.ones_like(used)
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
        known = ~self.facts.unknown[x].any(others) if others else ~self.facts.unknown[x]
        low, high = self.facts.extremes(x, family.x_axis)
        constants = self._contributes(family, node) & known & ((low != 0) | (high != 0))
        fold = constants & removed
        uneven = (high - low) > rounding(self.facts.values[x]) * torch.maximum(high.abs(), low.abs())
        sized = self.facts.sized(x, family.x_axis)
        for those, what in ((uneven, "from position to position"), (sized, "with the sizes of the inputs")):
            self._grow(x, family.x_axis, fold & those, self._says(node, f"it is a constant that differs {what}"))
        unfit = uneven | sized
        fold = fold & ~unfit
        if not fold.any():
            return
        values = torch.where(fold, (high + low) / 2, 0.0)
        if not family.padded and self._can_bias(node):
            self.folds[node] = Fold(node, values, None)
        elif family.groups == 1 and self._can_carry(node):
            self._carry(family, node, values, constants & ~unfit, (high + low) / 2)
        else:
            self._grow(x, family.x_axis, fold, self._says(node, "it is a constant that cannot be folded here"))

    def _contributes(self, family: Contraction, node: Node) -> Tensor:
        """Mark the input channels that have a nonzero weight towards an output channel that stays."""
        rows = self.keep[node][family.out_axis]
        if (box := self.facts.box(family)) is not None:
            return box[family.w_in] & (box[family.w_out] & rows).any()
        weight = self.facts.values[family.weight] != 0
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


def uniform(node: Node) -> bool:
    """Tell whether a creation gives the same value everywhere, so that any size of it will do."""
    name = operation(node).removeprefix("aten.").removeprefix("new_")
    return name in ("zeros", "ones", "full", "empty", "scalar_tensor")
