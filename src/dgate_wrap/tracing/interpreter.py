"""The label interpreter: walk the graph with labels instead of activations, one rule per family of operations.

Labels that must die together are united; whatever meets an operation without a rule is frozen, with the reason.
"""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace, operation, where
from .operations import (
    Barrier,
    Contraction,
    Creation,
    Family,
    Lookup,
    Mixing,
    Movement,
    Pick,
    Pointwise,
    describe,
    is_tensor,
    shape_of,
    source_indices,
    varying_nodes,
)
from .structure import CONSTANT, DATA, FIXED, LIVE, ZERO, Slot, Structure, label_of, state_of


class _Interpreter:
    """One walk over the graph, with one rule per family of operations."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.structure = Structure()
        inputs = {n for n, s in trace.sources.items() if s.kind == "input"}
        self.varying = varying_nodes(trace.nodes, inputs)
        self._axes: dict[tuple[Node, int], Tensor] = {}
        """Labels along an axis of a weight, as its first use gave them; later uses are united with them."""
        for node in trace.nodes:
            if node.op == "placeholder":
                source = trace.sources[node]
                if source.kind == "input" and isinstance(source.value, Tensor):
                    self._set(node, torch.full(source.value.shape, DATA))
            elif node.op == "get_attr" and is_tensor(node):
                self._set(node, torch.full(shape_of(node), CONSTANT))
            elif node.op == "call_function" and (is_tensor(node) or isinstance(node.meta.get("val"), tuple | list)):
                self._label(describe(node, self.varying), node)
            elif node.op == "output":
                for n in node.all_input_nodes:
                    words = self._words(n)
                    for w in words if isinstance(words, list) else [words]:
                        self.structure.flag("output", label_of(w))

    def _set(self, node: Node, words: Any) -> None:
        self.structure.words[node] = words

    def _words(self, node: Node) -> Any:
        """Return the words of a node; a parameter gets one label per element when it is first met as a value."""
        words = self.structure.words
        if node not in words:
            source = self.trace.sources.get(node)
            if source is None or not isinstance(source.value, Tensor):
                words[node] = torch.full((), CONSTANT)
            elif source.kind == "parameter" and source.value.numel() > 1:
                labels = self.structure.mint(source.value.numel()).view(source.value.shape)
                self.structure.slots.append(Slot(source.name, labels, producer=False))
                words[node] = labels * 4 + ZERO
            else:
                words[node] = torch.full(source.value.shape, CONSTANT)
        return words[node]

    def _says(self, node: Node, what: str) -> str:
        return f"{what} ({operation(node)}, {where(node)})"

    def _unite_over(self, words: Tensor, axes: list[int]) -> Tensor:
        """Unite the labels along axes and return one word per remaining index, axes kept with size 1.

        Constants are neutral; where a label meets data along these axes, the label is returned (the caller decides).
        """
        labels = label_of(words)
        top = labels.amax(axes, keepdim=True) if axes else labels
        self.structure.unite(labels, top)
        state = torch.where(words >= 0, state_of(words), ZERO)
        state = state.amax(axes, keepdim=True) if axes else state
        data = (words == DATA).any(axes, keepdim=True) if axes and words.numel() else words == DATA
        for axis in axes[1:] if words.dim() == 0 else []:
            data = data.any(axis, keepdim=True)
        return torch.where(top >= 0, top * 4 + state, torch.where(data, DATA, CONSTANT))

    @singledispatchmethod
    def _label(self, family: Family, node: Node) -> None:
        """Barrier: freeze what goes in; what comes out is data, or a constant if nothing varies."""
        assert isinstance(family, Barrier)
        for n in family.inputs:
            words = self._words(n) if n in self.structure.words or n in self.varying else None
            for w in words if isinstance(words, list) else [] if words is None else [words]:
                self.structure.freeze(label_of(w), self._says(node, "an operation without a rule"))
        self._set_all(node, DATA if node in self.varying else CONSTANT)

    def _set_all(self, node: Node, word: int) -> None:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            self._set(node, torch.full(tuple(value.shape), word))
        else:
            self._set(node, [torch.full(tuple(v.shape) if isinstance(v, Tensor) else (), word) for v in value])

    @_label.register
    def _(self, family: Creation, node: Node) -> None:
        self._set_all(node, CONSTANT)

    @_label.register
    def _(self, family: Pick, node: Node) -> None:
        self._set(node, self._words(family.source)[family.index])

    @_label.register
    def _(self, family: Movement, node: Node) -> None:
        parts = [self._words(n) for n in family.inputs]
        flat = torch.cat([*(p.flatten() for p in parts), torch.full((1,), CONSTANT)])
        moved = [flat[m] for m in source_indices(family)]
        self._set(node, moved[0] if is_tensor(node) else moved)
        if operation(node) == "aten.cat":
            self._couple_pieces(node, parts)

    def _couple_pieces(self, node: Node, parts: list[Tensor]) -> None:
        """Unite concatenated pieces along the other axes: their sizes must agree."""
        axis = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape_of(node))
        slices = [
            label_of(p).select(axis, 0)
            for p in parts
            if p.dim() == len(shape_of(node))
            and p.shape[axis]
            and bool((label_of(p) == label_of(p).narrow(axis, 0, 1)).all())
        ]
        for piece in slices[1:]:
            self.structure.unite(slices[0], piece)

    @_label.register
    def _(self, family: Pointwise, node: Node) -> None:
        shape = shape_of(node)
        words = [self._words(n) for n in family.operands]
        words = [
            w.expand(shape) if w.numel() > 1 else torch.full(shape, int(w) if int(w) < 0 else CONSTANT) for w in words
        ]
        labels = [label_of(w) for w in words]
        out = torch.full(shape, -1)
        for label in labels:
            self.structure.unite(out, label)
            out = torch.where(out >= 0, out, label)
        narrow = [
            n for n, w in zip(family.operands, words, strict=True) if bool((w == DATA).any()) and self._is_gate(n, out)
        ]
        data = torch.zeros(shape, dtype=torch.bool)
        for n, w in zip(family.operands, words, strict=True):
            data |= (w == DATA) & (n not in narrow)
        if (data & (out >= 0)).any():
            self.structure.freeze(out[data], self._says(node, "it meets something live that has no label of its own"))
        state = self._probe(node, family, words)
        any_data = torch.stack([w == DATA for w in words]).any(0)
        free = torch.where(any_data, DATA, CONSTANT)
        self._set(node, torch.where((out >= 0) & ~data, out * 4 + state, torch.where(data, DATA, free)))

    def _is_gate(self, operand: Node, labels: Tensor) -> bool:
        """Tell whether data is broadcast over every axis along which the labels vary (a mask, a shared scale)."""
        shape = shape_of(operand)
        offset = labels.dim() - len(shape)
        for axis in range(labels.dim()):
            varies = bool((labels != labels.narrow(axis, 0, 1)).any())
            if varies and axis >= offset and shape[axis - offset] > 1:
                return False
        return bool((labels >= 0).any())

    def _probe(self, node: Node, family: Pointwise, words: list[Tensor]) -> Tensor:
        """Return the state of every output by running the real operation: zeros where operands are zero, else noise."""
        states = torch.stack([state_of(w) for w in words])
        flat = states.flatten(1)
        combinations, inverse = flat.unique(dim=1, return_inverse=True)
        out: list[int] = []
        generator = torch.Generator().manual_seed(0)
        for combination in combinations.unbind(1):
            stand_in = {
                n: torch.zeros(64) if s == ZERO else torch.rand(64, generator=generator) + 0.5
                for n, s in zip(family.operands, combination.tolist(), strict=True)
            }
            out.append(self._outcome(node, stand_in, combination.tolist()))
        return torch.tensor(out)[inverse].view(states.shape[1:])

    def _outcome(self, node: Node, stand_in: dict[Node, Tensor], states: list[int]) -> int:
        dead = all(s != LIVE for s in states)
        try:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self._stand_in(n, stand_in))
            result = cast(Any, node.target)(*args, **kwargs)
            zero = isinstance(result, Tensor) and bool((result == 0).all())
        except (RuntimeError, TypeError, IndexError):
            zero = False  # the operation wants another dtype or shape: claim less
        return ZERO if zero else FIXED if dead else LIVE

    @staticmethod
    def _stand_in(n: Node, stand_in: dict[Node, Tensor]) -> Any:
        if n not in stand_in:
            return n.meta["val"]
        return stand_in[n].to(n.meta["val"].dtype)

    @_label.register
    def _(self, family: Contraction, node: Node) -> None:
        words = self._words(family.x)
        others = [a for a in range(words.dim()) if a != family.x_axis]
        labels = label_of(words)
        along = (labels == labels.narrow(family.x_axis, 0, 1)).all()
        if along and bool((labels >= 0).any()) and not bool((labels == labels.flatten()[0]).all()):
            self._mix_tokens(family, node, words)
            return
        column = self._unite_over(words, others)
        mixed = (words == DATA) & (column >= 0)
        if mixed.any():
            self.structure.freeze(
                label_of(column.expand(words.shape)[mixed]), self._says(node, "its channel is in part live data")
            )
        column = label_of(column).flatten()
        self._read_columns(family, column)
        size = shape_of(node)[family.out_axis]
        depthwise = family.groups > 1 and family.groups == shape_of(family.x)[family.x_axis]
        if depthwise:
            repeated = column.repeat_interleave(size // family.groups)
            fresh = self.structure.mint(size)
            self.structure.unite(repeated, fresh)
            rows = self._produce(family, torch.where(repeated >= 0, repeated, fresh))
        else:
            rows = self._produce(family, self.structure.mint(size))
        if family.groups > 1:
            self.structure.flag("grouped", column)
            self.structure.flag("grouped", rows)
        shape = [size if a == family.out_axis else 1 for a in range(len(shape_of(node)))]
        self._set(node, (rows * 4 + ZERO).view(shape).expand(shape_of(node)))

    def _read_columns(self, family: Contraction, column: Tensor) -> None:
        """Record which label each input column reads; uses of the same weight share their columns."""
        source = self.trace.sources.get(family.weight)
        self.structure.unite(self._axes.setdefault((family.weight, family.w_in), column), column)
        if source is not None:
            self.structure.columns.append((source.name, family.w_in, column))

    def _produce(self, family: Contraction, rows: Tensor) -> Tensor:
        """Give the rows of a weight, and its bias, the labels of the output channels; uses of one weight share them."""
        known = self._axes.setdefault((family.weight, family.w_out), rows)
        self.structure.unite(known, rows)
        if known is rows:
            source = self.trace.sources.get(family.weight)
            ndim = len(shape_of(family.weight))
            if source is not None and source.kind == "parameter":
                shape = [-1 if a == family.w_out else 1 for a in range(ndim)]
                labels = rows if family.w_out == 0 or family.groups == 1 else None
                if labels is not None:
                    self.structure.slots.append(Slot(source.name, labels.view(shape), producer=True))
                else:
                    self._produce_transposed_groups(source.name, rows, family)
            elif source is not None:
                self.structure.freeze(rows, f"its weight {source.name!r} is no parameter")
            else:
                self._produce_computed(family, rows)
        if family.bias is not None:
            self._adjust(family.bias, 0, rows)
        return rows

    def _produce_transposed_groups(self, name: str, rows: Tensor, family: Contraction) -> None:
        shape = shape_of(family.weight)
        labels = rows.view(family.groups, shape[1]).repeat_interleave(shape[0] // family.groups, 0)
        self.structure.slots.append(Slot(name, labels.view(*shape[:2], *[1] * (len(shape) - 2)), producer=True))

    def _produce_computed(self, family: Contraction, rows: Tensor) -> None:
        """A weight that is computed from parameters: its elements carry labels if only data movement lies between."""
        words = self._words(family.weight)
        labels = label_of(words)
        if family.groups > 1 or bool((state_of(words) != ZERO).any()) or bool((labels < 0).any()):
            self.structure.freeze(rows, "its weight is computed from other parameters")
            return
        shape = [-1 if a == family.w_out else 1 for a in range(words.dim())]
        self.structure.unite(labels, rows.view(shape).expand(words.shape))
        touched = set(self.structure.classes(labels).unique().tolist())
        for i, s in enumerate(self.structure.slots):
            if not s.producer and set(self.structure.classes(s.labels).unique().tolist()) & touched:
                self.structure.slots[i] = Slot(s.name, s.labels, producer=True)

    def _adjust(self, parameter: Node, axis: int, labels: Tensor) -> bool:
        """Unite the labels of a vector parameter with those of the channels it adjusts; tell whether it is gated so."""
        source = self.trace.sources.get(parameter)
        if source is None or source.kind != "parameter":
            return False
        if source.value.numel() == 1 and label_of(self._words(parameter)).max() < 0:  # a vector for a single channel
            fresh = self.structure.mint(1).view(source.value.shape)
            self.structure.slots.append(Slot(source.name, fresh, producer=False))
            self._set(parameter, fresh * 4 + ZERO)
        words = self._words(parameter)
        shape = [-1 if a == axis else 1 for a in range(words.dim())]
        self.structure.unite(label_of(words), labels.view(shape).expand(words.shape))
        return True

    def _mix_tokens(self, family: Contraction, node: Node, words: Tensor) -> None:
        """The channels lie on another axis, and this contraction mixes positions: they pass through it."""
        first = words.narrow(family.x_axis, 0, 1)
        state = words.amax(family.x_axis, keepdim=True) if words.numel() else first
        worst = torch.where(first >= 0, label_of(first) * 4 + torch.maximum(state_of(state), state_of(first)), first)
        if family.bias is not None:
            worst = torch.where(worst >= 0, label_of(worst) * 4 + state_of(worst).clamp_min(FIXED), worst)
        shape = list(shape_of(node))
        self._set(node, worst.movedim(family.x_axis, family.out_axis).expand(shape))

    @_label.register
    def _(self, family: Mixing, node: Node) -> None:
        words = self._words(family.x)
        results = node.meta["val"]
        mixed = sorted(family.mixed)
        if family.kind == "norm":
            out = self._normalize(family, words)
        elif family.kind == "pool":
            out = self._unite_over(words, mixed).expand(words.shape)
        else:
            out = self._keep_if_constant(family, words, mixed)
        for axis in sorted((a for a, b in enumerate(family.out_axis) if b is None), reverse=True):
            out = out.select(axis, 0)
        if isinstance(results, Tensor):
            self._set(node, _fit(out, results))
        else:
            self._set(
                node, [_fit(out, r) if i == 0 else torch.full(tuple(r.shape), DATA) for i, r in enumerate(results)]
            )

    def _normalize(self, family: Mixing, words: Tensor) -> Tensor:
        """Normalize: over the channels it is a width statistic; its affine parameters die with their channels."""
        channels = sorted({x_axis for _, _, x_axis in family.parameters}) or [min(1, words.dim() - 1)]
        others = [a for a in range(words.dim()) if a not in channels]
        self._unite_over(words, others)
        labels = label_of(words)
        if set(channels) & family.mixed:
            self.structure.flag("norm", labels)
        top = labels.amax(others) if others else labels
        gated = 0
        for parameter, axis, x_axis in family.parameters:
            position = channels.index(x_axis)
            rest = [a for a in range(top.dim()) if a != position]
            gated += self._adjust(parameter, axis, top.amax(rest) if rest else top)
        parameters = [n for n, _, _ in family.parameters]
        affine = [n for n in parameters if self.trace.sources.get(n) and self.trace.sources[n].kind == "parameter"]
        if len(affine) >= 2 or (len(affine) == 1 and len(parameters) == 1):
            state = torch.full_like(words, ZERO)
        else:
            state = torch.full_like(words, LIVE if family.mixed & set(channels) else FIXED)
        return torch.where(words >= 0, labels * 4 + state, words)

    def _keep_if_constant(self, family: Mixing, words: Tensor, axes: list[int]) -> Tensor:
        """A statistic along axes keeps a label that is constant along them, and loses the others."""
        labels = label_of(words)
        top = labels.amax(axes, keepdim=True) if axes else labels
        same = ((labels == top) | (words == CONSTANT)).all(dim=tuple(axes), keepdim=True) if axes else labels >= 0
        lost = labels.masked_fill(same.expand(labels.shape), -1)
        self.structure.flag("norm", lost)
        state = state_of(words).amax(axes, keepdim=True)
        state = state.clamp_min(FIXED) if family.kind == "scan" else state
        data = (words == DATA).any(dim=tuple(axes), keepdim=True) | (lost >= 0).any(dim=tuple(axes), keepdim=True)
        out = torch.where(same & (top >= 0), top * 4 + state, torch.where(data, DATA, CONSTANT))
        return out.expand(words.shape)

    @_label.register
    def _(self, family: Lookup, node: Node) -> None:
        source = self.trace.sources.get(family.table)
        width = shape_of(family.table)[1]
        fresh = self.structure.mint(width)
        columns = self._axes.setdefault((family.table, 1), fresh)
        self.structure.unite(columns, fresh)
        if source is None or source.kind != "parameter":
            self.structure.freeze(fresh, "its table is no parameter")
        elif not any(s.name == source.name and s.labels.shape == (1, width) for s in self.structure.slots):
            self.structure.slots.append(Slot(source.name, fresh.view(1, -1), producer=True))
        self._set(node, (fresh * 4 + ZERO).expand(shape_of(node)))


def _fit(words: Tensor, result: Any) -> Tensor:
    """Broadcast words to the shape of a result; pooling and keepdim change sizes along axes of equal words."""
    shape = tuple(int(n) for n in result.shape)
    for axis, (have, want) in enumerate(zip(words.shape, shape, strict=True)):
        if have != want:
            words = words.narrow(axis, 0, 1)
    return words.expand(shape)


def find_structure(trace: Trace) -> Structure:
    """Interpret a trace with labels, and return what they say."""
    return _Interpreter(trace).structure
