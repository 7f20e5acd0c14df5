"""Products of two operands: batched weights, queries with keys, and attention weights with values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace
from .families import Contraction, Family, Indexing, Mixing, Movement, Pick, Pointwise, Product
from .nodes import is_tensor, op_name, shape_of
from .structure import CONSTANT, DATA, FIXED, LIVE, HeadSite, label_of, narrow, state_of
from .weights import Weights
from .words import laid


class Products(Weights):
    """What the rules do with sums of products, and with attention."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.attending: set[Node] = set()
        """Softmax values, and what was made of them by scaling, masking, moving or mixing heads."""

    def _contract_batched(self, family: Product, node: Node, x: Node, w: Node, x_axes: str, w_axes: str) -> None:
        """A weight with several channel axes, or with one weight per index of a batch axis."""
        words = self._words(x)
        sizes = dict(zip(w_axes, shape_of(w), strict=True))
        column = self._unite_over(words, [i for i, c in enumerate(x_axes) if sizes.get(c, 1) == 1])
        self._consume(node, column)
        read = laid(label_of(column), x_axes, w_axes)
        out_axes = [c for c in w_axes if c in family.out_axes]
        fresh = self.structure.sets.mint(int(torch.Size([sizes[c] for c in out_axes]).numel()))
        rows = fresh.view([sizes[c] if c in out_axes else 1 for c in w_axes])
        self._read(node, w, read)
        kept = tuple(i for i, c in enumerate(w_axes) if c in out_axes)
        state = self._produce(node, w, rows, "row", (w, *kept) if len(kept) > 1 else (w, kept[0] if kept else -1))
        self._set(node, laid(rows, w_axes, family.out_axes) * 4 + state)

    def _multiply(self, family: Product, node: Node) -> None:
        """Two activations: queries with keys, attention weights with values, and their kin."""
        words = {"a": narrow(self._words(family.a)), "b": narrow(self._words(family.b))}
        axes = {"a": family.a_axes, "b": family.b_axes}
        summed = (set(family.a_axes) | set(family.b_axes)) - set(family.out_axes)
        self._consume(node, words["a"])
        self._consume(node, words["b"])
        along = {s: self._varies_along(words[s], axes[s], summed) for s in "ab"}
        for s in "ab":
            if along[s]:
                why = self._says(node, "it is summed in a product of activations")
                self.structure.flag("scores", label_of(words[s]), why)
        if along["a"] and along["b"]:
            common = "".join(c for c in family.a_axes if c in family.b_axes)
            over = {s: [i for i, c in enumerate(axes[s]) if c not in common] for s in "ab"}
            self.structure.pair(*(laid(label_of(self._unite_over(words[s], over[s])), axes[s], common) for s in "ab"))
        free = {s: set(axes[s]) - summed for s in "ab"}
        shared = free["a"] & free["b"]
        own = {s: not along[s] and self._varies_along(words[s], axes[s], free[s] - shared or free[s]) for s in "ab"}
        if summed and (family.a in self.attending or family.b in self.attending):
            weights, values = ("a", "b") if family.a in self.attending else ("b", "a")
            if along[values]:  # among the channels of a head: cross-covariance
                several = self._varies_along(words[values], axes[values], shared)
                attends = several and not along[weights] and bool(free[weights] - shared)
            else:
                attends = not self._differ(words[values], axes[values], summed)
            if attends:
                self._attend_values(node, words[values], axes[values], axes[weights], summed)
        for s in ("b", "a"):
            other = "a" if s == "b" else "b"
            if own[s] or (not along[s] and not own[other] and bool((words[s] >= 0).any())):
                summed_axes = [i for i, c in enumerate(axes[s]) if c in summed]
                kept = self._unite_over(words[s], summed_axes)
                if family.a not in self.attending:  # the rows of a softmax sum to one: a constant comes out unchanged
                    kept = torch.where((kept >= 0) & (kept % 4 == FIXED), kept + LIVE - FIXED, kept)
                if own[other]:
                    self._attend_values(node, words[s], axes[s], axes[other], summed)
                if not along[other]:
                    self.structure.flag("follower", label_of(words[other]), self._says(node, "an outer product"))
                out = laid(kept, axes[s], family.out_axes)
                return self._set(node, torch.where(out >= 0, out, DATA))
        return self._set_all(node, DATA if node in self.varying else CONSTANT)

    def _varies_along(self, words: Tensor, axes: str, letters: Iterable[str]) -> bool:
        return any(self._varies(label_of(words), i) for i, c in enumerate(axes) if c in letters)

    def _differ(self, words: Tensor, axes: str, summed: set[str]) -> bool:
        """Tell whether each index along the summed axes has weights of its own: experts, not keys of one projection."""
        over = [i for i, c in enumerate(axes) if c in summed]
        rows = label_of(words).movedim(over, list(range(len(over)))).flatten(0, len(over) - 1)
        return rows.shape[0] > 1 and rows.flatten(1).unique(dim=0).shape[0] == rows.shape[0]

    def _attend_values(self, node: Node, words: Tensor, axes: str, weights: str, summed: set[str]) -> None:
        """Record the heads of an attention: one for each index that the attention weights have too."""
        leading = [i for i, c in enumerate(axes) if c in weights and c not in summed]
        self._add_site(node, words.movedim(leading, list(range(len(leading)))), len(leading))

    def _add_site(self, node: Node, words: Tensor, leading: int) -> None:
        labels = label_of(words)
        self.structure.flag("value", labels, self._says(node, "it is a value of an attention"))
        rows = labels.reshape(torch.Size(labels.shape[:leading]).numel(), -1)
        alive = bool((state_of(words)[words != CONSTANT] == LIVE).any())
        self.structure.heads.append(HeadSite(rows.unique(dim=0), alive, self.order[node], self._says(node, "")))

    def _attend(self, family: Family, node: Node) -> None:
        """Follow attention weights from their softmax to where they meet the values."""
        if isinstance(family, Mixing) and op_name(node) == "softmax":
            self.attending.add(node)
        elif isinstance(family, Movement | Mixing | Contraction | Pointwise | Pick | Indexing):
            read = family.operands if isinstance(family, Pointwise) else node.all_input_nodes
            read = [n for n in read if n in self.varying]
            bare = all(
                n in self.attending or not bool((narrow(self._words(n)) >= 0).any()) for n in read if is_tensor(n)
            )
            if any(n in self.attending for n in read) and bare:
                self.attending.add(node)


def summed_by(node: Node) -> Node | None:
    """Return the sum that alone reads a product of two tensors, if there is one: together they are a contraction."""
    if op_name(node) != "mul" or len(node.users) != 1 or len(node.all_input_nodes) != 2:
        return None
    (user,) = node.users
    keeps = len(shape_of(user)) == len(shape_of(node)) if op_name(user) == "sum" else True
    return None if keeps else user


def summed_product(node: Node, family: Mixing) -> Product | None:
    """Return the contraction that a sum makes of the product that it alone reads."""
    if summed_by(family.x) is not node:
        return None
    shape = shape_of(family.x)
    letters, spare = "abcdefghijklmnop"[: len(shape)], iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    a, b = family.x.all_input_nodes

    def axes(n: Node) -> str:
        own = list(
            zip(
                letters[len(shape) - len(shape_of(n)) :],
                shape_of(n),
                shape[len(shape) - len(shape_of(n)) :],
                strict=True,
            )
        )
        return "".join(c if have == full else next(spare) for c, have, full in own)

    held = "".join(c for i, c in enumerate(letters) if i not in family.mixed)
    return Product((a, b), a, b, axes(a), axes(b), held)


def as_product(family: Contraction, node: Node) -> Product:
    """Write a contraction with letters, as a product of two activations."""
    letters = "abcdefghij"[: len(shape_of(family.x))]
    k = letters[family.x_axis]
    weight = "".join(k if a == family.w_in else "n" for a in range(2))
    out = "".join("n" if c == k else c for c in letters)
    assert family.x_axis == family.out_axis
    return Product((family.x, family.weight), family.x, family.weight, letters, weight, out)
