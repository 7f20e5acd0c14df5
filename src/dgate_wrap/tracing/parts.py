"""Operations that torch calls whole and that are others in truth: each written with those that the rules know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten


def _distances(a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    """Return the norms of all differences of the rows of two matrices: ``cdist``."""
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def _unpool(x: Tensor, indices: Tensor, output_size: Sequence[int], *steps: Sequence[int]) -> Tensor:
    """Put every element of x at its index among the positions of a larger map of zeros: ``max_unpool``."""
    axes = len(output_size)
    zeros = x.new_zeros(*x.shape[:-axes], math.prod(output_size))
    placed = zeros.scatter(-1, indices.flatten(-axes), x.flatten(-axes))
    return placed.unflatten(-1, list(output_size))


def _fold(x: Tensor, size: Sequence[int], kernel: list[int], dilation: Any, padding: Any, stride: Any) -> Tensor:
    """Add up overlapping windows, ``(N, C · k, L)``, in maps ``(N, C, *size)``: ``col2im``."""
    if x.dim() == 2:
        return _fold(x.unsqueeze(0), size, kernel, dilation, padding, stride).squeeze(0)
    taps = math.prod(kernel)
    spans = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    steps = [span // t + 1 for span, t in zip(spans, stride, strict=True)]
    left = [span % t for span, t in zip(spans, stride, strict=True)]
    one = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *kernel)
    windows = x.reshape(-1, taps, *steps)
    maps = F.conv_transpose2d(windows, one, None, stride, padding, left, 1, dilation)
    return maps.reshape(len(x), -1, *size)


def _fill_at(x: Tensor, dim: int, index: Tensor, value: float | Tensor) -> Tensor:
    """Write a number at indices along an axis: ``index_fill``."""
    number = value if isinstance(value, Tensor) else x.new_full((), value)
    return _aten.index_put.default(x, [*[None] * (dim % max(x.dim(), 1)), index], number)


def _put(x: Tensor, indices: list[Tensor | None], value: Tensor, accumulate: bool = False) -> Tensor:
    """Write one number wherever a mask says: ``x[mask] = 0``."""
    if not is_masked_number(indices, value) or accumulate:
        return NotImplemented
    [mask] = indices
    assert mask is not None
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), value.reshape(()), x)


def is_masked_number(indices: Sequence[Tensor | None], value: Tensor) -> bool:
    """Tell whether `index_put` writes one number where one mask says, so that no shape depends on the mask."""
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool and value.numel() == 1


def _add_products(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Add products of matrices to x: ``baddbmm``."""
    return _added(x, torch.bmm(a, b), beta, alpha)


def _add_sum(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Add the sum of products of matrices to x: ``addbmm``."""
    return _added(x, torch.bmm(a, b).sum(0), beta, alpha)


def _added(x: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else product + (x if beta == 1 else beta * x)


def _extremes(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim())) if dim is None else [dim]
    return x.amin(axes, keepdim), x.amax(axes, keepdim)


def _sum_of_numbers(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum what is a number: ``nansum``."""
    axes = list(range(x.dim())) if dim in (None, []) else dim
    return torch.where(x.isnan(), 0, x).sum(axes, keepdim, dtype=dtype)


def _scatter_rows(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Write the rows of source, one after another, where a mask marks whole rows of x: ``masked_scatter``."""
    whole = mask.shape == x.shape and mask.dim() > 1 and mask.stride(-1) == 0 and mask.shape[-1] == source.shape[-1]
    if not whole or source.dim() < 2:
        return NotImplemented
    rows = mask.select(-1, 0)
    which = (rows.reshape(-1).cumsum(0) - 1).clamp_min(0)
    picked = source.reshape(-1, source.shape[-1]).index_select(0, which).reshape(x.shape)
    return torch.where(rows.unsqueeze(-1), picked, x)


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return what a tensor holds once another was copied into it: that, of its shape and dtype."""
    source = source if source.dtype == x.dtype else source.to(x.dtype)
    return source if source.shape == x.shape else source.expand(x.shape)


PARTS: dict[Any, Callable[..., Any]] = {
    _aten.cdist.default: _distances,
    _aten._cdist_forward.default: _distances,
    _aten.max_unpool2d.default: _unpool,
    _aten.max_unpool3d.default: _unpool,
    _aten.col2im.default: _fold,
    _aten.index_fill.int_Scalar: _fill_at,
    _aten.index_fill.int_Tensor: _fill_at,
    _aten.index_put.default: _put,
    _aten.aminmax.default: _extremes,
    _aten.copy.default: _copied,
    _aten.baddbmm.default: _add_products,
    _aten.addbmm.default: _add_sum,
    _aten.nansum.default: _sum_of_numbers,
    _aten.masked_scatter.default: _scatter_rows,
}
