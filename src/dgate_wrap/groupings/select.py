"""`Select`: groups by rule, with union and difference."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import labels as lb
from ..errors import GroupingError
from .registry import Selection, groupings, lookup, needs_trace, parameter_shapes, resolve

Index = int | slice | Sequence[int]


class _Algebra:
    """Union and difference of selections."""

    def __or__(self, other: object) -> _Union:
        return _Union(self, as_selection(other))

    def __add__(self, other: object) -> _Union:
        return _Union(self, as_selection(other))

    def __sub__(self, other: object) -> _Difference:
        return _Difference(self, as_selection(other))


@dataclass(frozen=True, eq=False)
class Select(_Algebra):
    """Select parameters by rule and say which of their weights form a group.

    A parameter is selected if it meets every rule that is given. Selections combine with ``|`` (union, also ``+``)
    and ``-`` (difference: groups that share a weight with the right side are dropped whole).

    Args:
        source: A registered grouping, whose groups are selected; any other string is a glob, as ``names``.
        names: Glob, or globs, on qualified parameter names (``"*"`` also matches dots).
        regex: Regular expression that must match the whole qualified parameter name.
        types: Module type, or types, that must own the parameter.
        where: Predicate ``(name, parameter) → bool``.
        axis: The axis, or axes, along which each index is a group; ``None`` makes each parameter one group.
        block: Contiguous indices per group along a single axis.
        at: Which indices along ``axis`` are grouped: a slice, an index or a list; the rest stays ungated.
        label: Function ``(name, parameter) → int64 labels``, instead of ``axis``; numbers start at 0 in each parameter.
        share: Whether equal numbers are the same group on all selected parameters.
        merge: Index sequences; each makes one group of several. Indices number the groups that are selected otherwise,
            in the order of their labels: those of ``Select("input_features")`` as the input has its features.

    Raises:
        GroupingError: If rules contradict each other, or (when resolved) an axis, slice or merge does not fit.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> chosen = dg.Select(types=torch.nn.Linear, names="*.weight", axis=0, block=2) - "2.*"
        >>> len(dg.groups(dg.gate(net, chosen)))
        3
        >>> one_hot = dg.Select("in_channels", names="0.*", merge=[range(1, 4)])  # columns 1 to 3 live or die together
        >>> len(dg.groups(dg.gate(dg.ungate(net), one_hot)))
        2
    """

    source: str | None = None
    names: str | Sequence[str] | None = field(default=None, kw_only=True)
    regex: str | None = field(default=None, kw_only=True)
    types: type[nn.Module] | tuple[type[nn.Module], ...] | None = field(default=None, kw_only=True)
    where: Callable[[str, nn.Parameter], bool] | None = field(default=None, kw_only=True)
    axis: int | Sequence[int] | None = field(default=None, kw_only=True)
    block: int = field(default=1, kw_only=True)
    at: Index | None = field(default=None, kw_only=True)
    label: Callable[[str, nn.Parameter], Tensor] | None = field(default=None, kw_only=True)
    share: bool = field(default=False, kw_only=True)
    merge: Sequence[Sequence[int]] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        shape_rules = self.axis is not None or self.block != 1 or self.at is not None or self.label is not None
        problem = None
        if self._grouping and (shape_rules or self.share):
            problem = f"{self.source!r} is a grouping, whose groups axis, block, at, label and share cannot change"
        elif self.label is not None and (self.axis is not None or self.block != 1 or self.at is not None):
            problem = "label=... and axis=, block= or at= are both given"
        elif self.at is not None and (self.axis is None or not isinstance(self.axis, int)):
            problem = f"at={self.at!r} needs a single axis, and axis={self.axis!r}"
        elif not all(isinstance(cast(object, block), range | list | tuple) for block in self.merge):
            problem = f"merge={self.merge!r} holds something else than ranges, lists and tuples of indices"
        if problem:
            raise GroupingError(
                f"dg.Select: {problem}.",
                expected="one way to say what a group is",
                mend='dg.Select(names="layer1.*weight", axis=0, at=slice(0, 8))',
            )

    @property
    def _grouping(self) -> bool:
        return self.source is not None and self.source in groupings()

    @property
    def kind(self) -> str:
        """What reports call these groups."""
        return self.source if self.source is not None and self._grouping else "select"

    @property
    def needs_trace(self) -> bool:
        """Whether the underlying grouping reads the trace."""
        return self.source is not None and self._grouping and lookup(self.source).needs_trace

    def labels(self, model: nn.Module, trace: Any) -> dict[str, Tensor]:
        """Return the labels of the selected groups; empty if no parameter meets the rules."""
        chosen = self._parameters(model)
        if self.source is not None and self._grouping:
            [(_, found)] = resolve(self.source, model, trace)
            found = keep_inside(found, set(chosen))
        else:
            each = {name: self._label(name, p) for name, p in chosen.items()}
            found = each if self.share else lb.disjoint(each)
        return _merged(found, self.merge) if self.merge and found else found

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        globs = [self.names] if isinstance(self.names, str) else list(self.names or ())
        if self.source is not None and not self._grouping:
            globs.append(self.source)
        owner = {
            f"{m}.{n}" if m else n: mod
            for m, mod in model.named_modules()
            for n, _ in mod.named_parameters(recurse=False)
        }
        return {
            n: p
            for n, p in model.named_parameters()
            if (not globs or matches(n, globs))
            and (self.regex is None or re.fullmatch(self.regex, n))
            and (self.types is None or isinstance(owner[n], self.types))
            and (self.where is None or self.where(n, p))
        }

    def _label(self, name: str, p: nn.Parameter) -> Tensor:
        if self.label is not None:
            return self.label(name, p)
        try:
            found = lb.along(p, self.axis, block=self.block)
        except GroupingError as e:
            raise GroupingError(f"{name!r}: {e.found}", expected=e.expected, mend=e.mend) from None
        if self.at is None or not isinstance(self.axis, int):
            return found
        inside = torch.zeros(p.shape[self.axis], dtype=torch.bool)
        try:
            inside[self.at if isinstance(self.at, int | slice) else list(self.at)] = True
        except IndexError:
            raise GroupingError(
                f"{name!r} has {p.shape[self.axis]} indices on axis {self.axis}, and at={self.at!r}.",
                expected=f"indices from 0 to {p.shape[self.axis] - 1}",
                mend="use a slice that fits every selected parameter, or select fewer",
            ) from None
        shape = [n if a == self.axis % p.dim() else 1 for a, n in enumerate(p.shape)]
        return torch.where(inside.view(shape), found, lb.UNGATED)


@dataclass(frozen=True, eq=False)
class _Union(_Algebra):
    left: Any
    right: Any
    kind: str = "select"

    @property
    def needs_trace(self) -> bool:
        return needs_trace(self.left) or needs_trace(self.right)

    def labels(self, model: nn.Module, trace: Any) -> dict[str, Tensor]:
        a, b = (_first_labels(s, model, trace) for s in (self.left, self.right))
        shared = lb.overlap(a, b)
        if shared:
            raise GroupingError(
                f"both sides of a union select weights of {', '.join(map(repr, sorted(shared)))}.",
                expected="every weight in at most one group",
                mend="subtract one side first: a | (b - a)",
            )
        return lb.union(a, b)


@dataclass(frozen=True, eq=False)
class _Difference(_Algebra):
    left: Any
    right: Any

    @property
    def kind(self) -> str:
        return getattr(self.left, "kind", "select")

    @property
    def needs_trace(self) -> bool:
        return needs_trace(self.left) or needs_trace(self.right)

    def labels(self, model: nn.Module, trace: Any) -> dict[str, Tensor]:
        a, b = (_first_labels(s, model, trace) for s in (self.left, self.right))
        if not b:
            raise GroupingError(
                f"the right side of a difference, {self.right!r}, selects nothing.",
                expected="something to leave out",
                mend="print([n for n, _ in model.named_parameters()]) shows what a pattern can match",
            )
        return lb.drop_groups(a, lb.touching(a, b))


def _first_labels(selection: Any, model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Return checked labels of one side of an operator."""
    found = selection.labels(model, trace)
    lb.check(found, parameter_shapes(model), source=repr(selection))
    return found


def as_selection(other: object) -> Selection:
    """Return a selection for whatever stands beside an operator: a name, a glob, labels or a selection."""
    if isinstance(other, str):
        return Select(other)
    if isinstance(other, Selection):
        return other
    return _Given(other)


@dataclass(frozen=True, eq=False)
class _Given(_Algebra):
    """Labels or a callable beside an operator."""

    given: object

    @property
    def needs_trace(self) -> bool:
        return needs_trace(self.given)

    def labels(self, model: nn.Module, trace: Any) -> dict[str, Tensor]:
        [(_, found)] = resolve(self.given, model, trace)
        return found


def matches(name: str, globs: Sequence[str]) -> bool:
    """Tell whether a qualified name matches any of the globs."""
    return any(fnmatch.fnmatchcase(name, g) for g in globs)


def keep_inside(labels: lb.Labels, names: set[str]) -> dict[str, Tensor]:
    """Keep the groups that stand on these parameters only, whole."""
    outside = {n: t for n, t in labels.items() if n not in names}
    doomed = torch.cat([lb.used(t) for t in outside.values()]) if outside else torch.empty(0, dtype=torch.int64)
    return lb.drop_groups(labels, doomed)


def _merged(labels: lb.Labels, blocks: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Give all groups of a block the label of its first."""
    groups = torch.cat([lb.used(t) for t in labels.values()]).unique()
    counts = Counter(i for block in blocks for i in block)
    outside = [i for i in counts if i not in range(groups.numel())]
    twice = [i for i, n in counts.items() if n > 1]
    if outside or twice:
        bad = ", ".join(map(repr, (outside or twice)[:4]))
        raise GroupingError(
            f"dg.Select: merge={blocks!r} names {bad} "
            + ("of " if outside else "more than once, of ")
            + f"{groups.numel()} groups.",
            expected=f"blocks of indices from 0 to {groups.numel() - 1} that share none",
            mend="dg.Select(..., merge=[range(0, 2), ...]); print(dg.groups(model).names) of a model gated without "
            "merge shows the groups",
        )
    target = groups.clone()
    for block in filter(len, blocks):
        target[list(block)] = groups[min(block)]
    return {n: torch.where(t >= 0, target[torch.searchsorted(groups, t)], t) for n, t in labels.items()}


def restrict(
    kind: str,
    labels: lb.Labels,
    model: nn.Module,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> dict[str, Tensor]:
    """Keep the groups whose parameters all match ``include`` and none of which matches ``exclude``.

    Raises:
        GroupingError: If a glob matches no parameter, or no group is left.
    """
    names = list(parameter_shapes(model))
    wanted, unwanted = ([g] if isinstance(g, str) else list(g or ()) for g in (include, exclude))
    idle = [g for g in [*wanted, *unwanted] if not any(matches(n, [g]) for n in names)]
    if idle:
        raise GroupingError(
            f"{', '.join(map(repr, idle))} in include or exclude matches no parameter.",
            expected="globs on qualified parameter names, such as " + ", ".join(map(repr, names[:3])),
            mend='dg.gate(model, ..., exclude=["fc.*"])',
        )
    inside = {n for n in names if (not wanted or matches(n, wanted)) and not matches(n, unwanted)}
    kept = keep_inside(labels, inside)
    if not kept:
        groups = torch.cat([lb.used(t) for t in labels.values()]).unique()
        reach = {n: lb.used(t).numel() for n, t in labels.items() if n not in inside}
        most = sorted(reach, key=lambda n: -reach[n])
        where = ", ".join(f"{reach[n]} on {n!r}" for n in most[:4]) + (", and others" if most[4:] else "")
        raise GroupingError(
            f"include={include!r} and exclude={exclude!r} leave no group of {kind!r}: each of its {groups.numel()} "
            f"groups stands on a parameter that is left out ({where}), and a group is gated whole or not at all.",
            expected="at least one group that lies in included parameters only",
            mend=f"narrow exclude or widen include, so that {most[0]!r} is in, or leave {kind!r} out",
        )
    return kept
