"""Additive models: subnetworks of a few input features each, whose outputs meet in linear operations only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from .branches import last_projections
from .families import Contraction, Family, Lookup, Movement, Pick, Pointwise, Product
from .flow import Flow, StuckError
from .nodes import is_tensor, shape_of
from .origins import operation, where
from .provenance import Provenance, distinct_pairs, is_linear, learned_nodes, linked, live_inputs, readings, weights_of

NO_LEAF = -1


class AdditiveModel:
    """One walk that mints a *leaf* wherever weights first read raw features, and finds which leaves meet.

    Origins are features, numbered first, the same features once they have passed a nonlinearity, and leaves. What lies
    before the linear tail of the model is subnetworks; leaves that meet there belong together.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow, self.learned, self.words = flow, learned_nodes(flow), Provenance(flow)
        self.count = 0
        """Twice the number of features; leaves are numbered from here."""
        seeds = {n: self._number(n) for n, s in flow.trace.sources.items() if s.kind == "input" and is_tensor(n)}
        self.count *= 2
        self.features: list[frozenset[int]] = []
        """The features that each leaf reads."""
        self.weights: list[tuple[Node, Node, Tensor]] = []
        """An operation, its weight, and the leaf of every element of it."""
        self.together: list[frozenset[int]] = []
        self.curved = set[int]()
        self.tail = self._find_tail()
        self.words.spread(seeds, self._rule)

    def _number(self, node: Node) -> Tensor:
        """Number the features of an input: all positions of an example, or its channels where these are too many."""
        shape = shape_of(node)
        sizes = list(shape[1:])
        if len(sizes) > 1 and torch.Size(sizes).numel() > 4096:
            channels = 0 if len(sizes) > 2 else 1
            sizes = [n if a == channels else 1 for a, n in enumerate(sizes)]
        start, self.count = self.count, self.count + torch.Size(sizes).numel()
        return torch.tensor([self.words.word([i]) for i in range(start, self.count)]).view(sizes).expand(shape)

    def _find_tail(self) -> set[Node]:
        """Return the operations from which on all is linear, but for a link function at the very end."""
        link, tail = {self.flow.output}, {self.flow.output}
        for node in reversed(self.flow.nodes):
            users = {u for u in node.users if u is self.flow.output or self.flow.is_above(u, self.flow.output)}
            if node.op != "call_function" or node not in self.flow.varying:
                continue
            family, live = self.flow.family(node), live_inputs(self.flow, node)
            alone = len(live) == 1 and (isinstance(family, Pointwise) or getattr(family, "kind", "") == "scan")
            if users <= link and (alone or isinstance(family, Movement | Pick)):
                link.add(node)
            if node in link or (users <= tail and is_linear(self.flow, node)):
                tail.add(node)
        return tail

    def _raw(self, word: int) -> frozenset[int]:
        return frozenset(o for o in self.words.origins(word) if o < self.count)

    def _bend(self, words: Tensor) -> Tensor:
        """Replace raw features by those that have passed a nonlinearity."""
        pairs, which = distinct_pairs(words, torch.zeros((), dtype=torch.int64))
        half = self.count // 2
        table = [self.words.word(o + half if o < half else o for o in self.words.origins(w)) for w, _ in pairs]
        return torch.tensor(table)[which].view(words.shape)

    def _enter(self, value: Node) -> None:
        """Note what has met before a value enters the tail."""
        if value not in self.tail and value in self.words.words:
            for w in self.words.found_in(self.words.words[value]):
                self.together.append(self.words.origins(w) - self._raw(w))

    def _rule(self, node: Node, family: Family) -> dict[Node, Tensor] | None:
        if node in self.tail:
            for n in node.all_input_nodes:
                self._enter(n)
        pair = weights_of(self.flow, node, self.learned)
        if pair is None or not isinstance(self.words.words.get(pair[0]), Tensor):
            live = {n: self.words.words[n] for n in node.all_input_nodes if n in self.words.words}
            if node in self.tail or is_linear(self.flow, node):
                return None
            return {n: self._bend(w) for n, w in live.items() if isinstance(w, Tensor)}
        x, weight = pair
        own = self.words.of(x)
        raw = {w: f for w in self.words.found_in(own) if (f := self._raw(w))}
        if not raw:
            return None
        zero = torch.zeros((), dtype=torch.int64)
        apart = isinstance(family, Pointwise | Lookup) or node in self.tail  # each word meets weights of its own
        of_x, of_weight = (zero, zero) if apart else _blocks(family, weight, own.shape, shape_of(weight))
        pairs, which = distinct_pairs(own, of_x)
        leaves: dict[tuple[int, int], int] = {}
        for block in sorted({b for _, b in pairs}):
            read = [w for w, b in pairs if b == block and w in raw]
            for some in [[w] for w in read] if apart else [read] if read else []:
                leaf = self.count + len(self.features)
                read_here = frozenset[int]().union(*(raw[w] for w in some))
                self.features.append(frozenset(o % (self.count // 2) for o in read_here))
                leaves |= {(w, block): leaf for w in some}
                met = frozenset[int]().union(*(self.words.origins(w) for w in some)) - read_here
                if met and node in self.tail:  # they met before: what is linear here is not linear in the features
                    self.together.append(met | {leaf})
                if node not in self.tail or max(read_here) >= self.count // 2:
                    self.curved.add(leaf)
        self._weigh(node, weight, readings(self.flow, node, own, weight), of_weight, leaves)
        word = self.words.word
        table = [word((self.words.origins(w) - raw[w]) | {leaves[w, b]}) if (w, b) in leaves else w for w, b in pairs]
        return {x: torch.tensor(table)[which].view(own.shape)}

    def _weigh(self, node: Node, weight: Node, read: Tensor, block: Tensor, leaves: dict[tuple[int, int], int]) -> None:
        """Give every element of a weight its leaf; leaves that share one belong together."""
        pairs, which = distinct_pairs(read, block.unsqueeze(-1))
        shape = torch.broadcast_shapes(read.shape, block.unsqueeze(-1).shape)
        found = torch.tensor([leaves.get((w, b), NO_LEAF) for w, b in pairs])[which].view(shape)
        top = found.amax(-1)
        low = torch.where(found < 0, top.unsqueeze(-1), found).amin(-1)
        for row in found[low != top].unique(dim=0).tolist():
            self.together.append(frozenset(row) - {NO_LEAF})
        self.weights.append((node, weight, top.expand(shape_of(weight))))

    def labels(self) -> dict[str, Tensor]:
        """Return labels of the first-layer weights; raise `StuckError` if the model is not additive."""
        for n in self.flow.output.all_input_nodes:
            self._enter(n)
        self._check()
        out: dict[str, Tensor] = {}
        for node, weight, leaf in self.weights:
            if not bool((leaf >= 0).any()):
                continue
            found = last_projections(self.flow, weight, leaf)
            if found.reason:
                raise StuckError(f"{operation(node)} at {where(node)} reads features by weights, but {found.reason}")
            for name, t in found.labels.items():
                old, new = torch.broadcast_tensors(out.get(name, t), t)
                self.together.extend(map(frozenset, distinct_pairs(old, new)[0]))
                out[name] = torch.where(old >= 0, old, new)
        self.together = [s - {NO_LEAF} for s in self.together]
        self._check()
        group = self._groups()
        order = {g: i for i, g in enumerate(dict.fromkeys(group.values()))}
        table = torch.tensor([order[group[self.count + i]] for i in range(len(self.features))] + [NO_LEAF])
        return {name: table[torch.where(t >= 0, t - self.count, -1)] for name, t in out.items()}

    def _check(self) -> None:
        """Refuse if no two groups that pass a nonlinearity are left apart, or a feature goes past all weights."""
        group = self._groups()
        if len({group[leaf] for leaf in self.curved}) < 2:
            mixing = self._first_mixing()
            raise StuckError(
                f"features meet in {operation(mixing)} at {where(mixing)}, before they are summed up"
                if mixing
                else "every feature passes linear operations only"
            )
        if any(self._reads_raw(n) for n in self.flow.output.all_input_nodes):
            raise StuckError("a feature reaches the output past all weights, and none make its function constant")

    def _reads_raw(self, node: Node) -> bool:
        return node in self.words.words and any(map(self._raw, self.words.found_in(self.words.words[node])))

    def _groups(self) -> dict[int, int]:
        """Return the first leaf of the group of each leaf: those that met, and those that read the same features."""
        links = [s for s in self.together if len(s) > 1]
        group = linked(range(self.count, self.count + len(self.features)), links)
        reads: dict[int, set[int]] = {}
        for leaf, g in group.items():
            reads.setdefault(g, set()).update(self.features[leaf - self.count])
        same: dict[frozenset[int], set[int]] = {}
        for g, features in reads.items():
            same.setdefault(frozenset(features), set()).add(g)
        return linked(group, [*links, *map(frozenset, same.values())])

    def _first_mixing(self) -> Node | None:
        for node in self.flow.nodes:
            if node.op != "call_function" or node in self.tail or node not in self.words.words:
                continue
            for w in self.words.found_in(self.words.words[node]):
                origins = self.words.origins(w)
                raw = frozenset(o % (self.count // 2) for o in self._raw(w))
                reads = raw.union(*(self.features[o - self.count] for o in origins if o >= self.count))
                if len(reads) > 1:
                    return node
        return None


def _blocks(family: Family, weight: Node, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Number the independent parts of an operation, along its data operand and along its weight."""
    zero = torch.zeros((), dtype=torch.int64)
    if isinstance(family, Contraction) and family.groups > 1:
        axis = min(family.w_in, family.w_out)  # rows of a transposed convolution are its inputs
        return tuple(
            torch.arange(family.groups)
            .repeat_interleave(shape[a] // family.groups)
            .view([-1 if i == a else 1 for i in range(len(shape))])
            for shape, a in ((x_shape, family.x_axis), (weight_shape, axis))
        )  # type: ignore[return-value]
    if not isinstance(family, Product):
        return zero, zero
    its, mine = (family.a_axes, family.b_axes) if family.a is weight else (family.b_axes, family.a_axes)
    sizes = dict(zip(its, weight_shape, strict=True))
    shared = [c for c, n in zip(mine, x_shape, strict=True) if c in family.out_axes and n > 1 and sizes.get(c) == n]
    numbers = torch.arange(torch.Size([sizes[c] for c in shared]).numel()).view([sizes[c] for c in shared])

    def lay(axes: str) -> Tensor:
        return numbers.permute([shared.index(c) for c in axes if c in shared]).reshape(
            [sizes[c] if c in shared else 1 for c in axes]
        )

    return lay(mine), lay(its)
