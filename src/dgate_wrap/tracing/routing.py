"""Trees: weights that are multiplied by leaf probabilities, one distribution over the leaves per tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .branches import last_projections
from .families import Contraction, Indexing, Lookup, Mixing, Movement, Pick, Pointwise, Product
from .flow import Flow, StuckError
from .movements import source_indices
from .nodes import names, op_name, shape_of, tensor_inputs
from .origins import where
from .provenance import is_linear, learned_nodes, linked, live_inputs, readings, weights_of

_NEVER_GATES = names("relu silu gelu elu leaky_relu hardswish softplus mish selu celu prelu log_sigmoid")
_KEEPS = names("clone contiguous alias detach _to_copy to dropout")


@dataclass(frozen=True)
class _Site:
    """An operation that multiplies leaf probabilities by a response; ``lone``: nothing but a softmax routes."""

    node: Node
    data: Node
    response: Node
    lone: bool


def find_trees(flow: Flow) -> dict[str, Tensor]:
    """Return labels of the response weights of every tree; raise `StuckError` if there is none."""
    learned = learned_nodes(flow)
    gates = _Gates(flow, learned)
    sites = [s for n in flow.nodes if (s := _site(gates, n))]
    if not sites:
        raise StuckError("no weight multiplies products of gates, or softmaxes")
    values = _noisy_run(flow)
    found: list[tuple[_Site, Tensor, int]] = []
    for s in sites:
        members = _members(flow, s, values)
        if members is not None:
            found.append((s, *members))
    single = [s.node for s, _, count in found if s.lone and count == 1]
    alone = [
        n
        for n in single
        if all(m is n or flow.is_above(m, n) or flow.is_above(n, m) for m in single)  # none stands beside it
    ]
    found = [f for f in found if f[0].node not in alone]
    if not found:
        s = sites[0]
        raise StuckError(
            f"what multiplies {s.response} at {where(s.node)} is no distribution over leaves"
            if not alone
            else f"a lone softmax multiplies {s.response} at {where(s.node)}"
        )
    out: dict[str, Tensor] = {}
    start = 0
    for s, members, count in found:
        for name, t in _parameters(flow, s, members).items():
            out.setdefault(name, torch.where(t >= 0, t + start, t))
        start += count
    return out


def _site(gates: _Gates, node: Node) -> _Site | None:
    flow = gates.flow
    pair = weights_of(flow, node, gates.learned)
    family = flow.family(node)
    if pair is None or isinstance(family, Lookup):
        return None
    if isinstance(family, Pointwise):  # a product by broadcasting, to be summed over the leaves
        users = [u for u in node.users if flow.is_above(u, flow.output)]
        if not users or any(op_name(u) not in ("sum", "mean") for u in users):
            return None
    products = gates.count(pair[0])
    return None if products is None else _Site(node, *pair, lone=not products)


class _Gates:
    """Counts the products of gate factors that make a value: a necessary condition that costs no run of the model."""

    def __init__(self, flow: Flow, learned: frozenset[Node]) -> None:
        self.flow, self.learned = flow, learned
        self._known: dict[tuple[Node, bool], int | None] = {}

    def count(self, node: Node, shifted: bool = False) -> int | None:
        """Return how many products there are, or ``None`` if anything but gates makes the value."""
        key = node, shifted
        if key not in self._known:
            live = live_inputs(self.flow, node)
            found = self._factors(node, live, shifted) if node.op == "call_function" else None
            if found is not None and not isinstance(found, int):
                factors, products = found
                shifted = shifted or (len(live) == 1 and op_name(node) in ("add", "sub", "rsub", "mul", "div"))
                counts = [self.count(n, shifted) for n in factors]
                found = None if None in counts or not counts else products + sum(cast("list[int]", counts))
            self._known[key] = found
        return self._known[key]

    def _factors(self, node: Node, live: list[Node], shifted: bool) -> tuple[list[Node], int] | int | None:
        """Return what to look at next, and the products here; a number where the walk ends at a gate."""
        family, name = self.flow.family(node), op_name(node)
        match family:
            case _ if not live:
                return 0  # a constant
            case Movement() | Pick():
                return live, 0
            case Indexing() if live == [family.x]:
                return live, 0
            case Pointwise() if len(live) == 1:
                if is_linear(self.flow, node):
                    return live, 0
                return None if name in _NEVER_GATES or (name == "tanh" and not shifted) else 0
            case Pointwise() if name in ("where", "mul", "add", "sub", "div", "minimum", "maximum"):
                return [n for n in live if name != "where" or n is not node.args[0]], int(name == "mul")
            case Mixing(kind="scan"):
                return 0 if "softmax" in name and "log" not in name else None
            case Mixing(kind="reduction") if name in ("prod", "sum"):
                return live, int(name == "prod")
            case Contraction() if family.weight not in self.learned:
                return live, 0
            case Product() if len(live) == 1 and self.learned.isdisjoint((family.a, family.b)):
                return live, 0
            case Product() if len(live) == 2 and {*family.a_axes, *family.b_axes} == set(family.out_axes):
                return live, 1
            case _:
                return None


def _noisy_run(flow: Flow) -> dict[Node, Any]:
    """Run the graph with noise on weights and inputs, so that nothing sums to one by its initialization."""
    generator = torch.Generator().manual_seed(0)
    given: dict[Node, Any] = {}
    for node, source in flow.trace.sources.items():
        value = source.value
        if isinstance(value, Tensor) and value.is_meta:
            raise StuckError("leaf probabilities are known by their values, and the model is on the meta device")
        if isinstance(value, Tensor) and source.kind in ("parameter", "input") and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value)
            given[node] = value.detach() + 0.3 * noise
    return flow.trace.run(given)


def _members(flow: Flow, site: _Site, values: dict[Node, Any]) -> tuple[Tensor, int] | None:
    """Return the tree of every element of a response, and how many trees there are."""
    path = [site.data]  # back to where each tree's leaves lie along one axis
    while True:
        value = values[path[-1]]
        axes = [a for a in range(value.dim()) if _is_distribution(value, a)]
        if len(path) == 1:
            axes = [a for a in axes if _is_summed(flow, site, a)]
        if axes:
            break
        inputs = [n for n in path[-1].all_input_nodes if n in flow.varying]
        keeps = isinstance(flow.family(path[-1]), Movement) or op_name(path[-1]) in _KEEPS
        if len(inputs) != 1 or not keeps:
            return None
        path.append(inputs[0])
    sizes = [1 if a == axes[-1] else n for a, n in enumerate(value.shape)]
    owner = torch.arange(torch.Size(sizes).numel()).view(sizes).expand(value.shape)
    leaf = torch.arange(value.shape[axes[-1]]).view([-1 if a == axes[-1] else 1 for a in range(value.dim())])
    leaf = leaf.expand(value.shape)
    for node in reversed(path[:-1]):
        family = flow.family(node)
        if isinstance(family, Movement):
            owner, leaf = (
                torch.cat([t.flatten(), torch.tensor([-1])])[source_indices(family)[0]] for t in (owner, leaf)
            )
    read = readings(flow, site.node, leaf, site.response)
    if bool((read.amax(-1) != read.amin(-1)).any()):
        return None  # a weight that serves several leaves of a distribution is no answer of a leaf
    read = readings(flow, site.node, owner, site.response)
    rows = read.flatten(0, -2)
    groups = linked(owner.unique().tolist(), [set(r) - {-1} for r in rows.unique(dim=0).tolist()])
    order = {g: i for i, g in enumerate(dict.fromkeys(groups.values()))}
    first = read.amax(-1)
    trees = torch.tensor([order[groups[i]] if i >= 0 else -1 for i in first.flatten().tolist()]).view(first.shape)
    return trees.expand(shape_of(site.response)), len(order)


def _is_distribution(value: Tensor, axis: int) -> bool:
    if value.shape[axis] < 2 or not value.is_floating_point() or bool((value < -1e-6).any()):
        return False
    return bool(((value.double().sum(axis) - 1).abs() < 1e-3).all())


def _is_summed(flow: Flow, site: _Site, axis: int) -> bool:
    """Tell whether the operation sums over an axis of the probabilities."""
    family = flow.family(site.node)
    match family:
        case Contraction():
            return axis == family.x_axis
        case Product():
            return (family.a_axes if family.a is site.data else family.b_axes)[axis] not in family.out_axes
        case _:
            place = axis + len(shape_of(site.node)) - len(shape_of(site.data))
            sums = [flow.family(u) for u in site.node.users if flow.is_above(u, flow.output)]
            return all(isinstance(f, Mixing) and place in f.mixed for f in sums)


def _parameters(flow: Flow, site: _Site, members: Tensor) -> dict[str, Tensor]:
    """Carry the trees from a response to its parameter, through a softmax over classes and the like."""
    response = site.response
    while True:
        found = last_projections(flow, response, members)
        family = flow.family(response)
        if not found.reason:
            return found.labels
        # a function of the weights that maps zeros to a constant: so does the tree, as its leaves sum to one
        along = sorted(family.mixed) if isinstance(family, Mixing) and family.kind == "scan" else []
        same = isinstance(family, Pointwise) and len(family.operands) == 1
        if not (along or same) or any(bool((members.diff(dim=a) != 0).any()) for a in along):
            raise StuckError(f"the response at {where(site.node)} cannot be zeroed: {found.reason}")
        response = tensor_inputs(response)[0]
