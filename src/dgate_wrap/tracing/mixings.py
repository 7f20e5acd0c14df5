"""Operations that mix elements along some axes: norms, pooling, reductions, softmax."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch.fx import Node

from .families import Family, Mixing, NormedWeight, OpRule
from .nodes import argument, argument_names, names, op_name, shape_of, shape_of_value, tensor_of


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
    vectors = [cast("Node | None", argument(node, i, n)) for i, n in ((2, "weight"), (3, "bias"))]
    if any(v in varying for v in vectors if v is not None):
        return None
    mixed = range(ndim - len(sizes), ndim)
    links = [(v, a - mixed.start, a) for v in vectors if v is not None for a in mixed]
    return _norm(node, x, frozenset(mixed), links, vectors[0])


def _rms_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x, sizes = cast("tuple[Node, list[int]]", node.args[:2])
    ndim = len(shape_of(x))
    weight = cast("Node | None", argument(node, 2, "weight"))
    if weight in varying:
        return None
    mixed = range(ndim - len(sizes), ndim)
    links = [(weight, a - mixed.start, a) for a in mixed] if weight is not None else []
    return Mixing("norm", x, frozenset(mixed), tuple(range(ndim)), tuple(links), weight, keeps_zero=True, averages=True)


def _group_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x = cast(Node, node.args[0])
    vectors = [cast("Node | None", argument(node, i, n)) for i, n in ((2, "weight"), (3, "bias"))]
    if any(v in varying for v in vectors if v is not None):
        return None
    links = tuple((v, 0, 1) for v in vectors if v is not None)
    ndim = len(shape_of(x))
    groups = cast(int, node.args[1])
    return Mixing("norm", x, frozenset(range(1, ndim)), tuple(range(ndim)), links, vectors[0], groups=groups)


def _instance_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    x, *vectors = cast("list[Node | None]", list(node.args[:5]))
    if any(v in varying for v in vectors if v is not None):
        return None
    spatial = frozenset(range(2, len(shape_of(cast(Node, x)))))
    return _norm(node, cast(Node, x), spatial, [(v, 0, 1) for v in vectors if v is not None], vectors[0])


def _norm(node: Node, x: Node, mixed: frozenset[int], links: list[tuple[Node, int, int]], scale: Node | None) -> Mixing:
    return Mixing("norm", x, mixed, tuple(range(len(shape_of(x)))), tuple(links), scale)


def _weight_norm(node: Node, varying: frozenset[Node]) -> Family | None:
    v, g = cast("tuple[Node, Node]", node.args[:2])
    if v in varying or g in varying:
        return None
    return NormedWeight((v, g), v, g, cast(int, argument(node, 2, "dim", 0)))


def _prelu(node: Node, varying: frozenset[Node]) -> Family | None:
    x, slope = cast("tuple[Node, Node]", node.args[:2])
    if slope in varying:
        return None
    links = () if shape_of(slope) == (1,) else ((slope, 0, 1),)
    return Mixing("norm", x, frozenset(), tuple(range(len(shape_of(x)))), links)


def _softmax(node: Node, varying: frozenset[Node]) -> Family | None:
    x, axis = cast("tuple[Node, int]", node.args[:2])
    ndim = len(shape_of(x))
    return Mixing("scan", x, frozenset({axis % ndim}), tuple(range(ndim)))


_REDUCTIONS = names(
    """
    mean sum amax amin var var_mean std std_mean logsumexp all any prod linalg_vector_norm norm quantile nanquantile
    """
)
_POOLS = names(
    """
    max_pool{n}d max_pool{n}d_with_indices avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d
    _adaptive_avg_pool{n}d lp_pool{n}d upsample_linear{n}d upsample_bilinear{n}d upsample_trilinear{n}d
    upsample_bicubic{n}d _upsample_bilinear{n}d_aa _upsample_bicubic{n}d_aa
    """
)


def _pool(n: int, node: Node, varying: frozenset[Node]) -> Family | None:
    """Pool or resize over the last n axes; along an axis with a kernel and a stride of one, nothing mixes."""
    x = node.args[0]
    if not isinstance(x, Node):
        return None
    ndim = len(shape_of(x))
    mixed = range(ndim - n, ndim)
    if op_name(node).startswith(("max_pool", "avg_pool")):
        kernel = _each(n, argument(node, 1, "kernel_size"))
        stride = _each(n, argument(node, 2, "stride", []) or kernel)
        mixed = [a for a, k, s in zip(mixed, kernel, stride, strict=True) if k != 1 or s != 1]
    return Mixing("pool", x, frozenset(mixed), tuple(range(ndim)))


def _each(n: int, given: Any) -> list[int]:
    """Return a setting of every one of n axes: one value stands for all of them."""
    values = list(given) if isinstance(given, list | tuple) else [given]
    return values * n if len(values) == 1 else values


def _reduction(node: Node, varying: frozenset[Node]) -> Family | None:
    """``sum(x)`` and ``var(x, unbiased)``, without axes, reduce everything."""
    x = node.args[0]
    if not isinstance(x, Node) or (op_name(node).endswith("quantile") and _is_vector(node.args[1])):
        return None
    ndim, arguments = len(shape_of(x)), argument_names(node)
    given = argument(node, arguments.index("dim"), "dim") if "dim" in arguments else None
    axes = range(ndim) if given in (None, []) else [given] if isinstance(given, int) else given
    mixed = frozenset(a % ndim for a in axes)
    keepdim = len(shape_of_value(tensor_of(node))) == ndim
    place = iter(range(ndim))
    out_axis = tuple(next(place) if keepdim or a not in mixed else None for a in range(ndim))
    name = op_name(node)
    order = argument(node, 1, "ord" if "ord" in arguments else "p", 2) if "norm" in name else None
    adds = name == "sum" or (isinstance(order, int | float) and order > 0)  # zeros change nothing
    return Mixing("reduction", x, mixed, out_axis, keeps_zero=adds, averages=name == "mean")


def _sample(node: Node, varying: frozenset[Node]) -> Family | None:
    """Values of maps at points that another operand gives, by interpolation: of every channel the same ones."""
    x, grid = cast("tuple[Node, Node]", node.args[:2])
    ndim = len(shape_of(x))
    return Mixing("pool", x, frozenset(range(2, ndim)), tuple(range(ndim)), keeps_zero=True, where=(grid,))


def _is_vector(x: Any) -> bool:
    return isinstance(x, Node) and shape_of(x) != ()


_FOURIER = names(
    """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
    fft_fftn fft_ifftn fft_rfftn fft_irfftn
    """
)


def _fourier(node: Node, varying: frozenset[Node]) -> Family | None:
    x, name = cast(Node, node.args[0]), op_name(node)
    ndim, default = len(shape_of(x)), None if name.endswith("n") else [-2, -1] if name.endswith("2") else [-1]
    given = argument(node, argument_names(node).index("dim"), "dim", default)
    axes = [given] if isinstance(given, int) else range(ndim) if given is None else cast("list[int]", given)
    return Mixing("pool", x, frozenset(a % ndim for a in axes), tuple(range(ndim)), keeps_zero=True)


def _triangle(node: Node, varying: frozenset[Node]) -> Family | None:
    """Zeros take the place of what lies on one side of a diagonal, which depends on both of the last axes."""
    x = cast(Node, node.args[0])
    ndim = len(shape_of(x))
    return Mixing("pool", x, frozenset({ndim - 2, ndim - 1}), tuple(range(ndim)), keeps_zero=True)


MIXINGS: dict[str, OpRule] = {
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "batch_norm"), _batch_norm),
    "_native_batch_norm_legit": _own_batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), _rms_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), _weight_norm),
    "prelu": _prelu,
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), _softmax),
    **{name.format(n=n): functools.partial(_pool, n) for name in _POOLS for n in (1, 2, 3)},
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_FOURIER, _fourier),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _sample),
}
