"""The grouping of mixtures of experts: what is added up with one routing weight per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing import Trace
from ..tracing.branches import Projections, last_projections
from ..tracing.families import Barrier, Contraction, Indexing, Mixing, Movement, Pick, Pointwise, Product
from ..tracing.flow import LIKE, Flow, axis_labels, is_floating, value_inputs
from ..tracing.movements import source_indices
from ..tracing.nodes import op_name, shape_of
from ..tracing.origins import where
from .branches import Found, is_sum, join, keep_exclusive, nothing_found
from .registry import register_grouping

Routing: TypeAlias = "Tensor | Literal['choice', 'unknown'] | None"
"""The expert whose routing weight each element is, or that this is ``unknown``; ``choice`` is what came from integers
and truth values (masks, one-hot vectors), and ``None`` anything else."""


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of what experts give and their routing weights, and which expert each element of it belongs to."""

    node: Node
    value: Node
    labels: Tensor | None
    channels: tuple[Tensor, ...]
    summed: bool


@register_grouping("experts", needs_trace=True)
def experts(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every expert of a mixture, routed ones and those behind a gate of their own.

    Experts are found as values that are multiplied by a weight per token, the same for all channels, which comes from
    a softmax or sigmoid by choosing and scaling only, and that are then added up. The group is the last weights of an
    expert (weight and bias), or its slice of a parameter that holds them all; zeroing it makes the expert's
    contribution exactly zero, whatever the router says. Experts that several routers share, of one task each, are gated
    once. Channel attention (squeeze-excite) and the attention of tokens to each other are no mixtures of experts.
    """
    flow = Flow(trace)
    router = _Router(flow)
    near: dict[_Product, Projections] = {}
    refused: list[str] = []
    seen = 0
    for node in flow.nodes:
        walked = {p: w for p in router.products(node) if (w := _walk(flow, p)) is not None}
        seen += bool(router.products(node))
        best = sorted(walked, key=lambda p: walked[p].reason != "")[:1]
        near |= {p: walked[p] for p in best}
    found: list[Found] = []
    for component in _mixtures(flow, router, list(near)):
        parts = [near[p] for p in component if not near[p].reason]
        refused += [f"at {where(p.node)}: {near[p].reason}" for p in component if near[p].reason]
        if sum(map(_count, parts)) > 1:
            gates = frozenset(p.node for p in component)
            found += [Found(p, gates) for p in parts]
    kept = keep_exclusive(flow, [Found(f.projections, _gates(f, found)) for f in found], refused)
    if not kept:
        raise nothing_found("mixture of experts", f"{seen} products with routing weights", refused)
    return join(kept)


def _gates(one: Found, everything: list[Found]) -> frozenset[Node]:
    """Return the products that weigh the same experts: those of several tasks, each with a router of its own."""
    weights = one.projections.labels.keys()
    return frozenset[Node]().union(*(f.gates for f in everything if f.projections.labels.keys() & weights))


def _walk(flow: Flow, p: _Product) -> Projections | None:
    """Return the last weights of the experts in a product; ``None`` if the weight is not broadcast over channels."""
    found = last_projections(flow, p.value, p.labels, by_row=p.labels is None, site=p.node)
    if found.conflict or (not found.reason and p.summed and _count(found) < 2):
        return None
    broadcast = (last_projections(flow, p.value, labels, site=p.node) for labels in p.channels)
    return None if all(own.reason for own in broadcast) else found


def _count(found: Projections) -> int:
    return 1 + max((int(t.max()) for t in found.labels.values()), default=-1)


def _mixtures(flow: Flow, router: _Router, products: list[_Product]) -> list[list[_Product]]:
    """Return the products that are added up with each other, and only those that are added up at all."""
    routed: dict[Node, set[int]] = {}
    streams: dict[Node, set[int]] = {}
    """Products that were added to something else, until something is computed from them."""
    parent = list(range(len(products)))
    summed: set[int] = set()

    def root(i: int) -> int:
        return i if parent[i] == i else root(parent[i])

    def unite(members: set[int]) -> None:
        for i in members:
            parent[root(i)] = root(min(members))

    start = {p.node: i for i, p in enumerate(products)}
    for node in flow.nodes:
        inputs = [n for n in value_inputs(node) if is_floating(n) and n in flow.varying]
        carried = [n for n in inputs if n in routed]
        alone = all(n in routed or router.of(n) is not None for n in inputs)
        if node in start:
            routed[node] = {start[node]}
            summed |= routed[node] if products[start[node]].summed else set()
        if carried and alone and _carries(flow, node):
            routed[node] = routed.get(node, set()).union(*(routed[n] for n in carried))
            unite(routed[node])
            summed |= routed[node] if len(carried) > 1 or _adds(flow, node) else set()
        elif is_sum(flow, node):
            a, b = (routed.get(n, streams.get(n, set())) for n in inputs)
            a, b = _apart(flow, products, a, inputs[1]), _apart(flow, products, b, inputs[0])
            streams[node] = a | b
            for members in ({i, j} for i in a for j in b if i != j):
                unite(members)
                summed |= members
    total = sorted({root(i) for i in summed})
    return [[p for i, p in enumerate(products) if root(i) == r] for r in total]


def _apart(flow: Flow, products: list[_Product], members: set[int], other: Node) -> set[int]:
    """Return the products from which another value was not computed."""
    return {i for i in members if not flow.is_above(products[i].node, other)}


def _carries(flow: Flow, node: Node) -> bool:
    """Tell whether a node moves, masks or adds up what it reads."""
    family = flow.family(node)
    moves = isinstance(family, Movement | Pick | Pointwise | Indexing | Product)
    return moves or (isinstance(family, Mixing) and op_name(node) in ("sum", "mean"))


def _adds(flow: Flow, node: Node) -> bool:
    """Tell whether a node adds up the elements of what it reads, or adds them to what is there."""
    adds = op_name(node) in ("sum", "mean", "index_add", "scatter_add", "index_put")
    return adds or isinstance(flow.family(node), Product)


class _Router:
    """Which values are routing weights, and of which expert: carried forward from softmax and sigmoid."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._known: dict[Node, Routing] = {}

    def products(self, node: Node) -> list[_Product]:
        """Return the ways to read a node as a product of what experts give by their routing weights."""
        family = self.flow.family(node) if node in self.flow.varying else None
        if isinstance(family, Pointwise) and family.product and len(family.operands) == 2:
            a, b = family.operands
            return [p for value, weight in ((a, b), (b, a)) for p in self._scaled(node, value, weight)]
        if isinstance(family, Product) and {family.a, family.b} <= self.flow.varying:
            a, b = (family.a, family.a_axes), (family.b, family.b_axes)
            return [p for v, w in ((b, a), (a, b)) for p in self._mixed(node, *v, *w, family.out_axes)]
        return []

    def _weighs(self, weight: Node, value: Node) -> bool:
        """Tell whether an operand holds routing weights for what another one holds."""
        routing = self.of(weight)
        known = isinstance(routing, Tensor) or routing == "unknown"
        return known and self.of(value) is None and is_floating(value) and not self.flow.is_above(value, weight)

    def _scaled(self, node: Node, value: Node, weight: Node) -> list[_Product]:
        """Read an elementwise product: the weight has size 1 where the value has its channels."""
        shape, own = shape_of(node), shape_of(weight)
        wide = [1] * (len(shape) - len(own)) + list(own)
        free = [a for a, n in enumerate(shape) if n > 1 and wide[a] == 1]
        if value not in self.flow.varying or not self._weighs(weight, value) or shape_of(value) != shape:
            return []
        routing = self.of(weight)
        labels = routing.expand(shape) if isinstance(routing, Tensor) else None
        if labels is not None and bool((labels == labels.flatten()[0]).all()):
            labels = None
        return [_Product(node, value, labels, tuple(axis_labels(value, a) for a in free), False)]

    def _mixed(self, node: Node, value: Node, axes: str, weight: Node, own: str, out: str) -> list[_Product]:
        """Read a contraction over experts."""
        summed = [c for c in own if c not in out]
        if value is weight or not self._weighs(weight, value) or len(summed) != 1 or summed[0] not in axes:
            return []
        free = [i for i, c in enumerate(axes) if c not in own and c in out and shape_of(value)[i] > 1]
        channels = tuple(axis_labels(value, a) for a in free)
        routing = self.of(weight)
        if not isinstance(routing, Tensor):
            return [_Product(node, value, None, channels, True)]
        along = routing.movedim(own.index(summed[0]), 0).flatten(1)
        if bool((along != along[:, :1]).any()):
            return []
        axis = axes.index(summed[0])
        labels = along[:, 0].view([-1 if a == axis else 1 for a in range(len(axes))]).expand(shape_of(value))
        return [_Product(node, value, labels, channels, True)]

    def of(self, node: Node) -> Routing:
        """Return which routing weights a value holds."""
        if node not in self._known:
            self._known[node] = None
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: Node) -> Routing:
        if node not in self.flow.varying:
            return None
        family = self.flow.family(node)
        if not is_floating(node):
            return "choice"
        if op_name(node) == "softmax":
            assert isinstance(family, Mixing)
            return axis_labels(node, min(family.mixed))
        if op_name(node) == "sigmoid":
            return axis_labels(node, len(shape_of(node)) - 1)
        if (
            family is None
            or isinstance(family, Contraction | Product)
            or (isinstance(family, Mixing) and family.kind != "reduction")
        ):
            return None
        if isinstance(family, Pick):
            return self._picked(node, family)
        inputs = [n for n in value_inputs(node) if n in self.flow.varying]
        states = [self.of(n) for n in inputs]
        if any(s is None for s in states):
            return None
        if all(isinstance(s, str) and s == "choice" for s in states):
            return "choice"
        return self._carried(node, family)

    def _picked(self, node: Node, family: Pick) -> Routing:
        inner = self.flow.family(family.source)
        if isinstance(inner, Movement):
            return self._moved(inner, family.index)
        inputs = [n for n in family.source.all_input_nodes if n in self.flow.varying]
        return "unknown" if inputs and all(self.of(n) is not None for n in inputs) else None

    def _moved(self, family: Movement, index: int) -> Routing:
        parts = [self.of(n) for n in family.inputs]
        labels = [p for p in parts if isinstance(p, Tensor)]
        if len(labels) < len(parts):
            return None if any(p is None for p in parts) else "unknown"
        flat = torch.cat([*(p.flatten() for p in labels), torch.full((1,), -1)])
        return flat[source_indices(family)[index]]

    def _carried(self, node: Node, family: object) -> Routing:
        if isinstance(family, Movement):
            return self._moved(family, 0)
        if op_name(node) in LIKE:
            return self.of(value_inputs(node)[0])
        if isinstance(family, Pointwise):
            labels = [s.expand(shape_of(node)) for n in family.operands if isinstance(s := self.of(n), Tensor)]
            agree = labels and all(bool((t == labels[0]).all()) for t in labels)
            return labels[0] if agree else "unknown"
        if isinstance(family, Indexing) and family.source is not None and len(family.axes) == 1:
            return axis_labels(node, family.axes[0])
        return "unknown" if isinstance(family, Mixing | Barrier) else None
