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
from ..tracing.recorder import storage_of, written_by


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


def flatten_(model: nn.Module) -> None:
    """Lay the weights of each recurrent layer on a GPU side by side, which every call would do otherwise."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def weight_bytes(model: nn.Module) -> int:
    """Return how much memory the parameters of a model take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


_LARGE = 1 << 17
"""From how many elements on an operand of a product is widened into memory that is kept for the next one.

Memory that is new to the process costs several times as much as what is written to it.
"""

_aten = torch.ops.aten
_TURNS = {_aten.t.default, _aten.transpose.int, _aten.permute.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


class InDouble(TorchDispatchMode):
    """Run every operation in float64: what is narrower is widened as it is read, so no copy of a model is needed."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[torch.device, int], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        given = (args, kwargs or {})
        if func in _TURNS:  # widened by what reads it
            return func(*args, **given[1])
        if func is _aten.embedding.default:  # a few rows of a table
            return _widened(func(*args, **given[1]))
        if func in _PRODUCTS:
            args = tuple(self._operand(x, i) for i, x in enumerate(args))
            return func(*args, **given[1])
        wide_args, wide_kwargs = pytree.tree_map(_widened, given)
        for x in written_by(func, *given):  # what is written to a copy would be lost
            if _is_narrow(x.dtype):
                raise TypeError(f"{func} writes to a tensor of {x.dtype}")
        return func(*wide_args, **wide_kwargs)

    def _operand(self, x: Any, i: int) -> Any:
        """Widen the operand at one place of a product, which its result never lies on."""
        if not isinstance(x, Tensor) or not _is_narrow(x.dtype) or x.numel() < _LARGE:
            return _widened(x)
        base = x if x.is_contiguous() else x.mT
        if not base.is_contiguous():
            return x.double()
        memory = self._kept.get((x.device, i))
        if memory is None or memory.numel() < x.numel():
            memory = self._kept[x.device, i] = x.new_empty(x.numel(), dtype=torch.float64)
        wide = memory[: x.numel()].view(base.shape).copy_(base)
        return wide if base is x else wide.mT


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 8


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if _is_narrow(x.dtype) else x
    return torch.float64 if isinstance(x, torch.dtype) and _is_narrow(x) else x


class WritesParameterError(Exception):
    """A forward writes into a parameter."""


class SparingParameters(TorchDispatchMode):
    """Raise `WritesParameterError` before anything is written into a parameter of a model: others share its memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._shared = {storage_of(p) for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if any(storage_of(x) in self._shared for x in written_by(func, args, kwargs or {})):
            raise WritesParameterError
        return func(*args, **(kwargs or {}))
