"""How operations that have sizes written in them are written for smaller tensors: one rule per operation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.families import Contraction, Indexing, Mixing
from ..tracing.lowering import DROPOUT
from ..tracing.operations import op_name, shape_of
from ..tracing.origins import where
from ..tracing.symbolic import is_open

if TYPE_CHECKING:
    from .regraph import Writing


class UnwritableError(Exception):
    """A step cannot be written for the smaller tensors; the message says which and why."""


def _sizes(w: Writing, node: Node, sizes: list[Any], start: int = 0) -> list[Any]:
    """Return sizes with every number replaced by what is kept of its axis."""
    kept = [w.r.kept(node, start + axis) for axis in range(len(sizes))]
    merged = [isinstance(n, Node) and not k.all() for n, k in zip(sizes, kept, strict=True)]  # batch times heads
    told = merged.count(True) == 1 and -1 not in sizes  # by the other sizes

    def size(n: Any, k: Tensor, cut: bool) -> Any:
        if cut:
            return -1 if told else _share(w, n, k)
        return n if isinstance(n, Node) or n == -1 else int(k.sum())

    return [size(n, k, cut) for n, k, cut in zip(sizes, kept, merged, strict=True)]


def _share(w: Writing, size: Node, kept: Tensor) -> Node:
    """Return what is kept of an open size of which the same share is kept at every size."""
    step = math.gcd(int(kept.sum()), len(kept))
    many = w.graph.call_function(operator.mul, (size, int(kept.sum()) // step))
    return w.graph.call_function(operator.floordiv, (many, len(kept) // step))


def _view(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return w.graph.call_function(torch.ops.aten.reshape.default, (args[0], _sizes(w, node, args[1])))


def _sized(position: int) -> Any:
    def rule(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        args[position] = _sizes(w, node, args[position])

    return rule


def _unflatten(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[2] = _sizes(w, node, args[2], args[1] % len(node.args[0].meta["val"].shape))  # type: ignore[union-attr]


def _pairs(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Lay pairs of numbers side by side: behind a cut, one may begin at any place."""
    args[0] = w.graph.call_function(torch.ops.aten.contiguous.default, (args[0],))


def _axis(node: Node, position: int = 2) -> tuple[Node, int]:
    x = cast(Node, node.args[0])
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return x, cast(int, axis) % len(x.meta["val"].shape)


def _split(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, axis = _axis(node)
    kept = w.r.kept(x, axis)
    if kept.all():
        return None
    written = node.args[1]
    if op_name(node) == "chunk":
        written = -(-len(kept) // cast(int, written))
    parts = kept.split(cast(Any, written))
    counts = [int(part.sum()) for part in parts]
    return w.graph.call_function(torch.ops.aten.split_with_sizes.default, (args[0], counts, axis))


def _pick(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    source = cast(Node, node.args[0])
    if isinstance(args[0], tuple):
        return args[0][cast(int, args[1])]
    if op_name(source) == "unbind":
        x, axis = _axis(source, 1)
        args[1] = int(w.r.kept(x, axis)[: cast(int, args[1])].sum())
    return None


def _slice(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, axis = _axis(node, 1)
    kept = w.r.kept(x, axis)
    if kept.all() and w.r.kept(node, axis).all():
        return None
    given = [node.args[i] if len(node.args) > i else default for i, default in ((2, None), (3, None), (4, 1))]
    if any(isinstance(g, Node) for g in given):
        raise UnwritableError(f"a slice of open size meets a cut ({where(node)})")
    start, end, step = given
    return take(w, args[0], axis, kept, torch.arange(len(kept))[slice(start, end)][:: cast(int, step)])


def _pick_in_order(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Pick by a constant vector, renumbered."""
    family = w.facts.families[w.r.twin(node)]
    order = w.facts.order(family) if isinstance(family, Indexing) else None
    if order is None or not isinstance(family, Indexing):
        return None
    x, [axis] = cast(Node, node.args[0]), family.axes
    kept, wanted = w.r.kept(x, axis), w.r.kept(node, axis)
    if kept.all() and wanted.all():
        return None
    if is_open(x.meta["val"].shape[axis]):
        raise UnwritableError(f"an index meets a cut along an axis of open size ({where(node)})")
    return take(w, args[0], axis, kept, order[wanted])


def take(w: Writing, x: Any, axis: int, kept: Tensor, indices: Tensor) -> Any:
    """Pick indices of the whole axis from a cut one: as a slice if they lie side by side."""
    places = kept.cumsum(0) - 1
    picked = places[indices[kept[indices]]]
    if len(picked) and bool((picked == torch.arange(int(picked[0]), int(picked[0]) + len(picked))).all()):
        start = int(picked[0])
        return w.graph.call_function(torch.ops.aten.slice.Tensor, (x, axis, start, start + len(picked)))
    return w.graph.call_function(torch.ops.aten.index_select.default, (x, axis, w.graph.get_attr(w.hold(picked))))


def _select(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, axis = _axis(node, 1)
    kept = w.r.kept(x, axis)
    if not kept.all():
        index = cast(int, node.args[2]) % len(kept)
        args[2] = int(kept[:index].sum())


def _roll(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x = cast(Node, node.args[0])
    ndim = len(x.meta["val"].shape)
    shifts = cast("list[int]", node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]])
    axes = cast("list[int]", (node.args[2] if len(node.args) > 2 else []) or [])
    made = args[0]
    for shift, axis in zip(shifts, [a % ndim for a in axes], strict=False):
        kept = w.r.kept(x, axis)
        if kept.all():
            made = w.graph.call_function(torch.ops.aten.roll.default, (made, [shift], [axis]))
        else:
            made = take(w, made, axis, kept, torch.arange(len(kept)).roll(shift))
    return made if axes else None


def _pad(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x = cast(Node, node.args[0])
    ndim = len(x.meta["val"].shape)
    pads = list(cast("list[Any]", args[1]))
    for i in range(0, len(pads), 2):
        axis = ndim - 1 - i // 2
        kept = w.r.kept(node, axis)
        if kept.all():
            continue
        if any(isinstance(p, Node) or p < 0 for p in pads[i : i + 2]):
            raise UnwritableError(f"a padding that cuts meets a cut ({where(node)})")
        front, back = pads[i], pads[i + 1]
        pads[i], pads[i + 1] = int(kept[:front].sum()), int(kept[len(kept) - back :].sum()) if back else 0
    args[1] = pads


def _squeeze(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    shape = cast(Node, node.args[0]).meta["val"].shape
    named = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = [a % len(shape) for a in ([named] if isinstance(named, int) else cast("list[int]", named))]
    gone = [a for a in axes if not is_open(shape[a]) and int(shape[a]) == 1]
    return w.graph.call_function(torch.ops.aten.squeeze.dims, (args[0], gone)) if gone else args[0]


def _regroup(position: int) -> Any:
    def rule(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        family = w.facts.families[w.r.twin(node)]
        if not isinstance(family, Contraction | Mixing) or family.groups == 1:
            return
        channels = w.r.kept(node, family.out_axis if isinstance(family, Contraction) else 1)
        used = int(channels.view(family.groups, -1).any(1).sum())
        if len(args) > position:
            args[position] = used
        else:
            kwargs["groups"] = used

    return rule


def _attention(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    query = cast(Node, node.args[0])
    if p := w.r.dropouts.get(w.r.twin(node)):
        dropped = w.graph.call_function(operator.mul, (w.trains(node), p))
        if len(args) > 4:
            args[4] = dropped
        else:
            kwargs["dropout_p"] = dropped
    if kwargs.get("scale") is None and not w.r.kept(query, -1).all():
        kwargs["scale"] = shape_of(w.r.twin(query))[-1] ** -0.5
    if len(args) > 3 and isinstance(args[3], Node):  # beside float64, torch's kernel misreads a mask of float32
        here, mask = (w.facts.values[w.r.twin(cast(Node, node.args[i]))] for i in (0, 3))
        if mask.is_floating_point() and mask.dtype != here.dtype:
            args[3] = w.graph.call_function(torch.ops.aten.to.other, (args[3], args[0]))


def _mean(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Divide by how many there were."""
    share = share_of(w, node)
    if share == 1:
        return None
    made = w.graph.call_function(cast(Any, node.target), tuple(args), kwargs)
    return w.graph.call_function(torch.ops.aten.mul.Tensor, (made, share))


def _rms_norm(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Take the mean of squares over how many there were, as `Plan` does for the layers that may be changed.

    An epsilon that follows the dtype stays, beside squares that are as much smaller as it would have to be larger.
    """
    share = share_of(w, node)
    if share == 1:
        return None
    sizes = cast("list[int]", args[1])
    args[1] = _sizes(w, node, sizes, len(shape_of(w.r.twin(node))) - len(sizes))
    if len(args) > 3 and args[3] is not None:
        args[3] = args[3] / share
    else:
        args[0] = w.graph.call_function(torch.ops.aten.mul.Tensor, (args[0], share**0.5))
    made = w.graph.call_function(cast(Any, node.target), tuple(args), kwargs)
    if w.r.permissions.can_rescale(w.r.twin(node)):
        return made
    return w.graph.call_function(torch.ops.aten.mul.Tensor, (made, share**-0.5))


def share_of(w: Writing, node: Node) -> float:
    """Return which share of what an operation averages over stays."""
    family = w.facts.families[w.r.twin(node)]
    return w.r.widths.share(family.x, family.mixed) if isinstance(family, Mixing) else 1.0


def _dropout(w: Writing, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Let a dropout that the forward does by itself follow the module's mode, as it does in code."""
    if DROPOUT not in node.meta:
        return None
    op, p = node.meta[DROPOUT]
    return w.graph.call_function(op, (args[0], p, w.trains(node)))


RULES: dict[str, Callable[[Writing, Node, list[Any], dict[str, Any]], Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("expand", "new_zeros", "new_ones", "new_full"), _sized(1)),
    **dict.fromkeys(("zeros", "ones", "full"), _sized(0)),
    "unflatten": _unflatten,
    "clone": _dropout,
    "view_as_complex": _pairs,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "getitem": _pick,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("index", "index_select"), _pick_in_order),
    "roll": _roll,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "squeeze": _squeeze,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _regroup(6)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _regroup(6)),
    "convolution": _regroup(8),
    "group_norm": _regroup(1),
    "mean": _mean,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
}
