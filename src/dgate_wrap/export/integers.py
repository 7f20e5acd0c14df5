"""Guess which integers that a module remembers are sizes that changed: the number of heads, of channels, of groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from torch import nn
from torch.fx import Node

from ..tracing.capture import owner
from .widths import Widths

Patch = dict[str, dict[str, int]]
"""New integers: per attribute, per module that has it."""

_MOST = 6
"""How many attributes of one module are tried in all combinations."""


class Integers:
    """Guesses of integers.

    Args:
        model: The model that was analysed.
        widths: What is kept of it.
    """

    def __init__(self, model: nn.Module, widths: Widths) -> None:
        self._modules = dict(model.named_modules())
        self.sizes: dict[str, dict[int, set[int]]] = {}
        """Per module whose own code makes or reads something that is cut: old and new sizes."""
        for node in widths.facts.nodes:
            path = owner(node)
            if node.op == "call_function" and path is not None:
                for n in (node, *node.all_input_nodes):
                    self._note(path, n, widths)

    def _note(self, path: str, node: Node, widths: Widths) -> None:
        vectors = widths.keep.get(node, [])
        for kept in vectors if all(k.numel() for k in vectors) else []:
            if not kept.all():
                self.sizes.setdefault(path, {}).setdefault(len(kept), set()).add(int(kept.sum()))

    def guesses(self, path: str) -> Iterator[Patch]:
        """Yield patches of a module and all of its class, the boldest first."""
        found = self._candidates(path)
        names = list(found)[:_MOST]
        alike = [p for p, m in self._modules.items() if type(m) is type(self._modules[path])]
        others = {p: self._candidates(p) for p in alike}
        for count in range(len(names), 0, -1):
            for chosen in combinations(names, count):
                yield {name: {p: values[name] for p, values in others.items() if name in values} for name in chosen}

    def _candidates(self, path: str) -> dict[str, int]:
        """Return the integers of a module that are a size that changed, with what they should be then."""
        sizes = self.sizes.get(path, {})
        held = {k: v for k, v in vars(self._modules[path]).items() if type(v) is int}
        return {k: next(iter(sizes[v])) for k, v in held.items() if len(sizes.get(v, ())) == 1}
