"""Which indices of every axis of every tensor stay: the least fixed point of what the operations demand.

The vectors start from the elements that are needed and only ever grow, until every operation of the graph can run on
the tensors that are left; so the search ends. Each index remembers why it stays.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.families import Contraction, Mixing, Movement, Product, Recurrence
from ..tracing.operations import op_name, shape_of
from ..tracing.origins import owner
from .constants import held_once, rounding
from .demands import can_add, demand
from .facts import Facts, makes
from .masks import any_of, is_any, on_axis, project
from .terms import Terms
from .vectors import NEEDED, Allowed, Vectors

_HALVES = 8
"""Of so many elements kernels ask that sizes are multiples, if these are halves: 16 bytes."""

_LARGE = 256
"""An axis so long that it costs little to keep its size a multiple of that."""


@dataclass(frozen=True)
class Fold:
    """Constants of removed input channels that a contraction must be given in another way.

    Args:
        node: The contraction, or recurrence.
        values: The constant of each input channel, float64, 0 where nothing is folded.
        carrier: The kept constant channel that takes them over, or ``None`` if they go into the bias.
        at: Where along the other axes of the input, flattened, the constants are these: where they differ from position
            to position, they do so in proportion.
    """

    node: Node
    values: Tensor
    carrier: int | None
    at: int = 0

    def same(self, other: Fold | None, tolerance: float) -> bool:
        """Tell whether another contraction must be given the same."""
        if other is None or (self.carrier, self.at) != (other.carrier, other.at):
            return False
        return torch.allclose(self.values, other.values, rtol=tolerance, atol=0)


class Widths(Vectors):
    """The kept indices of every axis, found.

    Args:
        facts: Constants and liveness.
        allowed: What may be changed beside the sizes of tensors.
    """

    def __init__(self, facts: Facts, allowed: Allowed) -> None:
        super().__init__(facts, allowed)
        self.folds: dict[Node, Fold] = {}
        self.merged: dict[Node, tuple[Node, Tensor]] = {}
        """Per sum of products with a weight that lost constants: the weight, and what is added to it instead."""
        self.added: dict[Node, Tensor] = {}
        """Per sum that lost constants in a forward that is written anew: what is added to it."""
        self.filled: set[str] = set()
        """Modules in which something would have been left empty."""
        self._start()
        self._settle()
        while self._fill_empty() or self._align():
            self._settle()

    @property
    def held_by_code(self) -> bool:
        """Whether anything stays only since a number is written in the code, which a rewritten forward could change."""
        return any(int(i) in self.written for vectors in self.why.values() for w in vectors for i in w.unique())

    def share(self, node: Node, axes: Collection[int]) -> float:
        """Return which share of the elements along some axes stays."""
        kept = [self.keep[node][axis] for axis in axes]
        return math.prod(int(k.sum()) for k in kept) / math.prod(k.numel() for k in kept)

    def rows(self, node: Node) -> Tensor:
        """Mark the outputs that a contraction computes."""
        family = cast(Contraction, self.facts.families[node])
        if node in self.allowed.scattered:
            return self.keep[family.weight][family.w_out]
        return self.keep[node][family.out_axis]

    def _start(self) -> None:
        for node in self.facts.nodes:
            value = self.facts.values.get(node)
            if not isinstance(value, Tensor):
                continue
            self.keep[node] = [torch.zeros(n, dtype=torch.bool) for n in value.shape]
            self.why[node] = [torch.full((n,), -1) for n in value.shape]
            self._start_at(node)
        for node in self.facts.nodes:
            if node.op == "call_function" and (owner(node) or "") in self.allowed.frozen.modules:
                for n in (node, *(n for n in node.all_input_nodes if n in self.facts.varying)):
                    self.keep_results(n, self.written_down(node, "the code computes with its size"))
            if makes(node) and (owner(node) or "") in self.allowed.frozen.made:
                self.keep_results(node, self.written_down(node, "its size is written in the code"))
            if node in self.allowed.frozen.idle:
                self.keep_results(node, self.code_reason("code that the graph does not show reads it"))
            if node.op == "output":
                for n in node.all_input_nodes:
                    self.keep_results(n, self.reason("it is an output of the model"))

    def _start_at(self, node: Node) -> None:
        """Keep what a tensor needs to hold, whatever operations demand of it."""
        source = self.facts.trace.sources.get(node)
        if source is not None and source.kind == "input":
            self._start_from(node)
            for axis in range(len(self.keep[node])):
                if not self.allowed.can_select(node, axis):
                    self.keep_axis(node, axis, self.reason("it is an input of the model"))
        elif (source is not None and source.kind == "constant") or node.op == "get_attr":
            if not self.allowed.rewrite:
                self.keep_whole(node, self.code_reason("it is a constant that the forward makes"))
        elif source is not None and not node.users:
            self.keep_whole(node, self.reason("the traced forward does not use it"))
        elif node in self.facts.varying:
            self._start_from(node)
        else:
            self._start_beyond(node)

    def _start_beyond(self, node: Node) -> None:
        """Keep what slices leave out of a table: positions beyond the example's length, which other inputs reach."""
        users = [n for n in node.users if isinstance(self.facts.families.get(n), Movement)]
        if len(users) < len(node.users) or any(op_name(n) not in ("slice", "narrow") for n in users):
            return
        read = torch.zeros(shape_of(node), dtype=torch.bool)
        for user in users:
            read.view(-1)[self.facts.movement_map(user)[0].flatten()] = True
        for axis in range(read.dim()):
            beyond = ~project(read, axis)
            self.grow(node, axis, beyond, self.reason("the traced forward does not use it"))

    def _start_from(self, node: Node) -> None:
        """Keep what is neither constant nor unread."""
        sized = self.facts.sized.get(node)
        if sized is not None and is_any(sized):
            said = self.says(node, "it is a constant that differs with the sizes of the inputs")
            self.grow_elements(node, self.facts.needed(node) & sized, said)
        for axis, needed in enumerate(self.facts.needed_along(node)):
            self.grow(node, axis, needed, NEEDED)

    def _settle(self) -> None:
        """Apply every operation's demand until none changes anything; only then see where constants have to go."""
        asked = everyone = list(self.facts.families)
        while True:
            self.grown.clear()
            for node in asked:
                if node in self.allowed.gone:
                    continue
                demand(self.facts.families[node], node, self)
            if not self.grown and asked is everyone:
                self._fold_all()
                if not self.grown:
                    return
            nodes = [key for key in self.grown if isinstance(key, Node)]
            near = {n for key in nodes for n in (key, *key.users, *key.all_input_nodes)}
            asked = [n for n in everyone if n in near] if near and len(nodes) == len(self.grown) else everyone

    def maps(self, node: Node) -> tuple[Contraction, ...]:
        """Return the linear maps by which an operation reads an activation, into which constants may be folded."""
        family = self.facts.families[node]
        return family.maps if isinstance(family, Contraction | Recurrence) else ()

    def _fold_all(self) -> None:
        self.folds.clear()
        self.merged.clear()
        self.added.clear()
        for node, family in self.facts.families.items():
            if maps := self.maps(node):
                self._fold(maps, node)
            elif isinstance(family, Product) and self.allowed.can_carry(node):
                self._merge(family, node)
            elif isinstance(family, Mixing) and can_add(self, family, node):
                self._add_up(family, node)

    def _fill_empty(self) -> bool:
        """Keep one index of every axis that would be left empty: a layer never becomes empty."""
        reason = self.reason("it is the last one of a layer, which never becomes empty")
        found = {key: axes for key, vectors in self.keep.items() if (axes := _empty_axes(vectors))}
        empty = {key: axes for key, axes in found.items() if key not in self.allowed.gone}
        self.filled |= {owner(key) or "" for key in empty if isinstance(key, Node) and key.op == "call_function"}
        for key, axes in empty.items():
            last = len(self.keep[key]) - 1
            within = (owner(key) or "") if isinstance(key, Node) else None
            if len(axes) > 1 and axes[-1] == last and within in self.allowed.frozen.fills:
                self.keep_axis(key, last, reason)
        for key, axes in empty.items():
            within = owner(key) if isinstance(key, Node) else None
            for axis in axes:
                if not self.keep[key][axis].any():
                    one = torch.zeros_like(self.keep[key][axis])
                    one[self._most_kept(len(one), within)] = True
                    self.grow(key, axis, one, reason)
        return bool(empty)

    def _align(self) -> bool:
        """Keep sizes multiples of as many elements as kernels read at a time, where they were.

        Those of large axes also stay multiples of what halves need, for networks that are made half later.
        """
        products = [(n, f) for n, f in self.facts.families.items() if isinstance(f, Product) and f.aligned]
        for summed in (True, False):  # what is made may be several parts side by side, which are read apart
            short = False
            for node, family in products:
                for letter in (c for c in family.aligned if (c not in family.out_axes) is summed):
                    x, axis = next((x, axes.index(letter)) for x, axes in family.operands if letter in axes)
                    kept = self.keep[x][axis]
                    unit = math.gcd(len(kept), _HALVES if len(kept) >= _LARGE else self.allowed.unit)
                    if lacking := -int(kept.sum()) % unit:
                        more = torch.zeros_like(kept)
                        more[(~kept).nonzero().flatten()[:lacking]] = True
                        self.grow(x, axis, more, self.says(node, f"sizes stay multiples of {unit} here"))
                        short = True
            if short:
                return True
        return False

    def _most_kept(self, size: int, within: str | None) -> int:
        """Return the index that stays on most axes of a size in a module, which costs least: a head that lives, say."""
        counts = torch.zeros(size, dtype=torch.long)
        for key, vectors in self.keep.items():
            if isinstance(key, Node) and (within is None or owner(key) == within):
                counts += sum((v.long() for v in vectors if len(v) == size and not v.all()), torch.zeros_like(counts))
        return int(counts.argmax())

    def _fold(self, maps: tuple[Contraction, ...], node: Node) -> None:
        """Say where the constants of removed input channels go; keep the channels that have nowhere to go."""
        x, axis = maps[0].x, maps[0].x_axis
        removed = ~self.keep[x][axis]
        if not removed.any():
            return
        known = ~project(self.facts.unknown[x], axis)
        low, high = self.facts.extremes(x, axis)
        constants = known & ((low != 0) | (high != 0))
        constants = constants & any_of(torch.stack([self._contributes(m, node) for m in maps]), 0)
        fold = constants & removed
        uneven = (high - low) > rounding(self.facts.values[x]) * torch.maximum(high.abs(), low.abs())
        said = self.says(node, "it is a constant that differs from position to position")
        if bool((fold & uneven).any()) and maps == (self.facts.families[node],):
            strength, at, alike = self._proportions(maps[0], constants & uneven)
            real = not self.facts.values[x].is_complex()
            carried = real and maps[0].groups == 1 and self.allowed.can_carry(node) and not bool((fold & ~uneven).any())
            if carried and bool((fold & alike).any()):
                self.grow(x, axis, fold & ~alike, said)
                self._carry(maps[0], node, torch.where(fold & alike, strength, 0.0), alike, strength, at)
                return
        self.grow(x, axis, fold & uneven, said)
        fold = fold & ~uneven
        if not fold.any():
            return
        values = torch.where(fold, (high + low) / 2, 0.0)
        if not maps[0].padded and self.allowed.can_bias(node):
            self.folds[node] = Fold(node, values, None)
        elif maps[0].groups == 1 and self.allowed.can_carry(node):
            self._carry(maps[0], node, values, constants & ~uneven, (high + low) / 2)
        elif maps[0].padded or maps[0] is not self.facts.families[node]:
            self.grow(x, axis, fold, self.says(node, "it is a constant that cannot be folded here"))
        elif self.allowed.rewrite:
            self.folds[node] = Fold(node, values, None)  # the forward around it, written anew, adds a constant
        else:
            self.grow(x, axis, fold, self.written_down(node, "it is a constant that cannot be folded here"))

    def _merge(self, family: Product, node: Node) -> None:
        """Let one constant that stays stand for all removed ones in a sum of products with a weight; or keep them."""
        terms = Terms.of(self.facts, family)
        axes = [self.keep[terms.x][axis] for axis in terms.summed.values()]
        if all(bool(k.all()) for k in axes) or not all(bool(k.any()) for k in self.keep[node]):
            return
        stays = torch.ones((), dtype=torch.bool)
        for letter, kept in zip(terms.summed, axes, strict=True):
            stays = stays & on_axis(kept, terms.letters.index(letter), len(terms.letters))
        lost = terms.constant & ~stays
        if bool((lost & ~terms.steady).any()):
            said = self.says(node, "it is a constant that differs from position to position")
            self._keep_terms(terms, lost & ~terms.steady, said)
            return
        if not is_any(lost):
            return
        left = [self.keep[node][family.out_axes.index(c)] for c in terms.left]
        total = terms.total(self.facts.values[terms.weight].double(), lost, left)
        if not is_any(total != 0):
            return
        strength = terms.strength(terms.steady)
        held = terms.strength(terms.steady & stays)
        if float(strength.max()) == 0:
            self._keep_terms(terms, lost, self.says(node, "it adds a constant to a sum"))
        elif float(held.max()) < float(strength.max()) / 16:
            said = self.says(node, "it carries the constants of all removed channels")
            self._keep_terms(terms, terms.at(strength), said)
        else:
            self.merged[node] = terms.weight, terms.carried(total, terms.at(held))

    def _add_up(self, family: Mixing, node: Node) -> None:
        """Let what is added beside the terms of a sum hold the constants of removed ones; or keep them.

        That is a parameter, if the code adds one to the terms, or else a constant in a forward that is written anew.
        """
        x, [summed] = family.x, family.mixed
        kept = self.keep[x][summed]
        lost = ~kept & project(self.facts.nonzero_constant(x), summed)
        known = ~project(self.facts.unknown[x], summed)
        if not lost.any() or not all(bool(k.any()) for o in self.facts.outputs(node) for k in self.keep[o]):
            return
        if not kept.any() or bool((lost & ~known).any()):
            self.grow(x, summed, lost, self.says(node, "it adds a constant to a sum"))
            return
        places = lost.nonzero().flatten()
        total = self.facts.values[x].double().index_select(summed, places).sum(summed, keepdim=True)
        for axis in range(total.dim()):
            alike = held_once(total, axis)
            total = total if alike is None else alike
        found = self.facts.addend(node) if self.allowed.can_carry(node) else None
        if found is not None:
            parameter, axis = found
            more = torch.zeros(shape_of(parameter), dtype=torch.float64)
            carrier = more.narrow(axis, int(kept.nonzero()[0]), 1)
            with contextlib.suppress(RuntimeError):  # it differs along axes that the parameter lacks
                carrier.copy_(total.squeeze(tuple(range(total.dim() - carrier.dim()))))
                self.merged[node] = parameter, more
                return
        elif self.allowed.rewrite and sum(size > 1 for size in total.shape) <= 1:
            self.added[node] = total.squeeze(summed) if family.out_axis[summed] is None else total
            return
        self.grow(x, summed, lost, self.says(node, "it is a constant that differs from position to position"))

    def _keep_terms(self, terms: Terms, chosen: Tensor, why: int) -> None:
        """Keep the indices over which is summed that some terms have."""
        for letter, axis in terms.summed.items():
            self.grow(terms.x, axis, project(chosen, terms.letters.index(letter)), why)

    def _contributes(self, family: Contraction, node: Node) -> Tensor:
        """Mark the input channels that have a nonzero weight towards an output channel that stays."""
        own = self.facts.families[node] is family
        rows = self.keep[node][family.out_axis] if own else self.keep[family.weight][family.w_out]
        if (box := self.facts.box(family)) is not None:
            return box[family.w_in] & (box[family.w_out] & rows).any()
        weight = self.facts.values[family.weight] != 0
        weight = any_of(weight, range(2, weight.dim()))
        if family.groups == 1:
            return any_of(weight.movedim(family.w_out, 0)[rows], 0)
        w = weight.view(family.groups, -1, weight.shape[1])
        if family.w_out == 0:
            return any_of(w & rows.view(family.groups, -1, 1), 1).flatten()
        return any_of(w & rows.view(family.groups, 1, -1), 2).flatten()

    def _proportions(self, family: Contraction, channels: Tensor) -> tuple[Tensor, int, Tensor]:
        """Compare channels with the strongest of some, as zero padding in front of a convolution leaves them.

        Returns:
            What each channel is where that one is largest, where that is, and which are that one, scaled.
        """
        values = self.facts.values[family.x]
        rows = values.double().movedim(family.x_axis, 0).flatten(1)
        chosen = torch.where(channels, rows.abs().amax(1), -1)
        profile = rows[int(chosen.argmax())]
        at = int(profile.abs().argmax())
        strength = rows[:, at]
        differs = (rows - torch.outer(strength / profile[at], profile)).abs().amax(1)
        return strength, at, channels & (differs <= rounding(values) * chosen.abs())

    def differing(self) -> set[Node]:
        """Return the contractions that share their layer with others that must be given other constants."""
        calls: dict[Node, list[Node]] = {}
        for node, family in self.facts.families.items():
            if isinstance(family, Contraction):
                calls.setdefault(family.weight, []).append(node)
        found: set[Node] = set()
        for nodes in calls.values():
            first = next((f for n in nodes if (f := self.folds.get(n)) is not None), None)
            if first is not None and len(nodes) > 1:
                tolerance = rounding(self.facts.values[nodes[0]])
                found |= set() if all(first.same(self.folds.get(n), tolerance) for n in nodes) else {*nodes}
        return found

    def _carry(
        self,
        family: Contraction,
        node: Node,
        values: Tensor,
        candidates: Tensor,
        constants: Tensor,
        at: int = 0,
    ) -> None:
        """Let one kept constant channel stand for all removed ones; keep the largest if none is kept."""
        x = family.x
        largest = values.abs().max()
        kept = candidates & self.keep[x][family.x_axis] & (constants.abs() >= largest / 16)
        if kept.any():
            self.folds[node] = Fold(node, values, int(torch.where(kept, constants.abs(), -1).argmax()), at)
        else:
            one = torch.zeros_like(candidates)
            one[int(values.abs().argmax())] = True
            self.grow(x, family.x_axis, one, self.says(node, "it carries the constants of all removed channels"))


def _empty_axes(vectors: list[Tensor]) -> list[int]:
    return [axis for axis, kept in enumerate(vectors) if kept.numel() and not kept.any()]
