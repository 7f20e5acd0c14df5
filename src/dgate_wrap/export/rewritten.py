"""Modules that run a recipe in place of a forward that cannot follow smaller tensors, and the arguments of forwards."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
import types
from abc import ABCMeta
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ExportError
from .recipes import Recipe, build_graph, build_tree, match_tree, require_records

_FLAG = "use_cache"
"""A flag that models pass on to layers, which do nothing with it: the cache itself is another argument."""

_OUTPUTS = ("output_attentions", "output_hidden_states")
"""Flags of models that ask for more outputs; to say no is to leave them out."""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, for another one with the same tensors and submodules that may drop some."""
    found = {k: v for k, v in module.__dict__.items() if k not in ("forward", "_graft_run")}
    stores = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return found | {store: type(found[store])(found[store]) for store in stores}


class Rewritten(nn.Module):
    """A module of the user's whose forward is a graph, since its own code cannot follow the smaller tensors.

    It is of the class of the module that it stands for, with its other methods, and has its attributes, and those of
    its parameters, buffers and submodules that it needs, under their names; all that it has of its own starts with
    ``_graft_``, not to hide any of them. Its forward takes the same arguments; those that are no tensors must be what
    they were when it was exported.

    Args:
        original: The module that it stands for.
        recipe: What it does.
        constants: The constants of the recipe.
    """

    _graft_name: str
    _graft_recipe: Recipe
    _graft_signature: list[tuple[str, int, Any]]
    _graft_run: Callable[..., Any]
    _graft_kind: type[nn.Module] = nn.Module
    """The class of the module that it stands for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the classes of rewritten modules out of registries that the classes they stand for fill."""

    def __init__(self, original: nn.Module, recipe: Recipe, constants: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)  # and not that of the class it stands for
        self.__dict__.update(_attributes(original))
        again = isinstance(original, Rewritten)
        self.__dict__["_graft_name"] = original._graft_name if again else type(original).__name__
        self.__dict__["_graft_recipe"] = recipe
        self.__dict__["_graft_signature"] = plain_signature(original)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        separated: dict[str, nn.Module] = {"": self}
        held = {name for name, _ in self.named_modules(remove_duplicate=False)}
        for name in recipe.drops:
            owner, _, leaf = name.rpartition(".")
            if owner in held:  # else a module that others share is a forward written anew, which forgot it
                holder = self._graft_separate(owner, separated)
                if leaf in holder._parameters:  # as torch's layers have it, for code around it that asks
                    holder._parameters[leaf] = None
                holder._buffers.pop(leaf, None)
        self._graft_forget_idle(separated)
        require_records(recipe.gives)
        self._graft_compile()

    def _graft_separate(self, path: str, separated: dict[str, nn.Module]) -> nn.Module:
        """Return a submodule that no other module shares, with those around it: a copy, which has the same tensors."""
        if path not in separated:
            parent, _, leaf = path.rpartition(".")
            around = self._graft_separate(parent, separated)
            module = around.get_submodule(leaf)
            copy = separated[path] = object.__new__(type(module))
            copy.__dict__.update(_attributes(module))
            around._modules[leaf] = copy
        return separated[path]

    def _graft_forget_idle(self, separated: dict[str, nn.Module]) -> None:
        """Drop submodules that have no tensors and are not called."""
        called = [f"{target}." for _, op, target, *_ in self._graft_recipe.steps if op == "call_module"]
        called += [
            target.removesuffix("training") for _, op, target, *_ in self._graft_recipe.steps if op == "get_attr"
        ]
        modules = dict(self.named_modules())
        for path in sorted(modules, key=len, reverse=True)[:-1]:
            held = [*modules[path].parameters(), *modules[path].buffers()]
            if not held and not any(c.startswith(f"{path}.") or f"{path}.".startswith(c) for c in called):
                parent, _, leaf = path.rpartition(".")
                self._graft_separate(parent, separated)._modules.pop(leaf, None)

    def extra_repr(self) -> str:
        """Show which class it stands for in ``print(model)``."""
        return f"stands for {self._graft_name}"

    def train(self, mode: bool = True) -> Rewritten:
        """Set the mode, as the class it stands for does, unless that reaches for what is gone."""
        try:
            super().train(mode)
        except AttributeError:
            nn.Module.train(self, mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_graft_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._graft_compile()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revived, (self._graft_kind,), self.__getstate__()

    def _graft_compile(self) -> None:
        """Make the function that runs the graph; before the first call, which torch.compile may trace."""
        graph = build_graph(self._graft_recipe.steps)
        code = graph.python_code("self")
        source, scope = code.src, dict[str, Any](code.globals)
        for path in {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}:
            if any(map(keyword.iskeyword, path.split("."))):  # which code cannot name: ``self.heads.class``
                held = functools.reduce(lambda holder, name: f'getattr({holder}, "{name}")', path.split("."), "self")
                source = re.sub(rf"{re.escape(_dotted(path))}(?![\w.])", held, source)
        exec(compile(source, f"<{self._graft_name}, rewritten>", "exec"), scope)  # noqa: S102  # of known operations
        self.__dict__["_graft_run"] = scope["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the original takes and return what it returns."""
        arguments = bind(self._graft_signature, args, kwargs)
        found: dict[int, Any] = {}
        for name, tree in self._graft_recipe.takes["dict"].items():
            earlier = len(found)
            fits = match_tree(tree, arguments.get(name), found)
            forms = [self._graft_wanted(i, found[i]) for i in list(found)[earlier:]]
            unlike = [form for form in forms if form is not None]
            if not fits or unlike:
                form = unlike[0] if fits else _short(tree)
                raise ExportError(
                    f"the rewritten {self._graft_name} got {name}={_short(arguments.get(name))}.",
                    expected=f"{name} of the form it had when it was exported: {form}",
                    mend="export with example inputs of this form, or dg.export(..., rewrite=False) to keep its code",
                )
        if any(x.is_meta for x in self._buffers.values() if x is not None):
            self._graft_require_meta(found.values())
        results = self._graft_run(self, *(found[i] for i in range(len(found))))
        return build_tree(self._graft_recipe.gives, results)

    def _graft_require_meta(self, given: Iterable[Any]) -> None:
        """Require that what is given is on the meta device, as constants are: indices there would read anything."""
        held = {n: self._buffers.get(n) for n in self._graft_recipe.constants}
        lost = [n for n, x in held.items() if x is not None and x.is_meta]
        if lost and not all(x.is_meta for x in given if isinstance(x, Tensor)):
            raise ExportError(
                f"the rewritten {self._graft_name} lost its constants ({', '.join(lost)}) on the meta device.",
                expected="constants with values: they are buffers that are in no state dict",
                mend="dg.load(folder, YourModel()), or move the model without the meta device",
            )

    def _graft_wanted(self, i: int, value: Any) -> str | None:
        """Say what a given tensor should be, where it is something else that the graph cannot take."""
        if not isinstance(value, Tensor) or i >= len(self._graft_recipe.axes):
            return None
        if value.dim() != self._graft_recipe.axes[i]:
            return f"{self._graft_recipe.axes[i]} axes"
        if (
            i < len(self._graft_recipe.kinds) and kind_of(value) > self._graft_recipe.kinds[i]
        ):  # code would make masks bool
            return f"{_KINDS[self._graft_recipe.kinds[i]]}, not {value.dtype}"
        return None


def rewritten(original: nn.Module, recipe: Recipe, constants: dict[str, Tensor]) -> Rewritten:
    """Return a module that stands for another one, of its class too; the arguments are those of `Rewritten`."""
    kind = original._graft_kind if isinstance(original, Rewritten) else type(original)
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
    space: dict[str, Any] = {
        "_graft_kind": kind,
        "forward": forward,
        "__module__": __name__,
        "__doc__": Rewritten.__doc__,
    }
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
        return module._graft_signature
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
