"""One growing boolean vector per (tensor, axis): which indices stay, and why each does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.families import Pick
from ..tracing.operations import shape_of
from ..tracing.origins import operation, owner, where
from .facts import Facts, makes
from .masks import any_of, is_any, others

NEEDED = 0
"""Reason of an index that carries something which depends on the input and reaches an output."""


@dataclass(frozen=True)
class Columns:
    """Stands for the input channels of a grouped weight, which lie in another axis for each group of rows."""

    weight: Node


@dataclass(frozen=True)
class Units:
    """Stands for the units of one layer and direction of a recurrence, or for what it gives to the next layer."""

    node: Node
    layer: int
    projected: bool = False


@dataclass(frozen=True)
class Frozen:
    """What has to stay whole for the user's code to run.

    Args:
        fills: Modules in which more stays of a tensor that would be empty than one element: the whole of its last axis
            (a head, say, and not one channel of a head).
        made: Modules whose own code makes tensors of sizes that are written in it (zeros to begin with): they stay.
        reshapes: Modules whose own code has sizes written in it: their reshapes and slices stay whole.
        modules: Modules whose own code computes with sizes in other ways: all that it makes and reads stays whole.
        idle: What code reads that the graph does not show, as nobody needs its results: a head for a loss, say.
    """

    fills: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()
    reshapes: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    idle: frozenset[Node] = frozenset()


@dataclass(frozen=True)
class Allowed:
    """What may be changed beside the sizes of tensors.

    Args:
        can_bias: Whether the bias of a contraction may be changed, or made.
        can_carry: Whether the weight of a contraction may be changed.
        can_regroup: Whether a contraction's number of groups may be changed.
        can_rescale: Whether what a normalization multiplies by, and its epsilon, may be changed.
        can_select: Whether an input of the model may be cut along an axis.
        scattered: Contractions that compute only the outputs that some weight leads to, and scatter them.
        leaves_idle: Whether they do not compute either what nothing depends on.
        picking: Contractions that read only the inputs that are not zero, of more that stay.
        unit: Of how many elements kernels that read several at a time ask that sizes are multiples.
        rewrite: Whether forwards may be written anew, in which lengths, numbers of groups and scales become others.
        frozen: What has to stay whole for the user's code to run.
        gone: Nodes of modules that give what is left of constants, whatever is left of their inputs and weights.
    """

    can_bias: Callable[[Node], bool]
    can_carry: Callable[[Node], bool]
    can_regroup: Callable[[Node], bool]
    can_rescale: Callable[[Node], bool]
    can_select: Callable[[Node, int], bool]
    scattered: frozenset[Node] = frozenset()
    leaves_idle: bool = False
    picking: frozenset[Node] = frozenset()
    unit: int = 1
    rewrite: bool = False
    frozen: Frozen = Frozen()
    gone: frozenset[Node] = frozenset()


class Vectors:
    """Which indices of every axis stay, and the ways in which they grow.

    Args:
        facts: Constants and liveness.
        allowed: What may be changed beside the sizes of tensors.
    """

    def __init__(self, facts: Facts, allowed: Allowed) -> None:
        self.facts = facts
        self.allowed = allowed
        self.reasons: list[str] = ["the model's output depends on others at the same index"]
        self._ids: dict[str, int] = {self.reasons[0]: NEEDED}
        self.written: set[int] = set()
        """The reasons that hold for the user's code only."""
        self.keep: dict[Hashable, list[Tensor]] = {}
        self.why: dict[Hashable, list[Tensor]] = {}
        self.grown: set[Hashable] = set()
        """Tensors that grew since the set was emptied."""

    def reason(self, text: str) -> int:
        """Return the number of a reason."""
        if text not in self._ids:
            self._ids[text] = len(self.reasons)
            self.reasons.append(text)
        return self._ids[text]

    def says(self, node: Node, what: str) -> int:
        """Return the number of a reason that names an operation and its source line."""
        return self.reason(f"{what} ({operation(node)}, {where(node)})")

    def code_reason(self, text: str) -> int:
        """Return the number of a reason that holds for the user's code only."""
        number = self.reason(text)
        self.written.add(number)
        return number

    def written_down(self, node: Node, what: str) -> int:
        """Return the number of a reason that names an operation, and holds for the user's code only."""
        return self.code_reason(f"{what} ({operation(node)}, {where(node)})")

    def full(self, key: Hashable) -> bool:
        """Tell whether every index of every axis of a tensor stays."""
        return all(bool(k.all()) for k in self.keep[key])

    def elements(self, key: Hashable) -> Tensor:
        """Mark the elements all of whose indices stay."""
        return _outer(self.keep[key], torch.logical_and, torch.ones((), dtype=torch.bool))

    def element_why(self, key: Hashable, axes: Collection[int] | None = None) -> Tensor:
        """Return, per element, the latest reason of its indices, on some axes or on all; a single number is needed."""
        why = [w if axes is None or a in axes else torch.full_like(w, -1) for a, w in enumerate(self.why[key])]
        return _outer(why, torch.maximum, torch.tensor(-1 if why else NEEDED))

    def grow(self, key: Hashable, axis: int, mask: Tensor, why: int | Tensor) -> None:
        """Keep more indices of an axis, for a reason or for one per index."""
        kept = self.keep[key][axis]
        new = mask & ~kept
        if new.any():
            self.why[key][axis] = torch.where(new, why, self.why[key][axis])
            self.keep[key][axis] = kept | new
            self.grown.add(key)

    def keep_axis(self, key: Hashable, axis: int, why: int) -> None:
        """Keep every index of an axis."""
        self.grow(key, axis, torch.ones_like(self.keep[key][axis]), why)

    def keep_whole(self, key: Hashable, why: int) -> None:
        """Keep every index of every axis of a tensor."""
        for axis in range(len(self.keep[key])):
            self.keep_axis(key, axis, why)

    def keep_results(self, node: Node, why: int) -> None:
        """Keep everything that an operation returns."""
        for out in self.facts.outputs(node):
            self.keep_whole(out, why)

    def link(self, a: Hashable, axis_a: int, b: Hashable, axis_b: int, meeting: int | None = None) -> None:
        """Keep the same indices on two axes; ``meeting`` is the reason that is given for what the other one needs."""
        for (k, i), (m, j) in (((a, axis_a), (b, axis_b)), ((b, axis_b), (a, axis_a))):
            why = self.why[k][i]
            if meeting is not None:
                why = torch.where(why == NEEDED, meeting, why)
            self.grow(m, j, self.keep[k][i], why)

    def link_operand(
        self, node: Node, n: Node, axis: int, out: Node, out_axis: int, meeting: int | None = None
    ) -> None:
        """Link an axis of an operand with that of a result; a forward that is written anew may take part of it only."""
        frozen = self.allowed.frozen
        if self.facts.takes_part(node, n, axis, out, out_axis):
            if (self.allowed.rewrite and self.follows(node)) or (makes(n) and self._module(n) not in frozen.made):
                self.grow(n, axis, self.keep[out][out_axis], self.why[out][out_axis])
                return
            said = self.written_down(node, "it meets an operand of which others need more")
            why = self.why[n][axis]
            written = torch.isin(why, torch.tensor(list(self.written)))
            self.grow(out, out_axis, self.keep[n][axis], torch.where(written, why, said))
        self.link(n, axis, out, out_axis, meeting)

    def link_blocks(self, a: Hashable, axis_a: int, b: Hashable, axis_b: int, blocks: int) -> None:
        """Keep in every block of one axis the same indices as on another."""
        kept, why = self.keep[a][axis_a].view(blocks, -1), self.why[a][axis_a].view(blocks, -1)
        self.grow(b, axis_b, kept.any(0), why.amax(0))
        self.grow(a, axis_a, self.keep[b][axis_b].repeat(blocks), self.why[b][axis_b].repeat(blocks))

    def broadcast(self, n: Node, node: Node, meeting: int | None) -> None:
        """Link the axes of an operand with those of a result to which it is broadcast."""
        shape = shape_of(node)
        offset = len(shape) - len(shape_of(n))
        for axis, size in enumerate(shape_of(n)):
            if size == shape[axis + offset]:
                self.link_operand(node, n, axis, node, axis + offset, meeting)
            else:
                self.keep_axis(n, axis, NEEDED)

    def grow_elements(self, key: Hashable, mask: Tensor, why: int | Tensor) -> None:
        """Keep, on every axis, what holds one of some elements, for a reason or for one per element."""
        for axis in range(mask.dim() if is_any(mask) else 0):
            rest = others(mask.dim(), axis)
            self.grow(key, axis, any_of(mask, rest), why.amax(rest) if rest and isinstance(why, Tensor) else why)

    def follows(self, node: Node) -> bool:
        """Tell whether the user's code follows smaller tensors in a movement, or has its sizes written down."""
        return self._module(node) not in self.allowed.frozen.reshapes

    def _module(self, node: Node) -> str:
        return owner(node) or ""

    def result_index(self, node: Node, out: Node) -> int:
        """Return which of the results of an operation one is."""
        family = self.facts.families[out]
        return family.index if out is not node and isinstance(family, Pick) else 0


def _outer(vectors: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Tensor:
    """Combine one vector per axis into a tensor over all axes."""
    out = start
    for axis, v in enumerate(vectors):
        out = combine(out, v.view([-1 if a == axis else 1 for a in range(len(vectors))]))
    return out
