"""Weights: which rows make a channel and which columns read one, through whatever moved or computed the weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .families import Contraction, Lookup, Movement, NormedWeight, Pick, Pointwise
from .movements import source_indices
from .nodes import is_tensor, op_name, shape_of
from .operations import COPIES
from .structure import FIXED, ZERO, Reader, Role, Slot, compact, label_of, narrow, state_of
from .words import Words


class Weights(Words):
    """What the rules do with weights and biases."""

    def _was_channels(self, weight: Node) -> bool:
        """Tell whether a constant operand holds channels that weights produced from constants, and is no weight."""
        family = self.families.get(weight)
        if family is None or weight in self.varying:
            return False
        if isinstance(family, Contraction | Lookup):
            made_by = family.weight if isinstance(family, Contraction) else family.table
            return self._scattered(made_by, torch.full((), -1)) is not None
        size = torch.Size(shape_of(weight)).numel() if is_tensor(weight) else 0
        whole = [n for n in weight.all_input_nodes if not is_tensor(n) or torch.Size(shape_of(n)).numel() >= size]
        return any(self._was_channels(n) for n in whole)

    def _learned(self, node: Node) -> bool:
        """Tell whether a value is made from parameters, or varies."""
        source = self.trace.sources.get(node)
        if source is not None:
            return source.kind in ("parameter", "input")
        return node in self.varying or any(self._learned(n) for n in node.all_input_nodes)

    def _follows_weights(self, node: Node) -> bool:
        """Tell whether a value depends on parameters."""
        front, seen = [node], {node}
        while front:
            at = front.pop()
            if at.op == "placeholder" and self.trace.sources[at].kind == "parameter":
                return True
            more = [n for n in at.all_input_nodes if n not in seen]
            seen.update(more)
            front.extend(more)
        return False

    def _from_input(self, labels: Tensor) -> bool:
        """Tell whether these are features of the model's input, and no channels that it makes."""
        sets = self.structure.sets
        return any(bool(torch.isin(sets.find(labels), sets.find(x)).any()) for x in self._inputs)

    @staticmethod
    def _columns(family: Contraction, column: Tensor, size: int) -> Tensor:
        """Lay the labels of input channels over the weight; in a grouped convolution rows read different ones."""
        ndim = len(shape_of(family.weight))
        if family.groups == 1 or family.w_in == 0:
            return column.view([-1 if a == family.w_in else 1 for a in range(ndim)])
        blocks = column.view(family.groups, -1).repeat_interleave(size // family.groups, 0)
        return blocks.view(*blocks.shape, *[1] * (ndim - 2))

    @staticmethod
    def _rows(family: Contraction, rows: Tensor) -> Tensor:
        """Lay the labels of output channels over the weight; a grouped transposed convolution has them per block."""
        shape = shape_of(family.weight)
        if family.groups == 1 or family.w_out == 0:
            return rows.view([-1 if a == family.w_out else 1 for a in range(len(shape))])
        blocks = rows.view(family.groups, -1).repeat_interleave(shape[0] // family.groups, 0)
        return blocks.view(*blocks.shape, *[1] * (len(shape) - 2))

    def _key(self, node: Node) -> Any:
        source = self.trace.sources.get(node)
        return source.name if source is not None else node

    def _share(self, key: tuple[Any, ...], labels: Tensor) -> bool:
        """Unite labels with those of the same axes of the same weight; tell whether this is its first use."""
        key = (self._key(key[0]), *key[1:])
        known = self._axes.setdefault(key, labels)
        self.structure.unite(known, labels)
        return known is labels

    def _read(self, node: Node, weight: Node, labels: Tensor) -> None:
        """Record which label each input column reads; uses of the same weight share their columns."""
        self._share((weight, "read", *(a for a in range(labels.dim()) if labels.shape[a] > 1)), labels)
        for name, found in self._scattered(weight, labels, products=True) or []:
            self.structure.readers.append(Reader(name, found, self.order[node]))

    def _produce(self, node: Node, weight: Node, labels: Tensor, role: Role, key: tuple[Any, ...]) -> int:
        """Give the rows of a weight the labels of the output channels; return the state that zeroing them leaves."""
        first = self._share(key, labels)
        for axis in range(labels.dim()):  # a tied weight: its rows here may be its columns elsewhere
            self._share((weight, "read", axis), labels) if labels.shape[axis] > 1 and role == "table" else None
        family = self.families.get(weight)
        if isinstance(family, NormedWeight):
            return self._produce_normed(family, labels, role)
        slots = self._scattered(weight, labels)
        if slots is None and weight not in self.varying:
            if self._produce_computed(weight, labels):
                return ZERO
            slots = self._scattered(weight, labels, products=True)
        if slots is not None:
            if first:
                self.structure.slots.extend(Slot(name, found, role) for name, found in slots)
        else:
            why = "its weight is computed from other values" if weight.op != "placeholder" else "its weight is fixed"
            self.structure.flag("frozen", labels, self._says(node, why))
        return ZERO

    def _produce_normed(self, family: NormedWeight, labels: Tensor, role: Role) -> int:
        """Weight normalization: zero the norms if there is one per row, else the rows of the direction."""
        rows = [a for a in range(labels.dim()) if labels.shape[a] > 1]
        target = family.g if rows in ([], [family.axis % labels.dim()]) else family.v
        if target is family.v:
            self.structure.flag("follower", label_of(self._words(family.g)), "it scales all channels of a weight")
        for name, found in self._scattered(target, labels) or []:
            self.structure.slots.append(Slot(name, found, role))
        return ZERO

    def _produce_computed(self, weight: Node, labels: Tensor) -> bool:
        """A weight that is computed from parameters: its rows die if they are zero when those of the parameters are."""
        words = self._words(weight)
        found = label_of(words)
        if bool((state_of(words) != ZERO).any()) or bool((found < 0).any()):
            return False
        along = [a for a in range(labels.dim()) if labels.shape[a] > 1]
        if any(self._varies(narrow(found), a) for a in range(found.dim()) if a not in along):
            return False  # its rows are not the parameter's rows
        self.structure.unite(narrow(found), labels)
        made = self.structure.sets.find(labels)
        for i, s in enumerate(self.structure.slots):
            touched = torch.isin(self.structure.sets.find(s.labels), made)
            if not s.producer and touched.any():
                self.structure.slots[i] = Slot(s.name, torch.where(touched, s.labels, -1), "row")
        return True

    def _scattered(self, node: Node, labels: Tensor, *, products: bool = False) -> list[tuple[str, Tensor]] | None:
        """Carry labels of a weight back to the parameters that it was moved from; ``None`` if it is no such weight.

        With ``products``, also to those that it is a product of, each of which may be zero for all.
        """
        source = self.trace.sources.get(node)
        if source is not None:
            return [(source.name, labels)] if source.kind == "parameter" else None
        family = self.families.get(node)
        if isinstance(family, Pick):
            family = self.families.get(family.source)
        if isinstance(family, Pointwise) and op_name(node) in COPIES:
            return self._scattered(family.operands[0], labels, products=products)
        if products and isinstance(family, Pointwise) and node not in self.varying:
            return self._factored(_factors(node, family), labels.expand(shape_of(node)))
        if products and isinstance(family, NormedWeight) and labels.shape[family.axis] == 1:
            return self._scattered(family.v, labels, products=True)
        if not isinstance(family, Movement) or node in self.varying:
            return None
        index = cast(Pick, self.families[node]).index if isinstance(self.families[node], Pick) else 0
        return self._scattered_back(family, index, labels.expand(shape_of(node)), products)

    def _factored(self, factors: list[Node], labels: Tensor) -> list[tuple[str, Tensor]] | None:
        """Carry labels of a product back to the factors along whose axes they differ."""
        out: list[tuple[str, Tensor]] = []
        for n in factors:
            shape = shape_of(n)
            full = (1,) * (labels.dim() - len(shape)) + shape
            repeated = [a for a, size in enumerate(full) if size == 1]
            if not any(self._varies(labels, a) for a in repeated):
                one = labels[tuple(slice(1) if a in repeated else slice(None) for a in range(labels.dim()))]
                out.extend(self._scattered(n, one.reshape(shape), products=True) or [])
        return out or None

    def _scattered_back(
        self, family: Movement, index: int, labels: Tensor, products: bool
    ) -> list[tuple[str, Tensor]] | None:
        sizes = [torch.Size(shape_of(n)).numel() for n in family.inputs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        places = source_indices(family)[index]
        out: list[tuple[str, Tensor]] = []
        for n, start, size in zip(family.inputs, starts, sizes, strict=True):
            inside = (places >= start) & (places < start + size)
            found = torch.full((size,), -1)
            found[places[inside] - start] = labels[inside]
            self.structure.unite(found[places[inside] - start], labels[inside])
            inner = self._scattered(n, compact(found.view(shape_of(n))), products=products)
            if inner is None:
                return None
            out.extend(inner)
        return out

    def _adjust(self, parameter: Node, axis: int, labels: Tensor) -> int:
        """Unite a vector of parameters with the channels it adjusts; return the state that zeroing it leaves."""
        source = self.trace.sources.get(parameter)
        if source is not None and source.kind != "parameter":
            return FIXED
        if source is not None and source.value.numel() == 1 and parameter not in self.structure.words:
            fresh = self.structure.sets.mint(1).view(source.value.shape)
            self.structure.slots.append(Slot(source.name, fresh, "adjust"))
            self._axes[source.name,] = fresh
            self.structure.words[parameter] = fresh * 4 + ZERO
        words = self._words(parameter)
        shape = [-1 if a == axis else 1 for a in range(words.dim())]
        self.structure.unite(label_of(words), labels.view(shape))
        return int(state_of(narrow(words)).max()) if words.numel() else ZERO

    def _is_parameter(self, node: Node) -> bool:
        words = self.structure.words.get(node)
        return isinstance(words, Tensor) and bool((words >= 0).all())


def _factors(node: Node, family: Pointwise) -> list[Node]:
    """Return the operands any of which makes a result zero where it is zero."""
    name = op_name(node)
    if name == "div":
        return [n for n in family.operands if n is node.args[0]]
    return list(family.operands) if family.product or name == "neg" else []
