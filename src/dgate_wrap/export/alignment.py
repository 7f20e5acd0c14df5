"""Put the units of experts and of heads in another order, the live ones first, so that as many can go from each.

A tensor is cut along whole indices of an axis. If the dead units of stacked experts have other indices in each of them,
hardly any index is dead in all. But an expert's units may stand in any order, as long as all weights that make and read
them follow. Labels tell which weights those are; that the network computes the same in the new order is seen by running
it, since an operation may tell positions apart (a table of cosines does).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing import Structure, find_structure
from ..tracing.families import Attention, Family, Mixing, Pick, Recurrence
from ..tracing.operations import op_name, shape_of
from ..tracing.origins import place
from ..tracing.structure import compact, label_of
from .copies import share
from .cuts import Cut, Gather
from .facts import Facts
from .masks import any_of, project
from .verify import Verifier

_RUNS = 16
"""How often a model is run to see which orders do not change what it computes."""


@dataclass(frozen=True)
class _Table:
    """Classes of labels of a tensor, and which of its elements are needed.

    Args:
        classes: Without the axes along which they are the same; none negative.
        live: Which elements are needed, in that shape.
    """

    classes: Tensor
    live: Tensor

    @functools.cached_property
    def members(self) -> set[int]:
        """All classes in it."""
        return set(self.classes.flatten().tolist())


@dataclass(frozen=True, eq=False)
class _Sorting:
    """An order of units: the unit that comes to the place of each, as classes of labels.

    Args:
        places: Classes whose places are taken, one row per block, shape ``(blocks, units)``.
        comes: The class that comes to each of those places.
        gains: Whether that alone lets a tensor be cut to fewer indices.
    """

    places: Tensor
    comes: Tensor
    gains: bool

    @functools.cached_property
    def classes(self) -> set[int]:
        """All classes that it moves or leaves."""
        return set(self.places.flatten().tolist())

    @property
    def key(self) -> bytes:
        """What it does."""
        return self.places.numpy().tobytes() + self.comes.numpy().tobytes()


def find_orders(model: nn.Module, facts: Facts, verifier: Verifier) -> dict[str, Cut]:
    """Return new orders of the indices of parameters, by name; empty if nothing is gained.

    Args:
        model: The dense model, in the precision of the analysis.
        facts: Constants and liveness of its graph.
        verifier: Knows what the model computes.
    """
    if not any(_could_gain(facts, n) for n in facts.nodes if n in facts.varying):
        return {}
    if any(_over_one(n, f) for n, f in facts.families.items()):  # there, all orders may give the same
        return {}
    structure = find_structure(facts.trace)
    finder = _Finder(model, facts, structure, verifier)
    tables = list(_tables(facts, structure))
    good: list[_Sorting] = []
    for inner in range(max((t.classes.dim() for t in tables), default=0)):
        moved = {c for s in good for c in s.classes}
        fitting = [t for t in tables if inner < t.classes.dim() and not moved & t.members]
        fitting.sort(key=lambda t: t.classes.shape[-1 - inner])  # heads come before queries, keys and values in a row
        found = {s.key: s for t in fitting if (s := _sort(t, inner)) is not None}
        while left := _apart((s for s in found.values() if s.gains), good):
            found = {k: s for k, s in found.items() if s not in left}
            good += finder.valid(left)
        named = finder.names(good)  # what lies beside sorted units in a weight is sorted with them
        good += finder.valid(_apart((s for s in found.values() if named & finder.names([s])), good))
    return finder.orders(good) or {}


def _apart(sortings: Iterable[_Sorting], taken: list[_Sorting]) -> list[_Sorting]:
    """Return sortings of which no two, and none with one of those that are taken, move the same units."""
    moved = {c for s in taken for c in s.classes}
    apart: list[_Sorting] = []
    for s in sortings:
        if not s.classes & moved:
            apart.append(s)
            moved |= s.classes
    return apart


def reorder_(model: nn.Module, orders: Mapping[str, Cut]) -> nn.Module:
    """Put the indices of parameters and buffers in another order, in place but for their memory; return the model."""
    for name, order in orders.items():
        path, _, leaf = name.rpartition(".")
        tensor = cast(Tensor, getattr(model.get_submodule(path), leaf))
        tensor.data = order.apply(tensor.data)
    return model


def reordered(index: Tensor, order: Cut) -> Tensor:
    """Put something that broadcasts to a parameter in its order."""
    moved = {*order.axes, *(a for g in order.gathers for a in (g.axis, *g.along))}
    return order.apply(index.expand([n if a in moved else index.shape[a] for a, n in enumerate(order.shape)]))


class _Finder:
    """Finds which orders do not change what a model computes."""

    def __init__(self, model: nn.Module, facts: Facts, structure: Structure, verifier: Verifier) -> None:
        self._model, self._structure, self._verifier = model, structure, verifier
        named = (s for s in facts.trace.sources.values() if s.kind in ("parameter", "buffer"))
        self._shapes = {s.name: tuple(s.value.shape) for s in named}
        self._classes = [
            *_by_parameter((s.name, structure.classes(s.labels)) for s in structure.slots),
            *_by_parameter((r.name, structure.classes(r.labels)) for r in structure.readers),
            *_statistics(facts, structure),
        ]
        self._runs = 0

    def valid(self, sortings: list[_Sorting]) -> list[_Sorting]:
        """Return those that do not change what the model computes: all, or those of the same weights of each layer."""
        kinds: dict[frozenset[str], list[_Sorting]] = {}
        for s in sortings:
            orders = self.orders([s])
            if orders is not None:
                kinds.setdefault(frozenset(map(place, orders)), []).append(s)
        together = [s for alike in kinds.values() for s in alike]
        if len(kinds) > 1 and self._is_valid(together):
            return together
        return [s for alike in kinds.values() for s in self._halved(alike)]

    def _halved(self, sortings: list[_Sorting]) -> list[_Sorting]:
        if not sortings or self._is_valid(sortings):
            return sortings
        half = len(sortings) // 2
        return [] if not half else [*self._halved(sortings[:half]), *self._halved(sortings[half:])]

    def _is_valid(self, sortings: list[_Sorting]) -> bool:
        orders = self.orders(sortings)
        self._runs += 1
        return (
            orders is not None and self._runs <= _RUNS and self._verifier.agrees(reorder_(share(self._model), orders))
        )

    def names(self, sortings: list[_Sorting]) -> set[str]:
        """Return the parameters that follow."""
        return set(self.orders(sortings) or {})

    def orders(self, sortings: list[_Sorting]) -> dict[str, Cut] | None:
        """Return the orders of all parameters that follow; ``None`` if one cannot."""
        comes = torch.arange(len(self._structure.sets))
        for s in sortings:
            comes[s.places] = s.comes
        found: dict[str, list[Cut]] = {}
        for name, classes in self._classes:
            if torch.equal(comes[classes.clamp_min(0)], classes.clamp_min(0)):
                continue
            order = _order(classes, comes, self._shapes[name])
            if order is None:
                return None
            if order not in found.setdefault(name, []):
                found[name].append(order)
        together = {name: _together(orders) for name, orders in found.items()}
        return None if any(t is None for t in together.values()) else {n: t for n, t in together.items() if t}


def _by_parameter(classes: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the classes of each parameter, those of its parts (queries, keys and values in one weight) together."""
    together: dict[str, list[Tensor]] = {}
    for name, found in classes:
        known = together.setdefault(name, [])
        for i, other in enumerate(known):
            a, b = torch.broadcast_tensors(other, found)
            if not bool(((a >= 0) & (b >= 0) & (a != b)).any()):
                known[i] = torch.where(a >= 0, a, b)
                break
        else:
            known.append(found)
    for name, known in together.items():
        yield from ((name, compact(t)) for t in known)


def _statistics(facts: Facts, structure: Structure) -> Iterator[tuple[str, Tensor]]:
    """Yield the classes of buffers that a norm has for its channels: running means and variances."""
    for family in (f for f in facts.families.values() if isinstance(f, Mixing)):
        words = structure.words.get(family.x)
        if not isinstance(words, Tensor):
            continue
        for node, _, axis in family.parameters:
            source = facts.trace.sources.get(node)
            if source is None or source.kind != "buffer" or source.value.dim() != 1:
                continue
            channels = compact(structure.classes(label_of(words).expand(shape_of(family.x)))).movedim(axis, 0)
            if channels.numel() == len(channels) == len(source.value):
                yield source.name, channels.flatten()


def _over_one(node: Node, family: Family) -> bool:
    """Tell whether a softmax, or attention, works over a single element."""
    if isinstance(family, Attention):
        return shape_of(family.key)[-2] == 1
    if not isinstance(family, Mixing) or op_name(node) != "softmax":
        return False
    return all(shape_of(family.x)[a] == 1 for a in family.mixed)


def _could_gain(facts: Facts, node: Node) -> bool:
    """Tell whether a tensor could be cut to fewer indices of some axis if each line along it were sorted."""
    if not isinstance(facts.values.get(node), Tensor):
        return False
    live = _live(facts, node)
    box = math.prod(int(project(live, a).sum()) for a in range(live.dim()))
    if int(live.count_nonzero()) == box:  # all at some indices of each axis: there is nothing between them to close
        return False
    return any(_gains(_lines(live, axis)) for axis in range(live.dim()))


def _live(facts: Facts, node: Node) -> Tensor:
    """Mark the elements of a tensor that are needed; of the last states of a recurrence, those of units that are.

    Whoever reads them or not: they are cut to the same indices in all layers and directions.
    """
    family = facts.families.get(node)
    if isinstance(family, Pick) and family.index > 0 and isinstance(facts.families.get(family.source), Recurrence):
        units = [found for _, found in facts.units.get(family.source, [])]
        if units and all(len(u) == shape_of(node)[-1] for u in units) and len(units) == shape_of(node)[0]:
            live = torch.stack(units)
            first = torch.arange(live.shape[1]) < int(live.sum(1).max())  # what stays of a layer that nobody reads
            live = torch.where(live.any(1, keepdim=True), live, first)
            return live.view(len(units), *[1] * (len(shape_of(node)) - 2), -1).expand(shape_of(node))
    return facts.needed(node)


def _lines(t: Tensor, axis: int) -> Tensor:
    """Return the lines of a tensor along an axis, as rows."""
    return t.movedim(axis, -1).reshape(-1, t.shape[axis])


def _tables(facts: Facts, structure: Structure) -> Iterator[_Table]:
    """Yield what the labels of tensors say, each once, by what is needed of their classes."""
    seen: set[bytes] = set()
    for node in (n for n in facts.nodes if n in facts.varying):
        words = structure.words.get(node)
        if not isinstance(words, Tensor) or not isinstance(facts.values.get(node), Tensor):
            continue
        live = _live(facts, node)
        classes = compact(structure.classes(label_of(words)).expand(live.shape))
        axes = [a for a, n in enumerate(classes.shape) if n > 1]
        if len(axes) < 2 or bool((classes < 0).any()):
            continue
        live = any_of(live, [a for a in range(live.dim()) if a not in axes])
        classes = classes.squeeze().contiguous()
        key = classes.numpy().tobytes() + live.contiguous().numpy().tobytes()
        if key not in seen:
            seen.add(key)
            yield _Table(classes, live)


def _sort(table: _Table, inner: int) -> _Sorting | None:
    """Return the order that puts the live units of every row first; ``None`` if it moves none, or rows differ.

    Args:
        table: Classes, and which are needed.
        inner: How many of its axes lie inside of the one along which units are sorted; a row is at each place along all
            others, and a unit has to stand at the same indices in every row.
    """
    axis = table.classes.dim() - 1 - inner
    classes, live = (_lines(t, axis) for t in (table.classes, table.live))
    _, where = classes[0].unique(return_inverse=True)  # a unit may stand at several indices: of both halves, say
    first = torch.full((int(where.max()) + 1,), len(where)).scatter_reduce(0, where, torch.arange(len(where)), "amin")
    at, rank = first.sort().values, first.argsort().argsort()[where]
    units = classes[:, at]
    if not torch.equal(units[:, rank], classes):
        return None
    counts = torch.zeros_like(units).index_add(1, rank, live.long())
    units, row = units.unique(dim=0, return_inverse=True)  # heads that share keys and values are one
    live = torch.zeros_like(units).index_add(0, row, counts) > 0
    order = (~live).int().argsort(dim=1, stable=True)
    if units.unique().numel() < units.numel() or len(units) == 1 or bool((order.diff(dim=1) > 0).all()):
        return None
    return _Sorting(units, units.gather(1, order), _gains(live))


def _gains(live: Tensor) -> bool:
    """Tell whether some column more is dead in all rows that live if each row is sorted."""
    live = live[live.any(1)]
    return len(live) > 0 and int(live.sum(1).max()) < int(live.any(0).sum())


def _order(classes: Tensor, comes: Tensor, shape: tuple[int, ...]) -> Cut | None:
    """Return how the indices of a parameter with such classes follow; ``None`` if whole indices cannot."""
    axes = [a for a, n in enumerate(classes.shape) if n > 1]
    if len(axes) == 1:
        line = _permutation(classes.flatten(), comes)
        return None if line is None else Cut(tuple(shape), {axes[0]: line})
    for axis in reversed(axes):
        along = [a for a in axes if a != axis]
        table = classes.movedim((*along, axis), tuple(range(len(axes)))).reshape(-1, classes.shape[axis])
        lines = [_permutation(line, comes) for line in table]
        rows = [line for line in lines if line is not None]
        if len(rows) == len(lines):
            return Cut(tuple(shape), {}, [Gather(axis, along, rows)])
    return None


def _permutation(line: Tensor, comes: Tensor) -> list[int] | None:
    """Return the old index that comes to each index of a line of classes: the n-th of a class where the n-th was."""
    wanted = torch.where(line >= 0, comes[line.clamp_min(0)], line)
    old, new = line.argsort(stable=True), wanted.argsort(stable=True)
    if not torch.equal(line[old], wanted[new]):
        return None
    return torch.empty_like(old).scatter_(0, new, old).tolist()


def _together(orders: list[Cut]) -> Cut | None:
    """Return several orders of the same parameter as one; ``None`` if two move the indices of the same axis."""
    gathers = [g for order in orders for g in order.gathers]
    axes = [a for order in orders for a in order.axes]
    moved = [*axes, *(g.axis for g in gathers)]
    if len(set(moved)) < len(moved) or {g.axis for g in gathers} & {a for g in gathers for a in g.along}:
        return None
    return Cut(orders[0].shape, {a: order.axes[a] for order in orders for a in order.axes}, gathers)
