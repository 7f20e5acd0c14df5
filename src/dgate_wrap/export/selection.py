"""Let a model that needs only some features of its inputs take them all, or only those."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..tracing import Inputs
from .recipes import plain_signature

Kept = Mapping[str, Mapping[int, list[int]]]
"""Per argument of a forward, and axis of it: the indices that are kept."""


class SelectInputs:
    """A forward pre-hook that selects what is kept of a model's arguments.

    Args:
        kept: What is kept.
    """

    def __init__(self, kept: Kept) -> None:
        self.axes = {name: list(axes) for name, axes in kept.items()}
        self._indices = {_buffer(name, axis): indices for name, axes in kept.items() for axis, indices in axes.items()}

    def attach(self, model: nn.Module) -> None:
        """Make a model take whole arguments."""
        device = next((t.device for t in model.parameters()), None)
        for name, indices in self._indices.items():
            model.register_buffer(name, torch.tensor(indices, device=device), persistent=False)
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with what is kept of them."""
        given, named = list(args), dict(kwargs)
        for name, place in places(model, Inputs(args, kwargs)).items():
            for axis in self.axes.get(name, []):
                held: Any = given if isinstance(place, int) else named
                held[place] = held[place].index_select(axis, getattr(model, _buffer(name, axis)))
        return tuple(given), named


def _buffer(name: str, axis: int) -> str:
    return f"_selected_{name}_{axis}"


def buffers(kept: Kept) -> set[str]:
    """Return the names of the buffers that `SelectInputs` adds."""
    return {_buffer(name, axis) for name, axes in kept.items() for axis in axes}


def reduced(inputs: Inputs, model: nn.Module, kept: Kept) -> Inputs:
    """Return inputs with only what is kept of them."""
    if not kept:
        return inputs
    given, named = list(inputs.args), dict(inputs.kwargs)
    for name, place in places(model, inputs).items():
        for axis, indices in kept.get(name, {}).items():
            held: Any = given if isinstance(place, int) else named
            held[place] = held[place].index_select(axis, torch.tensor(indices, device=held[place].device))
    return Inputs(tuple(given), named)


def places(model: nn.Module, inputs: Inputs) -> dict[str, int | str]:
    """Return where each argument is given: its position, or its keyword."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, kind, _ in plain_signature(model) if kind in kinds]
    found: dict[str, int | str] = {k: k for k in inputs.kwargs}
    found |= {names[i] if i < len(names) else f"args_{i}": i for i in range(len(inputs.args))}
    return found
