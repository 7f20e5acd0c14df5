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
    args, kwargs = pytree.tree_map_only(float, _other, (example.args, example.kwargs))
    return Inputs(args, kwargs)


def other_values(model: nn.Module, example: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield the example with another flag or whole number, or with one that it leaves to its default, and say which."""
    leaves, form = pytree.tree_flatten((example.args, example.kwargs))
    for i, name in enumerate(input_names(model, example)[:_MANY]):
        if type(leaves[i]) in (bool, int):
            args, kwargs = pytree.tree_unflatten([*leaves[:i], _other(leaves[i]), *leaves[i + 1 :]], form)
            yield f"{name}={_other(leaves[i])}", Inputs(args, kwargs)
    for name, default in list(_left_out(model, example).items())[:_MANY]:
        if type(default) in (bool, int, float):
            yield f"{name}={_other(default)}", Inputs(example.args, {**example.kwargs, name: _other(default)})


def left_out(model: nn.Module, example: Inputs) -> list[str]:
    """Return the names of arguments that the example leaves out, and of which no other value can be guessed."""
    return [n for n, default in _left_out(model, example).items() if type(default) not in (bool, int, float)]


def _left_out(model: nn.Module, example: Inputs) -> dict[str, Any]:
    """Return the arguments that the example leaves out, with their defaults."""
    given = {*list(signature(model))[: len(example.args)], *example.kwargs}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p.default for n, p in signature(model).items() if n not in given and p.kind in named}


def _other(x: Any) -> Any:
    """Return another value of a flag or a number."""
    if isinstance(x, bool):
        return not x
    return x + 1 if isinstance(x, int) else round(0.63 * x + 0.11, 6)
