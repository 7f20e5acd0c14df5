"""Layers: norms and statistics along axes, and the cells of recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .elements import Elements
from .families import Cell, Mixing, Recurrence
from .nodes import op_name, shape_of
from .structure import CONSTANT, DATA, FIXED, LIVE, ZERO, label_of, narrow, state_of


class Layers(Elements):
    """What the rules do with norms, statistics and recurrent layers."""

    def _normalize(self, family: Mixing, node: Node, words: Tensor) -> Tensor:
        """Normalize: over the channels it is a width statistic; its affine parameters die with their channels."""
        words = narrow(words)
        if family.parameters:
            channels = sorted({x_axis for _, _, x_axis in family.parameters})
            words = self._unite_over(words, [a for a in range(words.dim()) if a not in channels])
        labels = label_of(words)
        over = any(self._varies(labels, a) for a in family.mixed)
        if over:
            self.structure.flag("norm", labels, self._says(node, "it is normalized over the channels"))
        if over and not family.keeps_zero:
            self.structure.flag(
                "centered", labels, self._says(node, "the mean over the channels depends on their number")
            )
        state = state_of(words)
        if over:
            state = torch.where((state == ZERO) & family.keeps_zero, ZERO, LIVE)
        elif not family.keeps_zero:
            state = state.clamp_min(FIXED)
        states: list[int] = []
        for parameter, axis, x_axis in family.parameters:
            others = [a for a in range(labels.dim()) if a != x_axis]
            top = labels.amax(others) if others else labels
            states.append(self._adjust(parameter, axis, top.expand(shape_of(parameter)[axis])))
        affine = [s for s, (n, _, _) in zip(states, family.parameters, strict=True) if self._is_parameter(n)]
        vectors = len({n for n, _, _ in family.parameters if self._is_parameter(n)})
        if affine and max(affine) == ZERO and vectors >= (1 if family.keeps_zero or len(family.parameters) == 1 else 2):
            state = torch.full_like(words, ZERO)
        lively = (words >= 0) & (state == LIVE)
        if lively.any():
            self._enliven(labels[lively], self._says(node, "its normalized value depends on the other channels"))
        return torch.where(words >= 0, labels * 4 + state, words)

    def _keep_if_constant(self, family: Mixing, node: Node, words: Tensor, axes: list[int]) -> Tensor:
        """A statistic along axes keeps a label that is constant along them, and loses the others."""
        words = narrow(words)
        labels = label_of(words)
        wide = [a for a in axes if words.shape[a] > 1]
        if family.kind == "reduction" and family.keeps_zero and self._varies_both_ways(labels, wide):
            self.structure.unite(labels, labels.amax(wide, keepdim=True))  # edges: the nodes at which they end
        if not wide:
            same, top, data = torch.full_like(labels, True, dtype=torch.bool), labels, words == DATA
            state = state_of(words)
        else:
            found = self.structure.sets.find(labels)
            top = found.amax(wide, keepdim=True)
            same = ((found == top) | (words == CONSTANT)).all(dim=tuple(wide), keepdim=True)
            lost = labels.masked_fill(same.expand(labels.shape), -1)
            if family.kind == "scan":
                self.structure.flag("frozen", lost, self._says(node, "it is compared with other channels"))
            elif not family.keeps_zero:
                self.structure.flag("norm", lost, self._says(node, "a statistic over the channels"))
                if not family.averages:
                    self.structure.flag("centered", lost, self._says(node, "a statistic over the channels"))
            else:
                self._consume(node, torch.where(lost >= 0, words, CONSTANT))
            state = torch.where(words >= 0, state_of(words), ZERO).amax(wide, keepdim=True)
            data = (words == DATA).any(dim=tuple(wide), keepdim=True)
            data = data | (lost >= 0).any(dim=tuple(wide), keepdim=True)
        if (family.kind == "scan" and op_name(node) != "cumsum") or op_name(node) == "logsumexp":
            state = state.clamp_min(FIXED)
        return torch.where(same & (top >= 0), top * 4 + state, torch.where(data, DATA, CONSTANT))

    def _varies_both_ways(self, labels: Tensor, axes: list[int]) -> bool:
        """Tell whether what layers make differs along some axes, and along others too."""
        along = {a for a in range(labels.dim()) if self._varies(labels, a)}
        return bool(along.intersection(axes)) and not along <= {*axes} and not self._from_input(labels)

    def _recur(self, node: Node, family: Recurrence, cell: Cell, column: Tensor) -> tuple[Tensor, Tensor]:
        """One layer in one direction: return the words of its units, and of what it gives to the next layer."""
        units = self.structure.sets.mint(shape_of(cell.w_ih)[0] // family.gates)
        rows = units.repeat(family.gates).view(-1, 1)
        state = ZERO
        self._read(node, cell.w_ih, label_of(column).flatten().expand(shape_of(cell.w_ih)[1]).view(1, -1))
        for w in (cell.w_ih, cell.w_hh):
            state = max(state, self._produce(node, w, rows, "recurrent", (w, 0)))
        for b in (cell.b_ih, cell.b_hh):
            if b is not None:
                state = max(state, self._adjust(b, 0, rows.flatten()))
        hidden = units
        if cell.w_hr is not None:
            hidden = self.structure.sets.mint(shape_of(cell.w_hr)[0])
            self._read(node, cell.w_hr, units.view(1, -1))
            self._produce(node, cell.w_hr, hidden.view(-1, 1), "row", (cell.w_hr, 0))
        self._read(node, cell.w_hh, hidden.view(1, -1))
        for s in family.states:
            state = max(state, self._start(node, s, hidden if s is family.states[0] else units))
        return units * 4 + state, hidden * 4 + state

    def _start(self, node: Node, state: Node, labels: Tensor) -> int:
        """Unite an initial state with the units it belongs to; return what it leaves when they are dead."""
        value = self._fixed(state)
        if self._is_zero(state) or (isinstance(value, Tensor) and not value.any()):
            return ZERO
        words = self._words(state)
        found = self._unite_over(words, range(words.dim() - 1), self._says(node, "its initial state is live")).flatten()
        self.structure.unite(label_of(found), labels)
        if bool((found == DATA).any()) or bool((state_of(found) == LIVE).any()):
            self._enliven(labels, self._says(node, "its initial state is live"))
            return LIVE
        return FIXED if bool((found == CONSTANT).any()) else int(state_of(found).max())
