"""Guess which integers that a module remembers are sizes that changed: the number of heads, of channels, of groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import combinations, islice, product

from torch import Tensor, nn
from torch.fx import Node

from ..tracing import Inputs
from ..tracing.origins import owner, owners
from .culprits import Culprit, Expected, find_culprit, given_to
from .plan import remembering
from .widths import Widths

Patch = dict[str, dict[str, int]]
"""New integers: per attribute, per module that has it; ``config.heads`` is that of an object which a module holds."""

_MOST = 6
"""How many attributes of one module are tried in all combinations."""
_TRIES = 320
"""How many patches of one module are tried."""


class Integers:
    """Guesses of integers.

    Args:
        model: The model that was analysed.
        widths: What is kept of it.
    """

    def __init__(self, model: nn.Module, widths: Widths) -> None:
        self._modules = dict(model.named_modules())
        self.sizes: dict[str, dict[int, set[int]]] = {}
        """Per module whose own code makes or reads something that is cut, or that is given it: old and new sizes."""
        for node in widths.facts.nodes:
            path = owner(node)
            if node.op == "call_function" and path is not None:
                for n in (node, *node.all_input_nodes):
                    self._note(path, n, widths)
                inside = set(owners(node).values())
                for n in (n for n in node.all_input_nodes if n in widths.facts.varying):
                    for around in inside - set(owners(n).values()):
                        self._note(around, n, widths)

    def _note(self, path: str, node: Node, widths: Widths) -> None:
        for kept in widths.keep.get(node, []):
            if not kept.all():
                self.sizes.setdefault(path, {}).setdefault(len(kept), set()).add(int(kept.sum()))

    def guesses(self, path: str) -> Iterator[Patch]:
        """Yield patches of a module, with its class or alone, the boldest first: its own integers, then others."""
        return islice(self._all_guesses(path), _TRIES)

    def helping(self, model: nn.Module, inputs: Inputs, expected: Expected, culprit: Culprit) -> Patch | None:
        """Return the first guess with which a module of a smaller model fails no more, without idle integers."""
        given = given_to(model, inputs, culprit.path)

        def helps(patch: Patch) -> bool:
            with remembering(model, patch):
                for x in given:  # most guesses fail in the module itself
                    if (found := find_culprit(model, x, expected, culprit.path)) and found.path == culprit.path:
                        return False
                found = find_culprit(model, inputs, expected)
            return found is None or (found.path != culprit.path and found.done >= culprit.done)

        for patch in self.guesses(culprit.path):
            if not helps(patch):
                continue
            for name in list(patch):
                fewer = {k: v for k, v in patch.items() if k != name}
                if fewer and helps(fewer):
                    patch = fewer  # noqa: PLW2901
            return patch
        return None

    def _all_guesses(self, path: str) -> Iterator[Patch]:
        alike = {p: self._candidates(p) for p, m in self._modules.items() if type(m) is type(self._modules[path])}
        found = alike[path]
        own = [n for n in found if "." not in n][:_MOST]
        more = [*(n for n in found if "." in n), *own][:_MOST]
        for names in (own, more) if len(more) > len(own) else (own,):
            for count in range(len(names), 0, -1):
                for chosen in combinations(names, count):
                    if names is own or any("." in n for n in chosen):
                        for values in product(*(found[n] for n in chosen)):
                            patch = self._patch(path, alike, dict(zip(chosen, values, strict=True)))
                            yield patch
                            if any(len(paths) > 1 for paths in patch.values()):  # others may run as they are
                                yield {name: {path: paths[path]} for name, paths in patch.items()}
        yield from self._patches_inside(path)

    def _patches_inside(self, path: str) -> Iterator[Patch]:
        """Yield the patch of the modules inside of one, whose integers its code may read: what can be one size only."""
        patch: Patch = {}
        for inner in (p for p in self._modules if p != path and f"{p}.".startswith(f"{path}." if path else "")):
            if not type(self._modules[inner]).__module__.startswith("torch.nn."):
                for name, values in self._candidates(inner).items():
                    if len(values) == 1:
                        patch.setdefault(name, {})[inner] = values[0]
        if patch:
            yield patch

    @staticmethod
    def _patch(path: str, alike: dict[str, dict[str, list[int]]], chosen: dict[str, int]) -> Patch:
        """Give a module the chosen integers, and those of its class the same ones, or the only ones that they may."""
        patch: Patch = {}
        for name, value in chosen.items():
            for p, options in alike.items():
                possible = options.get(name, [])
                if p == path or value in possible:
                    patch.setdefault(name, {})[p] = value
                elif len(possible) == 1:
                    patch.setdefault(name, {})[p] = possible[0]
        return patch

    def _candidates(self, path: str) -> dict[str, list[int]]:
        """Return the integers of a module that are a size that changed, with what they may be then."""
        sizes = self.sizes.get(path, {})
        return {k: sorted(sizes[v]) for k, v in self._integers(path) if v in sizes}

    def _integers(self, path: str) -> Iterator[tuple[str, int]]:
        """Yield the integers that a module holds, and those that its code reads off plain objects that it holds."""
        module = self._modules[path]
        yield from ((k, v) for k, v in vars(module).items() if type(v) is int)
        read = _names_read(module)
        for name, part in vars(module).items():
            if name in read and hasattr(part, "__dict__") and not isinstance(part, nn.Module | Tensor | type):
                yield from ((f"{name}.{k}", v) for k, v in vars(part).items() if type(v) is int and k in read)


def _names_read(module: nn.Module) -> set[str]:
    """Return the names of attributes that the code of a module's class reads, but for its making."""
    found: set[str] = set()
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for name, member in vars(kind).items():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None and name != "__init__":
                found.update(code.co_names)
    return found
