"""Copies of a model that share the memory of its parameters, and runs of one in float64 without a copy of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..copying import deep_copy
from ..errors import ExportError


def share(model: nn.Module, own: Collection[Tensor] = (), shared: Collection[Tensor] = ()) -> nn.Module:
    """Copy a model whose parameters lie where those of the original do; modules and buffers are copies.

    The copy's parameters are objects of its own: to be replaced or given other ``data``, never to be written in place.

    Args:
        model: The model.
        own: Parameters that are copied after all.
        shared: Other tensors that the copy may hold as they are.

    Raises:
        ExportError: If it cannot be copied.
    """
    kept = {id(t) for t in own}
    memo: dict[int, Any] = {id(t): t for t in shared}
    for p in model.parameters():
        if type(p) is nn.Parameter and id(p) not in kept:
            memo[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    try:
        return deep_copy(model, memo)
    except Exception as e:
        raise ExportError(
            f"{type(model).__name__} cannot be copied: {type(e).__name__}: {e}",
            expected="a model that copy.deepcopy copies",
            mend="drop from its attributes what cannot be copied: locks, open files, handles of other libraries",
        ) from e


def separate_(model: nn.Module, *others: nn.Module) -> None:
    """Give a model memory of its own for every parameter that lies where one of other models does, in place."""
    taken = {p.untyped_storage().data_ptr() for other in others for p in other.parameters()}
    for p in model.parameters():
        place = p.untyped_storage().data_ptr()
        if place in taken:
            p.data = p.data.clone()
        taken.add(place)


def weight_bytes(model: nn.Module) -> int:
    """Return how much memory the parameters of a model take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class InDouble(TorchDispatchMode):
    """Run every operation in float64: what is narrower is widened as it is read, so no copy of a model is needed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        given = (args, kwargs or {})
        if func is torch.ops.aten.embedding.default:  # a few rows of a table
            return _widened(func(*args, **given[1]))
        wide_args, wide_kwargs = pytree.tree_map(_widened, given)
        if func._schema.is_mutable:
            _require_wide(func, given)
        return func(*wide_args, **wide_kwargs)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 8


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if _is_narrow(x.dtype) else x
    return torch.float64 if isinstance(x, torch.dtype) and _is_narrow(x) else x


def _require_wide(func: Any, given: Any) -> None:
    """Refuse to write to what would have to be widened first: what is written would be lost."""
    args, kwargs = given
    for i, a in enumerate(func._schema.arguments):
        x = args[i] if i < len(args) else kwargs.get(a.name)
        if a.alias_info is not None and a.alias_info.is_write and isinstance(x, Tensor) and _is_narrow(x.dtype):
            raise TypeError(f"{func} writes to a tensor of {x.dtype}")
