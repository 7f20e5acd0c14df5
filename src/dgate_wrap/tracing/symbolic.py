"""Capture a model with sizes left open, and the same graph with the sizes of the example.

Rules work on the graph of the example, where every size is a number. What is to run on other batch sizes and sequence
lengths is written from its twin, in which the sizes of the inputs that may vary are symbols.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from .capture import Trace, capture, export_open, trace_of
from .inputs import Inputs, normalize_inputs
from .lowering import is_symbol, reads_values
from .origins import operation, place_owners, spot_of
from .recorder import says_read
from .rewrite import split_einsums


@dataclass(frozen=True, eq=False)
class Symbolic:
    """The graph of a model with open sizes.

    Args:
        graph: Its nodes; placeholders are parameters, buffers and constants, then inputs.
        twins: For each of its nodes that gives tensors, the node of the example's graph.
        bounds: Per open size of the inputs, the axes that have it, as `Inputs.sizes` names them, and the least and the
            largest size (``None`` if there is none) at which the forward takes the branches that it took.
        by_batch: Whether only the batch was left open.
    """

    graph: Graph
    twins: dict[Node, Node]
    bounds: list[tuple[list[tuple[int, int]], int, int | None]]
    by_batch: bool = False


def capture_symbolic(
    model: nn.Module,
    example_inputs: object,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic: str = "all",
) -> tuple[Trace, Symbolic | None]:
    """Trace a model like `capture`, and with open sizes where the model allows.

    Where a trace in which all sizes are open fails, in formulas over sizes that the model asks to be what they are,
    only the batch is left open; so it is with ``dynamic="batch"``.

    Returns:
        The trace of the example, and its twin; ``None`` if there is no graph with open sizes.
    """
    inputs = normalize_inputs(example_inputs, example_kwargs)
    several = _several(inputs)
    for axes in (None, _batch(several))[dynamic == "batch" :]:
        with contextlib.suppress(Exception):
            return _capture_open(model, several, axes)
    return capture(model, inputs.args, inputs.kwargs), None


def _capture_open(
    model: nn.Module, inputs: Inputs, axes: set[tuple[int, int]] | None, *, as_given: bool = False
) -> tuple[Trace, Symbolic]:
    with _open_numbers(model), export_open(model, inputs, axes, as_given=as_given) as (exported, used):
        split_einsums(exported.graph_module)
        follow = [n for n in exported.graph.nodes if reads_values(n)]
        reads = [n for n in follow if not any(map(reads_values, n.all_input_nodes))]
        values = trace_of(model, used, exported).run() if reads else {}
        static, twins = _settle(exported, values)
        trace = trace_of(model, used, static, tuple(dict.fromkeys(says_read(spot_of(n)) for n in reads)))
        _give_out(trace, [twins[x] for n in reads for x in n.all_input_nodes])
        given = [n for n in exported.graph.nodes if n.op == "placeholder" and trace.sources[twins[n]].kind == "input"]
        bounds = _bounds(given, exported.range_constraints)
        return trace, Symbolic(exported.graph, twins, bounds, axes is not None)


def _give_out(trace: Trace, nodes: list[Node]) -> None:
    """Let a graph return the values of some nodes too: what a forward reads numbers off may not change."""
    [output] = trace.graph_module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *nodes),)


def _bounds(given: list[Node], ranges: Mapping[Any, Any]) -> list[tuple[list[tuple[int, int]], int, int | None]]:
    tensors = [x for n in given if isinstance(x := n.meta["val"], Tensor)]
    places: dict[Any, list[tuple[int, int]]] = {}
    for i, x in enumerate(tensors):
        for axis, size in enumerate(x.shape):
            if is_open(size):
                places.setdefault(cast(Any, size).node.expr, []).append((i, axis))
    found = [(at, ranges[size]) for size, at in places.items() if size in ranges]
    return [(at, int(r.lower), int(r.upper) if r.upper.is_Integer else None) for at, r in found]


def capture_part(model: nn.Module, path: str, inputs: Inputs, span: list[Node]) -> Symbolic | None:
    """Trace one module of a model alone with open sizes: they stay simple where those of the whole grow into formulas.

    Args:
        model: The model.
        path: The module.
        inputs: What the module is given when the model runs on the trace's inputs.
        span: What the module does there in the model's trace, in order.

    Returns:
        Its graph, of which the twins are nodes of the model's trace; ``None`` if there is none, or if it does something
        else, here or at other sizes.
    """
    module = model.get_submodule(path)
    with contextlib.suppress(Exception):
        alone, symbolic = _capture_open(module, inputs, None, as_given=True)
        pairs = _paired(alone, span)
        if pairs is None or any(_branches(inputs, *bounds) for bounds in symbolic.bounds):
            return None
        if alone.notes:  # it reads numbers off tensors that nothing in the model's trace keeps as they are
            return None
        for node in list(symbolic.graph.nodes):
            if node.op == "placeholder" and symbolic.twins[node] not in pairs:
                symbolic.graph.erase_node(node)  # which fails, as it should, if its sizes are used
        place_owners(symbolic.graph, path)
        twins = {n: pairs[t] for n, t in symbolic.twins.items() if t in pairs}
        return Symbolic(symbolic.graph, twins, symbolic.bounds)
    return None


def _branches(inputs: Inputs, at: list[tuple[int, int]], least: int, largest: int | None) -> bool:
    """Tell whether a forward takes another branch where a size is larger, or half as large."""
    return largest is not None or least > max(2, inputs.sizes[at[0]] // 2)


def _paired(alone: Trace, span: list[Node]) -> dict[Node, Node] | None:
    """Return the node of a model's trace for every node that a module's own needs; ``None`` if they do not the same.

    Copies do not count: a trace shows some where a recording shows none.
    """
    pairs: dict[Node, Node] = {}
    all_steps = [n for n in alone.nodes if n.op == "call_function"]
    steps, others = ([n for n in nodes if n is _original(n)] for nodes in (all_steps, span))
    if [operation(n) for n in steps] != [operation(n) for n in others]:
        return None
    for one, other in zip(steps, others, strict=True):
        theirs, ours = (_operands(n) for n in (one, other))
        if len(theirs) != len(ours):
            return None
        if any(pairs.setdefault(a, b) is not b for a, b in zip(theirs, ours, strict=True)):
            return None
        pairs[one] = other
    return pairs | {n: pairs[_original(n)] for n in all_steps if _original(n) in pairs}


_COPIES = ("aten.clone", "aten.alias", "aten.detach", "aten.contiguous", "aten.lift_fresh_copy")


def _original(node: Node) -> Node:
    while operation(node) in _COPIES:
        node = cast(Node, node.args[0])
    return node


def _operands(node: Node) -> list[Node]:
    """Return the nodes among the arguments of a node, each time that they are there."""
    return [_original(x) for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, Node)]


def _batch(inputs: Inputs) -> set[tuple[int, int]]:
    """Return the axes that are the batch, as `Inputs.sizes` names them: the first ones, as long as the first of all."""
    firsts = {at: size for at, size in inputs.sizes.items() if at[1] == 0}
    return {at for at, size in firsts.items() if size == next(iter(firsts.values()))}


@contextlib.contextmanager
def _open_numbers(model: nn.Module) -> Generator[None]:
    """Leave ``len(x)``, ``int(x)`` and ``int(a / b)`` of sizes open, in the files that the model's classes are in.

    Python wants plain integers of them, and torch would take those of the example for constants. A file that gives
    tensors the type ``int`` keeps that.
    """
    files = {c.__module__ for m in model.modules() for c in type(m).__mro__ if c.__module__.split(".")[0] != "torch"}
    modules = [sys.modules[f] for f in files & sys.modules.keys() - {"builtins"}]
    replaced = [(vars(m), name) for m in modules for name in _replaceable(m.__name__) if name not in vars(m)]
    for space, name in replaced:
        space[name] = _OPEN[name]
    try:
        yield
    finally:
        for space, name in replaced:
            del space[name]


@functools.cache
def _replaceable(file: str) -> list[str]:
    """Return the names that can be replaced in a file: not ``int`` beside ``dtype=int``, where torch wants that."""
    source = ""
    with contextlib.suppress(OSError, TypeError):  # a notebook, say
        source = inspect.getsource(sys.modules[file])
    typed = re.search(r"dtype\s*=\s*int\b|\.(to|type|astype)\(int\)", source)
    return [name for name in _OPEN if name != "int" or typed is None]


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)


class _OpenInt(type):
    """The type of a stand-in for ``int``."""

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is int

    def __hash__(cls) -> int:
        return hash(int)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a whole number; of a quotient of sizes the size that rounds it down, and of a tensor its number."""
        [value, *others] = args or (0,)
        if isinstance(value, Tensor) and not value.is_floating_point():
            value = value.item()
        if isinstance(value, torch.SymInt) and not others:
            return value
        if isinstance(value, torch.SymFloat) and not others:
            node = cast(Any, value.node)
            quotient = cast(Any, FloorDiv(*_fraction(node.expr)))
            if all(part.is_integer for part in quotient.args):
                return node.shape_env.create_symintnode(quotient, hint=None)
        return int(*args, **kwargs)


class _Int(metaclass=_OpenInt):
    """Stands for ``int``."""


_OPEN: dict[str, Any] = {"len": _length, "int": _Int}


def _fraction(expression: Any) -> tuple[Any, Any]:
    """Return numerator and denominator of a formula, as whole numbers as far as possible."""
    kind = type(expression).__name__
    if kind == "ToFloat":
        return _fraction(expression.args[0])
    if kind in ("FloatTrueDiv", "IntTrueDiv"):
        (a, b), (c, d) = map(_fraction, expression.args)
        return a * d, b * c
    whole = expression.is_number and float(expression).is_integer()
    return int(expression) if whole else expression, 1


def _several(inputs: Inputs) -> Inputs:
    """Return inputs of at least two examples: a size of one is taken for a constant."""

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(-1)]) if x.dim() else x

    tensors = [x for x in inputs.leaves() if isinstance(x, Tensor) and x.dim()]
    return inputs.map(twice) if tensors and all(x.shape[0] == 1 for x in tensors) else inputs


@dataclass(frozen=True)
class _Settled:
    """What `trace_of` reads of an exported program."""

    graph: Graph
    graph_module: GraphModule
    graph_signature: Any
    state_dict: dict[str, Any]
    constants: dict[str, Any]


def _settle(exported: torch.export.ExportedProgram, values: Mapping[Node, Any]) -> tuple[Any, dict[Node, Node]]:
    """Copy a graph with open sizes, with those of the example written in.

    Args:
        exported: The graph.
        values: What its nodes give on the example, where some of its numbers are read off tensors.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and _is_number(value):
            continue
        if node.op == "call_function" and value is None:  # an assertion
            continue
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda n: copies[n] if n in copies else values.get(n, _number(n.meta["val"]))
        )
        if node.op == "output":
            copies[node] = graph.output(args[0])
        else:
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        copies[node].meta = {**node.meta, "val": pytree.tree_map(_example, values.get(node, value))}
    module = GraphModule(exported.graph_module, graph)
    settled = _Settled(
        module.graph, module, exported.graph_signature, cast(Any, exported.state_dict), exported.constants
    )
    moved = dict(zip(graph.nodes, module.graph.nodes, strict=True))
    return settled, {n: moved[c] for n, c in copies.items() if n.op != "output"}


def is_open(size: Any) -> bool:
    """Tell whether a size is a symbol, not a number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _is_number(value: Any) -> bool:
    return is_symbol(value) or isinstance(value, int | float | bool)


def _number(value: Any) -> Any:
    return value.node.hint if is_symbol(value) else value


def _example(value: Any) -> Any:
    """Return a value with the sizes of the example."""
    if isinstance(value, Tensor):
        return torch.empty([operator.index(_number(n)) for n in value.shape], dtype=value.dtype, device="meta")
    return _number(value)
