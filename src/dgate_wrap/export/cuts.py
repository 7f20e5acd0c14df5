"""What stays of a parameter or buffer, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """Which indices stay along an axis whose kept indices differ along others, in their new order.

    Args:
        axis: The axis.
        along: The others, in order.
        rows: The kept indices at each place along those, in the order of memory; all rows are of one length. If there
            are fewer rows than places, each stands for a block of places.
    """

    axis: int
    along: list[int]
    rows: list[list[int]]

    def places(self, shape: tuple[int, ...]) -> Tensor:
        """Return the kept indices at each place of a tensor of some shape, shape ``(*places, kept)``."""
        sizes = [shape[a] for a in self.along]
        rows = torch.tensor(self.rows)
        return rows.repeat_interleave(math.prod(sizes) // len(rows), 0).view(*sizes, -1)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor."""
        ends, front = (*self.along, self.axis), range(len(self.along) + 1)
        moved = tensor.movedim(ends, tuple(front))
        places = self.places(tuple(tensor.shape)).to(tensor.device)
        index = places.view(*places.shape, *[1] * (moved.dim() - len(front)))
        index = index.expand(*places.shape, *moved.shape[len(front) :])
        return moved.gather(len(self.along), index).movedim(tuple(front), ends)


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter or buffer.

    Args:
        shape: Its shape before.
        axes: Per axis that loses some, its kept indices, in their new order.
        gathers: Done before, one after the other: axes whose kept indices differ along another axis, as those of the
            weight of a grouped convolution do between its groups, or those of stacked experts between the experts.
    """

    shape: tuple[int, ...]
    axes: dict[int, list[int]] = field(default_factory=dict)
    gathers: list[Gather] = field(default_factory=list[Gather])

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor of the shape before."""
        for gather in self.gathers:
            tensor = gather.apply(tensor)
        for axis, kept in self.axes.items():
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
        return tensor.contiguous()

    @property
    def kept_shape(self) -> torch.Size:
        """The shape of what stays."""
        return self.apply(torch.empty(self.shape, device="meta")).shape

    def then(self, cut: Cut) -> Cut:
        """Return what this cut, which only changes the order of indices, and another one after it do together."""
        gathers = list(self.gathers)
        for gather in cut.gathers:
            places = gather.places(self.shape)
            if gather.axis in self.axes:
                places = torch.tensor(self.axes[gather.axis])[places]
            for i, a in enumerate(gather.along):
                if a in self.axes:
                    places = places.index_select(i, torch.tensor(self.axes[a]).argsort())
            gathers.append(replace(gather, rows=places.flatten(0, -2).tolist()))
        done = {gather.axis for gather in cut.gathers}
        before = {a: order for a, order in self.axes.items() if a not in done}
        axes = {a: [before[a][i] for i in kept] if a in before else kept for a, kept in cut.axes.items()}
        return Cut(self.shape, {**before, **axes}, gathers)

    def mask(self) -> Tensor:
        """Mark the elements that stay, in the shape before."""
        numbers = torch.arange(torch.Size(self.shape).numel()).view(self.shape)
        out = torch.zeros(numbers.numel(), dtype=torch.bool)
        out[self.apply(numbers).flatten()] = True
        return out.view(self.shape)


def indices(kept: Tensor) -> list[int]:
    """Return the indices that a vector marks."""
    return kept.nonzero().flatten().tolist()


def cut_axes(keep: list[Tensor]) -> dict[int, list[int]]:
    """Return the kept indices of every axis that loses some."""
    return {a: indices(k) for a, k in enumerate(keep) if not k.all()}


def by_group(columns: Tensor, groups: int) -> Gather:
    """Return which columns of each group of a grouped convolution stay; rows of groups that go get any."""
    kept = [indices(c) for c in columns.view(groups, -1)]
    count = max(map(len, kept))
    return Gather(1, [0], [c if len(c) == count else list(range(count)) for c in kept])
