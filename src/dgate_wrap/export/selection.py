"""Let a model that needs only some features of its inputs take them all, or only those."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..tracing import Inputs
from .rewritten import plain_signature

Kept = Mapping[str, Mapping[int, list[int]]]
"""Per tensor that a forward is given (``x``, ``batch['x']``), and axis of it (-1): the indices that are kept."""


class SelectInputs:
    """A forward pre-hook that selects what is kept of a model's arguments.

    Args:
        kept: What is kept.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._cuts = _cuts(kept)

    def attach(self, model: nn.Module) -> None:
        """Make a model take whole arguments."""
        device = next((t.device for t in model.parameters()), None)
        for i, axes in enumerate(self._kept.values()):
            for axis, indices in axes.items():
                model.register_buffer(_buffer(i, axis), torch.tensor(indices, device=device), persistent=False)
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with what is kept of them."""
        less = _with(Inputs(args, kwargs), model, self._cuts, lambda i, axis, _: getattr(model, _buffer(i, axis)))
        return less.args, less.kwargs


def _buffer(number: int, axis: int) -> str:
    return f"_selected_{number}_{-axis}"


def buffers(kept: Kept) -> set[str]:
    """Return the names of the buffers that `SelectInputs` adds."""
    return {_buffer(i, axis) for i, axes in enumerate(kept.values()) for axis in axes}


def reduced(inputs: Inputs, model: nn.Module, kept: Kept) -> Inputs:
    """Return inputs with only what is kept of them."""
    if not kept:
        return inputs
    indices = list(kept.values())
    return _with(inputs, model, _cuts(kept), lambda i, axis, x: torch.tensor(indices[i][axis], device=x.device))


def is_selectable(name: str, inputs: Inputs, model: nn.Module) -> bool:
    """Tell whether an input can be told by its name: an argument, or within plain dicts, lists and tuples of one."""
    try:
        root, *keys = _keys(name)
        held: Any = inputs.args if isinstance(place := _places(model, inputs)[root], int) else inputs.kwargs
        for key in (place, *keys):
            if not isinstance(held, dict | list | tuple):
                return False
            held = cast(Any, held)[_at(held, key)]
    except (KeyError, IndexError, ValueError, SyntaxError):
        return False
    return isinstance(held, Tensor)


def _keys(name: str) -> list[Any]:
    """Return the argument that a name such as ``batch['x'][0]`` begins with, and the keys to what it names."""
    keys: list[Any] = []
    step = ast.parse(name, mode="eval").body
    while isinstance(step, ast.Subscript | ast.Attribute):
        keys.append(step.attr if isinstance(step, ast.Attribute) else ast.literal_eval(step.slice))
        step = step.value
    if not isinstance(step, ast.Name):
        raise ValueError(f"{name} names no argument")
    return [step.id, *reversed(keys)]


def _cuts(kept: Kept) -> list[tuple[list[Any], list[int]]]:
    """Return, per tensor of which something is kept, the keys that lead to it and its axes."""
    return [(_keys(name), list(axes)) for name, axes in kept.items()]


def _with(
    inputs: Inputs,
    model: nn.Module,
    cuts: list[tuple[list[Any], list[int]]],
    index: Callable[[int, int, Tensor], Tensor],
) -> Inputs:
    """Return inputs with what ``index`` says of each that is cut, by its number among these and the axis."""
    given, named = list(inputs.args), dict(inputs.kwargs)
    roots = _places(model, inputs)
    for i, ([root, *keys], axes) in enumerate(cuts):
        if root not in roots:
            continue
        for axis in axes:
            held: Any = given if isinstance(roots[root], int) else named
            _change(held, [roots[root], *keys], lambda x, i=i, axis=axis: x.index_select(axis, index(i, axis, x)))
    return Inputs(tuple(given), named)


def _change(held: Any, keys: list[Any], change: Callable[[Tensor], Tensor]) -> None:
    """Change what lies in a dict or list under some keys; what lies between is copied, and stays as it was."""
    key, *rest = keys
    if (isinstance(held, list) and key >= len(held)) or (isinstance(held, dict) and key not in held):
        return  # not given: the forward says what it thinks of that
    if not rest:
        held[key] = change(held[key]) if isinstance(held[key], Tensor) else held[key]
        return
    rest[0] = _at(held[key], rest[0])
    inner = held[key]
    if isinstance(inner, tuple) or type(inner) is list:
        mutable: Any = list(cast("list[Any]", inner))
    else:  # torch.compile follows no copy of the copy module
        mutable = dict(cast("dict[Any, Any]", inner)) if type(inner) is dict else copy.copy(inner)
    _change(mutable, rest, change)
    if isinstance(inner, tuple):
        mutable = type(cast(Any, inner))(*mutable) if hasattr(inner, "_fields") else tuple(mutable)
    held[key] = mutable


def _at(held: Any, key: Any) -> Any:
    """Return where something lies in a container; fields of a named tuple have names."""
    return held._fields.index(key) if isinstance(key, str) and hasattr(held, "_fields") else key


def _places(model: nn.Module, inputs: Inputs) -> dict[str, int | str]:
    """Return where each argument is given: its position, or its keyword."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, kind, _ in plain_signature(model) if kind in kinds]
    found: dict[str, int | str] = {k: k for k in inputs.kwargs}
    found |= {names[i] if i < len(names) else f"args_{i}": i for i in range(len(inputs.args))}
    return found
