"""What each operation of a graph does to the axes of its operands: one table from operations to a few families.

Whoever walks the graph (labels, constants, liveness, cutting) asks `describe` for the family of a node and has one
rule per family. An operation that stands in no table is a `Barrier`: whatever meets it is kept whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .capture import operation

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Movement:
    """Every output element is one input element, or a constant. ``run`` applies the operation to stand-ins."""

    inputs: tuple[Node, ...]
    run: Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Pointwise:
    """Every output element reads the elements at its own (broadcast) position. ``product``: zero absorbs."""

    operands: tuple[Node, ...]
    product: bool = False


@dataclass(frozen=True)
class Contraction:
    """A linear map of an activation by a weight: ``out = weight * x + bias``, summed over the channels of x.

    ``apply(x, weight)`` runs it without bias. The input channels are ``x_axis`` of x and ``w_in`` of the weight, the
    output channels ``out_axis`` and ``w_out``; other axes are kernel or position. ``padded`` means that some outputs
    see fewer inputs than others (zero padding, transposed convolution).
    """

    x: Node
    weight: Node
    bias: Node | None
    x_axis: int
    w_in: int
    w_out: int
    out_axis: int
    apply: Callable[[Tensor, Tensor], Tensor]
    groups: int = 1
    padded: bool = False
    spatial: bool = False


@dataclass(frozen=True)
class Mixing:
    """Elements of x mix along some axes and never along the others.

    ``out_axis[a]`` is where axis ``a`` of x lies in the output, or ``None`` if it is gone. ``parameters`` are
    ``(node, its axis, the axis of x)``; an output is constant where ``scale`` is zero. ``kind`` says what happens
    along the mixed axes: a norm's statistics, a pooling, a reduction, or a softmax or cumulative sum.
    """

    kind: Literal["norm", "pool", "reduction", "scan"]
    x: Node
    mixed: frozenset[int]
    out_axis: tuple[int | None, ...]
    parameters: tuple[tuple[Node, int, int], ...] = ()
    scale: Node | None = None


@dataclass(frozen=True)
class Lookup:
    """Rows of a table by integer index."""

    table: Node
    indices: Node


@dataclass(frozen=True)
class Creation:
    """A tensor made from nothing."""


@dataclass(frozen=True)
class Pick:
    """One of several results of another node."""

    source: Node
    index: int


@dataclass(frozen=True)
class Barrier:
    """An operation without a rule: whatever goes in or comes out stays whole."""

    inputs: tuple[Node, ...]


Family: TypeAlias = Movement | Pointwise | Contraction | Mixing | Lookup | Creation | Pick | Barrier


def tensor_of(node: Node) -> Any:
    """Return the traced (fake) value of a node."""
    return node.meta.get("val")


def shape_of(node: Node) -> Shape:
    """Return the shape of a tensor-valued node."""
    return tuple(int(n) for n in tensor_of(node).shape)


def is_tensor(node: Node) -> bool:
    """Tell whether a node gives one tensor."""
    return isinstance(tensor_of(node), Tensor)


def tensor_inputs(node: Node) -> tuple[Node, ...]:
    """Return the nodes that a node reads tensors from, each once."""
    return tuple(n for n in node.all_input_nodes if is_tensor(n) or isinstance(tensor_of(n), tuple | list))


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVEMENTS = _names(
    """
    view _unsafe_view reshape permute transpose t numpy_T unsqueeze squeeze expand slice select split
    split_with_sizes chunk unbind flatten unflatten movedim constant_pad_nd pad pixel_shuffle pixel_unshuffle
    channel_shuffle flip roll repeat tile cat stack narrow reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d diagonal swapaxes
    """
)
_ALSO_POINTWISE = _names(
    """
    clone contiguous alias detach _to_copy to dropout feature_dropout alpha_dropout lift_fresh_copy zeros_like
    ones_like full_like hardswish where masked_fill leaky_relu_ rsub fill rrelu add mul sub div
    """
)
_PRODUCTS = frozenset({"mul"})
_CREATIONS = _names(
    """
    zeros ones full arange empty scalar_tensor eye linspace tril_indices triu_indices
    """
)
_SPATIAL = _names(
    """
    max_pool{n}d max_pool{n}d_with_indices avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d
    _adaptive_avg_pool{n}d lp_pool{n}d upsample_linear{n}d upsample_bilinear{n}d upsample_trilinear{n}d
    upsample_bicubic{n}d _upsample_bilinear{n}d_aa
    """
)
_REDUCTIONS = _names(
    """
    mean sum amax amin var std logsumexp all any prod
    """
)


def _name(node: Node) -> str:
    return operation(node).removeprefix("aten.")


def describe(node: Node, varying: frozenset[Node]) -> Family:
    """Return the family of a ``call_function`` node.

    Args:
        node: The node.
        varying: The nodes that depend on the model's inputs.
    """
    name = _name(node)
    if node.target is operator.getitem:
        return Pick(cast(Node, node.args[0]), cast(int, node.args[1]))
    if name in _TABLE:
        return _TABLE[name](node, varying) or Barrier(tensor_inputs(node))
    if is_random(node) or str(node.target) == "aten.view.dtype":
        return Barrier(tensor_inputs(node))
    if name in _MOVEMENTS:
        return _movement(node)
    tags = cast("list[torch.Tag]", getattr(node.target, "tags", []))
    if (torch.Tag.pointwise in tags or name in _ALSO_POINTWISE) and is_tensor(node):
        return Pointwise(tensor_inputs(node), name in _PRODUCTS)
    if name in _CREATIONS and not tensor_inputs(node):
        return Creation()
    for n in (1, 2, 3):
        if name.replace(f"{n}d", "{n}d") in _SPATIAL and isinstance(node.args[0], Node):
            return _spatial(node, node.args[0], n)
    if name in _REDUCTIONS and is_tensor(node) and isinstance(node.args[0], Node):
        return _reduction(node, node.args[0])
    return Barrier(tensor_inputs(node))


def _movement(node: Node) -> Movement:
    inputs = tensor_inputs(node)
    target = cast(Callable[..., Any], node.target)

    def run(stand_ins: list[Tensor]) -> Any:
        by_node = dict(zip(inputs, stand_ins, strict=True))
        args, kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((node.args, node.kwargs), by_node.__getitem__))
        if _name(node) in ("constant_pad_nd", "pad"):  # pad with zero, which no stand-in is
            return F.pad(args[0], args[1], args[2] if isinstance(_argument(node, 2, "mode"), str) else "constant")
        return target(*args, **kwargs)

    return Movement(inputs, run)


def source_indices(family: Movement) -> list[Tensor]:
    """Return, per result of a movement, where each element comes from in its concatenated flat inputs, or -1."""
    stand_ins: list[Tensor] = []
    start = 1
    for n in family.inputs:
        size = torch.Size(shape_of(n))
        stand_ins.append(torch.arange(start, start + size.numel(), dtype=torch.float64).view(size))
        start += size.numel()
    moved = family.run(stand_ins)
    return [part.long() - 1 for part in ([moved] if isinstance(moved, Tensor) else list(moved))]


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _apply_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _linear(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight, bias = (_argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    if weight in varying or bias in varying or len(shape_of(weight)) != 2:
        return None
    last = len(shape_of(x)) - 1
    return Contraction(x, weight, bias, last, 1, 0, len(shape_of(node)) - 1, _apply_linear)


def _matmul(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    if weight in varying or len(shape_of(weight)) != 2:
        return None
    last = len(shape_of(x)) - 1
    return Contraction(x, weight, None, last, 0, 1, len(shape_of(node)) - 1, torch.matmul)


def _addmm(node: Node, varying: frozenset[Node]) -> Family | None:
    bias, x, weight = cast("tuple[Node, Node, Node]", node.args[:3])
    if node.kwargs or weight in varying or bias in varying or len(shape_of(bias)) != 1:
        return None
    return Contraction(x, weight, bias, 1, 0, 1, 1, torch.matmul)


def _convolution(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight, bias = (_argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    name = _name(node)
    groups = cast(int, _argument(node, 8, "groups", 1))
    if name.startswith("conv_transpose"):
        transposed, groups = True, cast(int, _argument(node, 6, "groups", 1))
    elif name == "convolution":
        transposed = bool(_argument(node, 6, "transposed", False))
    else:
        transposed, groups = False, cast(int, _argument(node, 6, "groups", 1))
    kernel = shape_of(weight)[2:]
    if weight in varying or bias in varying or len(shape_of(x)) != len(kernel) + 2:
        return None
    padding = _argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        padded = padding == "same" and any(k > 1 for k in kernel)
    else:
        padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    target = cast(Callable[..., Tensor], node.target)
    rest, options = node.args[3:], {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
    w_in, w_out = (0, 1) if transposed else (1, 0)
    return Contraction(
        x, weight, bias, 1, w_in, w_out, 1, lambda x, w: target(x, w, None, *rest, **options), groups,
        padded=padded or transposed, spatial=True,
    )  # fmt: skip


def _batch_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x, *vectors = cast("list[Node | None]", list(node.args[:5]))
    if any(v in varying for v in vectors if v is not None):
        return None
    return _norm(node, cast(Node, x), frozenset(), [(v, 0, 1) for v in vectors if v is not None], vectors[0])


def _layer_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    sizes = cast("list[int]", node.args[1])
    ndim = len(shape_of(x))
    vectors = [cast("Node | None", _argument(node, i, n)) for i, n in ((2, "weight"), (3, "bias"))]
    if any(v in varying for v in vectors if v is not None):
        return None
    mixed = range(ndim - len(sizes), ndim)
    links = [(v, a - mixed.start, a) for v in vectors if v is not None for a in mixed]
    return _norm(node, x, frozenset(mixed), links, None)


def _group_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    vectors = [cast("Node | None", _argument(node, i, n)) for i, n in ((2, "weight"), (3, "bias"))]
    if any(v in varying for v in vectors if v is not None):
        return None
    links = [(v, 0, 1) for v in vectors if v is not None]
    return _norm(node, x, frozenset(range(1, len(shape_of(x)))), links, None)


def _instance_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x, *vectors = cast("list[Node | None]", list(node.args[:5]))
    if any(v in varying for v in vectors if v is not None):
        return None
    spatial = frozenset(range(2, len(shape_of(cast(Node, x)))))
    return _norm(node, cast(Node, x), spatial, [(v, 0, 1) for v in vectors if v is not None], vectors[0])


def _norm(node: Node, x: Node, mixed: frozenset[int], links: list[tuple[Node, int, int]], scale: Node | None) -> Mixing:
    return Mixing("norm", x, mixed, tuple(range(len(shape_of(x)))), tuple(links), scale)


def _softmax(node: Node, varying: frozenset[Node]) -> Family | None:
    x, axis = cast("tuple[Node, int]", node.args[:2])
    ndim = len(shape_of(x))
    return Mixing("scan", x, frozenset({axis % ndim}), tuple(range(ndim)))


def _spatial(node: Node, x: Node, n: int) -> Mixing:
    ndim = len(shape_of(x))
    return Mixing("pool", x, frozenset(range(ndim - n, ndim)), tuple(range(ndim)))


def _reduction(node: Node, x: Node) -> Mixing:
    ndim = len(shape_of(x))
    axes = _argument(node, 1, "dim")
    axes = range(ndim) if axes is None or axes == [] or _dtype_only(node) else [axes] if isinstance(axes, int) else axes
    mixed = frozenset(a % ndim for a in axes)
    keepdim = len(shape_of(node)) == ndim
    place = iter(range(ndim))
    return Mixing("reduction", x, mixed, tuple(next(place) if keepdim or a not in mixed else None for a in range(ndim)))


def _dtype_only(node: Node) -> bool:
    """Tell whether a reduction has no axes: ``sum(x)`` and ``var(x, unbiased)`` reduce everything."""
    return "dim" not in [a.name for a in cast(Any, node.target)._schema.arguments]


def _embedding(node: Node, varying: frozenset[Node]) -> Family | None:
    table, indices = cast("tuple[Node, Node]", node.args[:2])
    return None if table in varying else Lookup(table, indices)


def _prelu(node: Node, varying: frozenset[Node]) -> Family | None:
    x, slope = cast("tuple[Node, Node]", node.args[:2])
    if slope in varying:
        return None
    links = () if shape_of(slope) == (1,) else ((slope, 0, 1),)
    return Mixing("norm", x, frozenset(), tuple(range(len(shape_of(x)))), links)


_TABLE: dict[str, Callable[[Node, frozenset[Node]], Family | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "batch_norm"), _batch_norm),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"), _softmax),
    "embedding": _embedding,
    "prelu": _prelu,
    "_prelu_kernel": lambda node, varying: Pointwise(tensor_inputs(node)),
}


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers; dropout does where it was traced in training."""
    tags = cast("list[torch.Tag]", getattr(node.target, "tags", []))
    idle_dropout = _name(node).endswith("dropout") and not _argument(node, 2, "train", True)
    return torch.Tag.nondeterministic_seeded in tags and not idle_dropout


def varying_nodes(nodes: list[Node], inputs: set[Node]) -> frozenset[Node]:
    """Return the nodes whose value depends on the model's inputs, or on chance."""
    found: set[Node] = set(inputs)
    for node in nodes:
        if any(n in found for n in node.all_input_nodes) or is_random(node):
            found.add(node)
    return frozenset(found)
