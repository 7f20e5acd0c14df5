"""Which weights make a value: walk back from a node to the nearest parameters whose zeroing makes it exactly zero.

Only the graph is read, never a value of the model, so that models on the meta device work too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace
from .families import (
    Attention,
    Barrier,
    Contraction,
    Creation,
    Halves,
    Indexing,
    Lookup,
    Mixing,
    Movement,
    NormedWeight,
    Pick,
    Pointwise,
    Product,
)
from .flow import (
    LIKE,
    ConflictError,
    Flow,
    StuckError,
    axis_labels,
    fit_labels,
    is_floating,
    label_part,
    labels_along,
    merge_labels,
    reduce_labels,
    unchoose_labels,
    unmix_labels,
)
from .movements import source_indices
from .nodes import argument_names, names, op_name, shape_of, tensor_inputs
from .operations import gives_zero
from .origins import operation, where
from .structure import compact, narrow

Need: TypeAlias = "Tensor | None"
"""Label per element of a value: the group whose zeroing must make it zero, or -1; ``None``: all are of group 0."""


@dataclass(frozen=True)
class Projections:
    """Weights whose zeroing makes a value exactly zero.

    Args:
        labels: Parameter name → int64 labels that broadcast to it, -1 where a weight may live.
        sites: ``(parameter name, node)``: the live nodes that read the parameter on the way to the value.
        reason: Why there are none; empty if there are.
        conflict: Whether the reason is that one weight would have to serve two labels.
    """

    labels: dict[str, Tensor]
    sites: frozenset[tuple[str, Node]]
    reason: str = ""
    conflict: bool = False


def last_projections(
    trace: Trace | Flow,
    node: Node,
    labels: Need = None,
    *,
    stop: Collection[Node] = (),
    main: Node | None = None,
    by_row: bool = False,
    site: Node | None = None,
) -> Projections:
    """Return the nearest weights whose zeroing makes a node's value exactly zero.

    The walk goes back through data movement, casts, dropout, constant scaling, sums, pooling and functions with
    ``f(0) = 0`` (each checked by running it on zeros), and ends at a scale, the affine parameters of a norm, or the
    weight and bias of a contraction. One zero factor of a product is enough: a parameter first, then the factor from
    which the other one is computed (x of ``x * sigmoid(f(x))``), then the one that descends from ``main``.

    Args:
        trace: The trace, or its `Flow` where many nodes are asked about.
        node: The value that shall be zero.
        labels: Label per element of that value, to ask for several parts at once (the experts along an axis, the
            pieces of a concatenation); elements labelled -1 may live. ``None``: the whole value, as group 0.
        stop: Nodes that the walk must not reach, such as the skip of a residual branch and all before it.
        main: The start of the branch.
        by_row: Where data choose among the rows of a parameter (``W[expert]``, a grouped matmul), label each row
            0, 1, ... instead of all of them 0; only for ``labels=None``.
        site: Who reads the value, where it is a parameter.

    Returns:
        The `Projections`; empty, with the reason, where no weights make the value zero, or where a weight serves two
        labels.
    """
    flow = trace if isinstance(trace, Flow) else Flow(trace)
    walk = _Walk(flow, frozenset(stop), main, by_row)
    try:
        pieces = walk.of(node, labels, site or node)
        out: dict[str, Tensor] = {}
        for name, t, _ in pieces:
            out[name] = merge_labels(out[name], t) if name in out else t
    except StuckError as e:
        return Projections({}, frozenset(), str(e), isinstance(e, ConflictError))
    if not out:
        return Projections({}, frozenset(), "the value is a constant zero")
    return Projections(out, frozenset((name, site) for name, _, site in pieces))


_Piece: TypeAlias = "tuple[str, Tensor, Node]"
_WHOLE = names(
    """
    view reshape permute transpose t numpy_T mT unsqueeze squeeze expand flatten unflatten movedim pixel_shuffle
    pixel_unshuffle channel_shuffle flip roll repeat tile cat stack constant_pad_nd pad
    """
)
"""Movements that lose no element of their inputs."""
_TURNS = names("transpose permute t numpy_T mT")
_ZERO_AT_ZERO = names("sum mean amax amin max min var std prod cumsum any linalg_vector_norm norm")


class _Walk:
    """One walk back, with one rule per family; pieces are ``(parameter, labels, the live node that reads it)``."""

    def __init__(self, flow: Flow, stop: frozenset[Node], main: Node | None, by_row: bool) -> None:
        self.flow, self.stop, self.main, self.by_row = flow, stop, main, by_row
        self._known: dict[tuple[Node, Node], list[_Piece] | StuckError] = {}

    def of(self, node: Node, need: Need, site: Node) -> list[_Piece]:
        """Return the pieces that make the needed elements of a node zero, or raise."""
        site = node if node in self.flow.varying else site
        if need is not None:
            return [] if bool((narrow(need) < 0).all()) else self._step(node, need, site)
        key = (node, site)
        if key not in self._known:
            try:
                self._known[key] = self._step(node, None, site)
            except StuckError as e:
                self._known[key] = e
        found = self._known[key]
        if isinstance(found, StuckError):
            raise found
        return found

    def _step(self, node: Node, need: Need, site: Node) -> list[_Piece]:
        if node in self.stop:
            raise StuckError("the walk back meets no weight before what the branch starts from")
        if node.op == "placeholder":
            source = self.flow.trace.sources[node]
            if source.kind != "parameter":
                raise StuckError(f"it is made by the {source.kind} {source.name!r}, not by a weight")
            return [(source.name, torch.zeros((), dtype=torch.int64) if need is None else compact(need).clone(), site)]
        return self._rule(self.flow.family(node), node, need, site)

    @singledispatchmethod
    def _rule(self, family: Any, node: Node, need: Need, site: Node) -> list[_Piece]:
        raise StuckError(f"{operation(node)} gives no zero ({where(node)})")

    def _first(self, choices: Iterable[Callable[[], list[_Piece]]]) -> list[_Piece]:
        """Return what the first choice gives that is not stuck; raise what the first one says."""
        reason: StuckError | None = None
        for choice in choices:
            try:
                return choice()
            except StuckError as e:
                reason = reason or e
        raise reason or StuckError("nothing makes it zero")

    def _rank(self, node: Node, others: Iterable[Node]) -> tuple[bool, ...]:
        """Sort the factors of a product: parameters, chosen parameters, then the main path."""
        flow = self.flow
        inner = flow.family(node)
        chosen = isinstance(inner, Indexing) and inner.x not in flow.varying
        computes = any(flow.is_above(node, n) for n in others)
        descends = self.main is not None and flow.is_above(self.main, node)
        return node in flow.varying, not chosen, not computes, not descends

    @_rule.register
    def _(self, family: Creation, node: Node, need: Need, site: Node) -> list[_Piece]:
        value = node.args[1] if op_name(node) == "full" else node.args[0] if op_name(node) == "scalar_tensor" else None
        if op_name(node) == "zeros" or (isinstance(value, int | float) and value == 0):
            return []
        raise StuckError(f"{operation(node)} is a constant ({where(node)})")

    @_rule.register
    def _(self, family: Pick, node: Node, need: Need, site: Node) -> list[_Piece]:
        inner = self.flow.family(family.source)
        if isinstance(inner, Movement):
            return self._back(inner, family.source, family.index, need, site)
        if family.index == 0 and isinstance(inner, Mixing | Barrier):
            return self._rule(inner, family.source, need, family.source)
        raise StuckError(f"{operation(family.source)} gives no zero ({where(node)})")

    @_rule.register
    def _(self, family: Movement, node: Node, need: Need, site: Node) -> list[_Piece]:
        return self._back(family, node, 0, need, site)

    def _back(self, family: Movement, node: Node, index: int, need: Need, site: Node) -> list[_Piece]:
        """Move labels back through a movement, onto the elements that the needed ones come from."""
        name = op_name(node)
        if "pad" in name and any(isinstance(a, int | float) and a != 0 for a in node.args[2:]):
            raise StuckError(f"{operation(node)} pads with something else than zero ({where(node)})")
        if name in _WHOLE and need is None:
            return [p for n in family.inputs for p in self.of(n, None, site)]
        if name in _TURNS and need is not None:
            turned = cast(Any, node.target)(torch.empty(list(range(need.dim())), device="meta"), *node.args[1:]).shape
            return self.of(family.inputs[0], need.permute([turned.index(a) for a in range(need.dim())]), site)
        if name in ("select", "slice") and need is None:
            return self.of(family.inputs[0], label_part(node, shape_of(family.inputs[0])), site)
        sources = source_indices(family)[index].flatten()
        here = torch.zeros_like(sources) if need is None else need.flatten()
        here, sources = here[sources >= 0], sources[sources >= 0]
        sizes = [torch.Size(shape_of(n)).numel() for n in family.inputs]
        moved = torch.full((sum(sizes),), -1).scatter_reduce(0, sources, here, "amax")
        if bool(((moved[sources] != here) & (here >= 0)).any()):
            raise ConflictError(f"elements serve several groups ({operation(node)}, {where(node)})")
        parts = zip(family.inputs, moved.split(sizes), strict=True)
        return [p for n, part in parts for p in self.of(n, part.view(shape_of(n)), site)]

    @_rule.register
    def _(self, family: Pointwise, node: Node, need: Need, site: Node) -> list[_Piece]:
        """Find the fewest operands whose zeros give zero; of several such sets, the first that can be made zero."""
        operands = [n for n in family.operands if is_floating(n)]

        def walk(chosen: Collection[Node]) -> list[_Piece]:
            return [p for n in chosen for p in self.of(n, None if need is None else fit_labels(need, n), site)]

        for count in range(len(operands) + 1):
            sets = [c for c in itertools.combinations(operands, count) if gives_zero(node, family, c)]
            if sets:
                sets.sort(key=lambda c: [self._rank(n, set(operands) - {n}) for n in c])
                return self._first(functools.partial(walk, c) for c in sets)
        raise StuckError(f"{operation(node)} of zero is not zero ({where(node)})")

    @_rule.register
    def _(self, family: Contraction, node: Node, need: Need, site: Node) -> list[_Piece]:
        rows = None if need is None else labels_along(need, family.out_axis)
        bias = [] if family.bias is None else self.of(family.bias, rows, site)

        def weight() -> list[_Piece]:
            if rows is None:
                return self.of(family.weight, None, site)
            shape = shape_of(family.weight)
            if family.w_out != 0 and family.groups > 1:
                labels = rows.view(family.groups, -1).repeat_interleave(shape[0] // family.groups, 0)
                labels = labels.view(*shape[:2], *[1] * (len(shape) - 2))
            else:
                labels = rows.view([-1 if a == family.w_out else 1 for a in range(len(shape))])
            return self.of(family.weight, labels.expand(shape), site)

        choices = [weight] if need is not None else [weight, lambda: self.of(family.x, None, site)]
        return self._first(choices) + bias

    @_rule.register
    def _(self, family: Product, node: Node, need: Need, site: Node) -> list[_Piece]:
        """One zero factor of a product is enough."""
        if "grouped_mm" in op_name(node):
            shape = shape_of(family.b)
            rows = self._rows(family.b, 0) if need is None else labels_along(need, -1).expand(shape)
            return self.of(family.b, rows, site)
        out = family.out_axes

        def walk(operand: Node, axes: str) -> list[_Piece]:
            if need is None:
                return self.of(operand, None, site)
            kept = [c for c in out if c in axes]
            labels = reduce_labels(need, [i for i, c in enumerate(out) if c not in axes])
            labels = labels.permute([kept.index(c) for c in axes if c in kept])
            for i, c in enumerate(axes):
                labels = labels if c in kept else labels.unsqueeze(i)
            return self.of(operand, fit_labels(labels, operand, grow=True), site)

        factors = sorted(
            [(family.a, family.a_axes), (family.b, family.b_axes)],
            key=lambda f: self._rank(f[0], {family.a, family.b} - {f[0]}),
        )
        return self._first(functools.partial(walk, n, axes) for n, axes in factors)

    @_rule.register
    def _(self, family: Attention, node: Node, need: Need, site: Node) -> list[_Piece]:
        labels = None
        if need is not None:
            shape = shape_of(family.value)
            labels = reduce_labels(need, [need.dim() - 2], keepdim=True)
            if family.repeats > 1:
                labels = reduce_labels(labels.unflatten(-3, (-1, family.repeats)), [labels.dim() - 2])
            labels = labels.expand(shape)
        return self.of(family.value, labels, site)

    @_rule.register
    def _(self, family: Indexing, node: Node, need: Need, site: Node) -> list[_Piece]:
        """Whatever the indices choose from zeros is zero; ``by_row``, the rows of a parameter are labelled."""
        if family.source is None and family.x not in self.flow.varying and need is None:
            return self.of(family.x, self._rows(family.x, min(family.axes)), site)
        out = self.of(family.x, None if need is None else unchoose_labels(family, need), site)
        if family.source is None:
            return out
        if need is not None:
            if len(family.axes) > 1 or len(shape_of(family.source)) != need.dim():
                raise StuckError(f"data choose where elements are written ({operation(node)}, {where(node)})")
            need = reduce_labels(need, [min(family.axes)], keepdim=True).expand(shape_of(family.source))
        return out + self.of(family.source, need, site)

    def _rows(self, table: Node, axis: int) -> Need:
        """Label the rows of a parameter among which data choose."""
        return axis_labels(table, axis) if self.by_row else None

    @_rule.register
    def _(self, family: Halves, node: Node, need: Need, site: Node) -> list[_Piece]:
        half = torch.zeros(shape_of(node), dtype=torch.int64) if need is None else need
        return self.of(family.x, torch.cat([half, torch.full_like(half, -1)], family.axis), site)

    @_rule.register
    def _(self, family: NormedWeight, node: Node, need: Need, site: Node) -> list[_Piece]:
        return self.of(family.g, None if need is None else fit_labels(need, family.g), site)

    @_rule.register
    def _(self, family: Lookup, node: Node, need: Need, site: Node) -> list[_Piece]:
        labels = None if need is None else labels_along(need, -1).expand(shape_of(family.table))
        return self.of(family.table, labels, site)

    @_rule.register
    def _(self, family: Mixing, node: Node, need: Need, site: Node) -> list[_Piece]:
        if family.kind == "norm":
            return self._norm(family, node, need, site)
        if family.kind == "pool" or family.keeps_zero or op_name(node) in _ZERO_AT_ZERO:
            return self.of(family.x, None if need is None else unmix_labels(family, need), site)
        raise StuckError(f"{operation(node)} of zero is not zero ({where(node)})")

    def _norm(self, family: Mixing, node: Node, need: Need, site: Node) -> list[_Piece]:
        """Take the scale and shift of a norm; a norm without them gives zero for zero, unless it shifts by a buffer."""
        given = {**dict(zip(argument_names(node), node.args, strict=False)), **node.kwargs}

        def vector(name: str) -> list[_Piece]:
            parameter = cast(Node, given[name])
            axes = {x_axis: axis for n, axis, x_axis in family.parameters if n is parameter}
            labels = None
            if need is not None:
                labels = reduce_labels(need, [a for a in range(need.dim()) if a not in axes])
            return self.of(parameter, labels, site)

        shift = vector("bias") if given.get("bias") is not None else []
        if "prelu" in op_name(node) or given.get("weight") is None:
            return self._normed(family, given, node, need, site) + shift
        return self._first([lambda: vector("weight"), lambda: self._normed(family, given, node, need, site)]) + shift

    def _normed(self, family: Mixing, given: dict[str, Any], node: Node, need: Need, site: Node) -> list[_Piece]:
        if given.get("running_mean") is not None:
            raise StuckError(f"{operation(node)} shifts by its running mean and has no scale ({where(node)})")
        return self.of(family.x, None if need is None else unmix_labels(family, need), site)

    @_rule.register
    def _(self, family: Barrier, node: Node, need: Need, site: Node) -> list[_Piece]:
        inputs = tensor_inputs(node)
        if op_name(node) == "new_zeros" or (op_name(node) == "new_full" and node.args[2] == 0):
            return []
        if op_name(node) in LIKE or (op_name(node) in _ZERO_AT_ZERO and need is None):
            return self.of(inputs[0], need, site)
        raise StuckError(f"{operation(node)} is not known to give zero ({where(node)})")
