"""Graphs as plain data.

A recipe is JSON: steps name operations of ``torch.ops.aten`` and the like, never code. So a saved network loads without
running anything that a file brings along.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..errors import FileFormatError

_OPERATORS = {
    f.__name__: f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
        operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        operator.and_, operator.or_,
    )
}  # fmt: skip
_SYMBOLIC = {
    f.__name__: f
    for f in (
        torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_sum,
    )
}  # fmt: skip
_PROPERTIES: dict[str, Callable[[Tensor], Any]] = {
    "device": lambda x: x.device,
    "dtype": lambda x: x.dtype,
    "lowest": lambda x: torch.finfo(x.dtype).min,
    "highest": lambda x: torch.finfo(x.dtype).max,
}
_DICTS: dict[str, type[dict[str, Any]]] = {"dict": dict, "ordered": OrderedDict}
_FORBIDDEN = frozenset({"from_file", "_assert_async"})


@dataclass(frozen=True)
class Sized:
    """Stands for a whole number that follows from the sizes of the model's inputs, and is given to the graph."""

    index: int
    """Its place among what the graph is given: after the tensors."""


class UndescribableError(Exception):
    """A value that a recipe cannot hold; the message says which."""


# ---- values ---------------------------------------------------------------------------------------------------------


def describe_tree(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value as plain data, with tensors replaced by their numbers, and append the tensors.

    Raises:
        UndescribableError: If it holds anything but tensors, numbers, strings, lists, tuples, dicts, named tuples, and
            dataclasses into which torch looks, such as the outputs of Hugging Face.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Sized):
        return {"number": value.index}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe_tree(v, tensors) for v in value]}
    if type(value) in _DICTS.values() and all(isinstance(k, str) for k in cast("dict[Any, Any]", value)):
        kind = next(k for k, found in _DICTS.items() if found is type(value))
        return {kind: {k: describe_tree(v, tensors) for k, v in cast("dict[str, Any]", value).items()}}
    if (fields := _fields(value)) is not None:
        return {"record": [_path(type(value)), describe_tree(fields, tensors)]}
    raise UndescribableError(f"a {type(value).__name__}")


def without_unread(tree: Any, read: Collection[int]) -> Any:
    """Let anything stand in a tree for the tensors that nothing reads."""
    if not isinstance(tree, dict):
        return tree
    [(kind, inner)] = cast("dict[str, Any]", tree).items()
    if kind == "tensor":
        return tree if inner in read else {"any": inner}
    if kind in _DICTS:
        return {kind: {k: without_unread(t, read) for k, t in inner.items()}}
    if kind == "record":
        return {"record": [inner[0], without_unread(inner[1], read)]}
    return {kind: [without_unread(t, read) for t in inner]} if kind in ("list", "tuple") else tree


def match_tree(tree: Any, value: Any, found: dict[int, Any]) -> bool:
    """Find what the graph is given, by place, in a value that has the form of a tree; tell whether it has."""
    if not isinstance(tree, dict):
        return bool(type(value) is type(tree) and value == tree)
    [(kind, inner)] = cast("dict[str, Any]", tree).items()
    if kind == "tensor":
        found[inner] = value
        return isinstance(value, Tensor)
    if kind == "any":
        found[inner] = value
        return True
    if kind == "number":
        found[inner] = value
        return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
    if kind in _DICTS:
        return (
            isinstance(value, dict)
            and set(cast("dict[str, Any]", value)) == set(inner)
            and all(match_tree(t, cast("dict[str, Any]", value)[k], found) for k, t in inner.items())
        )
    if kind == "record":
        return _path(type(value)) == inner[0] and match_tree(inner[1], _fields(value), found)
    same = isinstance(value, list if kind == "list" else tuple) and len(cast("list[Any]", value)) == len(inner)
    return same and all(match_tree(t, v, found) for t, v in zip(inner, cast("list[Any]", value), strict=True))


def build_tree(tree: Any, tensors: Any) -> Any:
    """Put tensors into the form of a tree."""
    if not isinstance(tree, dict):
        return tree
    [(kind, inner)] = cast("dict[str, Any]", tree).items()
    if kind == "tensor":
        return tensors[inner]
    if kind in _DICTS:
        return _DICTS[kind]((k, build_tree(t, tensors)) for k, t in inner.items())
    if kind == "record":
        return _record(inner[0])(**build_tree(inner[1], tensors))
    made = [build_tree(t, tensors) for t in inner]
    return made if kind == "list" else tuple(made)


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a named tuple, or of a dataclass into which torch looks; ``None`` for anything else."""
    if _found(_path(type(value))) is not type(value) or any(leaf is value for leaf in pytree.tree_leaves(value)):
        return None
    if _is_named_tuple(type(value)):
        return value._asdict()
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _found(path: str) -> Any:
    """Return a dataclass or named tuple of a module that is loaded already, or ``None``. Nothing is imported."""
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if dataclasses.is_dataclass(found) or _is_named_tuple(found) else None


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_asdict")


def _record(path: str) -> Any:
    found = _found(path)
    if found is None:
        raise FileFormatError(
            f"the plan names the class {path!r}, which is no dataclass or named tuple of a module that is loaded.",
            expected="the classes of the outputs of the model that it was made of",
            mend="build the model first: dg.load(folder, MyModel())",
        )
    return found


def require_records(tree: Any) -> None:
    """Require that every class of a tree is there."""
    if isinstance(tree, dict):
        [(kind, inner)] = cast("dict[str, Any]", tree).items()
        if kind == "record":
            _record(inner[0])
            require_records(inner[1])
        elif kind in (*_DICTS, "list", "tuple"):
            for part in inner.values() if kind in _DICTS else inner:
                require_records(part)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def describe_graph(graph: Graph) -> list[list[Any]]:
    """Return a graph as steps ``[name, op, target, args, kwargs]``."""
    return [[n.name, n.op, _name_of(n), _describe(n.args), _describe(dict(n.kwargs))] for n in graph.nodes]


def build_graph(steps: list[list[Any]]) -> Graph:
    """Return the graph of steps.

    Raises:
        FileFormatError: If a step names an operation that no recipe holds.
    """
    graph, made = Graph(), dict[str, Node]()
    for name, op, target, args, kwargs in steps:
        function = _function(target) if op == "call_function" else target
        made[name] = graph.create_node(op, function, _build(args, made), _build(kwargs, made), name)
    return graph


def _name_of(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    target = cast(Any, node.target)
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}::{target._schema.name.split('::')[1]}.{target._overloadname}"
    if target is getattr:
        return "property"
    for group, functions in (("operator", _OPERATORS), ("torch", _SYMBOLIC)):
        if functions.get(target.__name__) is target:
            return f"{group}:{target.__name__}"
    raise UndescribableError(f"the function {target}")


def _function(name: str) -> Any:
    group, _, short = name.partition(":")
    if name == "property":
        return _property
    if group == "operator" and short in _OPERATORS:
        return _OPERATORS[short]
    if group == "torch" and short in _SYMBOLIC:
        return _SYMBOLIC[short]
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if rest and packet not in _FORBIDDEN and hasattr(getattr(torch.ops, namespace), packet):
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise FileFormatError(
        f"the plan names the operation {name!r}, which this torch {torch.__version__} does not have.",
        expected="operations of torch",
        mend="load with the torch version that saved it",
    )


def _property(value: Any, name: str) -> Any:
    """Return the device or dtype of a tensor, or an extreme of its dtype."""
    return _PROPERTIES[name](value)


def _describe(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if value - value == 0 else {"float": str(value)}
    if type(value) is complex:
        return {"complex": str(value)}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_describe(v) for v in cast("list[Any]", value)]}
    if isinstance(value, dict):
        return {"dict": {k: _describe(v) for k, v in cast("dict[str, Any]", value).items()}}
    raise UndescribableError(f"a {type(value).__name__}")


def _build(value: Any, made: dict[str, Node]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = cast("dict[str, Any]", value).items()
    if kind == "node":
        return made[inner]
    if kind == "torch":
        found = getattr(torch, inner, None)
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise FileFormatError(f"the plan names torch.{inner}.", expected="a dtype or layout", mend="save again")
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](inner)
    if kind == "device":
        return torch.device(inner)
    if kind == "dict":
        return {k: _build(v, made) for k, v in inner.items()}
    parts = [_build(v, made) for v in inner]
    return parts if kind == "list" else tuple(parts)


# ---- modules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a rewritten forward does, as plain data.

    Args:
        steps: Its graph.
        takes: The arguments of the forward by name, as a tree of tensors and values.
        gives: Its result, as a tree of tensors and values.
        constants: Shapes of the tensors that are constants by now, which the module holds as buffers.
        drops: Parameters and buffers that it does not read any more.
        axes: How many axes each tensor has that it is given, in their order.
        kinds: Whether each holds truth values (0), whole numbers (1), or others (2).
    """

    steps: list[list[Any]]
    takes: Any
    gives: Any
    constants: dict[str, list[int]]
    drops: list[str]
    axes: list[int] = field(default_factory=list[int])
    kinds: list[int] = field(default_factory=list[int])
