"""What each operation of a graph does to the axes of its operands: one table from operations to families.

Whoever walks the graph (labels, constants, liveness, cutting) asks `describe` for the family of a node and has one
rule per family. An operation that stands in no table is a `Barrier`: whatever meets it is kept whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .capture import Trace, operation
from .families import (
    Attention,
    Barrier,
    Bilinear,
    Cell,
    Contraction,
    Creation,
    Family,
    Halves,
    Indexing,
    Lookup,
    Mixing,
    Movement,
    NormedWeight,
    Pick,
    Pointwise,
    Product,
    Ranking,
    Recurrence,
)

Shape = tuple[int, ...]


def tensor_of(node: Node) -> Any:
    """Return the traced (fake) value of a node."""
    return node.meta.get("val")


def shape_of(node: Node) -> Shape:
    """Return the shape of a tensor-valued node."""
    return tuple(int(n) for n in tensor_of(node).shape)


def shape_of_value(value: Any) -> Shape:
    """Return the shape of a traced value, or of the first of several."""
    return tuple(int(n) for n in (value if isinstance(value, Tensor) else value[0]).shape)


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
    upsample_nearest3d diagonal swapaxes slice_scatter select_scatter copy view_as squeeze_ numpy_T mT mH
    adjoint swapdims expand_as unfold unfold_copy im2col roll rot90 fliplr flipud
    """
)
_ALSO_POINTWISE = _names(
    """
    clone contiguous alias detach _to_copy to dropout feature_dropout alpha_dropout lift_fresh_copy zeros_like
    ones_like full_like hardswish where masked_fill leaky_relu_ rsub fill rrelu add mul sub div
    empty_like polar
    """
)
_PRODUCTS = frozenset({"mul"})
_CREATIONS = _names(
    """
    zeros ones full arange empty scalar_tensor eye linspace tril_indices triu_indices new_zeros new_ones new_full
    new_empty
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
    mean sum amax amin var std logsumexp all any prod linalg_vector_norm norm
    """
)


_ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "concat": "cat", "concatenate": "cat", "moveaxis": "movedim", "swapaxes": "transpose",
    "swapdims": "transpose", "special_expit": "sigmoid", "inner": "linear",
}  # fmt: skip


def op_name(node: Node) -> str:
    """Return the short name of an operation, such as ``conv2d``, with its aliases resolved."""
    name = operation(node).removeprefix("aten.")
    return _ALIASES.get(name, name)


def describe(node: Node, varying: frozenset[Node]) -> Family:
    """Return the family of a ``call_function`` node.

    Args:
        node: The node.
        varying: The nodes that depend on the model's inputs.
    """
    name = op_name(node)
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
    if name in _CREATIONS and (name.startswith("new_") or not tensor_inputs(node)):
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
        if op_name(node) in ("constant_pad_nd", "pad"):  # pad with zero, which no stand-in is
            return F.pad(args[0], args[1], args[2] if isinstance(_argument(node, 2, "mode"), str) else "constant")
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
    a, b = cast("tuple[Node, Node]", node.args[:2])
    ndim_a, ndim_b = len(shape_of(a)), len(shape_of(b))
    if b not in varying and ndim_b == 2:
        return Contraction(a, b, None, ndim_a - 1, 0, 1, len(shape_of(node)) - 1, torch.matmul)
    if a not in varying and ndim_a == 2 and ndim_b >= 2:
        return Contraction(b, a, None, ndim_b - 2, 1, 0, ndim_b - 2, lambda x, w: torch.matmul(w, x))
    if not ndim_a or not ndim_b:
        return None
    batch = "abcdefgh"[: max(ndim_a, ndim_b, 2) - 2]
    a_axes = (batch[len(batch) - max(ndim_a - 2, 0) :] + "mk")[-ndim_a:] if ndim_a > 1 else "k"
    b_axes = batch[len(batch) - max(ndim_b - 2, 0) :] + "kn" if ndim_b > 1 else "k"
    out = batch + "m" * (ndim_a > 1) + "n" * (ndim_b > 1)
    return Product((a, b), a, b, a_axes, b_axes, out)


def _baddbmm(node: Node, varying: frozenset[Node]) -> Family | None:
    addend, a, b = cast("tuple[Node, Node, Node]", node.args[:3])
    return Product((addend, a, b), a, b, "amk", "akn", "amn", addend)


def _grouped_mm(node: Node, varying: frozenset[Node]) -> Family | None:
    """Rows of x times one of several weights each, by offsets: its rows and columns are shared by all."""
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    if weight in varying or (len(shape_of(x)), len(shape_of(weight))) != (2, 3):
        return None
    return Product(tensor_inputs(node), x, weight, "mk", "ekn", "mn")


def _einsum(node: Node, varying: frozenset[Node]) -> Family | None:
    equation, operands = cast("tuple[str, list[Node]]", node.args[:2])
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    hidden = [
        len(shape_of(n)) - len(t.replace("...", "")) if "..." in t else 0 for n, t in zip(operands, terms, strict=True)
    ]
    dots = "".join(spare[: max(hidden)])
    terms = [t.replace("...", dots[len(dots) - k :]) for t, k in zip(terms, hidden, strict=True)]
    if len(sides) == 2:
        out = sides[1].replace("...", dots)
    else:
        letters = "".join(terms)
        out = dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in dots))
    if len(operands) != 2 or any(len(set(t)) < len(t) for t in (*terms, out)):
        return None
    (a, b), (a_axes, b_axes) = operands, terms
    for x, w, x_axes, w_axes in ((a, b, a_axes, b_axes), (b, a, b_axes, a_axes)):
        summed, made = set(w_axes) & set(x_axes) - set(out), set(w_axes) - set(x_axes)
        if w in varying or len(w_axes) != 2 or not len(summed) == len(made) == 1:
            continue
        (k,), (n,) = summed, made
        if x_axes.replace(k, n) == out:
            return Contraction(
                x, w, None, x_axes.index(k), w_axes.index(k), w_axes.index(n), out.index(n),
                _einsum_of(f"{x_axes},{w_axes}->{out}"),
            )  # fmt: skip
    return Product((a, b), a, b, a_axes, b_axes, out)


def _einsum_of(equation: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: torch.einsum(equation, x, w)


def _attention(node: Node, varying: frozenset[Node]) -> Family | None:
    query, key, value = cast("tuple[Node, Node, Node]", node.args[:3])
    repeats = 1
    if len(shape_of(query)) >= 4 and shape_of(query)[-3] != shape_of(value)[-3]:
        repeats = shape_of(query)[-3] // shape_of(value)[-3]
    return Attention(tensor_inputs(node), query, key, value, repeats)


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _recurrence(node: Node, varying: frozenset[Node]) -> Family | None:
    name = op_name(node)
    if name.endswith("_cell"):
        x, state, *weights = cast("list[Any]", list(node.args))
        states = tuple(cast("list[Node]", state)) if isinstance(state, list | tuple) else (cast(Node, state),)
        gates = _GATES[name.removesuffix("_cell")]
        return Recurrence(tensor_inputs(node), x, states, (Cell(*weights),), 1, gates, single=True)
    x, state, weights, biased, layers, _, _, bidirectional = cast("list[Any]", list(node.args[:8]))
    if not isinstance(weights, list | tuple) or isinstance(biased, list | tuple):
        return None  # packed sequences
    states = tuple(cast("list[Node]", state)) if isinstance(state, list | tuple) else (cast(Node, state),)
    cells = layers * (2 if bidirectional else 1)
    each = len(cast("list[Node]", weights)) // cells
    rows: list[Cell] = []
    for i in range(cells):
        own = list(cast("list[Node]", weights)[i * each : (i + 1) * each])
        projection = own.pop() if each in (3, 5) else None
        rows.append(Cell(*own, w_hr=projection))
    return Recurrence(tensor_inputs(node), x, states, tuple(rows), 2 if bidirectional else 1, _GATES[name])


def _index(node: Node, varying: frozenset[Node]) -> Family | None:
    """Rule for index, index_put, index_select, gather and the like."""
    name, x = op_name(node), cast(Node, node.args[0])
    target, args = cast(Callable[..., Tensor], node.target), node.args
    written: Node | None = None
    if name in ("index", "index_put"):
        listed = cast("list[Node | None]", args[1])
        axes = tuple(i for i, n in enumerate(listed) if n is not None)
        indices = tuple(n for n in listed if n is not None)
        masks = [n for n in indices if tensor_of(n).dtype in (torch.bool, torch.uint8) and len(shape_of(n)) > 1]
        if masks:
            return None if len(indices) > 1 else _masked_index(node, x, masks[0])
        written = cast(Node, args[2]) if name == "index_put" else None
        same = name == "index_put" or [len(shape_of(n)) for n in indices] == [1]
    elif name in ("gather", "index_select", "index_add", "index_copy", "scatter", "scatter_add", "repeat_interleave"):
        if name == "repeat_interleave" and not isinstance(args[1], Node):
            return _movement(node)
        axis = cast("int | None", _argument(node, 2, "dim") if name == "repeat_interleave" else args[1])
        if axis is None:
            return None
        axes = (axis % max(len(shape_of(x)), 1),)
        indices = (cast(Node, args[1] if name == "repeat_interleave" else args[2]),)
        written = (
            args[3]
            if name in ("index_add", "index_copy", "scatter", "scatter_add") and isinstance(args[3], Node)
            else None
        )
        if name in ("index_add", "scatter", "scatter_add"):
            return (
                None if written is None else Indexing(tensor_inputs(node), x, axes, indices, _never, written, adds=True)
            )
        same = True
    else:
        return None
    parts = [n for n in (x, written) if n is not None]

    def run(stand_ins: list[Tensor], values: dict[Node, Tensor]) -> Tensor:
        given = {**values, **dict(zip(parts, stand_ins, strict=True))}
        real_args, real_kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((args, node.kwargs), given.__getitem__))
        return target(*real_args, **real_kwargs)

    return Indexing(tensor_inputs(node), x, axes, indices, run, written, same)


def _masked_index(node: Node, x: Node, mask: Node) -> Family:
    """Positions picked by a boolean mask over leading axes."""
    axes = tuple(range(len(shape_of(mask))))
    target, args = cast(Callable[..., Tensor], node.target), node.args
    written = cast(Node, args[2]) if op_name(node) == "index_put" else None
    parts = [n for n in (x, written) if n is not None]

    def run(stand_ins: list[Tensor], values: dict[Node, Tensor]) -> Tensor:
        given = {**values, **dict(zip(parts, stand_ins, strict=True))}
        return target(*torch.fx.map_arg(args, given.__getitem__))

    return Indexing(tensor_inputs(node), x, axes, (mask,), run, written, written is not None)


def _never(stand_ins: list[Tensor], values: dict[Node, Tensor]) -> Tensor:
    raise NotImplementedError("this operation adds, it does not move")


def _ranking(node: Node, varying: frozenset[Node]) -> Family | None:
    x, name = cast(Node, node.args[0]), op_name(node)
    position = {"topk": 2, "kthvalue": 2}.get(name, 1)
    if name in ("max", "min", "median") and not isinstance(_argument(node, 1, "dim"), int):
        if len(node.args) > 1:
            return Pointwise(tensor_inputs(node))
        return Mixing("reduction", x, frozenset(range(len(shape_of(x)))), (None,) * len(shape_of(x)))
    axis = cast(int, _argument(node, position, "dim", -1))
    first = shape_of_value(tensor_of(node))
    return Ranking((x,), x, axis % max(len(shape_of(x)), 1), len(first) == len(shape_of(x)))


def _bilinear(node: Node, varying: frozenset[Node]) -> Family | None:
    x1, x2, weight, bias = (_argument(node, i, n) for i, n in enumerate(("input1", "input2", "weight", "bias")))
    return None if weight in varying else Bilinear(tensor_inputs(node), x1, x2, weight, bias)


def _tensordot(node: Node, varying: frozenset[Node]) -> Family | None:
    a, b, over_a, over_b = cast("tuple[Node, Node, list[int], list[int]]", node.args[:4])
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    a_axes = [next(letters) for _ in shape_of(a)]
    b_axes = [next(letters) for _ in shape_of(b)]
    for i, j in zip(over_a, over_b, strict=True):
        b_axes[j] = a_axes[i]
    summed = {a_axes[i] for i in over_a}
    out = "".join(c for c in (*a_axes, *b_axes) if c not in summed)
    return Product((a, b), a, b, "".join(a_axes), "".join(b_axes), out)


def _glu(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    return Halves((x,), x, cast(int, _argument(node, 1, "dim", -1)) % len(shape_of(x)))


def _weight_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    v, g = cast("tuple[Node, Node]", node.args[:2])
    if v in varying or g in varying:
        return None
    return NormedWeight((v, g), v, g, cast(int, _argument(node, 2, "dim", 0)))


def _complex(node: Node, varying: frozenset[Node]) -> Family | None:
    """A complex number has one identity: that of its two united parts."""
    x = cast(Node, node.args[0])
    ndim = len(shape_of(x))
    if op_name(node) == "view_as_complex":
        return Mixing("pool", x, frozenset({ndim - 1}), (*range(ndim - 1), None))
    return Movement((x,), lambda s: s[0].unsqueeze(-1).expand(*s[0].shape, 2))


def _addmm(node: Node, varying: frozenset[Node]) -> Family | None:
    bias, x, weight = cast("tuple[Node, Node, Node]", node.args[:3])
    if node.kwargs or weight in varying or bias in varying or len(shape_of(bias)) != 1:
        return None
    return Contraction(x, weight, bias, 1, 0, 1, 1, torch.matmul)


def _convolution(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight, bias = (_argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    name = op_name(node)
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


def _own_batch_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    """Batch norm by the statistics of the batch itself: a channel of zeros stays one."""
    x, *vectors = cast("list[Node | None]", list(node.args[:3]))
    if any(v in varying for v in vectors if v is not None):
        return None
    ndim = len(shape_of(cast(Node, x)))
    mixed = frozenset(range(ndim)) - {1}
    links = tuple((v, 0, 1) for v in vectors if v is not None)
    return Mixing("norm", cast(Node, x), mixed, tuple(range(ndim)), links, vectors[0], keeps_zero=True)


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


def _rms_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x, sizes = cast("tuple[Node, list[int]]", node.args[:2])
    ndim = len(shape_of(x))
    weight = cast("Node | None", _argument(node, 2, "weight"))
    if weight in varying:
        return None
    mixed = range(ndim - len(sizes), ndim)
    links = [(weight, a - mixed.start, a) for a in mixed] if weight is not None else []
    return Mixing("norm", x, frozenset(mixed), tuple(range(ndim)), tuple(links), None, keeps_zero=True)


def _group_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    vectors = [cast("Node | None", _argument(node, i, n)) for i, n in ((2, "weight"), (3, "bias"))]
    if any(v in varying for v in vectors if v is not None):
        return None
    links = tuple((v, 0, 1) for v in vectors if v is not None)
    ndim = len(shape_of(x))
    groups = cast(int, node.args[1])
    return Mixing("norm", x, frozenset(range(1, ndim)), tuple(range(ndim)), links, groups=groups)


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
    """Pool or resize over the last axes; along an axis with a kernel of one, nothing mixes."""
    ndim = len(shape_of(x))
    kernel = _argument(node, 1, "kernel_size") if op_name(node).startswith(("max_pool", "avg_pool")) else None
    sizes = kernel if isinstance(kernel, list | tuple) and len(cast("list[int]", kernel)) == n else [2] * n
    mixed = frozenset(a for a, k in zip(range(ndim - n, ndim), cast("list[int]", sizes), strict=True) if k != 1)
    return Mixing("pool", x, mixed, tuple(range(ndim)))


def _reduction(node: Node, x: Node) -> Mixing:
    ndim = len(shape_of(x))
    names = [a.name for a in cast(Any, node.target)._schema.arguments]
    axes = _argument(node, names.index("dim"), "dim") if "dim" in names else None
    axes = range(ndim) if axes is None or axes == [] or _dtype_only(node) else [axes] if isinstance(axes, int) else axes
    mixed = frozenset(a % ndim for a in axes)
    keepdim = len(shape_of(node)) == ndim
    place = iter(range(ndim))
    out_axis = tuple(next(place) if keepdim or a not in mixed else None for a in range(ndim))
    return Mixing("reduction", x, mixed, out_axis, keeps_zero=op_name(node) == "sum")


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
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    "baddbmm": _baddbmm,
    **dict.fromkeys(("_grouped_mm", "transformers.grouped_mm_fallback"), _grouped_mm),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrence),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrence),
    **dict.fromkeys(("index", "index_put", "gather", "index_select", "index_add", "index_copy"), _index),
    **dict.fromkeys(("scatter", "scatter_add", "repeat_interleave"), _index),
    "glu": _glu,
    "type_as": lambda node, varying: Pointwise((cast(Node, node.args[0]),)),
    **dict.fromkeys(("topk", "sort", "max", "min", "argsort", "argmax", "argmin", "kthvalue", "median"), _ranking),
    "bilinear": _bilinear,
    "tensordot": _tensordot,
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _embedding),
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), _weight_norm),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "batch_norm"), _batch_norm),
    "_native_batch_norm_legit": _own_batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), _rms_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"), _softmax),
    "embedding": _embedding,
    "prelu": _prelu,
    "_prelu_kernel": lambda node, varying: Pointwise(tensor_inputs(node)),
}


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers; dropout does where it was traced in training."""
    tags = cast("list[torch.Tag]", getattr(node.target, "tags", []))
    idle_dropout = op_name(node).endswith("dropout") and not _argument(node, 2, "train", True)
    return torch.Tag.nondeterministic_seeded in tags and not idle_dropout


def varying_nodes(trace: Trace) -> frozenset[Node]:
    """Return the nodes whose value depends on the model's inputs, or on chance."""
    found = {n for n, s in trace.sources.items() if s.kind == "input"}
    for node in trace.nodes:
        if any(n in found for n in node.all_input_nodes) or is_random(node):
            found.add(node)
    return frozenset(found)


def gives_zero(node: Node, family: Pointwise, zeros: Collection[Node]) -> bool:
    """Tell whether an operation gives zero where some operands are, whatever the others hold: by running it."""
    generator = torch.Generator().manual_seed(0)

    def stand_in(n: Node) -> Any:
        if n not in family.operands:
            return tensor_of(n)
        noise = torch.zeros(64) if n in zeros else 3 * torch.randn(64, generator=generator)
        dtype = tensor_of(n).dtype
        return noise > 0 if dtype == torch.bool else noise.to(dtype)

    try:
        args, kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((node.args, node.kwargs), stand_in))
        result = cast(Any, node.target)(*args, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})
    except (RuntimeError, TypeError, IndexError):
        return False  # the operation wants another dtype or shape: claim less
    return isinstance(result, Tensor) and bool((result == 0).all())
