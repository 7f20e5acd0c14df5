"""Write tensors that are filled slice by slice (``k[..., :16] = a``, ``out[:, t] = h``) as the concatenations they are.

Such code makes a tensor, often without values, and writes one part of it after the other. As a chain of operations,
each reads the whole tensor, the memory without values included, and puts a slice of fixed place into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Graph, Node

_aten: Any = torch.ops.aten

_ZEROS: dict[Any, Any] = {
    _aten.empty.memory_format: _aten.zeros.default,
    _aten.new_empty.default: _aten.new_zeros.default,
    _aten.empty_like.default: _aten.zeros_like.default,
}
"""What makes memory without values, and what makes zeros of the same arguments."""


@dataclass(frozen=True)
class _Piece:
    """A tensor from one place to another along an axis; one layer of the axis that it lacks, if ``new``."""

    node: Node
    start: int
    end: int
    new: bool = False


def join_slices(graph: Graph) -> None:
    """Write slices that are put into tensors as concatenations, where sizes and places are numbers.

    What memory without values holds is nobody's to count on, so it holds zeros.
    """
    graph.eliminate_dead_code()  # what was there before a write
    for node in graph.nodes:
        if node.target in _ZEROS:
            node.target = _ZEROS[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format" or "like" in str(node.target)}
    chains: dict[Node, tuple[int, list[_Piece]]] = {}
    passing: set[Node] = set()
    for node in graph.nodes:
        if (found := _written(node)) is None:
            continue
        axis, start, end, piece = found
        whole = cast(Node, node.args[0])
        pieces = [_Piece(whole, 0, _size(whole, axis))]
        if whole in chains and chains[whole][0] == axis:
            pieces = chains[whole][1]
            passing |= {whole} if len(whole.users) == 1 else set()
        chains[node] = axis, _put(pieces, start, end, piece)
    joined: dict[Node, Node] = {}
    for node in [n for n in chains if n not in passing]:  # what one write hands to the next alone is never made
        joined[node] = _concatenated(node, *chains[node], joined)
        node.replace_all_uses_with(joined[node])
    graph.eliminate_dead_code()


def _size(node: Node, axis: int) -> Any:
    return node.meta["val"].shape[axis]


def _written(node: Node) -> tuple[int, int, int, _Piece] | None:
    """Return the axis, the places and the piece that an operation puts into its first operand."""
    if node.target not in (_aten.slice_scatter.default, _aten.select_scatter.default):
        return None
    whole, source, *rest = cast("tuple[Node, Node, Any]", node.args)
    named = {**dict(zip(_NAMES[node.target], rest, strict=False)), **node.kwargs}
    axis = named.get("dim", 0) % whole.meta["val"].dim()
    size, new = _size(whole, axis), "index" in named
    start, end = (named["index"],) * 2 if new else (named.get("start") or 0, named.get("end"))
    numbers = [size, start, size if end is None else end]
    if not all(type(n) is int for n in numbers) or named.get("step", 1) != 1:
        return None
    start, end = (start % size, start % size + 1) if new else slice(start, end).indices(size)[:2]
    return (axis, start, end, _Piece(source, 0, end - start, new)) if start < end else None


_NAMES = {
    _aten.slice_scatter.default: ("dim", "start", "end", "step"),
    _aten.select_scatter.default: ("dim", "index"),
}


def _put(pieces: list[_Piece], start: int, end: int, piece: _Piece) -> list[_Piece]:
    """Return pieces that lie side by side, after one was laid over them."""
    before: list[_Piece] = []
    after: list[_Piece] = []
    place = 0
    for old in pieces:
        last = place + old.end - old.start
        if place < start:
            before.append(replace(old, end=old.start + min(last, start) - place))
        if last > end:
            after.append(replace(old, start=old.start + max(place, end) - place))
        place = last
    return [*before, piece, *after]


def _concatenated(node: Node, axis: int, pieces: list[_Piece], joined: Mapping[Node, Node]) -> Node:
    """Make the nodes that lay pieces side by side, in front of the node that they stand for."""
    graph = node.graph

    def made(target: Any, args: tuple[Any, ...]) -> Node:
        new = graph.call_function(target, args)
        values = torch.fx.map_arg(args, lambda n: n.meta["val"])
        new.meta = {**node.meta, "val": target(*values)}
        return new

    def taken(piece: _Piece) -> Node:
        source = joined.get(piece.node, piece.node)
        if piece.new:
            return made(_aten.unsqueeze.default, (source, axis))
        if (piece.start, piece.end) == (0, _size(source, axis)):
            return source
        return made(_aten.slice.Tensor, (source, axis, piece.start, piece.end))

    with graph.inserting_before(node):
        parts = [taken(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else made(_aten.cat.default, (parts, axis))
