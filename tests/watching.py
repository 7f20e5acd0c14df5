"""Two helpers that know no rule: an oracle that zeroes weights and watches, and a census of what was united."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgate_wrap.tracing import Structure, Trace
from dgate_wrap.tracing.structure import FIXED, ZERO, label_of, state_of


def watch(trace: Trace, structure: Structure, labels: dict[str, Tensor], most: int = 12, *, noisy: bool = True) -> int:
    """Zero the weights of one group after the other, run on two inputs, and look at every position of the group.

    A word of state ``ZERO`` promises exact zeros, one of state ``FIXED`` the same value for both inputs.

    Args:
        trace: The traced model.
        structure: What the labels say about it.
        labels: Labels of a grouping that were read off the structure.
        most: How many groups to try, drawn at random.
        noisy: Whether to draw all other parameters anew.

    Returns:
        How many groups were tried.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)

    def other(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return noise(x)
        return x if not x.dim() or x.dtype == torch.bool else x.flip(0 if x.dim() > 2 else -1)

    groups = torch.cat([t[t >= 0].flatten() for t in labels.values()]).unique() if labels else torch.empty(0)
    chosen = groups[torch.randperm(len(groups), generator=generator)[:most]].tolist()
    place = _groups_of_positions(structure, labels)
    inputs = {n: s.value for n, s in trace.sources.items() if s.kind == "input" and isinstance(s.value, Tensor)}
    for group in chosen:
        weights: dict[Any, Any] = {}
        for node, source in trace.sources.items():
            if source.kind == "parameter":
                value = noise(source.value) if noisy else source.value.detach()
                weights[node] = value.masked_fill(labels.get(source.name, torch.tensor(-1)) == group, 0)
        runs = [trace.run({**weights, **given}) for given in (inputs, {n: other(x) for n, x in inputs.items()})]
        for node, (words, found) in place.items():
            here = found == group
            a, b = (r[node] for r in runs)
            assert a.shape == words.shape
            zero, fixed = here & (state_of(words) == ZERO), here & (state_of(words) == FIXED)
            assert not a[zero].any(), f"{node}: a dead group is not zero"
            close = torch.isclose(a[fixed], b[fixed], rtol=1e-5, atol=1e-6, equal_nan=True)
            assert close.all(), f"{node}: a dead group is not constant"
    return len(chosen)


def _groups_of_positions(structure: Structure, labels: dict[str, Tensor]) -> dict[Any, tuple[Tensor, Tensor]]:
    """Return, per node, its words and the group of every position, or -1."""
    low = torch.full((len(structure.sets) + 1,), len(structure.sets))
    high = torch.full_like(low, -1)
    for slot in structure.slots:
        if slot.name in labels:
            slots, found = torch.broadcast_tensors(structure.sets.find(slot.labels), labels[slot.name])
            slots, found = slots[(slots >= 0) & (found >= 0)], found[(slots >= 0) & (found >= 0)]
            low.scatter_reduce_(0, slots, found, "amin")
            high.scatter_reduce_(0, slots, found, "amax")
    table = torch.where(low == high, high, -1)  # rows of a weight are in no group if its columns are
    out: dict[Any, tuple[Tensor, Tensor]] = {}
    for node, words in structure.words.items():
        if isinstance(words, Tensor) and node.op == "call_function":
            found = table[structure.sets.find(label_of(words))]
            if (found >= 0).any():
                out[node] = words, found
    return out


def census(structure: Structure) -> dict[str, tuple[int, int]]:
    """Count, per weight, the channels it produces and the classes they fall into: over-union shows as few classes."""
    out: dict[str, tuple[int, int]] = {}
    for s in structure.slots:
        if s.producer:
            labels = s.labels[s.labels >= 0].unique()
            rows, classes = out.get(s.name, (0, 0))
            out[s.name] = rows + labels.numel(), classes + structure.classes(labels).unique().numel()
    return out
