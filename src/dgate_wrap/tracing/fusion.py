"""Late fusions: subnetworks that share nothing, and meet for the first time in a concat, a stack or a sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from .branches import Projections, last_projections
from .families import Family, Indexing, Lookup, Mixing, Movement, Pointwise
from .flow import Flow, StuckError, merge_labels
from .nodes import op_name, shape_of
from .origins import operation, where
from .provenance import (
    NOTHING,
    Provenance,
    is_linear,
    learned_nodes,
    live_inputs,
    readings,
    uniform,
    weights_of,
)


def find_fusion(flow: Flow) -> dict[str, Tensor]:
    """Return labels of the branches of the late fusion nearest the output; raise `StuckError` if there is none."""
    inner, reasons = _Inner(flow), list[str]()
    for root in reversed(flow.nodes):
        branches = inner.branches(root)
        if len(branches) < 2 or inner.leaks(branches, root):
            continue
        try:
            return _fusion_labels(inner, root, branches)
        except StuckError as e:
            reasons.append(f"{operation(root)} at {where(root)} joins {len(branches)} branches, but {e}")
    raise StuckError("; ".join(reasons) or "no concat, stack or sum joins subnetworks that share nothing before it")


class _Inner:
    """What lies above each node: operations that read parameters, model inputs, a subnetwork, and joined operands."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.learned = learned_nodes(flow)
        self.readers: dict[Node, int] = {}
        self.inputs: dict[Node, int] = {}
        self.weights: dict[Node, int] = {}
        self.contracted, self.curved, self.deep = set[Node](), set[Node](), set[Node]()
        self.operands: dict[Node, list[Node]] = {}
        for i, node in enumerate(flow.nodes):
            live = live_inputs(flow, node)
            reads = node in flow.varying and any(n in self.learned for n in node.all_input_nodes)
            self.readers[node] = _union(self.readers[n] for n in live) | (reads << i)
            given = node.op == "placeholder" and node in flow.varying
            self.inputs[node] = _union(self.inputs[n] for n in live) | (given << i)
            own = node in self.learned and node.op == "placeholder"
            self.weights[node] = _union(self.weights[n] for n in node.all_input_nodes) | (own << i)
            family = flow.family(node)
            table = isinstance(family, Lookup) or "embedding" in op_name(node)
            maps = reads and not table and not isinstance(family, Pointwise | Movement | Mixing | Indexing)
            bends = bool(self.readers[node]) and not table and not is_linear(flow, node)
            for found, own in ((self.contracted, maps), (self.curved, bends)):
                if own or any(n in found for n in live):
                    found.add(node)
            if node in self.contracted and node in self.curved:
                self.deep.add(node)
            if op_name(node) in ("cat", "stack", "add") and live:
                self.operands[node] = [m for n in live for m in self._split(n, op_name(node))]

    def _split(self, node: Node, kind: str) -> list[Node]:
        """Return what a node joins, if it is one more link of a chain of joins of subnetworks; else itself."""
        parts = self.operands.get(node, [node])
        if op_name(node) != kind or len(node.users) > 1 or not self._apart(parts):
            return [node]
        return parts if len(parts) == 1 or len(self._chosen(parts)) == len(parts) else [node]

    def _apart(self, nodes: Sequence[Node]) -> bool:
        masks = [self.readers[n] for n in nodes]
        return sum(m.bit_count() for m in masks) == _union(masks).bit_count()

    def branches(self, root: Node) -> list[Node]:
        """Return the branches that a node joins; none if any two share an operation that reads a parameter."""
        operands = self.operands.get(root, [])
        if len(operands) < 2 or not self._apart(operands) or self.deep.isdisjoint(operands):
            return []
        pairs = itertools.combinations(operands, 2)
        if any(self.inputs[a] & self.inputs[b] and self.weights[a] == self.weights[b] != 0 for a, b in pairs):
            return []  # one subnetwork, used twice on the same input
        return self._chosen(operands)

    def _chosen(self, operands: Sequence[Node]) -> list[Node]:
        """Return the operands that are subnetworks, or alone in reading their inputs."""
        shared = seen = 0
        for n in operands:
            shared, seen = shared | seen & self.inputs[n], seen | self.inputs[n]
        return [n for n in operands if n in self.deep or (self.inputs[n] and not self.inputs[n] & shared)]

    def leaks(self, branches: Sequence[Node], root: Node) -> bool:
        """Tell whether anything inside a branch reaches the output past the fusion."""
        joins, front = set[Node](), [root]
        while front:
            node = front.pop()
            if node not in branches and node in self.operands:
                joins.add(node)
                front.extend(node.all_input_nodes)
        mask = _union(self.readers[n] for n in branches)
        inside = [n for i, n in enumerate(self.flow.nodes) if mask >> i & 1 and n not in joins]
        return self.flow.escapes([*inside, *branches], joins)


def _union(masks: Iterable[int]) -> int:
    out = 0
    for m in masks:
        out |= m
    return out


def _fusion_labels(inner: _Inner, root: Node, branches: Sequence[Node]) -> dict[str, Tensor]:
    """Label the columns that read each branch, or its last projection where a sum or a norm is what joins them."""
    flow, columns, summed = inner.flow, list[tuple[Node, Tensor]](), False
    provenance = Provenance(flow)
    words = torch.tensor([NOTHING, *(provenance.word([i]) for i in range(len(branches)))])

    def meet(node: Node, family: Family) -> dict[Node, Tensor] | None:
        nonlocal summed
        free = [n for n in live_inputs(flow, node) if n not in provenance.words and inner.readers[n]]
        if free and not is_linear(flow, node) and not isinstance(family, Movement):
            raise StuckError(f"{operation(node)} at {where(node)} weighs them by something else, as a router does")
        if not provenance.several(provenance.step(node, family)):
            return None
        pair = weights_of(flow, node, inner.learned)
        if pair is not None:
            read = readings(flow, node, provenance.of(pair[0]), pair[1])
            top = read.amax(-1)
            if not bool(((read != top.unsqueeze(-1)) & (read != NOTHING)).any()):
                columns.append((pair[1], (torch.searchsorted(words, top) - 1).expand(shape_of(pair[1]))))
                return dict.fromkeys([pair[0]], uniform(NOTHING, shape_of(pair[0])))
        if not is_linear(flow, node) and not (isinstance(family, Mixing) and family.kind == "norm"):
            raise StuckError(f"they meet in {operation(node)} at {where(node)}")
        summed = True
        return {n: uniform(NOTHING, shape_of(n)) for n in node.all_input_nodes if n in provenance.words}

    if op_name(root) == "add":
        summed = True
    else:
        provenance.spread({n: uniform(int(words[i + 1]), shape_of(n)) for i, n in enumerate(branches)}, meet)
    if not summed and any(provenance.found_in(provenance.of(n)) != {NOTHING} for n in flow.output.all_input_nodes):
        raise StuckError("the model returns one of them")
    if not summed:
        return _merged([(last_projections(flow, w, t), None, "columns") for w, t in columns])
    weighed = [n for n in branches if inner.readers[n]]  # a bare input in a sum has no weights
    if len(weighed) < 2:
        raise StuckError("only one of them has weights")
    return _merged([(last_projections(flow, n), torch.tensor(i), f"branch {i}") for i, n in enumerate(weighed)])


def _merged(parts: Sequence[tuple[Projections, Tensor | None, str]]) -> dict[str, Tensor]:
    """Join the labels of several walks back; ``group`` overrides them where each walk is one group."""
    out: dict[str, Tensor] = {}
    for found, group, what in parts:
        if found.reason:
            raise StuckError(f"the weights of {what} cannot be zeroed: {found.reason}")
        for name, t in found.labels.items():
            try:
                own = t if group is None else torch.where(t >= 0, group, t)
                out[name] = merge_labels(out[name], own) if name in out else own
            except StuckError as e:
                raise StuckError(f"{name!r} belongs to several of them: {e}") from None
    return out
