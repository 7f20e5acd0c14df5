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
from .lowering import is_symbol
from .rewrite import split_einsums


@dataclass(frozen=True, eq=False)
class Symbolic:
    """The graph of a model with open sizes.

    Args:
        graph: Its nodes; placeholders are parameters, buffers and constants, then inputs.
        twins: For each of its nodes that gives tensors, the node of the example's graph.
    """

    graph: Graph
    twins: dict[Node, Node]


def capture_symbolic(
    model: nn.Module, example_inputs: object, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[Trace, Symbolic | None]:
    """Trace a model like `capture`, and with open sizes where the model allows.

    Where a trace in which all sizes are open fails, in formulas over sizes that the model asks to be what they are,
    only the batch is left open.

    Returns:
        The trace of the example, and its twin; ``None`` if there is no graph with open sizes.
    """
    inputs = normalize_inputs(example_inputs, example_kwargs)
    several = _several(inputs)
    for axes in (None, _batch(several)):
        with (
            contextlib.suppress(Exception),
            _open_numbers(model),
            export_open(model, several, axes) as (exported, used),
        ):
            split_einsums(exported.graph_module)
            static, twins = _settle(exported)
            return trace_of(model, used, static), Symbolic(exported.graph, twins)
    return capture(model, inputs.args, inputs.kwargs), None


def _batch(inputs: Inputs) -> set[tuple[int, int]]:
    """Return the axes that are the batch, as `Inputs.sizes` names them: the first ones, as long as the first of all."""
    firsts = {at: size for at, size in inputs.sizes.items() if at[1] == 0}
    return {at for at, size in firsts.items() if size == next(iter(firsts.values()))}


@contextlib.contextmanager
def _open_numbers(model: nn.Module) -> Generator[None]:
    """Leave ``len(x)`` and ``int(a / b)`` of open sizes open, in the files in which the model's classes are written.

    Python wants plain integers of both, and torch would take those of the example for constants. A file that gives
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
        """Return a whole number; of a quotient of sizes, the size that rounds it down."""
        [value, *others] = args or (0,)
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


def _settle(exported: torch.export.ExportedProgram) -> tuple[Any, dict[Node, Node]]:
    """Copy a graph with open sizes, with those of the example written in."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and _is_number(value):
            continue
        if node.op == "call_function" and value is None:  # an assertion
            continue
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda n: copies[n] if n in copies else _number(n.meta["val"])
        )
        if node.op == "output":
            copies[node] = graph.output(args[0])
        else:
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        copies[node].meta = {**node.meta, "val": pytree.tree_map(_example, value)}
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
