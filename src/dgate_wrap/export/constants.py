"""Which elements of a graph are known constants: the first of the two proofs that a cut rests on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing import Trace
from ..tracing.families import (
    Attention,
    Bilinear,
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
from ..tracing.operations import (
    describe,
    feature_inputs,
    gives_zero,
    is_tensor,
    shape_of,
    source_indices,
    varying_nodes,
)
from ..tracing.origins import operation
from .masks import along, any_of, full_mask, is_any, on_axis, others, project, taps


class Constants:
    """Which elements of a traced model do not depend on its inputs, and their values.

    ``values[node]`` is the value of one run. ``unknown[node]`` marks the elements that depend on the model's inputs;
    every other element is the constant found in ``values``. What a known zero absorbs, as in a product, is zero, which
    holds for finite activations. The rows of a softmax sum to one, which holds where no row is masked throughout.

    Args:
        trace: The traced model.
        elsewhere: Values of runs at other sizes of the inputs. What is another constant there is none: ``sized[node]``
            marks it.
    """

    def __init__(self, trace: Trace, elsewhere: Sequence[Mapping[Node, Any]] = ()) -> None:
        self.trace = trace
        self.elsewhere = tuple(elsewhere)
        self.nodes = trace.nodes
        self.values = trace.run()
        self.varying = varying_nodes(trace)
        self.families: dict[Node, Family] = {
            n: describe(n, self.varying) for n in self.nodes if n.op == "call_function"
        }
        self._maps: dict[Node, list[Tensor]] = {}
        self._boxes: dict[Node, list[Tensor] | None] = {}
        self._extremes: dict[tuple[Node, int], tuple[Tensor, Tensor]] = {}
        self._absorbing: dict[tuple[Node, frozenset[Node]], bool] = {}
        self.unknown: dict[Node, Any] = {}
        self.sized: dict[Node, Tensor] = {}
        for node in self.nodes:
            self._find_unknown(node)
            if self.elsewhere and node in self.varying and isinstance(self.values.get(node), Tensor):
                self._find_sized(node)

    @functools.cached_property
    def features(self) -> frozenset[Node]:
        """The inputs whose elements are features."""
        return feature_inputs(self.trace, self.families, self.varying)

    def outputs(self, node: Node) -> list[Node]:
        """Return the tensor-valued nodes that hold a node's results: itself, or what is picked from it."""
        return [node] if is_tensor(node) else [u for u in node.users if isinstance(self.families.get(u), Pick)]

    def movement_map(self, node: Node) -> list[Tensor]:
        """Return, per result of a movement, where each element comes from; see `source_indices`."""
        if node not in self._maps:
            family = self.families[node]
            assert isinstance(family, Movement | Indexing)
            self._maps[node] = source_indices(family, self.values)
        return self._maps[node]

    def zero(self, node: Node) -> Tensor:
        """Mark the elements that are known to be zero; none of a sparse tensor."""
        value = self.values[node]
        if value.layout != torch.strided:
            return torch.zeros_like(self.unknown[node])
        return ~self.unknown[node] & (value == 0)

    def nonzero_constant(self, node: Node) -> Tensor:
        """Mark the elements that are known, and not zero."""
        return ~self.unknown[node] & (self.values[node] != 0)

    def steady(self, node: Node, axis: int) -> Tensor:
        """Mark the elements that are known, and the same all along an axis; that axis has size 1 in the result."""
        value = self.values[node]
        known = ~along(self.unknown[node], axis)
        if value.layout != torch.strided:
            return torch.zeros_like(known)
        if not value.is_floating_point() or value.shape[axis] == 0:
            return known & (value == value.narrow(axis, 0, 1)).all(axis, keepdim=True) if value.numel() else known
        low, high = value.amin(axis, keepdim=True), value.amax(axis, keepdim=True)
        return known & ((high - low) <= rounding(value) * torch.maximum(high.abs(), low.abs()))

    def _find_unknown(self, node: Node) -> None:
        value = self.values.get(node)
        if node.op == "placeholder":
            self.unknown[node] = full_mask(value, self.trace.sources[node].kind == "input")
        elif node.op == "get_attr":
            self.unknown[node] = full_mask(value, False)
        elif node.op == "call_function":
            known = node not in self.varying
            self.unknown[node] = full_mask(value, False) if known else self._unknown(self.families[node], node)

    def _find_sized(self, node: Node) -> None:
        """Mark as unknown what was seen to be another constant at other sizes of the inputs."""
        unknown, here = self.unknown[node], self.values[node]
        found = torch.zeros_like(unknown)
        for values in () if bool(unknown.all()) else self.elsewhere:
            there = values.get(node)
            if not isinstance(there, Tensor) or there.dim() != here.dim() or here.is_complex():
                # of another graph, zeros are zeros there too
                found = found | (here != 0)
                continue
            axes = [a for a, (m, n) in enumerate(zip(here.shape, there.shape, strict=True)) if m != n]
            for x, y in zip(_range(here, axes), _range(there, axes), strict=True):
                found = found | ((x - y).abs() > rounding(here) * torch.maximum(x.abs(), y.abs()))
        self.sized[node] = found & ~unknown
        self.unknown[node] = unknown | found

    @singledispatchmethod
    def _unknown(self, family: Family, node: Node) -> Any:
        return full_mask(self.values[node], True)

    @_unknown.register
    def _(self, family: Movement, node: Node) -> Any:
        flat = torch.cat([*(self.unknown[n].flatten() for n in family.inputs), torch.zeros(1, dtype=torch.bool)])
        moved = [flat[m] for m in self.movement_map(node)]
        return moved[0] if is_tensor(node) else moved

    @_unknown.register
    def _(self, family: Pointwise, node: Node) -> Any:
        out = torch.zeros(shape_of(node), dtype=torch.bool)
        for n in family.operands:
            out |= self.unknown[n] & ~self.absorbed(family, node, n)
        return out

    def absorbed(self, family: Pointwise, node: Node, operand: Node) -> Tensor:
        """Mark where an operand does not matter, since others, one or all, are known zeros that absorb it."""
        out = torch.zeros((), dtype=torch.bool)
        others = frozenset(n for n in family.operands if n is not operand)
        ways = {*(frozenset({n}) for n in others), others} if others else ()
        for zeros in ways:
            zero = functools.reduce(torch.logical_and, (self.zero(n) for n in zeros))
            if is_any(zero):
                if (node, zeros) not in self._absorbing:
                    self._absorbing[node, zeros] = gives_zero(node, family, zeros)
                if self._absorbing[node, zeros]:
                    out = out | zero
        return out

    @_unknown.register
    def _(self, family: Contraction, node: Node) -> Any:
        unknown, box = self.unknown[family.x], self.box(family)
        if box is None:
            return family.apply(unknown.float(), self.pattern(family)) > 0.5
        read = along(unknown & on_axis(box[family.w_in], family.x_axis, unknown.dim()), family.x_axis)
        if family.spatial:
            read = family.apply(read.float(), taps(box)) > 0.5
        return read & on_axis(box[family.w_out], family.out_axis, len(shape_of(node)))

    def pattern(self, family: Contraction) -> Tensor:
        """Return ones where a contraction's weight is not zero."""
        return (self.values[family.weight] != 0).float()

    def box(self, family: Contraction) -> list[Tensor] | None:
        """Mark, per axis of a contraction's weight, the indices that are not zero throughout.

        ``None`` if something else is zero than what has one of the other indices, or if the weight is grouped. Single
        zeros of a large weight, as chance puts them there, count as nonzero: to claim less is always right.
        """
        if family.groups > 1:
            return None
        if family.weight not in self._boxes:
            nonzero = self.values[family.weight] != 0
            box = [project(nonzero, a) for a in range(nonzero.dim())]
            full = int(nonzero.count_nonzero()) >= 0.9999 * math.prod(int(m.count_nonzero()) for m in box)
            self._boxes[family.weight] = box if full else None
        return self._boxes[family.weight]

    def extremes(self, node: Node, axis: int) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value at every index along an axis, in float64."""
        if (node, axis) not in self._extremes:
            rest = others(len(shape_of(node)), axis)
            self._extremes[node, axis] = _range(self.values[node], rest, keepdim=False)
        return self._extremes[node, axis]

    @_unknown.register
    def _(self, family: Mixing, node: Node) -> Any:
        unknown = self.unknown[family.x]
        moves = any(n in self.varying for n in family.where)  # zeros remain zeros, wherever they are taken from
        mixed = self.mixed(family, self.possible(family.x) > 0 if moves else unknown)
        if family.keeps_zero and family.kind == "norm":
            mixed = mixed & ~self.zero(family.x)
        scaled = mixed
        if family.scale is not None:
            along_x = {x_axis for n, _, x_axis in family.parameters if n is family.scale}
            shape = [n if a in along_x else 1 for a, n in enumerate(shape_of(family.x))]
            scaled = mixed & (self.values[family.scale] != 0).view(shape)
        gone = [a for a, b in enumerate(family.out_axis) if b is None]
        shape = [n for a, n in enumerate(scaled.shape) if a not in gone]
        results = self.values[node]
        if isinstance(results, Tensor):
            return scaled.reshape(shape).expand(results.shape).clone()
        masks = [scaled, *[mixed] * (len(results) - 1)]
        return [
            m.expand(r.shape).clone() if _same_axes(r, m) else full_mask(r, True)
            for r, m in zip(results, masks, strict=True)
        ]

    @staticmethod
    def mixed(family: Mixing, mask: Tensor) -> Tensor:
        """Mark everything that is mixed with something marked; the mixed axes get size 1, unless it is by groups."""
        if family.groups > 1:
            grouped = mask.unflatten(1, (family.groups, -1))
            grouped = any_of(grouped.flatten(2), 2)  # (N, groups)
            each = grouped.repeat_interleave(mask.shape[1] // family.groups, 1)
            return each.view(*each.shape, *[1] * (mask.dim() - 2))
        for axis in family.mixed:
            mask = along(mask, axis)
        return mask

    @_unknown.register
    def _(self, family: Lookup, node: Node) -> Any:
        found, value, table = self.unknown[family.indices], self.values[node], family.table
        if not isinstance(value, Tensor):  # bags of rows, which may be empty, and what the operation notes beside them
            bags, *notes = value
            nonzero = project(~self.zero(table), 1)
            return [nonzero.expand(bags.shape), *(full_mask(v, True) for v in notes)]
        if value.dim() <= found.dim():
            return full_mask(value, True)
        same = self.steady(table, 0).flatten()  # columns that are the same in every row
        return (found.unsqueeze(-1) & ~same).expand(value.shape).clone()

    @_unknown.register
    def _(self, family: Pick, node: Node) -> Any:
        return self.unknown[family.source][family.index]

    @_unknown.register
    def _(self, family: Creation, node: Node) -> Any:
        return full_mask(self.values[node], False)

    @_unknown.register
    def _(self, family: Product, node: Node) -> Any:
        a, b = family.a, family.b
        made = f"{family.a_axes},{family.b_axes}->{family.out_axes}"
        some_a, some_b = self.possible(a), self.possible(b)
        if any(n in self.varying for n in family.inputs if n not in (a, b)):
            out = torch.einsum(made, some_a, some_b) > 0  # which parts meet is up to the data
        else:
            out = (torch.einsum(made, self.unknown[a].float(), some_b) > 0) | (
                torch.einsum(made, some_a, self.unknown[b].float()) > 0
            )
        return out & ~self._averaged(family)

    def possible(self, node: Node) -> Tensor:
        """Mark, with ones, the elements that are not known to be zero."""
        return (~self.zero(node)).float()

    def _averaged(self, family: Product) -> Tensor:
        """Mark the results that are averages of one constant: a softmax times values that are all the same."""
        out = torch.zeros((), dtype=torch.bool)
        for (p, p_axes), (v, v_axes) in (
            ((family.a, family.a_axes), (family.b, family.b_axes)),
            ((family.b, family.b_axes), (family.a, family.a_axes)),
        ):
            summed = [c for c in dict.fromkeys(p_axes + v_axes) if c not in family.out_axes]
            if len(summed) != 1 or summed[0] not in p_axes or summed[0] not in v_axes:
                continue
            axis = v_axes.index(summed[0])
            same = self.steady(v, axis)
            if same.any() and sums_to_one(p, p_axes.index(summed[0]), self.families):
                ones = torch.ones(shape_of(p), dtype=torch.float32)
                held = torch.einsum(f"{p_axes},{v_axes}->{family.out_axes}", ones, same.expand(shape_of(v)).float())
                out = out | (held == shape_of(v)[axis])
        return out

    @_unknown.register
    def _(self, family: Attention, node: Node) -> Any:
        same = self.steady(family.value, -2)
        if family.repeats > 1:
            same = same.repeat_interleave(family.repeats, -3)
        results = self.values[node]
        if isinstance(results, Tensor):
            return ~same.expand(results.shape)
        return [~same.expand(results[0].shape), *(full_mask(r, True) for r in results[1:])]

    @_unknown.register
    def _(self, family: Recurrence, node: Node) -> Any:
        ends = [self.moving_units(family, i) for i in range(len(family.layers))]
        last = torch.cat([end[1] for end in ends[-family.directions :]])
        values = self.values[node]
        if isinstance(values, Tensor):
            return last.expand(values.shape).clone()
        if family.single:
            return [m.expand(v.shape).clone() for m, v in zip((ends[0][1], ends[0][0]), values, strict=False)]
        hidden, cells = (torch.stack([end[i] for end in ends]).unsqueeze(1) for i in (1, 0))
        finals = [m.expand(v.shape).clone() for m, v in zip((hidden, cells), values[1:], strict=False)]
        return [last.expand(values[0].shape).clone(), *finals]

    def moving_units(self, family: Recurrence, layer: int) -> tuple[Tensor, Tensor]:
        """Mark the units of a layer that are not zero throughout, and what it gives to the next one."""
        w_ih, w_hh, b_ih, b_hh, w_hr = family.layers[layer]
        units = shape_of(w_ih)[0] // family.gates
        start = units * _CANDIDATE[family.gates]
        moves = torch.zeros(units, dtype=torch.bool)
        for w in (w_ih, w_hh, b_ih, b_hh):
            if w is not None:
                rows = self.values[w].narrow(0, start, units) != 0
                moves |= rows.flatten(1).any(1) if rows.dim() > 1 else rows
        for s in family.states if w_hr is None else family.states[1:]:
            given = ~self.zero(s)
            given = given if given.dim() < 3 else given[layer]
            moves |= given.flatten(0, -2).any(0)
        if w_hr is None:
            return moves, moves
        projected = any_of((self.values[w_hr] != 0)[:, moves], 1)
        given = ~self.zero(family.states[0])[layer]
        return moves, projected | given.flatten(0, -2).any(0)

    @_unknown.register
    def _(self, family: Indexing, node: Node) -> Any:
        places = [n for n in (family.x, family.source) if n is not None]
        chosen = any(n in self.varying for n in family.indices)
        if family.adds:
            assert family.source is not None
            axis = family.axes[0]
            added = self.possible(family.source) > 0 if chosen else self.unknown[family.source]
            kept = self.possible(family.x) > 0 if chosen and family.over else self.unknown[family.x]
            return kept | along(added, axis).expand(shape_of(node))
        flat = torch.cat([*(self._choices(family, n, chosen).flatten() for n in places), torch.zeros(1).bool()])
        out = flat[self.movement_map(node)[0]]
        if chosen and family.source is not None:  # what is written where is up to the data
            value = self.values[node]
            for axis in family.axes:
                out = along(out, axis) | (value != value.narrow(axis, 0, 1))
                out = along(out, axis).expand(value.shape)
            source = family.source
            out = out | any_of(self.unknown[source]) | any_of(self.values[source] != 0)
        return out

    def _choices(self, family: Indexing, node: Node, chosen: bool) -> Tensor:
        """Mark the elements of an operand that may be picked and are unknown, or are picked by the data."""
        unknown = self.unknown[node]
        if not chosen or node is not family.x:
            return unknown
        value = self.values[node]
        for axis in family.axes:
            differs = value != value.narrow(axis, 0, 1) if value.shape[axis] else unknown
            unknown = along(unknown | differs, axis).expand(value.shape)
        return unknown

    @_unknown.register
    def _(self, family: Ranking, node: Node) -> Any:
        mask = along(self.unknown[family.x], family.axis)
        mask = mask if family.keeps_axis else mask.squeeze(family.axis)
        values = self.values[node]
        return mask.expand(values.shape).clone() if is_tensor(node) else [mask.expand(v.shape).clone() for v in values]

    @_unknown.register
    def _(self, family: Bilinear, node: Node) -> Any:
        weight = (self.values[family.weight] != 0).float()
        some = [self.possible(n) for n in (family.x1, family.x2)]
        unknown = [self.unknown[n].float() for n in (family.x1, family.x2)]
        first, second = (
            torch.einsum(_BILINEAR, a, weight, b) > 0 for a, b in ((unknown[0], some[1]), (some[0], unknown[1]))
        )
        return first | second

    @_unknown.register
    def _(self, family: Halves, node: Node) -> Any:
        first, second = self.unknown[family.x].chunk(2, family.axis)
        return first | (second & ~self.zero(family.x).chunk(2, family.axis)[0])


def _same_axes(result: Tensor, x: Tensor) -> bool:
    return result.dim() == x.dim() and all(b in (1, a) for a, b in zip(result.shape, x.shape, strict=True))


_CANDIDATE = {4: 2, 3: 2, 1: 0}
"""Which block of rows of a recurrent weight makes the candidate state, by the number of gates: LSTM, GRU, plain."""

_BILINEAR = "...i,oij,...j->...o"


def _range(value: Tensor, axes: list[int], *, keepdim: bool = True) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest values along some axes, in float64; complex numbers may be any of a size."""
    if value.is_complex():
        most = _range(value.abs(), axes, keepdim=keepdim)[1]
        return -most, most
    if value.dtype not in (torch.float32, torch.float64):
        value = value.double()  # torch knows no least of unsigned and narrow numbers
    low, high = (value.amin(axes, keepdim), value.amax(axes, keepdim)) if axes else (value, value)
    return low.double(), high.double()


def rounding(value: Tensor) -> float:
    """Return the relative difference up to which constants count as the same; 0 of whole numbers."""
    if not (value.is_floating_point() or value.is_complex()):
        return 0.0
    return 1e-9 if value.dtype == torch.float64 else 100 * torch.finfo(value.dtype).eps


def held_once(value: Tensor, axis: int) -> Tensor | None:
    """Return what is the same all along an axis, up to rounding, with size 1 there; ``None`` if it is not."""
    if not value.shape[axis]:
        return None
    once = value.narrow(axis, 0, 1)
    if not value.is_floating_point() or not value.numel():
        return once if bool((value == once).all()) else None
    return once if float((value - once).abs().max()) <= rounding(value) * float(value.abs().max()) else None


def sums_to_one(node: Node, axis: int, families: Mapping[Node, Family]) -> bool:
    """Tell whether a node's values are a softmax along an axis, possibly moved since."""
    family = families.get(node)
    axis %= len(shape_of(node))
    if isinstance(family, Mixing):
        return operation(node).removeprefix("aten.") in ("softmax", "_softmax") and family.mixed == frozenset((axis,))
    if isinstance(family, Pointwise) and len(family.operands) == 1:
        name = operation(node).removeprefix("aten.")
        same = name in ("_to_copy", "to", "clone", "contiguous", "alias", "detach", "dropout")
        return same and sums_to_one(family.operands[0], axis, families)
    if isinstance(family, Movement) and len(family.inputs) == 1 and is_tensor(node):
        [moved], x = source_indices(family), family.inputs[0]
        shape = shape_of(x)
        for a, size in enumerate(shape):
            if size != shape_of(node)[axis]:
                continue
            stride = torch.Size(shape[a + 1 :]).numel()
            place = torch.arange(size).view([-1 if b == axis else 1 for b in range(moved.dim())])
            if (
                bool((moved >= 0).all())
                and bool((moved - place * stride == moved.narrow(axis, 0, 1)).all())
                and bool((moved // stride % size == place).all())
            ):
                return sums_to_one(x, a, families)
    return False
