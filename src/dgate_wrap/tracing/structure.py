"""What labels say about a traced model: which weights belong together, what holds them back, and what they reach.

The value of a node is an int64 tensor in the shape of its activation. A word of at least 0 is ``label * 4 + state``;
``CONSTANT`` is a constant and ``DATA`` something live, both without an identity of their own. The state says what is
here once all weights of the label are zero: exactly zero, a constant, or still something live.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

CONSTANT, DATA = -1, -2
ZERO, FIXED, LIVE = 0, 1, 2
"""States: what is left at a position when its label's weights are zero."""

Role = Literal["row", "table", "recurrent", "adjust"]
Flag = Literal[
    "frozen", "input", "output", "live", "follower", "norm", "centered", "grouped", "scores", "value", "read", "added"
]

UNMOVABLE: tuple[Flag, ...] = ("frozen", "input", "output", "live", "follower")
"""Flags of channels that are not zero, or not a constant, wherever they are read when their own weights are zero."""


class UnionFind:
    """Disjoint sets of the numbers ``0 .. n-1``; all operations take tensors of numbers, negative ones are skipped."""

    def __init__(self) -> None:
        self._parent = torch.empty(0, dtype=torch.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def mint(self, count: int) -> Tensor:
        """Return new numbers, each a set of its own."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            size = max(2 * len(self._parent), self._count, 1024)
            self._parent = torch.cat([self._parent, torch.arange(len(self._parent), size)])
        return torch.arange(start, self._count)

    def find(self, numbers: Tensor) -> Tensor:
        """Return the smallest number of each set; negative numbers stay."""
        if not self._count:
            return numbers
        start = numbers.clamp_min(0)
        root = self._parent[start]
        while not torch.equal(up := self._parent[root], root):
            root = up
        self._parent[start] = root
        return torch.where(numbers >= 0, root, numbers)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Unite the sets of numbers pairwise, with broadcasting."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        a, b = a[both], b[both]
        while a.numel():
            a, b = self.find(a), self.find(b)
            apart = a != b
            low, high = torch.minimum(a, b)[apart], torch.maximum(a, b)[apart]
            self._parent.scatter_reduce_(0, high, low, "amin")  # what loses to a smaller one is seen again
            a, b = low, high

    def copy(self) -> UnionFind:
        """Return an independent copy."""
        other = UnionFind()
        other._parent, other._count = self._parent.clone(), self._count
        return other


@dataclass(frozen=True)
class Slot:
    """Labels of a parameter's elements: the weights that make a channel.

    Args:
        name: The parameter.
        labels: Labels, broadcasting to the parameter; -1 where it makes none.
        role: Rows of a contraction, columns of a table, or gate rows of a recurrent layer, which produce the channel;
            or weights that adjust one that exists (bias, norm, scale).
    """

    name: str
    labels: Tensor
    role: Role

    @property
    def producer(self) -> bool:
        """Whether these weights produce the channel."""
        return self.role != "adjust"


@dataclass(frozen=True)
class Reader:
    """Labels that the columns of a weight read.

    Args:
        name: The parameter.
        labels: Labels, broadcasting to the parameter; -1 where a column reads nothing that has a label.
        order: Position of the reading operation in the graph.
    """

    name: str
    labels: Tensor
    order: int


@dataclass(frozen=True)
class HeadSite:
    """The value operand of an attention: labels with one row per head (and batch), over keys and dimensions.

    Args:
        labels: Shape ``(heads, members)``.
        alive: Whether any of them is not zero, nor constant, when its weights are zero.
        order: Position of the attention in the graph.
        place: The operation and its source line.
    """

    labels: Tensor
    alive: bool
    order: int
    place: str


class Note(NamedTuple):
    """Labels that have a flag, why, and the position in the graph of the operation that gave it, or -1."""

    labels: Tensor
    reason: str
    order: int = -1


@dataclass
class Structure:
    """What the labels say about a traced model.

    Args:
        slots: Labels of parameters that make channels.
        readers: Labels that columns of weights read.
        heads: The value operand of every attention.
        words: Word of every element of every tensor of the graph, before unions: use `classes`.
        notes: Per flag, what holds labels back, or what they reach.
        barriers: Every operation that froze something it met, with its source line, and how many labels.
    """

    slots: list[Slot] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    heads: list[HeadSite] = field(default_factory=list)
    words: dict[Node, Any] = field(default_factory=dict)
    notes: dict[str, list[Note]] = field(default_factory=dict)
    barriers: dict[str, int] = field(default_factory=dict)
    sets: UnionFind = field(default_factory=UnionFind)
    """Labels that are at one position, whatever the queries and keys that are multiplied with each other say."""
    _paired: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _all: UnionFind | None = None

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Unite labels pairwise, with broadcasting; negative numbers are skipped."""
        self.sets.unite(a, b)

    def pair(self, a: Tensor, b: Tensor) -> None:
        """Unite labels that are multiplied and summed: a query's with its key's. It holds for `classes` alone."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0)
        self._paired.append((a[both], b[both]))

    def classes(self, labels: Tensor) -> Tensor:
        """Return the class of every label; negative numbers stay. Only after the whole graph was interpreted."""
        if self._all is None:
            self._all = self.sets.copy()
            for a, b in self._paired:
                self._all.unite(a, b)
        return self._all.find(labels)

    def flag(self, name: Flag, labels: Tensor, reason: str, order: int = -1) -> None:
        """Flag labels, with the reason, and the position of the operation that tells it."""
        found = labels[labels >= 0].unique()
        if found.numel():
            self.notes.setdefault(name, []).append(Note(found, reason, order))
            if name == "frozen":
                self.barriers[reason] = self.barriers.get(reason, 0) + found.numel()

    def flagged(self, *names: Flag) -> set[int]:
        """Return the classes of which any label has any of these flags."""
        return self.classes_in(note.labels for name in names for note in self.notes.get(name, []))

    def reasons(self, classes: set[int], *names: Flag) -> dict[int, str]:
        """Return, for each of these classes that has any of these flags, the first reason."""
        out: dict[int, str] = {}
        for note in (note for name in names for note in self.notes.get(name, [])):
            for c in set(self.classes(note.labels).unique().tolist()) & classes - out.keys():
                out[c] = note.reason
        return out

    def produced(self, *roles: Role) -> set[int]:
        """Return the classes that weights of these roles produce; of any producing role if none is given."""
        wanted = roles or ("row", "table", "recurrent")
        return self.classes_in(s.labels for s in self.slots if s.role in wanted)

    def classes_in(self, labels: Iterable[Tensor]) -> set[int]:
        """Return the classes of labels."""
        found = [self.classes(t).unique() for t in labels]
        return set(torch.cat(found).unique().tolist()) - {-1} if found else set()

    def channel_labels(self) -> dict[str, Tensor]:
        """Return labels of all channels that can be zeroed from end to end: produced by weights, and held by nothing.

        Channels that are normalized over are kept (zeroing is not removing).
        """
        return self.select(self.produced() - self.flagged(*UNMOVABLE))

    def select(self, wanted: set[int]) -> dict[str, Tensor]:
        """Return the labels of these classes, on every weight that makes them.

        A weight of two classes can be neither's alone: both are left out.
        """
        while True:
            labels, contested = self._assign(torch.tensor(sorted(wanted), dtype=torch.int64))
            if not contested:
                return {n: t for n, t in labels.items() if bool((t >= 0).any())}
            wanted = wanted - contested

    def _assign(self, wanted: Tensor) -> tuple[dict[str, Tensor], set[int]]:
        out: dict[str, Tensor] = {}
        contested: set[int] = set()
        for s in self.slots:
            found = self.classes(s.labels)
            found = torch.where(torch.isin(found, wanted), found, -1)
            if s.name not in out:
                out[s.name] = found
                continue
            held, found = torch.broadcast_tensors(out[s.name], found)
            contested.update(found[(held >= 0) & (found >= 0) & (held != found)].unique().tolist())
            out[s.name] = compact(torch.where(held >= 0, held, found))
        return out, contested


def label_of(words: Tensor) -> Tensor:
    """Return the labels of words; -1 for constants and data alike."""
    return torch.where(words >= 0, words.div(4, rounding_mode="floor"), -1)


def state_of(words: Tensor) -> Tensor:
    """Return the states of words: a constant is fixed, and data is live."""
    return torch.where(words >= 0, words % 4, torch.where(words == CONSTANT, FIXED, LIVE))


def narrow(t: Tensor) -> Tensor:
    """Return a tensor with size 1 along the axes along which it was expanded."""
    for axis in range(t.dim()):
        if t.shape[axis] > 1 and t.stride(axis) == 0:
            t = t.narrow(axis, 0, 1)
    return t


def compact(t: Tensor) -> Tensor:
    """Return a tensor with size 1 along every axis along which it is constant; it broadcasts to what it was."""
    t = narrow(t)
    for axis in range(t.dim()):
        if t.shape[axis] > 1 and bool((t == t.narrow(axis, 0, 1)).all()):
            t = t.narrow(axis, 0, 1)
    return t
