"""What every family of operations demands of the kept indices: one rule per family.

A rule makes the vectors of the tensors that an operation reads and makes grow, until it can run on what is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from functools import singledispatch
from itertools import pairwise, product
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.families import (
    Attention,
    Barrier,
    Bilinear,
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
from ..tracing.operations import is_tensor, op_name, shape_of
from .facts import Facts, makes
from .masks import largest, on_axis, others, project
from .vectors import NEEDED, Columns, Units, Vectors


@singledispatch
def demand(family: Family, node: Node, w: Vectors) -> None:
    """Make the vectors of what an operation reads and makes grow, until it can run."""
    assert isinstance(family, Barrier)
    for n in (*family.inputs, node):
        for out in w.facts.outputs(n):
            w.keep_whole(out, w.says(node, "an operation without a rule meets it"))


@demand.register
def _(family: Creation, node: Node, w: Vectors) -> None:
    if not w.follows(node) or not makes(node):
        w.keep_whole(node, w.written_down(node, "its size is written in the code"))


@demand.register
def _(family: Pick, node: Node, w: Vectors) -> None:
    """The node that it picks from speaks for it."""


@demand.register
def _(family: Pointwise, node: Node, w: Vectors) -> None:
    several = len(family.operands) > 1
    meeting = w.says(node, "it is added to, or multiplied by, something alive") if several else None
    for n in family.operands:
        w.broadcast(n, node, meeting)


@demand.register
def _(family: Mixing, node: Node, w: Vectors) -> None:
    results = [o for o in w.facts.outputs(node) if o in w.keep and len(w.keep[o]) > 0]
    for axis, out_axis in enumerate(family.out_axis):
        mixed = axis in family.mixed
        if mixed and family.groups > 1 and axis == 1:
            mixed = False
            _demand_whole_groups(w, family, node)
        elif mixed and family.averages and (w.allowed.rewrite or w.allowed.can_rescale(node)):
            _keep_nonzero(w, family, axis, node)
            mixed = family.kind == "reduction"
        elif mixed and family.keeps_zero and family.kind == "reduction":
            _keep_nonzero(w, family, axis, node)
        elif mixed:
            says = w.written_down if family.averages else w.says
            w.keep_axis(family.x, axis, says(node, "the operation works over the whole axis"))
        for out in results if out_axis is not None else ():
            assert out_axis is not None
            if out_axis >= len(w.keep[out]):  # a statistic with axes of its own
                w.keep_whole(out, NEEDED)
            elif mixed or w.keep[out][out_axis].numel() != w.keep[family.x][axis].numel():
                w.keep_axis(out, out_axis, NEEDED)
            else:
                w.link(family.x, axis, out, out_axis)
    for n in family.where:
        w.keep_whole(n, w.says(node, "it says what is taken from where"))
    for parameter, axis, x_axis in family.parameters:
        w.link(family.x, x_axis, parameter, axis)


def _demand_whole_groups(w: Vectors, family: Mixing, node: Node) -> None:
    """Keep or remove the groups of a group normalization as a whole."""
    kept = w.keep[family.x][1].view(family.groups, -1)
    kept = kept.any(1, keepdim=True).expand(kept.shape)
    w.grow(family.x, 1, kept.flatten(), w.says(node, "it is normalized together with something alive"))
    if not _regroups(w, node):
        w.keep_axis(family.x, 1, w.written_down(node, "the number of groups is written in the code"))


def _regroups(w: Vectors, node: Node) -> bool:
    """Tell whether an operation's number of groups follows: a layer's does, code may compute it from sizes."""
    return w.allowed.rewrite or w.allowed.can_regroup(node) or w.follows(node)


def _keep_nonzero(w: Vectors, family: Mixing, axis: int, node: Node) -> None:
    """Keep what adds a constant to a sum along an axis, if nothing that is added beside it can hold it."""
    if can_add(w, family, node):
        return
    if all(bool(k.any()) for o in w.facts.outputs(node) for k in w.keep[o]):
        adds = project(w.facts.nonzero_constant(family.x), axis)
        says = w.written_down if _is_plain_sum(family, node) else w.says
        w.grow(family.x, axis, adds, says(node, "it adds a constant to a sum"))


def can_add(w: Vectors, family: Mixing, node: Node) -> bool:
    """Tell whether constants can be added beside the terms of a sum: by a parameter, or in a forward written anew."""
    return _is_plain_sum(family, node) and (w.allowed.rewrite or w.allowed.can_carry(node))


def _is_plain_sum(family: Mixing, node: Node) -> bool:
    return family.kind == "reduction" and op_name(node) == "sum" and len(family.mixed) == 1


@demand.register
def _(family: Lookup, node: Node, w: Vectors) -> None:
    w.keep_axis(family.table, 0, w.says(node, "any row may be looked up"))
    for n in node.all_input_nodes:
        if n is not family.table:
            w.keep_whole(n, NEEDED)
    for i, out in enumerate(w.facts.outputs(node)):
        for axis in range(len(w.keep[out]) - (i == 0)):
            w.keep_axis(out, axis, NEEDED)
        if i == 0:
            w.link(family.table, 1, out, -1)


@demand.register
def _(family: Movement, node: Node, w: Vectors) -> None:
    results = w.facts.outputs(node)
    everything = [*family.inputs, *results]
    if all(w.full(n) for n in everything):
        return
    if not w.follows(node):
        for n in everything:
            w.keep_whole(n, w.written_down(node, "the sizes of this step are written in the code"))
        return
    if op_name(node) in _WRITES:  # what is written over still has the shape of the result
        for axis in range(len(w.keep[node])):
            w.link(family.inputs[0], axis, node, axis)
    for n, out in product(family.inputs, results):
        if 0 in (*shape_of(n), *shape_of(out)):
            _link_empty(w, n, out)
    if op_name(node) in ("expand", "expand_as"):
        w.broadcast(family.inputs[0], node, None)  # copies of what stays need not all stay
        return
    _move(w, node, family.inputs, results)


def _link_empty(w: Vectors, a: Node, b: Node) -> None:
    """Link the axes of two tensors of which one has no elements, whose other sizes have to agree nevertheless."""
    for axis, (m, n) in enumerate(zip(shape_of(a), shape_of(b), strict=False)):
        if m == n:
            w.link(a, axis, b, axis)


def _move(
    w: Vectors, node: Node, inputs: tuple[Node, ...], results: list[Node], broadcast: Collection[Node] = ()
) -> None:
    """Keep every element that comes from, or ends up in, one that stays; what is broadcast goes wherever it is met."""
    maps = w.facts.movement_map(node)
    inside = torch.cat([w.elements(n).flatten() & (n not in broadcast) for n in inputs])
    inside_why = torch.cat([w.element_why(n).flatten() for n in inputs])
    back = torch.full_like(inside_why, -1)
    for out in results:
        index = w.result_index(node, out)
        m = maps[index]
        constant = m < 0
        arrives = inside[m] & ~constant
        w.grow_elements(out, arrives, torch.where(arrives, inside_why[m], -1))
        leaves = w.elements(out) & ~constant
        back.scatter_reduce_(0, m[leaves], w.element_why(out)[leaves], "amax")
    sizes = [torch.Size(shape_of(n)) for n in inputs]
    for n, size, part in zip(inputs, sizes, back.split([s.numel() for s in sizes]), strict=True):
        w.grow_elements(n, (part >= 0).view(size), part.view(size))


@demand.register
def _(family: Indexing, node: Node, w: Vectors) -> None:
    places = family.moved
    alone = _demand_hooked if w.facts.is_hooked(family) else _demand_elementwise if family.each else None
    if alone is not None:
        alone(w, family, node)
        return
    for n in family.indices:
        w.keep_whole(n, NEEDED)
    order, said = w.facts.order(family), w.says(node, "it may be picked by an index")
    if order is not None and w.allowed.rewrite and w.follows(node):
        for axis in range(len(w.keep[node])):
            if axis not in family.axes:
                w.link(family.x, axis, node, axis)
        _move(w, node, places, [node])
        return
    if order is not None:
        said = w.written_down(node, "it may be picked by an index")
    for n in (*places, *([node] if family.same_axes else [])):
        for axis in family.axes if n is not family.source or family.adds else ():
            w.keep_axis(n, axis, said)
    if family.adds:
        for n in places:
            for axis in range(len(w.keep[node])):
                if axis not in family.axes:
                    w.link(n, axis, node, axis)
    elif not all(w.full(n) for n in (*places, node)):
        _move(w, node, places, [node], broadcast=[n for n in places[1:] if math.prod(shape_of(n)) == 1])


def _demand_hooked(w: Vectors, family: Indexing, node: Node) -> None:
    """Let the indices of a hook of an earlier export go with what they name; what it spreads that over stays."""
    [index], [axis], source = family.indices, family.axes, family.source
    for other in (a for a in range(len(w.keep[node])) if a != axis):
        for n in family.moved:
            w.link(n, other, node, other)
    said = w.says(node, "an earlier export left this size to the code around it")
    w.keep_axis(family.x, axis, said)
    if source is None:
        w.link(index, 0, node, axis)
        return
    w.keep_axis(node, axis, said)
    differs = project(w.facts.nonzero_constant(source), axis)
    beneath = project(w.facts.values[family.x] != 0, axis)
    w.grow(source, axis, differs | beneath[w.facts.values[index]], said)
    w.link(index, 0, source, axis)


_WRITES = ("slice_scatter", "select_scatter", "copy")


def _demand_elementwise(w: Vectors, family: Indexing, node: Node) -> None:
    """Link the axes that nothing is picked along, of x, the indices, what is written and the result."""
    said = w.says(node, "it may be picked by an index")
    everything = [family.x, *family.indices, *([family.source] if family.source is not None else []), node]
    for axis in range(len(w.keep[node])):
        even = len({w.keep[n][axis].numel() for n in everything}) == 1
        for a, b in pairwise(everything):
            if axis in family.axes or not even:
                w.keep_axis(a, axis, said)
                w.keep_axis(b, axis, said)
            else:
                w.link(a, axis, b, axis)


@demand.register
def _(family: Ranking, node: Node, w: Vectors) -> None:
    x, axis = family.x, family.axis
    w.keep_axis(x, axis, w.says(node, "everything along the axis is compared"))
    for out in w.facts.outputs(node):
        for a in range(len(w.keep[x])):
            if a == axis:
                if family.keeps_axis:
                    w.keep_axis(out, a, NEEDED)
            elif len(w.keep[out]):
                w.link(x, a, out, a if family.keeps_axis or a < axis else a - 1)


@demand.register
def _(family: Halves, node: Node, w: Vectors) -> None:
    for axis in range(len(w.keep[node])):
        if axis != family.axis:
            w.link(family.x, axis, node, axis)
    w.link_blocks(family.x, family.axis, node, family.axis, 2)


@demand.register
def _(family: NormedWeight, node: Node, w: Vectors) -> None:
    said = w.says(node, "the weight is normalized over it")
    for axis in range(len(w.keep[node])):
        if axis != family.axis and not w.allowed.can_rescale(node):
            w.grow(family.v, axis, project(w.facts.values[family.v] != 0, axis), said)
        w.link(family.v, axis, node, axis)
    if w.allowed.can_rescale(node) and all(bool(k.any()) for k in w.keep[node]):
        before, after = norms(w, family)
        v = w.facts.values[family.v].abs()
        for i in ((before > 0) & (after == 0) & w.keep[node][family.axis]).nonzero().flatten().tolist():
            one = torch.zeros_like(v, dtype=torch.bool)  # without a direction there is nothing to scale
            one.select(family.axis, i).copy_(largest(v.select(family.axis, i)))
            w.grow_elements(family.v, one, said)
    for axis, size in enumerate(shape_of(family.g)):
        if size == shape_of(family.v)[family.axis] and (size > 1 or axis == family.axis):
            w.link(family.g, axis, family.v, family.axis)
        else:
            w.keep_axis(family.g, axis, NEEDED)


def norms(w: Vectors, family: NormedWeight) -> tuple[Tensor, Tensor]:
    """Return ``‖v‖`` per index along the axis of its gain, of all its elements and of those that stay."""
    v, rest = w.facts.values[family.v], others(len(w.keep[family.v]), family.axis)
    kept = v
    for axis in rest:
        kept = kept * on_axis(w.keep[family.v][axis], axis, v.dim())
    return tuple(t.double().square().sum(rest).sqrt() for t in (v, kept))


@demand.register
def _(family: Bilinear, node: Node, w: Vectors) -> None:
    last = len(w.keep[node]) - 1
    for x, axis in ((family.x1, 1), (family.x2, 2)):
        for a in range(last):
            w.link(x, a, node, a)
        w.link(x, last, family.weight, axis)
        constant = project(w.facts.nonzero_constant(x), -1)
        used = project(w.facts.values[family.weight] != 0, axis)
        w.grow(x, last, constant & used, w.says(node, "it is a constant that cannot be folded here"))
    w.link(family.weight, 0, node, last)
    if family.bias is not None:
        w.link(family.bias, 0, node, last)


@demand.register
def _(family: Product, node: Node, w: Vectors) -> None:
    a, b = family.a, family.b
    places: dict[str, list[tuple[Node, int]]] = {}
    for n, axes in ((a, family.a_axes), (b, family.b_axes), (node, family.out_axes)):
        for axis, letter in enumerate(axes):
            places.setdefault(letter, []).append((n, axis))
    for letter, found in places.items():
        size = max(w.keep[n][axis].numel() for n, axis in found)
        full = [(n, axis) for n, axis in found if w.keep[n][axis].numel() == size]
        for n, axis in found:
            if (n, axis) not in full:
                w.keep_axis(n, axis, NEEDED)
            elif len(found) == 1:
                w.keep_axis(n, axis, w.says(node, "the operation works over the whole axis"))
        if letter not in family.out_axes and len(full) == 2:
            _sum_over(w, family, node, letter, full)
            continue
        for (n, i), (m, j) in pairwise(full):
            w.link(n, i, m, j)
        if letter not in family.out_axes and len(found) > 1:
            _keep_constants(w, family, node, letter, full[0])
    for n in family.inputs:
        if n not in (a, b):
            w.keep_whole(n, NEEDED)


def _sum_over(w: Vectors, family: Product, node: Node, letter: str, places: list[tuple[Node, int]]) -> None:
    """Sum over the same indices of both operands; a forward that is written anew may take part of a small one.

    As of the softmax of a router, which works over all experts, for those that live.
    """
    (n, i), (m, j) = sorted(places, key=lambda p: torch.Size(shape_of(p[0])).numel())
    small = 2 * torch.Size(shape_of(n)).numel() <= torch.Size(shape_of(m)).numel() and n in w.facts.varying
    spare = w.keep[n][i] & ~w.facts.needed_along(m)[j]
    if small and spare.any() and not spare.all():
        if w.allowed.rewrite and w.follows(node):
            w.grow(n, i, w.keep[m][j], w.why[m][j])
            adds = project(w.facts.nonzero_constant(m), j)
            w.grow(m, j, adds & w.keep[n][i], w.says(node, "it adds a constant to a sum"))
            _keep_constants(w, family, node, letter, (m, j))
            return
        w.grow(m, j, w.keep[n][i], w.written_down(node, "it meets an operand of which others need more"))
    w.link(m, j, n, i)
    _keep_constants(w, family, node, letter, (n, i))


def _keep_constants(w: Vectors, family: Product, node: Node, letter: str, place: tuple[Node, int]) -> None:
    """Keep the indices along a summed axis where two constants meet, if their product has nowhere else to go."""
    if w.allowed.can_carry(node) or not all(bool(k.any()) for k in w.keep[node]) or w.keep[place[0]][place[1]].all():
        return
    a, b = (w.facts.nonzero_constant(n) for n in (family.a, family.b))
    if a.any() and b.any():
        adds = torch.einsum(f"{family.a_axes},{family.b_axes}->{letter}", a.float(), b.float()) > 0
        w.grow(*place, adds, w.says(node, "it adds a constant to a sum"))


@demand.register
def _(family: Attention, node: Node, w: Vectors) -> None:
    query, key, value = family.query, family.key, family.value
    out = w.facts.outputs(node)[0] if not is_tensor(node) else node
    for extra in w.facts.outputs(node):
        if extra is not out:
            w.keep_whole(extra, NEEDED)
    ndim = len(w.keep[out])
    w.link(query, -1, key, -1)
    if not (w.allowed.rewrite or node.kwargs.get("scale") is not None):
        w.keep_axis(query, -1, w.written_down(node, "scores are scaled by the width of queries and keys"))
    w.grow(query, ndim - 1, w.facts.moves_scores(family), w.says(node, "it adds a constant to a sum"))
    w.link(value, -1, out, -1)
    w.link(query, -2, out, -2)
    w.link(key, -2, value, -2)
    for axis in range(ndim - 2):
        back = axis - ndim
        if back == -3 and family.repeats > 1:
            w.link(key, back, value, back)
            _share_heads(w, family, node, out)
            w.link(query, back, out, back)
            continue
        for n in (query, key, value):
            if w.keep[n][back].numel() == w.keep[out][back].numel():
                w.link(n, back, out, back)
            else:
                w.keep_axis(n, back, NEEDED)
    for n in family.inputs:
        if n not in (query, key, value):
            for axis in range(len(w.keep[n])):
                back = axis - len(w.keep[n])
                other = (key, -2) if back == -1 else (out, back)
                if w.keep[n][axis].numel() != w.keep[other[0]][other[1]].numel():
                    w.keep_axis(n, axis, NEEDED)
                elif back == -1:
                    w.link(n, axis, *other)
                else:
                    w.link_operand(node, n, axis, *other)


def _share_heads(w: Vectors, family: Attention, node: Node, out: Node) -> None:
    """Keep the same number of query heads for every key-value head that stays."""
    said = w.says(node, "query heads share keys and values in equal numbers")
    kept = w.keep[out][-3].view(-1, family.repeats)
    w.grow(family.value, -3, kept.any(1), NEEDED)
    groups = w.keep[family.value][-3]
    width = max(1, int(kept.sum(1).max()))
    missing = torch.where(groups, width - kept.sum(1), 0)
    free = ~kept
    w.grow(out, -3, (free & (free.cumsum(1) <= missing.unsqueeze(1))).flatten(), said)


@demand.register
def _(family: Recurrence, node: Node, w: Vectors) -> None:
    cells = range(len(family.layers))
    for layer in cells:
        _demand_cell(w, family, node, layer)
    results = w.facts.outputs(node)
    by_index = {w.result_index(node, o): o for o in results}
    last = list(cells)[-family.directions :]
    if (first := by_index.get(0)) is not None:
        _join(w, [_ends(w, family, node, layer) for layer in last], first, -1)
        for axis in range(len(w.keep[first]) - 1):
            w.link(family.x, axis, first, axis)
    _keep_batch(w, family, by_index)
    for index, out in by_index.items():
        live = w.facts.needed(out)
        for layer in cells if index else ():
            if family.single or bool(live[layer].any()):
                cell = family.single or index == 2
                w.link(Units(node, layer) if cell else _ends(w, family, node, layer), 0, out, -1)
    for i, state in enumerate(family.states):
        for layer in cells:
            key = Units(node, layer) if i else _ends(w, family, node, layer)
            if w.facts.unknown[state].any() or bool((w.facts.values[state] != 0).any()) or layer == 0:
                w.link(key, 0, state, -1)
    _even_out(w, family, node)


def _keep_batch(w: Vectors, family: Recurrence, results: dict[int, Node]) -> None:
    for n in (family.x, *family.states, *results.values()):
        for axis in range(len(w.keep[n]) - 1):
            w.keep_axis(n, axis, NEEDED)


def _ends(w: Vectors, family: Recurrence, node: Node, layer: int) -> Units:
    return Units(node, layer, projected=family.layers[layer].w_hr is not None)


def _join(w: Vectors, parts: list[Units], key: Hashable, axis: int) -> None:
    """Link an axis with the units that it holds one after another."""
    sizes = [w.keep[u][0].numel() for u in parts]
    w.grow(key, axis, torch.cat([w.keep[u][0] for u in parts]), torch.cat([w.why[u][0] for u in parts]))
    kept, why = w.keep[key][axis].split(sizes), w.why[key][axis].split(sizes)
    for units, some, reasons in zip(parts, kept, why, strict=True):
        w.grow(units, 0, some, reasons)


def _demand_cell(w: Vectors, family: Recurrence, node: Node, layer: int) -> None:
    w_ih, w_hh, b_ih, b_hh, w_hr = family.layers[layer]
    units, ends = Units(node, layer), _ends(w, family, node, layer)
    for key, size in ((units, shape_of(w_ih)[0] // family.gates), (ends, shape_of(w_hh)[1])):
        if key not in w.keep:
            w.keep[key] = [torch.zeros(size, dtype=torch.bool)]
            w.why[key] = [torch.full((size,), -1)]
    needed = w.facts.units.get(node)
    for key, i in ((ends, 0), (units, 1)):
        if needed is not None:
            w.grow(key, 0, needed[layer][i], NEEDED)
    for parameter in (w_ih, w_hh, b_ih, b_hh):
        if parameter is not None:
            w.link_blocks(parameter, 0, units, 0, family.gates)
    w.link(w_hh, 1, ends, 0)
    if w_hr is not None:
        w.link(w_hr, 0, ends, 0)
        w.link(w_hr, 1, units, 0)
    if layer < family.directions:
        w.link(w_ih, 1, family.x, -1)
    else:
        below = layer - layer % family.directions - family.directions
        _join(w, [_ends(w, family, node, below + d) for d in range(family.directions)], w_ih, 1)


def _even_out(w: Vectors, family: Recurrence, node: Node) -> None:
    """Keep the same number of units in every layer and direction."""
    said = w.says(node, "all layers and directions stay equally wide")
    units = [Units(node, layer) for layer in range(len(family.layers))]
    ends = [_ends(w, family, node, layer) for layer in range(len(family.layers))]
    narrow = _at_least(w, ends, 1, said)
    # torch tells a projection by its being narrower than the units
    _at_least(w, units, narrow + 1 if ends != units else 1, said)


def _at_least(w: Vectors, keys: list[Units], width: int, why: int) -> int:
    """Keep in each of several vectors as many indices as in the widest, and at least ``width``."""
    width = max(width, *(int(w.keep[k][0].sum()) for k in keys), 1)
    for key in keys:
        kept = w.keep[key][0]
        free = ~kept
        w.grow(key, 0, free & (free.cumsum(0) <= width - int(kept.sum())), why)
    return width


@demand.register
def _(family: Contraction, node: Node, w: Vectors) -> None:
    x, weight, bias = family.x, family.weight, family.bias
    if family.spatial:
        for key in (x, node, weight):
            for axis in range(2, len(w.keep[key])):
                w.keep_axis(key, axis, NEEDED)
        w.link(x, 0, node, 0)
    else:
        for axis in range(len(w.keep[x])):
            if axis != family.x_axis:
                w.link(x, axis, node, axis)
    if node in w.allowed.scattered:
        _scatter(w, family, node)
    elif bias is not None:
        w.link(bias, 0, node, family.out_axis)
    if x not in w.facts.varying:
        low, high = w.facts.extremes(x, family.x_axis)
        adds = (low != 0) | (high != 0)  # which no bias takes, so that it is trained further
        if family.groups == 1:
            adds = adds & project(w.facts.values[weight] != 0, family.w_in)
        w.grow(x, family.x_axis, adds, w.says(node, "it is computed from parameters alone"))
    if family.groups == 1:
        if node not in w.allowed.scattered:
            w.link(weight, family.w_out, node, family.out_axis)
        if node in w.allowed.picking:
            _pick(w, family, node)
        else:
            w.link(weight, family.w_in, x, family.x_axis)
    else:
        _demand_groups(w, family, node)


def _scatter(w: Vectors, family: Contraction, node: Node) -> None:
    """Compute the outputs that are not dead, of those that stay."""
    weight = family.weight
    rows = w.keep[node][family.out_axis] & computed_rows(w.facts, node, idle=w.allowed.leaves_idle)
    w.grow(weight, family.w_out, rows, w.why[node][family.out_axis])
    w.grow(node, family.out_axis, w.keep[weight][family.w_out], NEEDED)
    for other in (n for n in weight.users if n is not node and n in w.allowed.scattered):  # by the same hook
        w.link(node, family.out_axis, other, cast(Contraction, w.facts.families[other]).out_axis)
    if family.bias is not None:
        w.link(family.bias, 0, weight, family.w_out)


def _pick(w: Vectors, family: Contraction, node: Node) -> None:
    """Read the inputs that are not zero, of those that stay."""
    x, weight = family.x, family.weight
    columns = w.keep[x][family.x_axis] & read_columns(w.facts, node)
    w.grow(weight, family.w_in, columns, w.why[x][family.x_axis])
    w.grow(x, family.x_axis, w.keep[weight][family.w_in], NEEDED)
    for other in (n for n in weight.users if n is not node and n in w.allowed.picking):  # by the same hook
        reads = cast(Contraction, w.facts.families[other])
        w.link(x, family.x_axis, reads.x, reads.x_axis)


def _demand_groups(w: Vectors, family: Contraction, node: Node) -> None:
    """Keep whole groups, with the same number of inputs and of outputs in each."""
    weight, groups = family.weight, family.groups
    ends = ((family.x, family.x_axis), (node, family.out_axis))
    by_row, by_column = reversed(ends) if family.w_out == 0 else ends
    columns = Columns(weight)
    if columns not in w.keep:
        size = w.keep[by_column[0]][by_column[1]].numel()
        w.keep[columns] = [torch.zeros(size, dtype=torch.bool)]
        w.why[columns] = [torch.full((size,), -1)]
    w.link(columns, 0, *by_column)
    w.link(weight, 0, *by_row)
    w.keep_axis(weight, 1, NEEDED)
    equal = w.says(node, "the groups of a grouped convolution stay equally wide")
    used = torch.stack([w.keep[k][a].view(groups, -1).any(1) for k, a in ends]).any(0)
    if not used.any():
        return
    if not _regroups(w, node):
        equal = w.written_down(node, "the number of groups is written in the code")
        used = torch.ones_like(used)
    for key, axis in ends:
        kept = w.keep[key][axis].view(groups, -1)
        width = max(1, int(kept.sum(1).max()))
        missing = torch.where(used, width - kept.sum(1), 0)
        free = ~kept
        w.grow(key, axis, (free & (free.cumsum(1) <= missing.unsqueeze(1))).flatten(), equal)


def computed_rows(facts: Facts, node: Node, *, idle: bool) -> Tensor:
    """Mark the outputs of a contraction to which some weight leads; with ``idle``, none that nothing depends on."""
    family = cast(Contraction, facts.families[node])
    rows = project(facts.values[family.weight] != 0, family.w_out)
    return rows & facts.reached(node, family.out_axis) if idle else rows


def read_columns(facts: Facts, node: Node) -> Tensor:
    """Mark the inputs of a contraction that are not zero and from which some weight leads."""
    family = cast(Contraction, facts.families[node])
    low, high = facts.extremes(family.x, family.x_axis)
    some = project(facts.unknown[family.x], family.x_axis) | (low != 0) | (high != 0)
    return some & project(facts.values[family.weight] != 0, family.w_in)
