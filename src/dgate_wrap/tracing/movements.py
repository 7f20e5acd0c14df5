"""Operations that move elements: views, padding and joins, indexing and choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .families import Family, Halves, Indexing, Mixing, Movement, OpRule, Pointwise, Ranking
from .nodes import argument, names, op_name, shape_of, shape_of_value, tensor_inputs, tensor_of


def move(node: Node, varying: frozenset[Node]) -> Family | None:
    """Return the `Movement` of an operation that only moves what it reads."""
    if str(node.target) == "aten.view.dtype":  # other numbers, not the same ones elsewhere
        return None
    inputs = tensor_inputs(node)
    target = cast(Callable[..., Any], node.target)

    def run(stand_ins: list[Tensor]) -> Any:
        by_node = dict(zip(inputs, stand_ins, strict=True))
        args, kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((node.args, node.kwargs), by_node.__getitem__))
        if op_name(node) in ("constant_pad_nd", "pad"):  # pad with zero, which no stand-in is
            return F.pad(args[0], args[1], args[2] if isinstance(argument(node, 2, "mode"), str) else "constant")
        return target(*args, **kwargs)

    return Movement(inputs, run)


def source_indices(family: Movement | Indexing, values: Mapping[Node, Tensor] | None = None) -> list[Tensor]:
    """Return, per result of a movement, where each element comes from in its concatenated flat inputs, or -1.

    The inputs of an `Indexing` are x and what is written there; ``values`` holds those of its indices.
    """
    inputs = family.inputs if isinstance(family, Movement) else family.moved
    stand_ins: list[Tensor] = []
    start = 1
    for n in inputs:
        size = torch.Size(shape_of(n))
        stand_ins.append(torch.arange(start, start + size.numel(), dtype=torch.float64).view(size))
        start += size.numel()
    if isinstance(family, Movement):
        moved = family.run(stand_ins)
    else:
        moved = family.run(stand_ins, {n: (values or {})[n] for n in family.indices})
    return [part.long() - 1 for part in ([moved] if isinstance(moved, Tensor) else list(moved))]


def _index(node: Node, varying: frozenset[Node]) -> Family | None:
    """``x[i, j, ...]``, read or written; boolean masks of several axes only alone."""
    x, listed = cast("tuple[Node, list[Node | None]]", node.args[:2])
    written = cast(Node, node.args[2]) if op_name(node) == "index_put" else None
    axes = tuple(i for i, n in enumerate(listed) if n is not None)
    indices = tuple(n for n in listed if n is not None)
    if written is not None and argument(node, 3, "accumulate", False):  # as index_add, where it is that
        plain = len(indices) == 1 and len(shape_of(indices[0])) == 1 and tensor_of(indices[0]).dtype == torch.int64
        fits = plain and len(shape_of(written)) == len(shape_of(x))
        return _indexing(node, x, axes, indices, written, adds=True) if fits else None
    masks = [n for n in indices if tensor_of(n).dtype in (torch.bool, torch.uint8) and len(shape_of(n)) > 1]
    if masks:
        over = tuple(range(axes[0], axes[0] + len(shape_of(masks[0]))))
        return None if len(indices) > 1 else _indexing(node, x, over, indices, written, written is not None)
    same = written is not None or [len(shape_of(n)) for n in indices] == [1]
    return _indexing(node, x, axes, indices, written, same)


def _choose(node: Node, varying: frozenset[Node]) -> Family | None:
    x, axis, index = cast("tuple[Node, int, Node]", node.args[:3])
    return _indexing(node, x, (_axis(x, axis),), (index,), each=op_name(node) == "gather")


def _repeat(node: Node, varying: frozenset[Node]) -> Family | None:
    x, repeats, axis = cast(Node, node.args[0]), argument(node, 1, "repeats"), argument(node, 2, "dim")
    if isinstance(repeats, int):
        return move(node, varying)
    return None if repeats is None or axis is None else _indexing(node, x, (_axis(x, axis),), (repeats,))


def _write(node: Node, varying: frozenset[Node]) -> Family | None:
    """What is written or added at indices along one axis."""
    x, axis, index, written = cast("tuple[Node, int, Node, object]", node.args[:4])
    if not isinstance(written, Node):
        return None
    axes, indices = (_axis(x, axis),), (index,)
    if op_name(node) == "index_copy":
        return _indexing(node, x, axes, indices, written)
    each, adds = "scatter" in op_name(node), op_name(node) in ("index_add", "scatter_add")
    return _indexing(node, x, axes, indices, written, adds=True, each=each, over=not adds)


def _axis(x: Node, axis: int) -> int:
    return axis % max(len(shape_of(x)), 1)


def _indexing(
    node: Node,
    x: Node,
    axes: tuple[int, ...],
    indices: tuple[Node, ...],
    written: Node | None = None,
    same: bool = True,
    adds: bool = False,
    each: bool = False,
    over: bool = False,
) -> Indexing:
    parts = [n for n in (x, written) if n is not None]
    target = cast(Callable[..., Tensor], node.target)

    def run(stand_ins: list[Tensor], values: dict[Node, Tensor]) -> Tensor:
        given = {**values, **dict(zip(parts, stand_ins, strict=True))}
        args, kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((node.args, node.kwargs), given.__getitem__))
        return target(*args, **kwargs)

    return Indexing(tensor_inputs(node), x, axes, indices, run, written, same, adds, each, over)


def _ranking(node: Node, varying: frozenset[Node]) -> Family | None:
    x, name = cast(Node, node.args[0]), op_name(node)
    position = {"topk": 2, "kthvalue": 2}.get(name, 1)
    if name in ("max", "min", "median", "nanmedian") and not isinstance(argument(node, 1, "dim"), int):
        if len(node.args) > 1:
            return Pointwise(tensor_inputs(node))
        return Mixing("reduction", x, frozenset(range(len(shape_of(x)))), (None,) * len(shape_of(x)))
    axis = cast(int, argument(node, position, "dim", -1))
    first = shape_of_value(tensor_of(node))
    return Ranking((x,), x, axis % max(len(shape_of(x)), 1), len(first) == len(shape_of(x)))


def _glu(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    return Halves((x,), x, cast(int, argument(node, 1, "dim", -1)) % len(shape_of(x)))


def _complex(node: Node, varying: frozenset[Node]) -> Family | None:
    """A complex number has one identity: that of its two united parts."""
    x = cast(Node, node.args[0])
    ndim = len(shape_of(x))
    if op_name(node) == "view_as_complex":
        return Mixing("pool", x, frozenset({ndim - 1}), (*range(ndim - 1), None))
    return Movement((x,), lambda s: s[0].unsqueeze(-1).expand(*s[0].shape, 2))


_MOVES = names(
    """
    view reshape permute transpose t numpy_T mT mH adjoint unsqueeze squeeze expand expand_as view_as slice select
    split split_with_sizes chunk unbind flatten unflatten movedim narrow diagonal slice_scatter select_scatter
    constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d pixel_shuffle pixel_unshuffle
    channel_shuffle flip fliplr flipud rot90 roll repeat tile cat stack unfold unfold_copy im2col
    """
)

MOVEMENTS: dict[str, OpRule] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(("index", "index_put"), _index),
    **dict.fromkeys(("gather", "index_select"), _choose),
    **dict.fromkeys(("index_copy", "index_add", "index_reduce", "scatter", "scatter_add", "scatter_reduce"), _write),
    "repeat_interleave": _repeat,
    **dict.fromkeys(
        ("topk", "sort", "max", "min", "argsort", "argmax", "argmin", "kthvalue", "median", "nanmedian"), _ranking
    ),
    "glu": _glu,
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
}
