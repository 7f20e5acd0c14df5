"""Graphs as plain data, and modules that run them in place of a forward that cannot follow smaller tensors.

A recipe is JSON: steps name operations of ``torch.ops.aten`` and the like, never code. So a saved network loads without
running anything that a file brings along.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import keyword
import operator
import re
import sys
import types
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..errors import ExportError, FileFormatError

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


_FLAG = "use_cache"
"""A flag that models pass on to layers, which do nothing with it: the cache itself is another argument."""

_OUTPUTS = ("output_attentions", "output_hidden_states")
"""Flags of models that ask for more outputs; to say no is to leave them out."""


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


def _require_records(tree: Any) -> None:
    """Require that every class of a tree is there."""
    if isinstance(tree, dict):
        [(kind, inner)] = cast("dict[str, Any]", tree).items()
        if kind == "record":
            _record(inner[0])
            _require_records(inner[1])
        elif kind in (*_DICTS, "list", "tuple"):
            for part in inner.values() if kind in _DICTS else inner:
                _require_records(part)


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


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, for another one with the same tensors and submodules that may drop some."""
    found = {k: v for k, v in module.__dict__.items() if k not in ("forward", "_run")}
    stores = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return found | {store: type(found[store])(found[store]) for store in stores}


class Rewritten(nn.Module):
    """A module of the user's whose forward is a graph, since its own code cannot follow the smaller tensors.

    It is of the class of the module that it stands for, with its other methods, and has its attributes, and those of
    its parameters, buffers and submodules that it needs, under their names. Its forward takes the same arguments; those
    that are no tensors must be what they were when it was exported.

    Args:
        original: The module that it stands for.
        recipe: What it does.
        constants: The constants of the recipe.
    """

    stands_for: str
    recipe: Recipe
    _signature: list[tuple[str, int, Any]]
    _run: Callable[..., Any]
    _kind: type[nn.Module] = nn.Module
    """The class of the module that it stands for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the classes of rewritten modules out of registries that the classes they stand for fill."""

    def __init__(self, original: nn.Module, recipe: Recipe, constants: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)  # and not that of the class it stands for
        self.__dict__.update(_attributes(original))
        again = isinstance(original, Rewritten)
        self.__dict__["stands_for"] = original.stands_for if again else type(original).__name__
        self.__dict__["recipe"] = recipe
        self.__dict__["_signature"] = plain_signature(original)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        separated: dict[str, nn.Module] = {"": self}
        held = {name for name, _ in self.named_modules(remove_duplicate=False)}
        for name in recipe.drops:
            owner, _, leaf = name.rpartition(".")
            if owner in held:  # else a module that others share is a forward written anew, which forgot it
                holder = self._separate(owner, separated)
                if leaf in holder._parameters:  # as torch's layers have it, for code around it that asks
                    holder._parameters[leaf] = None
                holder._buffers.pop(leaf, None)
        self._forget_idle(separated)
        _require_records(recipe.gives)
        self._compile()

    def _separate(self, path: str, separated: dict[str, nn.Module]) -> nn.Module:
        """Return a submodule that no other module shares, with those around it: a copy, which has the same tensors."""
        if path not in separated:
            parent, _, leaf = path.rpartition(".")
            around = self._separate(parent, separated)
            module = around.get_submodule(leaf)
            copy = separated[path] = object.__new__(type(module))
            copy.__dict__.update(_attributes(module))
            around._modules[leaf] = copy
        return separated[path]

    def _forget_idle(self, separated: dict[str, nn.Module]) -> None:
        """Drop submodules that have no tensors and are not called."""
        called = [f"{target}." for _, op, target, *_ in self.recipe.steps if op == "call_module"]
        called += [target.removesuffix("training") for _, op, target, *_ in self.recipe.steps if op == "get_attr"]
        modules = dict(self.named_modules())
        for path in sorted(modules, key=len, reverse=True)[:-1]:
            held = [*modules[path].parameters(), *modules[path].buffers()]
            if not held and not any(c.startswith(f"{path}.") or f"{path}.".startswith(c) for c in called):
                parent, _, leaf = path.rpartition(".")
                self._separate(parent, separated)._modules.pop(leaf, None)

    def extra_repr(self) -> str:
        """Show which class it stands for in ``print(model)``."""
        return f"stands for {self.stands_for}"

    def train(self, mode: bool = True) -> Rewritten:
        """Set the mode, as the class it stands for does, unless that reaches for what is gone."""
        try:
            super().train(mode)
        except AttributeError:
            nn.Module.train(self, mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._compile()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revived, (self._kind,), self.__getstate__()

    def _compile(self) -> None:
        """Make the function that runs the graph; before the first call, which torch.compile may trace."""
        graph = build_graph(self.recipe.steps)
        code = graph.python_code("self")
        source, scope = code.src, dict[str, Any](code.globals)
        for path in {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}:
            if any(map(keyword.iskeyword, path.split("."))):  # which code cannot name: ``self.heads.class``
                held = functools.reduce(lambda holder, name: f'getattr({holder}, "{name}")', path.split("."), "self")
                source = re.sub(rf"{re.escape(_dotted(path))}(?![\w.])", held, source)
        exec(compile(source, f"<{self.stands_for}, rewritten>", "exec"), scope)  # noqa: S102  # of known operations
        self.__dict__["_run"] = scope["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the original takes and return what it returns."""
        arguments = bind(self._signature, args, kwargs)
        found: dict[int, Any] = {}
        for name, tree in self.recipe.takes["dict"].items():
            earlier = len(found)
            fits = match_tree(tree, arguments.get(name), found)
            forms = [self._wanted(i, found[i]) for i in list(found)[earlier:]]
            unlike = [form for form in forms if form is not None]
            if not fits or unlike:
                form = unlike[0] if fits else _short(tree)
                raise ExportError(
                    f"the rewritten {self.stands_for} got {name}={_short(arguments.get(name))}.",
                    expected=f"{name} of the form it had when it was exported: {form}",
                    mend="export with example inputs of this form, or dg.export(..., rewrite=False) to keep its code",
                )
        results = self._run(self, *(found[i] for i in range(len(found))))
        return build_tree(self.recipe.gives, results)

    def _wanted(self, i: int, value: Any) -> str | None:
        """Say what a given tensor should be, where it is something else that the graph cannot take."""
        if not isinstance(value, Tensor) or i >= len(self.recipe.axes):
            return None
        if value.dim() != self.recipe.axes[i]:
            return f"{self.recipe.axes[i]} axes"
        if i < len(self.recipe.kinds) and kind_of(value) > self.recipe.kinds[i]:  # code would make masks bool
            return f"{_KINDS[self.recipe.kinds[i]]}, not {value.dtype}"
        return None


def rewritten(original: nn.Module, recipe: Recipe, constants: dict[str, Tensor]) -> Rewritten:
    """Return a module that stands for another one, of its class too; the arguments are those of `Rewritten`."""
    kind = original._kind if isinstance(original, Rewritten) else type(original)
    return _class_beside(kind)(original, recipe, constants)


@functools.cache
def _class_beside(kind: type[nn.Module]) -> type[Rewritten]:
    """Return the class of modules whose forward is a graph, and that are modules of a class of the user's too.

    One that copies or pickles its modules in a way of its own, notes which classes there are, or cannot be derived
    from, is left out.
    """
    special = {"__deepcopy__", "__reduce__", "__reduce_ex__"}
    own = {name for c in kind.__mro__ if c not in nn.Module.__mro__ for name in vars(c)}
    if kind is nn.Module or type(kind) not in (type, ABCMeta) or special & own:
        return Rewritten

    def forward(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        return Rewritten.forward(self, *args, **kwargs)

    name = f"Rewritten{kind.__name__}"
    space: dict[str, Any] = {"_kind": kind, "forward": forward, "__module__": __name__, "__doc__": Rewritten.__doc__}
    try:
        forward.__signature__ = inspect.signature(kind.forward)  # pyright: ignore[reportFunctionMemberAccess]
        return cast("type[Rewritten]", types.new_class(name, (Rewritten, kind), exec_body=lambda s: s.update(space)))
    except Exception:
        return Rewritten


def _revived(kind: type[nn.Module]) -> Rewritten:
    """Return a module whose forward is a graph, on the way from a pickle or copy; its state is set next."""
    return object.__new__(_class_beside(kind))


def _dotted(path: str) -> str:
    """Return how the code of a graph names what it holds."""
    found = "self"
    for name in path.split("."):
        found = f"{found}.{name}" if name.isidentifier() else f'getattr({found}, "{name}")'
    return found


_KINDS = ("truth values", "whole numbers", "numbers")


def kind_of(x: Tensor) -> int:
    """Tell whether a tensor holds truth values (0), whole numbers (1), or others (2)."""
    return 0 if x.dtype == torch.bool else 2 if x.is_floating_point() or x.is_complex() else 1


def plain_signature(module: nn.Module) -> list[tuple[str, int, Any]]:
    """Return name, kind and default of every parameter of a module's forward."""
    if isinstance(module, Rewritten):
        return module._signature
    parameters = inspect.signature(module.forward).parameters.values()
    return [(p.name, int(p.kind), None if p.default is p.empty else p.default) for p in parameters]


def bind(signature: list[tuple[str, int, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that a forward gives them."""
    given, rest = list(args), dict(kwargs)
    found: dict[str, Any] = {}
    for name, kind, default in signature:
        if kind == inspect.Parameter.VAR_POSITIONAL:
            found[name], given = tuple(given), []
        elif kind == inspect.Parameter.VAR_KEYWORD:
            found[name], rest = {k: v for k, v in rest.items() if k != _FLAG and not says_no(k, v)}, {}
        else:
            positional = given and kind != inspect.Parameter.KEYWORD_ONLY
            value = given.pop(0) if positional else rest.pop(name, default)
            found[name] = default if says_no(name, value) and not default else value
    if given or rest:
        raise TypeError(f"unexpected arguments: {len(given)} positional, {sorted(rest)}")
    found.pop(_FLAG, None)
    return found


def unbind(signature: list[tuple[str, int, Any]], found: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of those that `bind` found."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, kind, _ in (p for p in signature if p[0] in found):
        if kind == inspect.Parameter.VAR_POSITIONAL:
            args.extend(found[name])
        elif kind == inspect.Parameter.VAR_KEYWORD:
            kwargs.update(found[name])
        elif kind == inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = found[name]
        else:
            args.append(found[name])
    return tuple(args), kwargs


def says_no(name: int | str, value: Any) -> bool:
    """Tell whether an argument says no to outputs that nobody gets without it."""
    return name in _OUTPUTS and (value is None or value is False)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
