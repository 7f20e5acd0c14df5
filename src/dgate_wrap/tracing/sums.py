"""Operations that sum products: of data with weights, and of data with data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .families import Attention, Bilinear, Cell, Contraction, Family, Lookup, Mixing, OpRule, Product, Recurrence
from .movements import move
from .nodes import argument, op_name, shape_of, tensor_inputs
from .rewrite import letters


def _apply_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _linear(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    if weight in varying or bias in varying or len(shape_of(weight)) != 2:
        return None
    last = len(shape_of(x)) - 1
    return Contraction(x, weight, bias, last, 1, 0, len(shape_of(node)) - 1, _apply_linear)


def _addmm(node: Node, varying: frozenset[Node]) -> Family | None:
    bias, x, weight = cast("tuple[Node, Node, Node]", node.args[:3])
    if node.kwargs or weight in varying or bias in varying or len(shape_of(bias)) != 1:
        return None
    return Contraction(x, weight, bias, 1, 0, 1, 1, torch.matmul)


def _matmul(node: Node, varying: frozenset[Node]) -> Family | None:
    a, b = cast("tuple[Node, Node]", node.args[:2])
    ndim_a, ndim_b = len(shape_of(a)), len(shape_of(b))
    if b not in varying and ndim_b == 2 and not is_sparse(b):
        return Contraction(a, b, None, ndim_a - 1, 0, 1, len(shape_of(node)) - 1, torch.matmul)
    if a not in varying and ndim_a == 2 and ndim_b >= 2 and not is_sparse(a):
        return Contraction(b, a, None, ndim_b - 2, 1, 0, ndim_b - 2, lambda x, w: torch.matmul(w, x))
    if not ndim_a or not ndim_b:
        return None
    batch = "abcdefgh"[: max(ndim_a, ndim_b, 2) - 2]
    a_axes = (batch[len(batch) - max(ndim_a - 2, 0) :] + "mk")[-ndim_a:] if ndim_a > 1 else "k"
    b_axes = batch[len(batch) - max(ndim_b - 2, 0) :] + "kn" if ndim_b > 1 else "k"
    out = batch + "m" * (ndim_a > 1) + "n" * (ndim_b > 1)
    return Product((a, b), a, b, a_axes, b_axes, out)


def is_sparse(node: Node) -> bool:
    """Tell whether a tensor is sparse, such as the neighbours of nodes: no rule looks at its elements."""
    return node.meta["val"].layout != torch.strided


def _grouped_mm(node: Node, varying: frozenset[Node]) -> Family | None:
    """Rows of x times one of several weights each, by offsets: its rows and columns are shared by all."""
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    if weight in varying or (len(shape_of(x)), len(shape_of(weight))) != (2, 3):
        return None
    return Product(tensor_inputs(node), x, weight, "mk", "ekn", "mn", aligned="kn")


def _einsum(node: Node, varying: frozenset[Node]) -> Family | None:
    operands = cast("list[Node]", node.args[1])
    terms, out = letters(cast(str, node.args[0]), [len(shape_of(n)) for n in operands])
    if len(operands) > 2 or any(len(set(t)) < len(t) for t in (*terms, out)):
        return None
    if len(operands) == 1:
        return _einsum_of_one(node, varying, operands[0], terms[0], out)
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


def _einsum_of_one(node: Node, varying: frozenset[Node], x: Node, axes: str, out: str) -> Family | None:
    """A transposition, or a sum that leaves the other axes in their order."""
    if len(axes) == len(out):
        return move(node, varying)
    if [c for c in axes if c in out] != list(out):
        return None
    mixed = frozenset(i for i, c in enumerate(axes) if c not in out)
    return Mixing("reduction", x, mixed, tuple(out.index(c) if c in out else None for c in axes), keeps_zero=True)


def _einsum_of(equation: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: torch.einsum(equation, x, w)


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


def _bilinear(node: Node, varying: frozenset[Node]) -> Family | None:
    x1, x2, weight, bias = (argument(node, i, n) for i, n in enumerate(("input1", "input2", "weight", "bias")))
    return None if weight in varying else Bilinear(tensor_inputs(node), x1, x2, weight, bias)


def _convolution(node: Node, varying: frozenset[Node]) -> Family | None:
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    name = op_name(node)
    groups = cast(int, argument(node, 8, "groups", 1))
    if name.startswith("conv_transpose"):
        transposed, groups = True, cast(int, argument(node, 6, "groups", 1))
    elif name == "convolution":
        transposed = bool(argument(node, 6, "transposed", False))
    else:
        transposed, groups = False, cast(int, argument(node, 6, "groups", 1))
    kernel = shape_of(weight)[2:]
    if weight in varying or bias in varying or len(shape_of(x)) != len(kernel) + 2:
        return None
    padding = argument(node, 4, "padding", 0)
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


def _attention(node: Node, varying: frozenset[Node]) -> Family | None:
    query, key, value = cast("tuple[Node, Node, Node]", node.args[:3])
    asking, asked, given = (shape_of(n)[-3] if len(shape_of(n)) >= 4 else 1 for n in (query, key, value))
    if asked != given:  # a key may serve more heads than a value does
        return None
    repeats = asking // given
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


def _embedding(node: Node, varying: frozenset[Node]) -> Family | None:
    table, indices = cast("tuple[Node, Node]", node.args[:2])
    return None if table in varying else Lookup(table, indices)


SUMS: dict[str, OpRule] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), _matmul),
    **dict.fromkeys(("_grouped_mm", "transformers.grouped_mm_fallback"), _grouped_mm),
    "einsum": _einsum,
    "tensordot": _tensordot,
    "bilinear": _bilinear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_GATES, _recurrence),
    **dict.fromkeys((f"{name}_cell" for name in _GATES), _recurrence),
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _embedding),
}
