"""Arguments that are no tensors: other numbers and flags than the example gives, and arguments that it leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ..tracing import Inputs
from ..tracing.inputs import input_names, signature

_MANY = 16
"""How many other values are tried at most."""


def with_other_floats(example: Inputs) -> Inputs | None:
    """Return the example with other numbers in place of all floats that it gives (a temperature), or ``None``."""
    if not any(type(x) is float for x in example.leaves()):
        return None
    args, kwargs = pytree.tree_map_only(float, lambda x: _others(x)[0], (example.args, example.kwargs))
    return Inputs(args, kwargs)


def other_values(model: nn.Module, example: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield the example with another flag or number, or with one that it leaves to its default, and say which."""
    leaves, form = pytree.tree_flatten((example.args, example.kwargs))
    for i, name in enumerate(input_names(model, example)[:_MANY]):
        for other in _others(leaves[i]):
            args, kwargs = pytree.tree_unflatten([*leaves[:i], other, *leaves[i + 1 :]], form)
            yield f"{name}={other}", Inputs(args, kwargs)
    for name, default in list(_left_out(model, example).items())[:_MANY]:
        for other in _others(default):
            yield f"{name}={other}", Inputs(example.args, {**example.kwargs, name: other})


def left_out(model: nn.Module, example: Inputs) -> list[str]:
    """Return the names of arguments that the example leaves out, and of which no other value can be guessed."""
    return [n for n, default in _left_out(model, example).items() if type(default) not in (bool, int, float)]


def _left_out(model: nn.Module, example: Inputs) -> dict[str, Any]:
    """Return the arguments that the example leaves out, with their defaults."""
    given = {*list(signature(model))[: len(example.args)], *example.kwargs}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p.default for n, p in signature(model).items() if n not in given and p.kind in named}


def _others(x: Any) -> list[Any]:
    """Return other values of a flag or a number; none of anything else."""
    if type(x) is bool:
        return [not x]
    if type(x) is int:
        return list(dict.fromkeys([x + 1, *([x - 1, x // 2] if x > 0 else [])]))
    return [round(0.63 * x + 0.11, 6), *([0.0] if x else [])] if type(x) is float else []
