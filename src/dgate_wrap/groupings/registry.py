"""The registry of named groupings, and the one function that turns whatever a user gives into labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import GroupingError, UnknownGroupingError
from ..gates import computed_weights
from ..labels import Labels, check


@runtime_checkable
class Selection(Protocol):
    """What `Select` and the results of its operators can do."""

    def labels(self, model: nn.Module, trace: Any) -> Labels:
        """Return the labels of the selected groups."""
        ...


GroupingFunction: TypeAlias = Callable[[nn.Module, Any], "Labels | Selection"]
GroupSpec: TypeAlias = "str | Selection | Labels | Callable[..., Labels | Selection]"


@dataclass(frozen=True)
class Grouping:
    """A registered grouping.

    Args:
        name: The name that `gate` takes.
        function: ``(model, trace) → labels`` (or a `Select`); pure.
        needs_trace: Whether it reads the trace; then `gate` needs ``example_inputs``.
        doc: First line of the function's docstring.
    """

    name: str
    function: GroupingFunction
    needs_trace: bool
    doc: str


_REGISTRY: dict[str, Grouping] = {}


def register_grouping(name: str, *, needs_trace: bool = False) -> Callable[[GroupingFunction], GroupingFunction]:
    """Register a grouping under a name, as a decorator.

    The function takes ``(model, trace)`` and returns labels, or a `Select`. ``trace`` is ``None`` unless
    ``needs_trace``. Equal labels are one group, on whichever parameter they stand; ``-1`` is ungated.

    Args:
        name: The name under which `gate` finds it.
        needs_trace: Whether the function reads the trace.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        GroupingError: If the name is taken or is no string.

    Example:
        >>> import dgate_wrap as dg
        >>> @dg.register_grouping("quartets")
        ... def quartets(model, trace):
        ...     '''Four neighbouring neurons of every linear layer.'''
        ...     return dg.Select(types=torch.nn.Linear, names="*weight", axis=0, block=4)
        >>> "quartets" in dg.groupings()
        True
        >>> dg.unregister_grouping("quartets")
    """
    if not isinstance(cast(object, name), str) or not name:
        raise GroupingError(
            f"a grouping cannot be called {name!r}.",
            expected="a name, as a non-empty string",
            mend='@dg.register_grouping("my_groups")',
        )
    if name in _REGISTRY:
        raise GroupingError(
            f"a grouping called {name!r} is registered already ({_REGISTRY[name].doc})",
            expected="a name that is free",
            mend=f"choose another name, or call dg.unregister_grouping({name!r}) first",
        )

    def decorate(function: GroupingFunction) -> GroupingFunction:
        doc = (function.__doc__ or "").strip().partition("\n")[0]
        _REGISTRY[name] = Grouping(name, function, needs_trace, doc)
        return function

    return decorate


def unregister_grouping(name: str) -> None:
    """Forget a registered grouping.

    Raises:
        UnknownGroupingError: If there is none of that name.
    """
    lookup(name)
    del _REGISTRY[name]


def groupings() -> dict[str, Grouping]:
    """Return the registered groupings by name.

    Example:
        >>> import dgate_wrap as dg
        >>> print(dg.groupings()["filters"].doc)
        Every output channel of every convolution.
    """
    return dict(sorted(_REGISTRY.items()))


def lookup(name: str) -> Grouping:
    """Return the grouping of that name, or raise with the nearest names."""
    if name not in _REGISTRY:
        raise UnknownGroupingError(name, _REGISTRY)
    return _REGISTRY[name]


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """Return the shape of every parameter under each of its names; of a computed one also under its plain name.

    So a model that is gated in one part can be gated in another, and labels of a parametrized weight are recognized.
    """
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        shapes |= {f"{prefix}.{n}" if prefix else n: getattr(module, n).shape for n in computed_weights(module)}
    return shapes


def needs_trace(groups: object) -> bool:
    """Tell whether a specification of groups reads the trace."""
    if isinstance(groups, str):
        return lookup(groups).needs_trace
    if isinstance(groups, list | tuple):
        return any(needs_trace(g) for g in cast(Iterable[object], groups))
    return bool(getattr(groups, "needs_trace", False))


def kinds(groups: object) -> list[str]:
    """Return the kind of every grouping of a specification, in order, without resolving any.

    Raises:
        UnknownGroupingError: If a name is not registered.
        GroupingError: If a specification is of no known type.
    """
    if isinstance(groups, list | tuple):
        return [kind for entry in cast(Iterable[object], groups) for kind in kinds(entry)]
    if isinstance(groups, str):
        return [lookup(groups).name]
    if isinstance(groups, Selection):
        return [getattr(groups, "kind", "select")]
    if isinstance(groups, Mapping):
        return ["labels"]
    if callable(groups):
        return [getattr(groups, "__name__", "callable")]
    raise GroupingError(
        f"groups is a {type(groups).__name__}.",
        expected="a registered name, a dg.Select, a mapping of labels, a callable (model, trace) → labels, "
        "or a list of them",
        mend='dg.gate(model, "filters")',
    )


def resolve(groups: object, model: nn.Module, trace: Any = None) -> list[tuple[str, dict[str, Tensor]]]:
    """Turn a specification of groups into pairs of a kind and checked labels, one pair per grouping.

    Args:
        groups: A registered name, a `Select`, a mapping of labels, a callable, or a list of them.
        model: The ungated model.
        trace: Its trace, or ``None`` where nothing in ``groups`` needs one.

    Returns:
        ``(kind, labels)`` per entry; the labels name each parameter by its first name.

    Raises:
        UnknownGroupingError: If a name is not registered.
        GroupingError: If labels do not fit, nothing is selected, or a specification is of no known type.
    """
    if isinstance(groups, list | tuple):
        entries = list(cast(Iterable[object], groups))
        if not entries:
            raise GroupingError(
                "the list of groupings is empty.", expected="at least one grouping", mend='dg.gate(model, ["filters"])'
            )
        return [pair for entry in entries for pair in resolve(entry, model, trace)]
    [kind] = kinds(groups)
    result = groups
    if isinstance(groups, str):
        result = lookup(groups).function(model, trace)
    elif not isinstance(groups, Selection | Mapping):
        result = cast(GroupingFunction, groups)(model, trace)
    while isinstance(result, Selection):
        result = result.labels(model, trace)
    if not isinstance(result, Mapping):
        raise GroupingError(
            f"the grouping {kind!r} gave {type(result).__name__}.",
            expected="a mapping from parameter names to label tensors, or a dg.Select",
            mend="return {name: dg.along(p, 0) for name, p in model.named_parameters() if ...}",
        )
    labels = cast(Labels, result)
    check(labels, parameter_shapes(model), source=f"grouping {kind!r}")
    labels = _under_first_names(labels, model)
    if not any(bool((t >= 0).any()) for t in labels.values()):
        raise GroupingError(
            f"the grouping {kind!r} selects no weight of this model, whose modules are {_module_types(model)}.",
            expected="at least one group",
            mend="dg.groupings() lists the kinds; "
            "print([n for n, _ in model.named_parameters()]) lists what a pattern can match",
        )
    return [(kind, labels)]


def _under_first_names(labels: Labels, model: nn.Module) -> dict[str, Tensor]:
    """Name each tied parameter by its first name; two labellings of the same parameter must not overlap."""
    first: dict[int, str] = {}
    alias = {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
    out: dict[str, Tensor] = {}
    for name, t in labels.items():
        target = alias.get(name, name)
        if target in out and ((out[target] >= 0) & (t >= 0)).any() and not _equal(out[target], t):
            raise GroupingError(
                f"{name!r} and {target!r} are the same tied parameter, and their labels put weights in two groups.",
                expected="labels on one of the names only",
                mend=f"drop {name!r} from the labels",
            )
        out[target] = torch.where(out[target] >= 0, out[target], t) if target in out else t
    return out


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _module_types(model: nn.Module) -> str:
    return ", ".join(sorted({type(m).__name__ for m in model.modules()}))
