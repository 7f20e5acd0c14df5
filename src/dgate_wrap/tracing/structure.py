"""What labels say about a traced model: which weights belong together, what holds them back, and what they reach.

The value of a node is an int64 tensor in the shape of its activation. A word of at least 0 is ``label * 4 + state``;
``CONSTANT`` is a constant and ``DATA`` something live, both without an identity of their own. The state says what is
here once all weights of the label are zero: exactly zero, a constant, or still something live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

CONSTANT, DATA = -1, -2
ZERO, FIXED, LIVE = 0, 1, 2
"""States: what is left at a position when its label's weights are zero."""


@dataclass(frozen=True)
class Slot:
    """Labels of a parameter's elements: the weights that make a channel.

    Args:
        name: The parameter.
        labels: Labels, broadcasting to the parameter.
        producer: Whether these weights produce the channel (rows of a contraction, columns of a table), or adjust one
            that exists (bias, norm, scale).
    """

    name: str
    labels: Tensor
    producer: bool


@dataclass
class Structure:
    """What the labels say about a traced model.

    Args:
        slots: Labels of parameters.
        words: Word of every element of every tensor of the graph, before unions: use `classes`.
        columns: ``(parameter, axis, labels)``: which labels each input column of a contraction reads.
        frozen: Why a label can never be removed: the first reason.
        flags: Labels that reach the model's output, are normalized over, or stand in a grouped convolution.
        barriers: Every operation that froze something it met, with its source line, and how many labels.
    """

    slots: list[Slot] = field(default_factory=list)
    words: dict[Node, Any] = field(default_factory=dict)
    columns: list[tuple[str, int, Tensor]] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)
    flags: dict[str, set[int]] = field(default_factory=lambda: {"output": set(), "norm": set(), "grouped": set()})
    barriers: dict[str, int] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=list)

    def mint(self, count: int) -> Tensor:
        """Return new labels."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, label: int) -> int:
        """Return the class of a label."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Unite labels pairwise; broadcasts, and pairs with a negative number are skipped."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            for i, j in torch.stack([a[both], b[both]], 1).unique(dim=0).tolist():
                x, y = sorted((self.find(i), self.find(j)))
                self._parent[y] = x

    def classes(self, labels: Tensor) -> Tensor:
        """Return the class of every label; negative numbers stay."""
        table = torch.tensor([self.find(i) for i in range(len(self._parent))] or [0])
        return torch.where(labels >= 0, table[labels.clamp_min(0)], labels)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Mark labels as never removable."""
        found = labels[labels >= 0].unique().tolist()
        for label in found:
            self.frozen.setdefault(label, reason)
        if found:
            self.barriers[reason] = self.barriers.get(reason, 0) + len(found)

    def flag(self, name: str, labels: Tensor) -> None:
        """Flag labels."""
        self.flags[name].update(labels[labels >= 0].unique().tolist())

    def frozen_classes(self) -> dict[int, str]:
        """Return the classes of which any label is frozen, with the first reason."""
        out: dict[int, str] = {}
        for label, reason in self.frozen.items():
            out.setdefault(self.find(label), reason)
        return out

    def flagged_classes(self, name: str) -> set[int]:
        """Return the classes of which any label has a flag."""
        return {self.find(label) for label in self.flags[name]}

    def channel_labels(self) -> dict[str, Tensor]:
        """Return labels of all channels that can be zeroed from end to end: produced by weights, and never frozen.

        Channels that reach the model's output are left out; those that are normalized over are kept (zeroing is not
        removing).
        """
        doomed = set(self.frozen_classes()) | self.flagged_classes("output")
        produced = {int(c) for s in self.slots if s.producer for c in self.classes(s.labels).unique()}
        while True:
            wanted = torch.tensor(sorted(produced - doomed), dtype=torch.int64)
            labels, contested = self._assign(wanted)
            if not contested:
                return {n: t for n, t in labels.items() if bool((t >= 0).any())}
            doomed |= contested

    def _assign(self, wanted: Tensor) -> tuple[dict[str, Tensor], set[int]]:
        """Give every parameter the wanted classes of its slots; a weight of two classes can be neither's alone."""
        out: dict[str, Tensor] = {}
        contested: set[int] = set()
        for s in self.slots:
            found = self.classes(s.labels)
            found = torch.where(torch.isin(found, wanted), found, -1)
            held = out.get(s.name, torch.full_like(found, -1))
            held, found = torch.broadcast_tensors(held, found)
            contested.update(found[(held >= 0) & (found >= 0) & (held != found)].unique().tolist())
            out[s.name] = torch.where(held >= 0, held, found)
        return out, contested


def label_of(words: Tensor) -> Tensor:
    """Return the labels of words; -1 for constants and data alike."""
    return torch.where(words >= 0, words.div(4, rounding_mode="floor"), -1)


def state_of(words: Tensor) -> Tensor:
    """Return the states of words: a constant is fixed, and data is live."""
    return torch.where(words >= 0, words % 4, torch.where(words == CONSTANT, FIXED, LIVE))
