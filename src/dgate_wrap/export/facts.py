"""Which elements of a graph reach an output: the second of the two proofs that a cut rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing import Trace
from ..tracing.families import (
    Attention,
    Barrier,
    Bilinear,
    Cell,
    Contraction,
    Creation,
    Family,
    Halves,
    Indexing,
    Lookup,
    Mixing,
    Movement,
    Pick,
    Pointwise,
    Product,
    Ranking,
    Recurrence,
)
from ..tracing.operations import COPIES, is_tensor, op_name, shape_of
from ..tracing.origins import owner
from .constants import Constants
from .masks import along, any_of, fit, full_mask, is_any, on_axis, project, taps


class Facts(Constants):
    """Constants and liveness of every element of a traced model.

    ``live[node]`` marks the unknown elements that reach an output. ``units[node]`` marks, per layer and direction of a
    recurrence, what it gives to the next layer and which of its units are both.

    Args:
        trace: The traced model.
        elsewhere: Values of runs at other sizes of the inputs, if constants turned out to differ from size to size.
    """

    def __init__(self, trace: Trace, elsewhere: Sequence[Mapping[Node, Any]] = ()) -> None:
        super().__init__(trace, elsewhere)
        self.units: dict[Node, list[tuple[Tensor, Tensor]]] = {}
        self._needed: dict[Node, list[Tensor]] = {}
        self._parts: dict[tuple[Node, Node, int, Node, int], bool] = {}
        self._moving: dict[tuple[Node, Node], Tensor] = {}
        self._counted = self._find_counted()
        self.live: dict[Node, Any] = {n: full_mask(self.values.get(n), False) for n in self.nodes}
        for node in reversed(self.nodes):
            self._find_live(node)

    def needed(self, node: Node) -> Tensor:
        """Mark the elements of a tensor-valued node that are neither constant nor unread."""
        return self.live[node] & self.unknown[node]

    def settled(self, node: Node) -> Tensor | None:
        """Return the value of a node of which nothing is needed but constants; 0 stands for what nobody needs."""
        if bool(self.needed(node).any()):
            return None
        return self.values[node].masked_fill(self.unknown[node], 0)

    def needed_along(self, node: Node) -> list[Tensor]:
        """Mark the indices along each axis that hold an element which is needed, each of shape ``(size,)``."""
        if node not in self._needed:
            needed = self.needed(node)
            self._needed[node] = [project(needed, axis) for axis in range(needed.dim())]
        return self._needed[node]

    def reached(self, node: Node, axis: int) -> Tensor:
        """Mark the indices along an axis that reach an output, shape ``(size,)``."""
        return project(self.live[node], axis)

    def order(self, family: Indexing) -> Tensor | None:
        """Return which index along an axis each index of the result is, where a constant vector says so."""
        if family.source is not None or family.adds or not family.same_axes or len(family.indices) != 1:
            return None
        [index], [axis] = family.indices, family.axes
        picked = self.values[index]
        if index in self.varying or picked.dim() != 1 or picked.dtype == torch.bool:
            return None
        return picked % shape_of(family.x)[axis]

    def _find_counted(self) -> frozenset[Node]:
        """Return the constants that are computed from steps of numbers, such as the slopes of heads."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.op == "call_function" and node not in self.varying:
                counts = isinstance(self.families.get(node), Creation) and not makes(node)
                if counts or not found.isdisjoint(node.all_input_nodes):
                    found.add(node)
        return frozenset(found)

    def is_hooked(self, family: Indexing) -> bool:
        """Tell whether a hook that an earlier export left picks or writes, at places in a buffer of its own."""
        source = self.trace.sources.get(family.indices[0]) if len(family.indices) == len(family.axes) == 1 else None
        own = source is not None and source.kind == "buffer" and source.name.rpartition(".")[2] in HOOK_BUFFERS
        return own and not family.adds

    def takes_part(self, node: Node, n: Node, axis: int, out: Node, out_axis: int) -> bool:
        """Tell whether an operation needs part of an operand only, of which others need more.

        As one table of positions serves the heads of every layer. Something else that the operation reads has to gain
        by it: more than a copy costs, if the operand is no smaller than the result, as scores of attention do.
        """
        key = (node, n, axis, out, out_axis)
        if key not in self._parts:  # asked again and again while widths settle
            self._parts[key] = self._takes_part(*key)
        return self._parts[key]

    def _takes_part(self, node: Node, n: Node, axis: int, out: Node, out_axis: int) -> bool:
        whole = self._is_made_whole(n, axis)

        def idle(m: Node, at: int) -> Tensor:
            return ~project(self.live[m] & ~self.zero(m), at) if whole else ~self.reached(m, at)

        spare = idle(out, out_axis)
        if (n in self.varying or n.op == "placeholder") and not whole:
            spare = spare & self.reached(n, axis)  # what nothing needs need not be made, if it can be left out
        if not spare.any() or not self.reached(out, out_axis).any():
            return False
        back = axis - len(shape_of(n))
        if op_name(node) in COPIES or n in self._counted:  # a copy of a part costs no more; numbers are counted whole
            return True
        beside = [m for m in node.all_input_nodes if m is not n and is_tensor(m) and len(shape_of(m)) >= -back]
        small = n not in self.varying or torch.Size(shape_of(n)).numel() < torch.Size(shape_of(out)).numel()
        small = small or isinstance(self.families.get(node), Attention)  # which works hardest
        fits = [m for m in beside if shape_of(m)[back] == len(spare)]
        gains = {m: spare & idle(m, len(shape_of(m)) + back) for m in fits}
        if any(bool(gains[m].any()) for m in fits if small or self._is_score(m)):
            return True
        # or all that it reads is made elsewhere for several, as two biases that every layer adds to its scores
        elsewhere = all(owner(m) != owner(node) for m in (n, *fits))
        return elsewhere and back < -1 and not any(bool(g.any()) for g in gains.values())

    def _is_made_whole(self, node: Node, axis: int) -> bool:
        """Tell whether a tensor is made all along an axis or not at all, as by a softmax."""
        family = self.families.get(node)
        if isinstance(family, Pointwise):
            size, back = shape_of(node)[axis], axis - len(shape_of(node))
            made = [n for n in family.operands if n in self.varying and _size_at(n, back) == size]
            return any(self._is_made_whole(n, len(shape_of(n)) + back) for n in made)
        if isinstance(family, Mixing) and axis in family.out_axis:
            before = family.out_axis.index(axis)
            return family.kind in ("scan", "norm") if before in family.mixed else self._is_made_whole(family.x, before)
        if isinstance(family, Indexing):
            return family.source is not None and axis in family.axes
        if isinstance(family, Movement) and len(family.inputs) == 1 and is_tensor(node):
            before = self._axis_before(node, axis)
            return before is not None and self._is_made_whole(family.inputs[0], before)
        return False

    def _axis_before(self, node: Node, axis: int) -> int | None:
        """Return the axis of what a movement moves that becomes one of its result as it is, or ``None``."""
        [places] = self.movement_map(node)
        index = torch.arange(places.shape[axis]).view([-1 if a == axis else 1 for a in range(places.dim())])
        rest = 1
        shape = shape_of(node.all_input_nodes[0])
        for before in reversed(range(len(shape))):
            if shape[before] == places.shape[axis] and bool((places // rest % shape[before] == index).all()):
                return before
            rest *= shape[before]
        return None

    def addend(self, node: Node) -> tuple[Node, int] | None:
        """Return the parameter that is added to what a sum adds up along an axis, and which of its axes that is."""
        family = self.families.get(node)
        if not isinstance(family, Mixing) or op_name(node) != "sum" or len(family.mixed) != 1:
            return None
        x, [axis] = family.x, family.mixed
        inner = self.families.get(x)
        if not isinstance(inner, Pointwise) or op_name(x) != "add" or x.kwargs or len(x.users) != 1:
            return None
        back = axis - len(shape_of(x))
        for n in inner.operands:
            source = self.trace.sources.get(n)
            if source is not None and source.kind == "parameter" and _size_at(n, back) == shape_of(x)[axis]:
                return n, len(shape_of(n)) + back
        return None

    def moves_scores(self, family: Attention) -> Tensor:
        """Mark the channels whose constants add to scores that differ from key to key: those of learned queries, say.

        What is the same for all keys, such as the product of two biases, leaves the softmax as it is.
        """
        query, key = family.query, family.key
        if (query, key) not in self._moving:
            moving = self.nonzero_constant(key) & ~self.steady(key, self.values[key].dim() - 2)
            self._moving[query, key] = project(self.nonzero_constant(query), -1) & project(moving, -1)
        return self._moving[query, key]

    def _is_score(self, node: Node) -> bool:
        """Tell whether a value is a product of activations, scaled perhaps."""
        family = self.families.get(node)
        if isinstance(family, Pointwise):
            live = [n for n in family.operands if n in self.varying]
            return len(live) == 1 and self._is_score(live[0])
        return isinstance(family, Product) and {family.a, family.b} <= self.varying

    def _find_live(self, node: Node) -> None:
        if node.op == "output":
            for n in node.all_input_nodes:
                self.live[n] = full_mask(self.values[n], True)
        elif node.op == "call_function" and node in self.varying:
            live, unknown = self.live[node], self.unknown[node]
            if isinstance(live, Tensor):
                live = live & unknown
                if is_any(live):
                    self._live(self.families[node], node, live)
            elif isinstance(live, list):
                parts = [a & b for a, b in zip(live, unknown, strict=True) if isinstance(a, Tensor)]
                if any(is_any(p) for p in parts):
                    self._live(self.families[node], node, parts)

    def _mark(self, node: Node, mask: Any) -> None:
        if isinstance(self.live[node], Tensor):
            self.live[node] = self.live[node] | mask
        elif isinstance(self.live[node], list):
            self.live[node] = full_mask(self.values[node], True)

    @singledispatchmethod
    def _live(self, family: Family, node: Node, live: Any) -> None:
        for n in family.inputs if isinstance(family, Barrier) else ():
            self._mark(n, full_mask(self.values[n], True))

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
            reached = live & ~self.absorbed(family, node, n)
            self._mark(n, fit(reached, shape_of(n)))

    @_live.register
    def _(self, family: Contraction, node: Node, live: Any) -> None:
        box, shape = self.box(family), list(shape_of(family.x))
        if box is None:
            self._mark(family.x, _reached(family, shape, self.pattern(family), live))
            return
        asked = along(live & on_axis(box[family.w_out], family.out_axis, live.dim()), family.out_axis)
        if family.spatial:
            shape[family.x_axis] = 1
            asked = _reached(family, shape, taps(box), asked)
        self._mark(family.x, asked & on_axis(box[family.w_in], family.x_axis, len(shape)))

    @_live.register
    def _(self, family: Mixing, node: Node, live: Any) -> None:
        if isinstance(live, list):
            first, *others = live
            if any(is_any(o) for o in others):  # indices of a pooling, statistics of a norm
                self._mark(family.x, full_mask(self.values[family.x], True))
            live = first
        for axis in sorted(a for a, b in enumerate(family.out_axis) if b is None):
            live = live.unsqueeze(axis)
        if family.kind == "norm" and family.averages:
            live = live & ~self.zero(family.x)
        self._mark(family.x, self.mixed(family, live).expand(shape_of(family.x)))
        for n in family.where:
            self._mark(n, full_mask(self.values[n], True))

    @_live.register
    def _(self, family: Product, node: Node, live: Any) -> None:
        reached = live.float()
        a_axes, b_axes, out = family.a_axes, family.b_axes, family.out_axes
        for n, axes, other, other_axes in (
            (family.a, a_axes, family.b, b_axes),
            (family.b, b_axes, family.a, a_axes),
        ):
            own = [c for c in axes if c not in other_axes + out]
            mask = torch.einsum(
                f"{out},{other_axes}->{''.join(c for c in axes if c not in own)}", reached, self.possible(other)
            )
            for c in own:  # summed over, and in no other operand
                mask = mask.unsqueeze(axes.index(c))
            full = [max(s, m) for s, m in zip(shape_of(n), mask.shape, strict=True)]
            self._mark(n, fit((mask > 0).expand(full), shape_of(n)))
        for n in family.inputs:
            if n not in (family.a, family.b):
                self._mark(n, full_mask(self.values[n], True))

    @_live.register
    def _(self, family: Attention, node: Node, live: Any) -> None:
        live = live[0] if isinstance(live, list) else live
        key, value = (n for n in (family.key, family.value))
        scored = any_of(live, (-1, -2), keepdim=True)  # (..., heads, 1, 1)
        shared = along(live, -2)
        if family.repeats > 1:
            shared = shared.unflatten(-3, (-1, family.repeats)).any(-3)
        self._mark(value, fit(shared.expand(*shared.shape[:-2], shape_of(value)[-2], -1), shape_of(value)))
        heads = scored
        if family.repeats > 1:
            heads = scored.unflatten(-3, (-1, family.repeats)).any(-3)
        dims = along(self.possible(key), -2) if family.repeats == 1 else None
        wide = along(live, -1) if dims is None else along(live, -1) & dims
        self._mark(family.query, fit(wide.expand(*wide.shape[:-1], shape_of(family.query)[-1]), shape_of(family.query)))
        asked = along(self.possible(family.query), -2) if family.repeats == 1 else None
        wide = heads if asked is None else heads & asked
        self._mark(key, fit(wide.expand(*wide.shape[:-2], *shape_of(key)[-2:]), shape_of(key)))
        rows = along(live, -1)
        scores = rows.expand(*rows.shape[:-1], shape_of(key)[-2])
        for n in family.inputs:
            if n not in (family.query, key, value):
                self._mark(n, fit(scores, shape_of(n)))

    @_live.register
    def _(self, family: Recurrence, node: Node, live: Any) -> None:
        wanted = self._wanted_units(family, live)
        moving = [self.moving_units(family, layer) for layer in range(len(family.layers))]
        self.units[node] = [(a & d, b & c) for (a, b), (c, d) in zip(wanted, moving, strict=True)]
        columns = torch.zeros(shape_of(family.x)[-1], dtype=torch.bool)
        for layer, (outs, units) in enumerate(wanted):
            w_ih = family.layers[layer].w_ih
            if layer < family.directions:
                rows = units.repeat(family.gates)
                columns |= (self.values[w_ih] != 0)[rows].any(0)
            for s, mask in zip(family.states, (outs, units), strict=False):
                if s in self.varying:
                    self._mark(s, fit(mask.expand(shape_of(s)), shape_of(s)))
        self._mark(family.x, columns.expand(shape_of(family.x)))

    def _wanted_units(self, family: Recurrence, live: Any) -> list[tuple[Tensor, Tensor]]:
        """Mark, per layer and direction, which of its outputs and of its units reach the node's live results."""
        parts = [live] if isinstance(live, Tensor) else [p for p in live if isinstance(p, Tensor)]
        dirs, cells = family.directions, len(family.layers)
        wanted: list[tuple[Tensor, Tensor]] = []
        for w_ih, _, _, _, w_hr in family.layers:
            units = shape_of(w_ih)[0] // family.gates
            outs = units if w_hr is None else shape_of(w_hr)[0]
            wanted.append((torch.zeros(outs, dtype=torch.bool), torch.zeros(units, dtype=torch.bool)))
        first = parts[0].flatten(0, -2).any(0).chunk(dirs)
        for d in range(dirs):
            wanted[cells - dirs + d][0].logical_or_(first[d])
        for i, part in enumerate(parts[1:]):
            for layer in range(cells):
                mine = part if family.single else part[layer]
                index = 1 if family.single else i
                wanted[layer][index].logical_or_(mine.flatten(0, -2).any(0))
        for layer in reversed(range(cells)):
            outs, units = wanted[layer]
            self._reach_back(family.layers[layer], family.gates, outs, units)
            if layer >= dirs:
                columns = (self.values[family.layers[layer].w_ih] != 0)[units.repeat(family.gates)].any(0).chunk(dirs)
                for d in range(dirs):
                    wanted[layer - layer % dirs - dirs + d][0].logical_or_(columns[d])
        return wanted

    def _reach_back(self, cell: Cell, gates: int, outs: Tensor, units: Tensor) -> None:
        """Add the units and outputs that wanted ones read at earlier steps, in place."""
        w_hr, recurrent = cell.w_hr, self.values[cell.w_hh] != 0
        while True:
            before = int(outs.sum()) + int(units.sum())
            units |= outs if w_hr is None else (self.values[w_hr] != 0)[outs].any(0)
            outs |= recurrent[units.repeat(gates)].any(0)
            if w_hr is None:
                outs |= units
            if int(outs.sum()) + int(units.sum()) == before:
                return

    @_live.register
    def _(self, family: Indexing, node: Node, live: Any) -> None:
        chosen = any(n in self.varying for n in family.indices)
        if not family.each:
            for n in family.indices:
                self._mark(n, full_mask(self.values[n], True))
        elif family.source is None:
            self._mark(family.indices[0], live)
        if family.adds:
            assert family.source is not None
            axis = family.axes[0]
            self._mark(family.x, live)
            wide = along(live, axis)
            for n in (family.source, *family.indices) if family.each else (family.source,):
                shape = [1 if a == axis else size for a, size in enumerate(shape_of(n))]
                part = any(
                    size not in (1, whole) for size, whole in zip(shape, wide.shape, strict=True)
                )  # at its start
                mask = full_mask(self.values[n], True) if part else fit(wide, tuple(shape)).expand(shape_of(n))
                nothing = op_name(node) == "scatter_add" and shape_of(n) == shape_of(family.source)
                self._mark(n, mask & (self.possible(family.source) > 0) if nothing else mask)
            return
        places = [n for n in (family.x, family.source) if n is not None]
        if chosen and family.source is not None:
            for axis in family.axes:
                live = along(live, axis).expand(live.shape)
        flat = torch.zeros(sum(torch.Size(shape_of(n)).numel() for n in places) + 1, dtype=torch.bool)
        flat[self.movement_map(node)[0][live]] = True
        sizes = [torch.Size(shape_of(n)) for n in places]
        for n, size, part in zip(places, sizes, flat[:-1].split([s.numel() for s in sizes]), strict=True):
            mask = part.view(size)
            if chosen and n is family.x:
                for axis in family.axes:
                    mask = along(mask, axis).expand(size)
            elif chosen and n is family.source:
                mask = full_mask(self.values[n], True) if is_any(live) else mask
            self._mark(n, mask)

    @_live.register
    def _(self, family: Ranking, node: Node, live: Any) -> None:
        parts = [live] if isinstance(live, Tensor) else live
        for part in parts:
            mask = part if family.keeps_axis else part.unsqueeze(family.axis)
            self._mark(family.x, along(mask, family.axis).expand(shape_of(family.x)))

    @_live.register
    def _(self, family: Bilinear, node: Node, live: Any) -> None:
        weight = (self.values[family.weight] != 0).float()
        one = torch.einsum("...o,oij,...j->...i", live.float(), weight, self.possible(family.x2))
        two = torch.einsum("...o,oij,...i->...j", live.float(), weight, self.possible(family.x1))
        self._mark(family.x1, one > 0)
        self._mark(family.x2, two > 0)

    @_live.register
    def _(self, family: Halves, node: Node, live: Any) -> None:
        second = live & ~self.zero(family.x).chunk(2, family.axis)[0]
        self._mark(family.x, torch.cat([live, second], family.axis))

    @_live.register
    def _(self, family: Lookup, node: Node, live: Any) -> None:
        for n in node.all_input_nodes:
            if n is not family.table:
                self._mark(n, full_mask(self.values[n], True))

    @_live.register
    def _(self, family: Pick, node: Node, live: Any) -> None:
        parts = self.live[family.source]
        parts[family.index] = parts[family.index] | live


def _size_at(node: Node, back: int) -> int | None:
    """Return the size of a tensor along an axis counted from the last one, if it has so many."""
    shape = shape_of(node)
    return shape[back] if -back <= len(shape) else None


def makes(node: Node) -> bool:
    """Tell whether a node makes a tensor that is the same everywhere, of a size that the code may read off a module."""
    name = op_name(node).removeprefix("new_")
    return node.op == "call_function" and name in ("zeros", "ones", "full", "scalar_tensor")


HOOK_BUFFERS = ("_kept", "_read")
"""The names under which layers that compute, or read, some channels only hold which."""


def _reached(family: Contraction, shape: list[int], weight: Tensor, live: Tensor) -> Tensor:
    """Mark the elements of a contraction's operand that live results read through a weight."""
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=torch.float32, requires_grad=True)
        out = family.apply(x, weight)
    [reached] = torch.autograd.grad(out, x, live.float())
    return reached > 0.5
