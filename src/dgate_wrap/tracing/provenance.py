"""Provenance: from which origins each element of each value of a trace is computed.

An origin is whatever the caller numbers: an input feature, a branch, a tree. Every element carries one *word*, the
number of a set of origins that is stored once; word 0 is the empty set. Data movement moves words; whatever mixes
elements unites their sets; an operation without a rule unites everything it reads. Nearly all elements of a real
network soon read the same set, and a value whose elements all do is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import Node

from .families import Contraction, Creation, Family, Indexing, Lookup, Mixing, Movement, Pick, Pointwise, Product
from .fixed import FixedValues
from .flow import Flow
from .movements import source_indices
from .nodes import names, op_name, shape_of, tensor_of

NOTHING = 0
"""The word of an element that reads no origin."""

Rule: TypeAlias = Callable[[Node, Family], "Mapping[Node, Tensor] | None"]
"""``(node, its family) → words`` that some of its inputs are to be given instead of their own, in this use only."""

_MANY = 4096
"""More different meetings than this in one operation are not told apart: its output reads them all."""
_LINEAR = names(
    """
    add sub rsub neg clone contiguous alias detach _to_copy to dropout feature_dropout alpha_dropout lift_fresh_copy
    batch_norm _native_batch_norm_legit_no_training sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d
    """
)


def live_inputs(flow: Flow, node: Node) -> list[Node]:
    """Return the varying nodes whose values a node reads; ``x.new_zeros(...)`` and ``zeros_like(x)`` read none."""
    made = (
        isinstance(flow.family(node), Creation) or op_name(node).endswith("_like") or op_name(node).startswith("new_")
    )
    return [] if made else [n for n in node.all_input_nodes if n in flow.varying]


def is_linear(flow: Flow, node: Node) -> bool:
    """Tell whether an operation is a linear (affine) map of all it reads that varies, taken together."""
    family = flow.family(node)
    if isinstance(family, Movement | Pick | Contraction | Creation):
        return True
    live = live_inputs(flow, node)
    if isinstance(family, Product) or op_name(node) == "mul":
        return len(live) == 1
    return op_name(node) in _LINEAR or (op_name(node) == "div" and live == [node.args[0]])


def learned_nodes(flow: Flow) -> frozenset[Node]:
    """Return the nodes that are computed from parameters and never from the model's inputs."""
    found: set[Node] = set()
    for node in flow.nodes:
        source = flow.trace.sources.get(node)
        own = source is not None and source.kind == "parameter"
        if node not in flow.varying and (own or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


class Provenance:
    """Words of all values of a trace, spread from seeds in one walk.

    Args:
        flow: The trace, and who reads whom in it.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.words: dict[Node, Any] = {}
        """Word of every element of every value that was reached; a list of tensors where a node has several results."""
        self._sets: list[frozenset[int]] = [frozenset()]
        self._number: dict[frozenset[int], int] = {frozenset(): NOTHING}
        self._fixed = FixedValues(flow.trace, flow.varying)

    def word(self, origins: Iterable[int]) -> int:
        """Return the word of a set of origins."""
        members = frozenset(origins)
        if members not in self._number:
            self._number[members] = len(self._sets)
            self._sets.append(members)
        return self._number[members]

    def origins(self, word: int) -> frozenset[int]:
        """Return the origins that a word stands for."""
        return self._sets[word]

    def united(self, words: Iterable[int]) -> int:
        """Return the word of the union of the sets of several words."""
        return self.word(frozenset().union(*(self._sets[w] for w in words)))

    def of(self, node: Node) -> Tensor:
        """Return the words of a node with one result."""
        found = self.words.get(node)
        return found if isinstance(found, Tensor) else uniform(NOTHING, shape_of(node))

    def found_in(self, words: Any) -> set[int]:
        """Return the distinct words of a value."""
        if isinstance(words, list):
            return set().union(*(self.found_in(w) for w in cast("list[Tensor]", words)))
        return set(words.flatten()[:1].tolist()) if is_uniform(words) else set(words.unique().tolist())

    def spread(self, seeds: Mapping[Node, Tensor], rule: Rule | None = None) -> Provenance:
        """Walk the graph once, forward, and return self.

        Args:
            seeds: Words of the nodes to start from.
            rule: May give an operation other words than those of its inputs.
        """
        for node in self.flow.nodes:
            if node in seeds:
                self.words[node] = seeds[node]
            family = self.flow.family(node) if node in self.flow.varying else None
            live = [n for n in live_inputs(self.flow, node) if n in self.words]
            if node in seeds or family is None or not live:
                continue
            found = self.step(node, family, (rule(node, family) if rule else None) or {})
            self.words[node] = _compact(found) if isinstance(found, Tensor) else found
        return self

    def several(self, words: Any) -> bool:
        """Tell whether any element reads more than one origin."""
        return any(len(self._sets[w]) > 1 for w in self.found_in(words))

    def step(self, node: Node, family: Family, instead: Mapping[Node, Tensor] | None = None) -> Any:
        """Return the words of a node whose inputs are known; ``instead`` gives some of them other words."""
        given = {n: self.words[n] for n in node.all_input_nodes if n in self.words} | dict(instead or {})
        value = tensor_of(node)
        parts = [w for g in given.values() for w in (cast("list[Tensor]", g) if isinstance(g, list) else [g])]
        joins = isinstance(family, Movement) and any(n not in given for n in family.inputs)
        joins = joins or (isinstance(family, Movement | Indexing) and len(self.found_in(parts)) > 1)
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else () for v in _results(value)]
        if not all(is_uniform(w) for w in parts) or joins:
            if isinstance(family, Pick):
                return given[family.source][family.index]
            if isinstance(family, Movement):
                inputs = [given.get(n, uniform(NOTHING, shape_of(n))) for n in family.inputs]
                flat = torch.cat([*(w.flatten() for w in inputs), torch.tensor([NOTHING])])
                moved = [flat[m] for m in source_indices(family)]
                return moved[0] if isinstance(value, Tensor) else moved
            found = self._computed(family, given, shapes[0]) if shapes else None
        else:
            found = None
        rest = [uniform(self.united(self.found_in(parts)), s) for s in shapes]
        words = rest if found is None else [found, *rest[1:]]  # a norm may return its statistics, too
        return words[0] if isinstance(value, Tensor) else words

    def _computed(self, family: Family, given: Mapping[Node, Any], shape: tuple[int, ...]) -> Tensor | None:
        """Return the words of the (first) tensor that an operation computes; ``None`` where there is no rule."""

        def of(n: Node) -> Tensor:
            return given.get(n, uniform(NOTHING, shape_of(n)))

        match family:
            case Pointwise():
                out = uniform(NOTHING, shape)
                for n in family.operands:
                    out = self.meet(out, of(n))
                return out
            case Mixing(where=()):
                out = self.meet_over(of(family.x), sorted(family.mixed))
                gone = [a for a, place in enumerate(family.out_axis) if place is None]
                out = out.squeeze(gone) if gone else out
                return out.expand(shape) if out.dim() == len(shape) else None
            case Contraction():
                return self._contracted(family, of(family.x), shape)
            case Product():
                out = self._aligned(of(family.a), family.a_axes, family.out_axes)
                out = self.meet(out, self._aligned(of(family.b), family.b_axes, family.out_axes))
                return out.expand(shape)
            case Lookup():
                rows = of(family.indices)
                return rows.unsqueeze(-1).expand(shape) if rows.shape == shape[:-1] else None  # bags are not told apart
            case Indexing():
                values = {n: self._fixed(n) for n in family.indices}
                if family.adds or any(v is None for v in values.values()):
                    return None  # words are moved, and not added
                return family.run([of(n) for n in (family.x, family.source) if n is not None], values)
            case _:
                return None

    def _contracted(self, family: Contraction, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        weight = list(shape_of(family.weight))
        kernel = [n for a, n in enumerate(weight) if a not in (family.w_in, family.w_out)]
        axis, inner = family.x_axis, x.shape[family.x_axis] // family.groups
        x = self.meet_over(x.unflatten(axis, (family.groups, inner)), [axis + 1]).squeeze(axis + 1)
        if any(k > 1 for k in kernel):
            x = self.meet_over(x, list(range(2, x.dim()))).expand(-1, -1, *[1] * (x.dim() - 2))
            return x.repeat_interleave(shape[1] // family.groups, 1).expand(shape)
        # one channel per group in and out, and a kernel of ones: the operation itself puts every word where it belongs
        weight[family.w_in], weight[family.w_out] = 1, 1
        weight[min(family.w_in, family.w_out)] = family.groups
        out = family.apply(x.double(), torch.ones(weight, dtype=torch.float64)).round().long()
        return out.repeat_interleave(shape[family.out_axis] // family.groups, family.out_axis)

    def _aligned(self, words: Tensor, axes: str, out_axes: str) -> Tensor:
        """Unite over the letters that are summed, and lay out the others as in the output."""
        words = self.meet_over(words, [i for i, c in enumerate(axes) if c not in out_axes])
        words = words.squeeze([i for i, c in enumerate(axes) if c not in out_axes])
        kept = [c for c in axes if c in out_axes]
        words = words.permute([kept.index(c) for c in out_axes if c in kept])
        for i, c in enumerate(out_axes):
            words = words if c in kept else words.unsqueeze(i)
        return words

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the words of elements that read both a and b at their own (broadcast) place."""
        a, b = torch.broadcast_tensors(a, b)
        if is_uniform(a) and is_uniform(b):
            return uniform(self.united(self.found_in([a, b])), a.shape)
        out = torch.where(a == NOTHING, b, a)
        both = (a != b) & (a != NOTHING) & (b != NOTHING)
        if bool(both.any()):
            pairs, which = distinct_pairs(a[both], b[both])
            if len(pairs) > _MANY:
                return uniform(self.united(self.found_in([a, b])), a.shape)
            out[both] = torch.tensor([self.united(p) for p in pairs])[which]
        return out

    def meet_over(self, words: Tensor, axes: list[int]) -> Tensor:
        """Return the words of elements that read all of some axes; these are kept with size 1."""
        if not axes or words.numel() == 0:
            return words
        small = [1 if a in axes else n for a, n in enumerate(words.shape)]
        if is_uniform(words):
            return uniform(int(words.flatten()[0]), small)
        rest = [a for a in range(words.dim()) if a not in axes]
        rows = words.permute(*rest, *axes).reshape(-1, _product(words.shape[a] for a in axes))
        top = rows.amax(1)
        low = torch.where(rows == NOTHING, top.unsqueeze(1), rows).amin(1)
        several = (low != top).nonzero().flatten().tolist()
        if len(several) > _MANY:
            return uniform(self.united(self.found_in(words)), small)
        known: dict[tuple[int, ...], int] = {}
        for i in several:
            key = tuple(rows[i].unique().tolist())
            top[i] = known.setdefault(key, self.united(key))
        return top.view(small)


def uniform(word: int, shape: Iterable[int]) -> Tensor:
    """Return a tensor of one word that takes the memory of one."""
    return torch.tensor(word).expand(tuple(shape))


def _compact(words: Tensor) -> Tensor:
    """Return words in the memory of one, where all are the same."""
    same = words.numel() > 1 and not is_uniform(words) and bool((words == words.flatten()[0]).all())
    return uniform(int(words.flatten()[0]), words.shape) if same else words


def distinct_pairs(a: Tensor, b: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the distinct pairs of elements of two tensors, at least -1, and which pair stands where."""
    a, b = torch.broadcast_tensors(a, b)
    shape, base = a.shape, int(b.max()) + 2 if b.numel() else 1
    if is_uniform(a) and is_uniform(b) and a.numel():
        a, b = a.flatten()[:1], b.flatten()[:1]
    codes, which = ((a + 1) * base + b + 1).unique(return_inverse=True)
    return [(c // base - 1, c % base - 1) for c in codes.tolist()], (
        which.flatten()[0].expand(shape) if which.numel() == 1 else which
    )


def is_uniform(words: Tensor) -> bool:
    """Tell whether a tensor of words is stored as a single one."""
    return words.numel() <= 1 or not any(words.stride())


def weights_of(flow: Flow, node: Node, learned: frozenset[Node]) -> tuple[Node, Node] | None:
    """Return ``(x, weight)`` of an operation that multiplies data by a learned weight, or looks up a learned table."""
    match flow.family(node):
        case Contraction(x=x, weight=weight) | Lookup(indices=x, table=weight):
            found = x, weight
        case Product(a=a, b=b):
            found = (a, b) if a in flow.varying else (b, a)
        case Pointwise(product=True) if len(node.all_input_nodes) == 2:
            a, b = node.all_input_nodes
            found = (a, b) if a in flow.varying else (b, a)
        case _:
            return None
    return found if found[0] in flow.varying and found[1] in learned else None


def readings(flow: Flow, node: Node, x: Tensor, weight: Node) -> Tensor:
    """Lay out the words of the data operand of an operation by the elements of the weight that read them.

    Args:
        flow: The trace.
        node: An operation for which `weights_of` gives the weight.
        x: Words of its data operand.
        weight: The weight.

    Returns:
        Words of a shape that broadcasts to the weight, with one more axis for all that an element of it reads.
    """
    family, shape = flow.family(node), shape_of(weight)
    match family:
        case Contraction():
            rows = x.movedim(family.x_axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
            small = [1] * len(shape)
            if family.groups > 1 and family.w_out < family.w_in:
                rows = rows.unflatten(0, (family.groups, -1)).repeat_interleave(shape[0] // family.groups, 0)
                small[family.w_out] = rows.shape[0]
            small[family.w_in] = rows.shape[-2]
            return rows.reshape(*small, -1)
        case Product():
            mine, its = family.a_axes, family.b_axes
            if family.a is weight:
                mine, its = its, mine
        case Pointwise():
            letters = [chr(200 + i) for i in range(max(x.dim(), len(shape)))]
            mine, its = ("".join(letters[len(letters) - n :]) for n in (x.dim(), len(shape)))
        case _:
            return x.reshape(*[1] * len(shape), -1)
    kept = [c for c, n in zip(its, shape, strict=True) if n > 1 and c in mine]
    x = x.permute([mine.index(c) for c in kept] + [i for i, c in enumerate(mine) if c not in kept])
    sizes = dict(zip(kept, x.shape, strict=False))
    return x.reshape(*[sizes.get(c, 1) for c in its], -1)


def _results(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(cast("list[Any]", value or []))


def _product(sizes: Iterable[int]) -> int:
    return int(torch.Size(list(sizes)).numel())


def linked(items: Iterable[int], links: Iterable[Iterable[int]]) -> dict[int, int]:
    """Return the first item of the class of each item, where linked ones are of one class."""
    parent = {i: i for i in items}

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, *rest in (sorted(link) for link in links if link):
        for other in rest:
            a, b = sorted((find(first), find(other)))
            parent[b] = a
    return {i: find(i) for i in parent}
