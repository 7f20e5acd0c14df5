"""`explain`: before any training, what every parameter's groups are, and whether they could be cut out.

A group can go if each of its weights makes a channel that dies with the group, or reads one that does. A channel dies
if one group holds all weights that make it, and nothing holds it back; or all weights that read it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import GateError, GroupingError, TraceWarning
from .gates import gated_tensors
from .groupings.registry import lookup, needs_trace, resolve
from .groupings.select import restrict
from .labels import overlap
from .tracing import capture
from .verdicts import Judge, Part, count_by_severity

Verdict: TypeAlias = Literal["exactly", "with compensation", "no", "in part", "unknown"]
_VERDICTS: tuple[Verdict, ...] = ("exactly", "with compensation", "no")

_UNKNOWN = "no example was traced: explain it with example_inputs=..."


@dataclass(frozen=True)
class Explained:
    """What is known of one parameter.

    Args:
        name: Its first name.
        size: Number of weights.
        kinds: Groupings whose groups stand on it.
        groups: Number of those groups.
        exactly: How many of them can be cut out exactly.
        compensated: How many can be cut out if other weights are corrected.
        kept: How many cannot be cut out.
        verdict: What holds for all of them; ``"in part"`` if they differ and ``"unknown"`` if nothing was traced.
        reason: Why not, for most of those that cannot; or why no group stands on it.
        partners: The other parameters that its groups stand on.
    """

    name: str
    size: int
    kinds: tuple[str, ...]
    groups: int
    exactly: int
    compensated: int
    kept: int
    verdict: Verdict
    reason: str
    partners: tuple[str, ...]


@dataclass(frozen=True)
class KindTotal:
    """The groups of one grouping.

    Args:
        kind: Its name.
        groups: Number of groups.
        exactly: How many of them can be cut out exactly.
        compensated: How many can be cut out if other weights are corrected.
        kept: How many cannot be cut out.
        refused: Why it finds nothing in this model; empty if it does.
    """

    kind: str
    groups: int
    exactly: int = 0
    compensated: int = 0
    kept: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Explanation:
    """What a gated model could lose. Iterates over `Explained`, one row per parameter; prints as a table.

    Args:
        rows: One per parameter, in the order of the model.
        kinds: One per grouping.
        parameters: Number of parameters of the model.
        saved: How many of them could go at most: the weights of all groups that can be cut out, and all that nothing
            reads then; ``None`` if nothing was traced.
        barriers: Operations that froze something they met, with the source line, and how many channels.
        notes: What else is to be known: values that the example decides, groupings that overlap.
    """

    rows: tuple[Explained, ...]
    kinds: tuple[KindTotal, ...]
    parameters: int
    saved: int | None
    barriers: dict[str, int]
    notes: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Share of the parameters that could go at most; ``None`` if nothing was traced."""
        return None if self.saved is None else self.saved / max(self.parameters, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Explained]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Explained:
        """Return the row of a parameter."""
        return {r.name: r for r in self.rows}[name]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return one column per field of `Explained`, one entry per parameter."""
        return {f.name: [getattr(r, f.name) for r in self.rows] for f in fields(Explained)}

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per parameter (pandas must be installed)."""
        import pandas

        return pandas.DataFrame(self.to_dict())

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("parameter", "weights", "groups", "kind", "partners", "removable", "why")]
        for r in self.rows:
            first, more = r.partners[:1], len(r.partners) - 1
            partners = (first[0] if first else "-") + (f" +{more}" if more > 0 else "")
            verdict = r.verdict if r.groups else "-"
            table.append((r.name, f"{r.size:,}", str(r.groups), "+".join(r.kinds) or "-", partners, verdict, r.reason))
        widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(c.rjust(w) if i in (1, 2) else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in table
        ]
        lines += [_sentence(k, self.saved is not None) for k in self.kinds]
        if self.saved is not None and self.share is not None:
            lines.append(f"at most {self.saved:,} of {self.parameters:,} parameters can go ({self.share:.1%})")
        else:
            lines.append(_UNKNOWN)
        lines += [f"barrier: {reason}: {n} channels kept" for reason, n in self.barriers.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _sentence(k: KindTotal, known: bool) -> str:
    if k.refused:
        return f"{k.kind}: no groups: {k.refused}"
    counts = f": {k.exactly} can go exactly, {k.compensated} with compensation, {k.kept} not" if known else ""
    return f"{k.kind}: {k.groups} groups{counts}"


def explain(
    model: nn.Module,
    groups: object = "channels",
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Explanation:
    """Say of every parameter which groups stand on it, and whether they could be cut out, before any training.

    A group goes **exactly** if, once it is zero, its channels are zero, or a constant that folds into a bias, wherever
    they are read, and cutting them changes nothing else. It goes **with compensation** if other weights have to follow:
    an RMS-like norm over the channels, whose weight and eps depend on their number; layers whose channel groups, heads
    or stacked layers have to stay of equal size; a constant that a zero-padded convolution reads. Otherwise it does
    **not** go, and the reason names the operation and its source line. Each group is judged alone, by all weights that
    make, or all that read, the same channel: of two layers whose product is a channel, a group has to hold both.

    The model is not changed, and may be on the meta device. Registered groupings that find nothing in the model are
    reported, and raise no error; groupings may overlap here.

    Args:
        model: A model without gates.
        groups: As in `gate`: a name, a `Select`, labels, a callable, or a list of these.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs. Groupings that read no
            trace can do without; then it is not known what can be cut out.
        example_kwargs: Keyword inputs beside positional ones.
        include: Glob, or globs, on parameter names: only groups that lie wholly in matching parameters.
        exclude: Glob, or globs: no group that stands on a matching parameter.

    Returns:
        `Explanation`: prints as a table, iterates over `Explained`, converts with ``to_dict`` and ``to_pandas``.

    Raises:
        UnknownGroupingError: If no grouping has that name.
        GroupingError: If labels do not fit the model, or a selection, ``include`` and ``exclude`` leave nothing.
        GateError: If the model is no plain module, or is gated already.
        TraceError: If inputs are needed and missing or do not fit, or the model cannot be traced.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = dg.explain(net, "channels", torch.randn(3, 4))
        >>> [(row.name, row.groups, row.verdict) for row in found]
        [('0.weight', 8, 'exactly'), ('0.bias', 8, 'exactly'), ('2.weight', 0, 'no'), ('2.bias', 0, 'no')]
        >>> found.saved, found.parameters
        (56, 58)

    Reference:
        Kolb, Frost, Bischl, Rügamer, "Differentiable Sparsity via D-Gating", arXiv 2509.23898.
    """
    _check_model(model)
    trace = None
    if needs_trace(groups) or example_inputs is not None or example_kwargs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TraceWarning)  # the explanation says it
            trace = capture(model, example_inputs, example_kwargs)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    parts: list[Part] = []
    kinds: list[KindTotal] = []
    judge = None if trace is None else Judge(trace, {n: p.shape for n, p in model.named_parameters()})
    for entry in _entries(groups):
        try:
            pairs = resolve(entry, model, trace)
        except GroupingError as e:
            if not isinstance(entry, str):
                raise
            kinds.append(KindTotal(entry, 0, refused=e.found))
            continue
        for kind, found in pairs:
            part = Part(kind, found, restrict(kind, found, model, include, exclude), judge)
            parts.append(part)
            kinds.append(KindTotal(kind, part.count, *count_by_severity(part.verdicts)))
    rows = [_row(n, size, parts, kinds, judge) for n, size in sizes.items()]
    notes = [*getattr(trace, "notes", ()), *_overlaps(parts), *_strangers(parts, sizes)]
    saved = None if judge is None else judge.count_saved(parts)
    barriers = {} if judge is None else dict(judge.structure.barriers)
    return Explanation(tuple(rows), tuple(kinds), sum(sizes.values()), saved, barriers, tuple(notes))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise GateError(
            f"cannot explain a {type(model).__name__}.",
            expected="a torch.nn.Module that is not scripted",
            mend="pass the module itself",
        )
    if lazy := [n for n, p in model.named_parameters() if is_lazy(p)]:
        raise GateError(
            f"cannot explain: {', '.join(map(repr, lazy))} of a lazy module have no shape yet.",
            expected="parameters with shapes",
            mend="run the model once on an example, then explain it",
        )
    if gated_tensors(model):
        raise GateError(
            "cannot explain a model that is gated already.",
            expected="a model without gates",
            mend="dg.explain(dg.ungate(copy.deepcopy(model)), ...), or dg.groups(model) for the groups it has",
        )


def _entries(groups: object) -> Iterator[object]:
    """Yield the specifications of a list, however deep; an empty one is left to `resolve`, which raises."""
    if isinstance(groups, list | tuple) and groups:
        for entry in cast(Iterable[object], groups):
            yield from _entries(entry)
    else:
        if isinstance(groups, str):
            lookup(groups)
        yield groups


def _row(name: str, size: int, parts: Sequence[Part], kinds: Sequence[KindTotal], judge: Judge | None) -> Explained:
    """Explain one parameter."""
    mine = [p for p in parts if name in p.index]
    if not mine:
        return Explained(name, size, (), 0, 0, 0, 0, "no", _why_not(name, parts, kinds, judge), ())
    codes = torch.cat([p.on(name) for p in mine])
    total, counts = codes.numel(), count_by_severity(codes)
    verdict, reason = _overall(counts, total), ""
    if judge is None:
        verdict, reason = "unknown", _UNKNOWN
    else:
        reason, worst = judge.main_reason(codes)
        if reason and verdict == "in part":
            reason = f"{worst} of {total}: {reason}"
    partners = dict.fromkeys(p for part in mine for p in part.partners.get(name, ()))
    exactly, compensated, kept = counts
    stand = tuple(p.kind for p in mine)
    return Explained(name, size, stand, total, exactly, compensated, kept, verdict, reason, tuple(partners))


def _overall(counts: tuple[int, int, int], total: int) -> Verdict:
    if total not in counts:
        return "in part"
    return _VERDICTS[counts.index(total)]


def _why_not(name: str, parts: Sequence[Part], kinds: Sequence[KindTotal], judge: Judge | None) -> str:
    """Say why no group stands on a parameter."""
    if any(name in p.all_labels for p in parts):
        return "left out by include or exclude"
    why = judge.why_ungated(name, {k.kind for k in kinds}) if judge is not None else ""
    return why or f"not reached by {', '.join(repr(k.kind) for k in kinds)}"


def _overlaps(parts: Sequence[Part]) -> Iterator[str]:
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            if shared := overlap(a.labels, b.labels):
                names = ", ".join(map(repr, sorted(shared)[:3])) + (" and others" if len(shared) > 3 else "")
                yield f"{a.kind!r} and {b.kind!r} both hold weights of {names}: dg.gate takes one of them"


def _strangers(parts: Sequence[Part], sizes: Mapping[str, int]) -> Iterator[str]:
    names = sorted({n for p in parts for n in p.labels if n not in sizes})
    if names:
        yield f"{', '.join(map(repr, names))}: another parametrization stands there, and dg.gate refuses it"
