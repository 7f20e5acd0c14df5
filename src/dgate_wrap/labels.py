"""The one language of the library: a grouping is a mapping from parameter names to label tensors.

A label tensor is int64 and broadcasts to its parameter. Equal labels are one group, on whichever parameter they
stand; ``-1`` is not gated. Everything here is pure: tensors in, tensors out, no modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .errors import GroupingError

UNGATED = -1
"""The label of a weight that belongs to no group."""

Labels = Mapping[str, Tensor]
"""Parameter name → int64 labels that broadcast to that parameter."""


def along(shape: Sequence[int] | Tensor, axis: int | Sequence[int] | None = None, *, block: int = 1) -> Tensor:
    """Label every index along one or several axes.

    Index ``i`` of a single axis gets label ``i // block``. Several axes are numbered in row-major order. No axis at
    all puts the whole tensor in one group.

    Args:
        shape: Shape of the parameter, or the parameter itself.
        axis: The axis, the axes, or ``None`` for one group.
        block: How many consecutive indices share a label; for a single axis only.

    Returns:
        int64 labels with size 1 on every axis that was not named, so that they broadcast to ``shape``.

    Raises:
        GroupingError: If an axis does not exist, or ``block`` does not divide its size.

    Example:
        >>> along((4, 3), 0, block=2).tolist()
        [[0], [0], [1], [1]]
        >>> along((2, 3), (0, 1)).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    shape = tuple(shape.shape) if isinstance(shape, Tensor) else tuple(shape)
    axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    bad = [a for a in axes if not -len(shape) <= a < len(shape)]
    if bad:
        raise GroupingError(
            f"a parameter of shape {shape} has no axis {bad[0]}.",
            expected=f"axes from 0 to {len(shape) - 1}",
            mend="give axis=0, an axis that exists, or restrict the selection to parameters that have it",
        )
    axes = tuple(a % len(shape) for a in axes)
    kept = [n if a in axes else 1 for a, n in enumerate(shape)]
    labels = torch.arange(int(torch.Size(kept).numel())).view(kept)
    if block == 1:
        return labels
    if len(axes) != 1 or block < 1 or shape[axes[0]] % block:
        size = [shape[a] for a in axes]
        raise GroupingError(
            f"block={block} does not divide axes {axes} of shape {shape}, which have sizes {size}.",
            expected="one axis whose size is a multiple of the block",
            mend="choose a divisor, or give labels=lambda name, p: ... for unequal blocks",
        )
    return labels.div(block, rounding_mode="floor")


def disjoint(labels: Labels | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Renumber labels so that no group spans two parameters.

    Args:
        labels: Labels of several parameters, each numbered from 0.

    Returns:
        The same labels, shifted so that each parameter uses numbers of its own.

    Example:
        >>> out = disjoint({"a": torch.tensor([0, 1]), "b": torch.tensor([0, -1])})
        >>> out["a"].tolist(), out["b"].tolist()
        ([0, 1], [2, -1])
    """
    shifted: dict[str, Tensor] = {}
    start = 0
    pairs = cast(Labels, labels).items() if isinstance(labels, Mapping) else labels
    for name, t in pairs:
        shifted[name] = shift(t, start)
        start = max(start, next_label({name: shifted[name]}))
    return shifted


def shift(labels: Tensor, start: int) -> Tensor:
    """Add ``start`` to every label and leave the ungated as they are."""
    return torch.where(labels >= 0, labels + start, labels)


def next_label(labels: Labels) -> int:
    """Return the smallest number above every label."""
    return 1 + max((int(t.max()) for t in labels.values() if t.numel()), default=UNGATED)


def check(labels: Labels, shapes: Mapping[str, torch.Size], *, source: str) -> None:
    """Raise one error that lists every entry which is no valid label tensor of a parameter of the model."""
    bad: list[str] = []
    for name, t in cast(Mapping[str, object], labels).items():
        if name not in shapes:
            bad.append(f"{name!r} is not a parameter of the model")
        elif not isinstance(t, Tensor) or t.dtype != torch.int64:
            got = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            bad.append(f"the labels of {name!r} are {got}, not an int64 tensor")
        elif not _broadcasts(t.shape, shapes[name]):
            bad.append(f"the labels of {name!r} have shape {tuple(t.shape)}, the parameter {tuple(shapes[name])}")
        elif t.numel() and int(t.min()) < UNGATED:
            bad.append(f"the labels of {name!r} go down to {int(t.min())}")
    if bad:
        raise GroupingError(
            f"{source}: " + "; ".join(bad) + ".",
            expected="parameter name → int64 tensor that broadcasts to the parameter, labels >= 0 and -1 for ungated",
            mend="labels = {name: dg.along(p, axis=0) for name, p in model.named_parameters() if ...}",
        )


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )


def drop_groups(labels: Labels, doomed: Tensor) -> dict[str, Tensor]:
    """Return the labels without the groups in ``doomed``, on every parameter; parameters left empty are left out."""
    kept = {n: torch.where(torch.isin(t, doomed), UNGATED, t) for n, t in labels.items()}
    return {n: t for n, t in kept.items() if bool((t >= 0).any())}


def used(labels: Tensor) -> Tensor:
    """Return the distinct labels of groups, sorted."""
    u = labels.unique()
    return u[u >= 0]


def overlap(a: Labels, b: Labels) -> dict[str, int]:
    """Count, per parameter, the weights that both labellings gate (in the coarser of their common shape)."""
    return {name: n for name in a.keys() & b.keys() if (n := int(((a[name] >= 0) & (b[name] >= 0)).sum()))}


def union(a: Labels, b: Labels) -> dict[str, Tensor]:
    """Join two labellings that gate no weight twice; groups of ``b`` get numbers of their own."""
    start = next_label(a)
    out = dict(a)
    for name, unshifted in b.items():
        t = shift(unshifted, start)
        out[name] = torch.where(out[name] >= 0, out[name], t) if name in out else t
    return out


def touching(labels: Labels, other: Labels) -> Tensor:
    """Return the labels of the groups that share a weight with any group of ``other``."""
    hit: list[Tensor] = []
    for name in labels.keys() & other.keys():
        t, gated = torch.broadcast_tensors(labels[name], other[name] >= 0)
        hit.append(t[gated])
    return used(torch.cat(hit)) if hit else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Component:
    """Parameters that share groups, and their groups numbered from 0.

    Args:
        names: The parameters, in the order in which they were given.
        index: Per parameter, labels in ``0 .. num_groups - 1`` or -1, broadcasting to the parameter.
        num_groups: How many groups there are.
    """

    names: tuple[str, ...]
    index: dict[str, Tensor]
    num_groups: int


def components(labels: Labels) -> list[Component]:
    """Split labels into sets of parameters that share no group, each with its groups numbered from 0.

    Example:
        >>> [c] = components({"w": torch.tensor([[5], [7]]), "b": torch.tensor([7, -1])})
        >>> c.num_groups, c.index["b"].tolist()
        (2, [1, -1])
    """
    names = [n for n, t in labels.items() if bool((t >= 0).any())]
    owner = list(range(len(names)))

    def find(i: int) -> int:
        while owner[i] != i:
            i = owner[i]
        return i

    uniques = [used(labels[n]) for n in names]
    flat = torch.cat(uniques) if uniques else torch.empty(0, dtype=torch.int64)
    who = torch.cat([torch.full_like(u, i) for i, u in enumerate(uniques)]) if uniques else flat
    order = flat.argsort(stable=True)
    flat, who = flat[order], who[order]
    same = flat[1:] == flat[:-1]
    pairs = torch.stack([who[:-1][same], who[1:][same]], 1).unique(dim=0)
    for i, j in pairs.tolist():
        a, b = sorted((find(i), find(j)))
        owner[b] = a

    out: list[Component] = []
    for root in sorted({find(i) for i in range(len(names))}):
        members = tuple(n for i, n in enumerate(names) if find(i) == root)
        groups = torch.cat([used(labels[n]) for n in members]).unique()
        index = {n: torch.where(labels[n] >= 0, torch.searchsorted(groups, labels[n]), UNGATED) for n in members}
        out.append(Component(members, index, groups.numel()))
    return out
