"""Groupings of what is added to a stream as a whole: residual blocks, and low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import GroupingError
from ..tracing import Trace
from ..tracing.branches import Projections, last_projections
from ..tracing.families import Contraction, Mixing, Movement, Pick, Pointwise
from ..tracing.flow import LIKE, Flow, axis_labels, is_floating, value_inputs
from ..tracing.nodes import names, op_name, shape_of
from ..tracing.origins import where
from .registry import register_grouping


@dataclass(frozen=True, eq=False)
class Found:
    """Weights of one or several groups, and the additions through which alone they act."""

    projections: Projections
    gates: frozenset[Node]


@register_grouping("blocks", needs_trace=True)
def blocks(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every residual branch as a whole, so that depth can shrink.

    A branch is what is added to a value from which it was computed, or to a purely linear shortcut from there, as a
    skip that a parameter scales (beside a branch that ends in a layer); where several are added at once (parallel
    attention and feed-forward), each is a group. The group is the last weights of the branch: a layer scale, the weight
    and bias of a norm, or of a linear layer or convolution. Zeroing it makes the branch exactly zero, and the skip is
    what remains. Uses of shared weights are one group; a branch whose last weights, or whose value, also serve
    elsewhere is left alone.
    """
    flow = Flow(trace)
    found: list[Found] = []
    refused: list[str] = []
    sums = [n for n in flow.nodes if is_sum(flow, n) and not _is_score(flow, n)]
    for total in sums:
        for root, branch in _branches(flow, total):
            if all(_rescales(flow, n) for part in branch for n in flow.between(root, part)):
                continue
            stop = (flow.above(root) | {root}) & flow.varying
            parts = [last_projections(flow, n, stop=stop, main=root) for n in branch]
            stuck = next((p.reason for p in parts if p.reason), None)
            if stuck is not None:
                refused.append(f"at {where(total)}: {stuck}")
            else:
                found += [Found(p, frozenset({total})) for p in [_joined(parts)]]
    kept = keep_exclusive(flow, found, refused)
    if not kept:
        raise nothing_found("residual branch", f"{len(sums)} additions of two activations", refused)
    return join(kept)


def _joined(parts: list[Projections]) -> Projections:
    """Take several sets of weights as one group."""
    labels: dict[str, Tensor] = {}
    for p in parts:
        for name, t in p.labels.items():
            a, b = torch.broadcast_tensors(labels.get(name, t), t)
            labels[name] = torch.maximum(a, b)
    return Projections(labels, frozenset[tuple[str, Node]]().union(*(p.sites for p in parts)))


def keep_exclusive(flow: Flow, found: list[Found], refused: list[str]) -> list[Projections]:
    """Drop what holds a weight that is read elsewhere too, or makes a value that acts other than through its gates."""
    kept: list[Found] = []
    for f in found:
        if flow.escapes({site for _, site in f.projections.sites}, f.gates):
            refused.append(f"{_names(f)}: what it makes is also used elsewhere than in the addition")
        else:
            kept.append(f)
    uses = {name: flow.sites(name) for f in kept for name, _ in f.projections.sites}
    while True:
        known = {(name, node) for f in kept for name, site in f.projections.sites for node in flow.meets(site)}
        shared = {n for n, nodes in uses.items() if any((n, node) not in known for node in nodes)}
        doomed = [f for f in kept if shared & f.projections.labels.keys()]
        if not doomed:
            return [f.projections for f in kept]
        refused += [f"{_names(f)}: its weights are also used elsewhere" for f in doomed]
        kept = [f for f in kept if not shared & f.projections.labels.keys()]


def _names(found: Found) -> str:
    return ", ".join(sorted(found.projections.labels))


def join(found: Iterable[Projections]) -> dict[str, Tensor]:
    """Give each set of weights labels of its own, and unite those that share a weight."""
    out: dict[str, Tensor] = {}
    parent: list[int] = []

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    for p in found:
        start = len(parent)
        parent.extend(range(start, start + 1 + max(int(t.max()) for t in p.labels.values())))
        for name, t in p.labels.items():
            mine = torch.where(t >= 0, t + start, -1)
            held, mine = torch.broadcast_tensors(out.get(name, torch.tensor(-1)), mine)
            both = (held >= 0) & (mine >= 0)
            for a, b in torch.stack([held[both], mine[both]], 1).unique(dim=0).tolist():
                low, high = sorted((root(a), root(b)))
                parent[high] = low
            out[name] = torch.where(held >= 0, held, mine)
    used = sorted({root(int(i)) for t in out.values() for i in t.unique() if i >= 0})
    table = torch.tensor([used.index(root(i)) if root(i) in used else -1 for i in range(len(parent))])
    return {name: torch.where(t >= 0, table[t.clamp_min(0)], -1) for name, t in out.items()}


def nothing_found(what: str, seen: str, refused: list[str]) -> GroupingError:
    """Return the error for a model that has no such structure, with what stood in the way."""
    several = "; ".join(refused[:3]) + (f"; and {len(refused) - 3} more" if len(refused) > 3 else "")
    return GroupingError(
        f"no {what} can be gated in this model: among {seen}, "
        + (f"{len(refused)} came near ({several})." if refused else "none has its form."),
        expected=f"at least one {what} whose last weights serve nothing else",
        mend='dg.explain(model, "channels", example_inputs=...) shows what else can be gated; '
        "dg.Select(names=...) takes weights by name",
    )


def is_sum(flow: Flow, node: Node) -> bool:
    """Tell whether a node adds two activations."""
    if op_name(node) not in ("add", "sub") or node not in flow.varying:
        return False
    operands = [n for n in node.args[:2] if isinstance(n, Node) and n in flow.varying and is_floating(n)]
    return len(operands) == 2 and operands[0] is not operands[1]


def _is_score(flow: Flow, node: Node) -> bool:
    """Tell whether a sum goes straight into a softmax: scores of attention with a mask or a bias."""
    for user in node.users:
        family = flow.family(user)
        if isinstance(family, Mixing) and family.kind == "scan":
            return True
        if not isinstance(family, Contraction) and linear_input(flow, user) is node and _is_score(flow, user):
            return True
    return False


def _operands(node: Node) -> tuple[Node, Node]:
    a, b = node.args[:2]
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    return a, b


def _branches(flow: Flow, total: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Yield the start of a branch and the summands that make it, for every branch that an addition adds."""
    a, b = _operands(total)
    for skip, branch in ((a, b), (b, a)):
        root = _root(flow, skip, branch, shape_of(total))
        if root is not None:
            yield from ((root, part) for part in _by_source(flow, root, _summands(flow, root, branch)))
            return


def _root(flow: Flow, skip: Node, branch: Node, shape: tuple[int, ...]) -> Node | None:
    """Return the value that a skip carries past a branch: it lies before the branch, and the skip is linear in it."""
    if shape_of(skip) != shape:
        return None
    if flow.is_above(skip, branch):
        return skip
    if is_sum(flow, skip):
        return next((r for n in _operands(skip) if (r := _root(flow, n, branch, shape)) is not None), None)
    mapped = scaled = False
    node: Node | None = skip
    while node is not None:
        mapped |= isinstance(flow.family(node), Contraction | Mixing)
        scaled |= op_name(node) in ("mul", "div") and any(flow.is_learned(n) for n in node.all_input_nodes)
        node = linear_input(flow, node)
        if node is not None and flow.is_above(node, branch):
            missing = scaled and not mapped and not _ends_in_layer(flow, branch)
            return None if missing or _is_linear(flow, branch, node) else node
    return None


def _ends_in_layer(flow: Flow, branch: Node) -> bool:
    """Tell whether a value is an affine map of what a layer makes, unlike the state space beside a learned skip."""
    node: Node | None = branch
    while node is not None:
        family = flow.family(node)
        if isinstance(family, Contraction) and flow.is_learned(family.weight):
            return True
        node = linear_input(flow, node)
    return False


def _rescales(flow: Flow, node: Node) -> bool:
    """Tell whether a node maps elements one by one, by means at most of statistics: a norm, or GELU written out."""
    family = flow.family(node)
    return isinstance(family, Pointwise | Movement | Pick) or (
        isinstance(family, Mixing) and family.kind == "reduction"
    )


def _summands(flow: Flow, root: Node, branch: Node) -> list[Node]:
    """Return what is added up in a branch, without what does not come from its start."""
    if not flow.is_above(root, branch):
        return []
    if not is_sum(flow, branch):
        before = plain_input(flow, branch)
        inner = [] if before is None else _summands(flow, root, before)
        return inner if len(inner) > 1 else [branch]
    return [n for operand in _operands(branch) for n in _summands(flow, root, operand)]


def _by_source(flow: Flow, root: Node, summands: list[Node]) -> list[list[Node]]:
    """Put summands together that are linear in the same value: a layer and its adapter, parallel convolutions."""
    out: dict[Node, list[Node]] = {}
    for n in summands:
        source, before = n, linear_input(flow, n)
        while before is not None and source is not root:
            source, before = before, linear_input(flow, before)
        out.setdefault(source, []).append(n)
    return list(out.values())


_SCALINGS = names("mul div neg _to_copy clone dropout feature_dropout alias detach")
_PARTS = names("select split split_with_sizes chunk unbind")


def plain_input(flow: Flow, node: Node) -> Node | None:
    """Return the one activation that a node moves, casts or scales by constants; ``None`` if it does more."""
    family = flow.family(node)
    live = [n for n in value_inputs(node) if n in flow.varying]
    if len(live) != 1 or not is_floating(node) or not is_floating(live[0]):
        return None
    learned = any(flow.is_learned(n) for n in node.all_input_nodes)
    moves = (isinstance(family, Movement) or op_name(node) in LIKE) and op_name(node) not in _PARTS
    return live[0] if moves or (_scales(flow, node, live[0]) and not learned) else None


def _scales(flow: Flow, node: Node, x: Node) -> bool:
    """Tell whether a node is one of its operands, scaled."""
    by_x = op_name(node) == "div" and node.args[0] is not x
    return isinstance(flow.family(node), Pointwise) and op_name(node) in _SCALINGS and not by_x


def linear_input(flow: Flow, node: Node) -> Node | None:
    """Return the one activation of which a node is an affine map; ``None`` if it is none, or takes only a part."""
    family = flow.family(node)
    if isinstance(family, Pick) and family.index == 0 and isinstance(flow.family(family.source), Mixing):
        return linear_input(flow, family.source)
    if isinstance(family, Contraction):
        return family.x if family.x in flow.varying else None
    if isinstance(family, Mixing) and (family.kind == "pool" or "batch_norm" in op_name(node)):
        return family.x
    if isinstance(family, Pointwise):
        live = [n for n in family.operands if n in flow.varying]
        if len(live) != 1 or not is_floating(live[0]):
            return None
        return live[0] if op_name(node) in ("add", "sub", "rsub") or _scales(flow, node, live[0]) else None
    return plain_input(flow, node)


def _is_linear(flow: Flow, node: Node, source: Node) -> bool:
    """Tell whether a value is linear in an earlier one, by one path or a sum of them."""
    front, seen = [node], {source}
    while front:
        n = front.pop()
        if n in seen or not flow.is_above(source, n):
            continue
        seen.add(n)
        family = flow.family(n)
        if is_sum(flow, n):
            front += _operands(n)
        elif isinstance(family, Movement):
            front += family.inputs
        elif (before := family.source if isinstance(family, Pick) else linear_input(flow, n)) is not None:
            front.append(before)
        else:
            return False
    return True


@dataclass(frozen=True)
class _Adapter:
    """A low-rank adapter ``up(down(x))``: the two contractions, and the nodes that hold them."""

    down: Node
    up: Node
    first: Contraction
    second: Contraction


@register_grouping("lora", needs_trace=True)
def lora(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every low-rank adapter as a whole, both of its factors.

    An adapter is ``up(down(x))``, two linear maps with nothing but dropout and constant scaling between them, narrower
    inside than at both ends, and added to another linear map of the same x. Zeroing either factor makes it exactly
    zero: what remains is the layer without its adapter.
    """
    flow, adapters = _adapters(trace)
    found = [_joined([last_projections(flow, a.up), last_projections(flow, a.down)]) for a in adapters]
    return join(found)


@register_grouping("lora_ranks", needs_trace=True)
def lora_ranks(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every rank of every low-rank adapter: its row of the down projection and its column of the up projection.

    The adapter is the sum of its ranks; zeroing one makes that summand exactly zero, so that each adapter finds the
    rank it needs.
    """
    flow, adapters = _adapters(trace)
    found: list[Projections] = []
    for a in adapters:
        rows = last_projections(flow, a.second.x, axis_labels(a.second.x, a.second.x_axis))
        columns = last_projections(flow, a.second.weight, axis_labels(a.second.weight, a.second.w_in))
        found.append(_joined([rows, columns]))
    return join(found)


def _adapters(trace: Trace) -> tuple[Flow, list[_Adapter]]:
    """Return every low-rank adapter of a model, or raise."""
    flow = Flow(trace)
    found: list[_Adapter] = []
    pairs = 0
    for up in flow.nodes:
        second = _bare(flow, up)
        down = None if second is None else _source(flow, second.x)
        first = None if down is None else _bare(flow, down)
        if second is None or first is None or down is None:
            continue
        pairs += 1
        rank = shape_of(second.x)[second.x_axis]
        narrow = rank < min(shape_of(first.x)[first.x_axis], shape_of(up)[second.out_axis])
        if narrow and _is_added_to_a_map_of(flow, up, _source(flow, first.x)):
            found.append(_Adapter(down, up, first, second))
    own = {n for a in found for n in (a.down, a.up)}
    found = [
        a
        for a in found
        if all(flow.sites(name) <= own for n in (a.down, a.up) for name in last_projections(flow, n).labels)
    ]
    if not found:
        raise nothing_found("low-rank adapter", f"{pairs} pairs of linear maps with nothing in between", [])
    return flow, found


def _bare(flow: Flow, node: Node) -> Contraction | None:
    """Return a contraction by parameters, without bias and not in channel groups."""
    family = flow.family(node) if node in flow.varying else None
    if not isinstance(family, Contraction) or family.bias is not None or family.groups > 1:
        return None
    return None if last_projections(flow, family.weight).reason else family


def _source(flow: Flow, node: Node) -> Node:
    """Go back through data movement, casts, dropout and constant scaling."""
    before = plain_input(flow, node)
    while before is not None:
        node, before = before, plain_input(flow, before)
    return node


def _is_added_to_a_map_of(flow: Flow, node: Node, x: Node) -> bool:
    """Tell whether a value, but for scaling, is added to a linear map of x."""
    for user in node.users:
        if is_sum(flow, user):
            others = [n for n in _operands(user) if n is not node]
            return any(_maps(flow, n, x) for n in others) or _is_added_to_a_map_of(flow, user, x)
        if plain_input(flow, user) is node and _is_added_to_a_map_of(flow, user, x):
            return True
    return False


def _maps(flow: Flow, node: Node, x: Node) -> bool:
    """Tell whether one of the summands of a value is a single contraction of x."""
    if is_sum(flow, node):
        return any(_maps(flow, n, x) for n in _operands(node))
    before: Node | None = node
    while before is not None:
        family = flow.family(before)
        if isinstance(family, Contraction):
            return _source(flow, family.x) is x
        before = linear_input(flow, before)
    return False
