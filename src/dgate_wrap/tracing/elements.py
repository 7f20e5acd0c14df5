"""Elements: what becomes of words where values are moved, written, or combined position by position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .families import Indexing, Movement, Pointwise
from .nodes import op_name, shape_of
from .operations import gives_zero
from .products import Products
from .structure import CONSTANT, DATA, FIXED, LIVE, ZERO, compact, label_of, narrow, state_of


class Elements(Products):
    """What the rules do with data movement, indexing and operations on single elements."""

    @staticmethod
    def _moved(family: Movement, parts: list[Tensor]) -> list[Tensor]:
        """Run a movement on words; padding gives constants."""
        stand_ins = [(narrow(p) - CONSTANT).double().expand(p.shape) for p in parts]
        try:
            moved = family.run(stand_ins)
        except RuntimeError:  # a view of an expanded tensor
            moved = family.run([s.contiguous() for s in stand_ins])
        return [compact(m).long() + CONSTANT for m in ([moved] if isinstance(moved, Tensor) else list(moved))]

    def _couple(self, parts: list[Tensor], axis: int) -> None:
        """Unite pieces that lie side by side along an axis, along the other axes: their sizes must agree.

        Those of an input, which are told apart one by one, are not: columns of a table stay columns.
        """
        ndim = max(p.dim() for p in parts)
        slices: list[Tensor] = []
        for p in parts:
            labels = label_of(narrow(p))
            if p.dim() == ndim and p.numel() and not self._varies(labels, axis) and not self._from_input(labels):
                slices.append(labels.amax(axis))
        for piece in slices[1:]:
            self.structure.unite(slices[0], piece)

    def _write(self, family: Indexing, node: Node, united: Tensor, written: Tensor) -> None:
        """What is written or added at unknown positions is united with what lies there."""
        if not written.numel():
            return self._set(node, united)
        rest = [a for a in range(united.dim()) if a not in family.axes]
        masks = any(n.meta["val"].dtype == torch.bool for n in family.indices)
        count = 1 if masks or family.each else max(len(shape_of(n)) for n in family.indices)
        count = max(count, written.dim() - len(rest))
        source = self._aligned(written, len(rest) + count)
        side_by_side = family.axes == tuple(range(family.axes[0], family.axes[0] + len(family.axes)))
        first = family.axes[0] if side_by_side else 0  # where torch puts what is picked among the other axes
        source = self._unite_over(
            source, range(first, first + count), self._says(node, "it is written at unknown positions")
        )
        sizes = iter(n for a, n in enumerate(source.shape) if a not in range(first, first + count))
        shape = [next(sizes) if a in rest else 1 for a in range(united.dim())]
        source = source.reshape(shape)
        a, b = label_of(united), label_of(source)
        self.structure.unite(a, b)
        top = torch.where(a >= 0, a, b)
        state = torch.maximum(state_of(united), state_of(source))
        state = torch.where((united == CONSTANT) & (source >= 0), state_of(source).clamp_min(FIXED), state)
        data = (united == DATA) | (source == DATA)
        return self._set(node, torch.where(top >= 0, top * 4 + state, torch.where(data, DATA, CONSTANT)))

    @staticmethod
    def _aligned(words: Tensor, ndim: int) -> Tensor:
        return words.reshape((1,) * (ndim - words.dim()) + tuple(words.shape))

    def _follows(self, i: int, labels: list[Tensor], real: list[tuple[int, ...]]) -> bool:
        """Tell whether an operand is broadcast along an axis along which another one's labels differ."""
        if not bool((labels[i] >= 0).any()):
            return False
        for axis, size in enumerate(real[i]):
            for j, other in enumerate(labels):
                if j != i and size == 1 and real[j][axis] > 1 and self._varies(other, axis):
                    return True
        return False

    def _reads_outer(self, node: Node, family: Pointwise, i: int, words: list[Tensor]) -> bool:
        """Tell whether a value times a weight of more axes reads it, as a contraction over nothing, and record it."""
        operands = family.operands
        other = operands[1 - i] if len(operands) == 2 else operands[i]
        found = self._scattered(other, torch.full((), -1)) if other not in self.varying else None
        if not family.product or not found or operands[i] not in self.varying:
            return False
        column = self._unite_over(words[i], [a for a in range(words[i].dim()) if words[1 - i].shape[a] == 1])
        self._consume(node, column)
        ndim = len(shape_of(other))
        read = label_of(column).expand([-1] * column.dim()).reshape(column.shape[column.dim() - ndim :])
        self._read(node, other, read)
        words[i] = torch.full_like(words[i], DATA)
        return True

    def _gather_adjusting(self, i: int, operands: list[Node], words: list[Tensor]) -> None:
        """Unite what is computed from weights, and not zero if they are, along axes that an operand lacks.

        As the decays of a state space model, ``-exp(A)`` of shape ``(channels, states)``, belong to the channels.
        """
        lacking = [a for a in range(words[i].dim()) if words[i].shape[a] == 1]
        for j, n in enumerate(operands):
            held = words[j][words[j] >= 0]
            if n not in self.varying and held.numel() and bool((state_of(held) == FIXED).all()):
                words[j] = self._unite_over(words[j], lacking)

    def _probe(self, node: Node, family: Pointwise, words: list[Tensor]) -> Tensor:
        """Return the state of every output by running the real operation: zeros where operands are zero, else noise."""
        held_by = [self._state_of(n, w) for n, w in zip(family.operands, words, strict=True)]
        states = torch.stack(torch.broadcast_tensors(*held_by)) if words else torch.zeros(1, 1)
        codes = (states * torch.tensor([3**i for i in range(len(words))]).view(-1, *[1] * (states.dim() - 1))).sum(0)
        out = torch.zeros(3 ** len(words), dtype=torch.int64)
        for code in codes.unique().tolist():
            held = [code // 3**i % 3 for i in range(len(words))]
            zeros = {n for n, state in zip(family.operands, held, strict=True) if state == ZERO}
            if zeros and gives_zero(node, family, zeros, self._bounds(node, family)):
                out[code] = ZERO
            else:
                out[code] = LIVE if LIVE in held else FIXED
        return out[codes]

    def _bounds(self, node: Node, family: Pointwise) -> dict[Node, Tensor]:
        """Return the bounds of a clamp that are buffers of one number, with their values."""
        if op_name(node) not in ("clamp", "clamp_min", "clamp_max", "minimum", "maximum"):
            return {}
        sources = {n: self.trace.sources[n] for n in family.operands if n in self.trace.sources}
        held = {n: s.value for n, s in sources.items() if s.kind in ("buffer", "constant")}
        return {n: x for n, x in held.items() if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta}

    def _state_of(self, node: Node, words: Tensor) -> Tensor:
        """Return the state of an operand: zeros that code makes, such as a first hidden state, are zero."""
        state = state_of(words)
        return torch.where(words == CONSTANT, ZERO, state) if self._is_zero(node) else state
