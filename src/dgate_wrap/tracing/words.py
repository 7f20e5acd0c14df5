"""The words of nodes: how the interpreter keeps them, unites them and reads them off.

Words are kept narrow: a tensor that is constant along an axis is stored with stride 0 there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace
from .families import Contraction, Family, Movement
from .fixed import FixedValues
from .nodes import has_tensors, op_name, shape_of
from .operations import describe, feature_inputs, varying_nodes
from .origins import operation, where
from .structure import CONSTANT, DATA, LIVE, ZERO, Note, Slot, Structure, compact, label_of, narrow, state_of


class Words:
    """The words of a trace's nodes, and what the rules do with them alike.

    Args:
        trace: The traced model.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.structure = Structure()
        self.varying = varying_nodes(trace)
        self.order = {n: i for i, n in enumerate(trace.nodes)}
        self.families: dict[Node, Family] = {
            n: describe(n, self.varying) for n in trace.nodes if n.op == "call_function" and has_tensors(n)
        }
        self.makers = self._find_makers()
        self._axes: dict[tuple[Any, ...], Tensor] = {}
        """Labels along axes of a weight, as its first use gave them; later uses are united with them."""
        self._fixed = FixedValues(trace, self.varying)
        self.features = feature_inputs(trace, self.families, self.varying)
        self.cancelled: set[Node] = set()
        """Values that are zero whatever the inputs, such as a mask times zeros."""
        self._inputs: list[Tensor] = []

    def _find_makers(self) -> set[Node]:
        """Return the parameters from which weights of contractions are computed, and all constants on the way."""
        found: set[Node] = set()
        reached = [f.weight for f in self.families.values() if isinstance(f, Contraction)]
        while reached:
            node = reached.pop()
            if node not in self.varying and node not in found:
                found.add(node)
                reached.extend(node.all_input_nodes)
        return found

    def _set(self, node: Node, words: Any) -> None:
        """Keep the words of a node, narrow, expanded to its shape; a list for several results."""
        if isinstance(words, list):
            values = cast("list[Any]", node.meta["val"])
            self.structure.words[node] = [
                compact(w).expand(tuple(v.shape)) if isinstance(v, Tensor) else w
                for w, v in zip(cast("list[Tensor]", words), values, strict=True)
            ]
        else:
            self.structure.words[node] = compact(words).expand(shape_of(node))

    def _set_all(self, node: Node, word: int) -> None:
        value = node.meta["val"]
        full = torch.full((), word)
        self._set(node, full if isinstance(value, Tensor) else [full] * len(value))

    def _words(self, node: Node) -> Any:
        """Return the words of a node; a parameter gets one label per element when it is first met as a value."""
        words = self.structure.words
        if node not in words:
            source = self.trace.sources.get(node)
            if source is None or not isinstance(source.value, Tensor):
                words[node] = torch.full((), CONSTANT)
            elif source.kind == "parameter" and source.value.numel() > 1:
                labels = self._axes.get((source.name,))
                if labels is None:
                    labels = self._axes[source.name,] = self._own_labels(node, source.value)
                    self.structure.slots.append(Slot(source.name, labels, "adjust"))
                words[node] = (labels * 4 + ZERO).expand(source.value.shape)
            else:
                words[node] = torch.full((), CONSTANT).expand(source.value.shape)
        return words[node]

    def _own_labels(self, node: Node, value: Tensor) -> Tensor:
        """Mint labels for a parameter that is used as a value: per row if a weight is computed from it, else each."""
        if value.dim() >= 2 and value.shape[0] > 1 and node in self.makers:
            return self.structure.sets.mint(value.shape[0]).view(-1, *[1] * (value.dim() - 1))
        return self.structure.sets.mint(value.numel()).view(value.shape)

    def _listed(self, node: Node) -> list[Tensor]:
        words = self._words(node)
        return cast("list[Tensor]", words) if isinstance(words, list) else [words]

    def _is_zero(self, node: Node) -> bool:
        """Tell whether a value is zeros that code makes, such as a first hidden state, moved or multiplied perhaps."""
        family = self.families.get(node)
        if isinstance(family, Movement):
            return bool(family.inputs) and all(self._is_zero(n) for n in family.inputs)
        return op_name(node) in ("zeros", "new_zeros") or node in self.cancelled

    def _says(self, node: Node, what: str) -> str:
        return f"{what} ({operation(node)}, {where(node)})"

    def _varies(self, labels: Tensor, axis: int) -> bool:
        """Tell whether the united labels differ along an axis; positions without a label are neutral."""
        if labels.shape[axis] < 2:
            return False
        found = self.structure.sets.find(labels)
        return bool(((found != found.amax(axis, keepdim=True)) & (found >= 0)).any())

    def _unite_over(self, words: Tensor, axes: Iterable[int], why: str = "") -> Tensor:
        """Unite the labels along axes and return one word per remaining index, axes kept with size 1.

        Constants are neutral. Where a label meets data along these axes, its state becomes live.
        """
        words = narrow(words)
        axes = [a for a in axes if words.shape[a] > 1]
        if not axes or not words.numel():
            return words
        labels = label_of(words)
        top = labels.amax(axes, keepdim=True)
        self.structure.unite(labels, top)
        state = torch.where(words >= 0, state_of(words), ZERO).amax(axes, keepdim=True)
        data = (words == DATA).any(dim=tuple(axes), keepdim=True)
        mixed = data & (top >= 0)
        if mixed.any():
            state = torch.where(mixed, LIVE, state)
            self._enliven(top[mixed], why or "it is mixed with something live")
        return torch.where(top >= 0, top * 4 + state, torch.where(data, DATA, CONSTANT))

    def _enliven(self, labels: Tensor, why: str) -> None:
        self.structure.notes.setdefault("enlivened", []).append(Note(labels[labels >= 0].unique(), why))

    def _consume(self, node: Node, words: Tensor) -> None:
        """A sum over channels reads these words: what is still live there cannot be ignored."""
        words = narrow(words)
        live = label_of(words)[(words >= 0) & (words % 4 == LIVE)]
        if live.numel():
            self.structure.flag("live", live, self._says(node, "it is not constant when its weights are zero"))
        self.structure.flag("read", label_of(words), self._says(node, "a contraction reads it"), self.order[node])


def laid(t: Tensor, axes: str, target: str) -> Tensor:
    """Lay a tensor with lettered axes out over other letters, with size 1 for those it lacks; others must be single."""
    drop = [i for i, c in enumerate(axes) if c not in target]
    for i in reversed(drop):
        t = t.amax(i)
    held = [c for c in axes if c in target]
    order = sorted(range(len(held)), key=lambda i: target.index(held[i]))
    t = t.permute(order)
    shape = iter(t.shape)
    return t.reshape([next(shape) if c in held else 1 for c in target])


def fit(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast words to a shape; pooling and keepdim change sizes along axes of equal words."""
    for axis, (have, want) in enumerate(zip(words.shape, shape, strict=True)):
        if have != want and have > 1:
            words = words.narrow(axis, 0, 1)
    return words.expand(shape)
