"""Copies of models."""

from __future__ import annotations

import contextlib
import copy
import operator
import types
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a model like ``copy.deepcopy``, with functions that call the copy's modules and not the original's.

    A module may hold a function that reads a module or tensor from around it, as a lambda of ``__init__`` does; it
    stays the same function in a plain copy. It may also hold what a forward computed, as the old
    ``nn.utils.weight_norm`` does, which a plain copy refuses; the copy holds it without its history.

    Args:
        model: The model.
        memo: Per ``id``, what stands for an object in the copy; filled on the way.
    """
    for result in _results(model):
        memo.setdefault(id(result), result.detach().clone())
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        held = vars(module)
        for values in [held, *(v for v in held.values() if isinstance(v, list | dict))]:
            _rebind(cast("list[Any] | dict[Any, Any]", values), memo)
    return copied


def _results(model: nn.Module) -> list[Tensor]:
    """Return the tensors that modules hold and that have a history."""
    held = (x for module in model.modules() for x in pytree.tree_leaves(vars(module)))
    return [x for x in held if isinstance(x, Tensor) and not x.is_leaf]


def _rebind(values: list[Any] | dict[Any, Any], memo: dict[int, Any]) -> None:
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        if isinstance(value, types.FunctionType):
            values[key] = _rebound(value, memo)


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return a function that reads from around it what stands in the copy for what the original reads."""
    around = function.__closure__ or ()
    cells = tuple(_copied_cell(cell, memo) for cell in around)
    if all(map(operator.is_, cells, around)):
        return function
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _copied_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    with contextlib.suppress(ValueError):  # it is empty
        if id(cell.cell_contents) in memo:
            return types.CellType(memo[id(cell.cell_contents)])
    return cell
