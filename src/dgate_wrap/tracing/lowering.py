"""Write an exported program with the operations that the rules know.

``run_decompositions({})`` of torch does so for any program, by tracing all of it once more. Most programs need less:
few of their operations, such as ``reshape`` and ``batch_norm``, are made of others, which are traced here alone, one of
each kind; and what they write in place, such as activations, nothing else sees. That takes a fifth of the time. What no
rule knows and is made of others, such as a cosine similarity, is written as these too.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .operations import has_rule
from .parts import PARTS
from .recorder import SAME
from .slices import join_slices

_aten: Any = torch.ops.aten

CAST = "cast"
"""Marks nodes whose values are cast to the dtype that they have: in another precision they may have another one."""

DROPOUT = "dropout"
"""Marks copies that dropouts are in eval mode: which dropout of how much."""

_DROPOUTS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
_ASSERTIONS = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}


def lower(exported: ExportedProgram) -> ExportedProgram:
    """Return a program of functional operations; linear, convolution, attention and norms stay whole.

    The program that is given may be changed. Assertions, and what nothing needs, are left out.
    """
    graph = _lowered(exported.graph)
    if graph is None:
        exported._guards_code = []  # conditions on sizes, which a second trace would take minutes to write down
        exported = exported.run_decompositions(PARTS)
        graph = exported.graph
        _clean(graph)
    join_slices(graph)
    exported.graph_module.graph = graph
    return exported


def _clean(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target in SAME:  # nothing here has gradients
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _lowered(given: Graph) -> Graph | None:
    """Return a graph of functional operations; ``None`` if they cannot be told one by one."""
    if not all(_is_call(n) for n in given.nodes if n.op not in ("placeholder", "output")):
        return None
    if any(_is_composite(n.target) and reads_values(n) for n in given.nodes):  # numbers of two nodes of one kind differ
        return None
    graph = Graph()
    graph.output(graph.graph_copy(given, {}))
    _clean(graph)
    for node in [n for n in graph.nodes if _is_whole(n)]:
        node.replace_all_uses_with(cast(Node, node.args[0]))
        graph.erase_node(node)
    known: dict[str, Graph] = {}
    for node in [n for n in graph.nodes if _is_composite(n.target)]:
        if _is_idle_cast(node):
            cast(Node, node.args[0]).meta[CAST] = True
        if node.target in _DROPOUTS and node.args[1:] != (0.0, False):
            node.meta[DROPOUT] = node.target, node.args[1]
        if _may_alias(node.target):
            _replace(node, _parts(node, known))
        elif not has_rule(node):
            with contextlib.suppress(Exception):  # it looks at values, say
                _replace(node, _parts(node, known))
    graph.eliminate_dead_code()  # a dropout counts as random, and stays though nothing needs it, until it is a copy
    seen = set[Node]()
    for node in graph.nodes:
        if _writes(node.target) and not _write_out_of_place(node, seen):
            return None
        seen.add(node)
    graph.eliminate_dead_code()  # views of what was there before
    for node in [n for n in graph.nodes if n.target in PARTS and _has_parts(n)]:
        _replace(node, _parts(node, known))
    _merge_numbers(graph)
    return graph


def _is_call(node: Node) -> bool:
    """Tell whether a node calls an operation on tensors or numbers, and not a graph of its own."""
    op: Any = node.target
    if node.op != "call_function":
        return False
    return isinstance(op, OpOverload) or op is operator.getitem or is_symbol(node.meta.get("val"))


def is_symbol(value: Any) -> bool:
    """Tell whether a number is one that torch follows, such as an open size."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_idle_cast(node: Node) -> bool:
    """Tell whether a node casts floating-point numbers to the dtype that they have."""
    if not isinstance(node.target, OpOverload) or node.target.overloadpacket not in (_aten.to, _aten.type_as):
        return False
    x, y = cast(Node, node.args[0]).meta["val"], node.meta["val"]
    return x.dtype == y.dtype and y.is_floating_point()


def _is_whole(node: Node) -> bool:
    """Tell whether a node is a slice of all that there is, as open sizes leave it of a colon in ``x[:, :3]``."""
    return node.target is _aten.slice.Tensor and node.args[2:] in ((0, sys.maxsize), (0, sys.maxsize, 1))


def reads_values(node: Node) -> bool:
    """Tell whether a node gives a number, or a size, that follows from the values of a tensor."""
    parts = pytree.tree_leaves(node.meta.get("val"))
    numbers: list[Any] = [n for x in parts for n in (x.shape if isinstance(x, Tensor) else [x])]
    return any(is_symbol(n) and n.node.hint is None for n in numbers)


def _is_composite(op: Any) -> bool:
    """Tell whether an operation is made of others."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(op, OpOverload) and op.has_kernel_for_dispatch_key(composite)


def _kind(node: Node) -> str:
    """Say what an operation is called with: nodes of one kind are made of the same parts."""

    def shown(n: Node) -> str:
        x = n.meta["val"]
        place = node.all_input_nodes.index(n)
        return f"%{place}: {x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" if isinstance(x, Tensor) else f"%{x}"

    return f"{node.target} {torch.fx.map_arg((node.args, node.kwargs), shown)}"


def _mode_of(node: Node) -> Any:
    """Return the mode in which the values that a node reads were made."""
    values = [n.meta["val"] for n in node.all_input_nodes]
    [mode] = {cast(Any, x).fake_mode for x in values if isinstance(x, Tensor)}
    return mode


def _has_parts(node: Node) -> bool:
    """Tell whether an operation is made of others as it is called here."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), _mode_of(node), enable_python_dispatcher():
        return PARTS[node.target](*args, **kwargs) is not NotImplemented


def _parts(node: Node, known: dict[str, Graph]) -> Graph:
    """Return the graph of what an operation is made of, with one placeholder for each of its input nodes."""
    kind, inputs = _kind(node), node.all_input_nodes
    if kind in known:
        return known[kind]

    def call(*values: Any) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), dict(zip(inputs, values, strict=True)).__getitem__)
        return cast(Any, node.target)(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    with torch.no_grad(), _mode_of(node), enable_python_dispatcher():
        traced = make_fx(call, PARTS)(*(x.detach() if isinstance(x, Tensor) else x for x in values))
    traced.graph.eliminate_dead_code()
    known[kind] = traced.graph
    return traced.graph


def _replace(node: Node, part: Graph) -> None:
    """Put the parts of an operation in its place."""
    graph = node.graph
    values = dict[Node, Any](zip(part.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for inner in part.nodes:
            if inner.op == "call_function":
                values[inner] = graph.node_copy(inner, values.__getitem__)
                values[inner].meta = {**node.meta, "val": inner.meta["val"]}
    [output] = part.find_nodes(op="output")
    result = torch.fx.map_arg(output.args[0], values.__getitem__)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _merge_numbers(graph: Graph) -> None:
    """Let one node, the first, give all open sizes that are equal."""
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and is_symbol(value):
            same = first.setdefault((type(value), value.node.expr), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def _writes(op: Any) -> bool:
    return isinstance(op, OpOverload) and op._schema.is_mutable


def _write_out_of_place(node: Node, seen: set[Node]) -> bool:
    """Replace an operation that writes into its first operand by the one that returns the result.

    That is possible if the operand has memory of its own. It may be a part of such a tensor, as in ``mask[:4] = 1``:
    then the result is put into the tensor's place. Views of the tensor that are used later are taken again.
    """
    x, op = cast(Node, node.args[0]), _out_of_place(cast(OpOverload, node.target))
    parts = list[Node]()
    while x.target in _PUT_BACK:
        parts.append(x)
        x = cast(Node, x.args[0])
    if op is None or not _is_new(x):
        return False
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    old, new = cast(Node, node.args[0]).meta["val"], op(*args, **kwargs)
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    node.target = op
    made, graph = [node], node.graph

    def add(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        with graph.inserting_after(made[-1]):
            made.append(graph.call_function(target, args, kwargs))
        made[-1].meta = {**node.meta, "val": like.meta["val"]}
        return made[-1]

    for part in parts:
        whole, *at = part.args
        add(_PUT_BACK[part.target], (whole, made[-1], *at), dict(part.kwargs), cast(Node, whole))
    now = {x: made[-1]}

    def again(view: Node) -> Node:
        if view not in now:
            whole, *how = view.args
            now[view] = add(view.target, (again(cast(Node, whole)), *how), dict(view.kwargs), view)
        return now[view]

    stale = [(v, v) for v in (x, *_views(x)) if v in seen]
    for held, view in [*stale, (node, parts[0] if parts else x)]:
        if later := held.users.keys() - seen - {*made}:
            fresh = again(view)
            held.replace_all_uses_with(fresh, later.__contains__)
    return True


def _views(node: Node) -> list[Node]:
    """Return what shares, or may share, the memory of a tensor and was made from it."""
    return [v for u in node.users if _may_alias(u.target) for v in (u, *_views(u))]


def _out_of_place(op: OpOverload) -> OpOverload | None:
    """Return the operation that gives what another writes into its first operand."""
    written = [a for a in op._schema.arguments if a.alias_info is not None]
    packet = getattr(_aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None)
    if packet is None or written != op._schema.arguments[:1]:
        return None
    # of the overloads, those of the same name first: that of ``pow_.Scalar`` is ``pow.Tensor_Scalar``
    takes = [str(a.type) for a in op._schema.arguments]
    others = (getattr(packet, name) for name in sorted(packet.overloads(), key=lambda name: name != op._overloadname))
    return next((o for o in others if [str(a.type) for a in o._schema.arguments] == takes and not _writes(o)), None)


_PUT_BACK: dict[Any, OpOverload] = {
    _aten.slice.Tensor: _aten.slice_scatter.default,
    _aten.select.int: _aten.select_scatter.default,
}
"""What puts a tensor in the place of a part of another, by the operation that takes the part."""


def _is_new(node: Node) -> bool:
    """Tell whether a tensor has memory of its own."""
    if node.target is operator.getitem:
        return _is_new(cast(Node, node.args[0]))
    return node.op == "call_function" and not _may_alias(node.target)


def _may_alias(op: Any) -> bool:
    """Tell whether the result of an operation may share the memory of an operand."""
    if not isinstance(op, OpOverload):
        return op is operator.getitem
    return torch.Tag.maybe_aliasing_or_mutating in op.tags or any(a.alias_info for a in op._schema.arguments)
