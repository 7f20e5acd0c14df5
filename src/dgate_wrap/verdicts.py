"""Verdicts: which groups can be cut out, by the channels that their weights make, adjust or read.

A verdict is one number: how severe it is, then how much its reason says (0 says most), then the number of the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from .labels import Labels, components, used
from .tracing import Structure, Trace, find_structure
from .tracing.families import Contraction, Product, Recurrence
from .tracing.interpreter import Interpreter
from .tracing.operations import describe, varying_nodes
from .tracing.origins import operation, where
from .tracing.structure import FIXED, UNMOVABLE, ZERO, compact, label_of, state_of

_OF_CHANNELS = frozenset({"channels", "hidden", "heads", "embedding_dims", "rnn"})
"""Groupings that leave a channel out for what the structure says about it."""

_HELD = ("output", *(f for f in UNMOVABLE if f != "output"))
"""Flags that keep a channel, the one that says most first."""

_EXACTLY, _COMPENSATED, _KEPT = 0, 1, 2
_SEVERITY, _RANK = 1 << 40, 1 << 32


def _code(severity: int, rank: int, text: int) -> int:
    return severity * _SEVERITY + rank * _RANK + text


class _Staying(Interpreter):
    """Interprets as if biases, scales and norm parameters stayed when the weights of their channels are zero."""

    def _adjust(self, *args: Any, **kwargs: Any) -> int:
        super()._adjust(*args, **kwargs)
        return FIXED

    def _words(self, node: Node) -> Any:
        first = node not in self.structure.words
        words = super()._words(node)
        source = self.trace.sources.get(node)
        acts = any(u in self.varying for u in node.users)
        if first and source is not None and source.kind == "parameter" and isinstance(words, Tensor) and acts:
            stays = torch.where((words >= 0) & (state_of(words) == ZERO), label_of(words) * 4 + FIXED, words)
            words = self.structure.words[node] = stays
        return words


@dataclass(frozen=True)
class _Use:
    """The classes that the weights of a parameter make, adjust or read."""

    name: str
    classes: Tensor
    kind: Literal["makes", "adjusts", "reads"]

    @property
    def present(self) -> Tensor:
        return self.classes.flatten()[self.classes.flatten() >= 0]


class Judge:
    """Decides which groups can go, by the flags of the channels that they hold.

    Args:
        trace: The trace.
        shapes: Shapes of the parameters.
    """

    def __init__(self, trace: Trace, shapes: Mapping[str, torch.Size]) -> None:
        self.trace, self.shapes = trace, shapes
        self.structure = find_structure(trace)
        self.size = len(self.structure.sets)
        self._texts: list[str] = [""]
        self._numbers: dict[str, int] = {"": 0}
        self._staying: tuple[Tensor, Tensor] | None = None
        varying = varying_nodes(trace)
        self.families = {n: describe(n, varying) for n in trace.nodes if n.op == "call_function"}
        self.names = list(shapes)
        self.uses: dict[str, list[_Use]] = {}
        for s in self.structure.slots:
            self._use(s.name, s.labels, "makes" if s.producer else "adjusts")
        for r in self.structure.readers:
            self._use(r.name, r.labels, "reads")
        self.flags = {name: self._flags(self.structure, name) for name in self.structure.notes}
        self.elsewhere = self._read_elsewhere()
        self.stacked = self._stacked()
        self.padded = self._padded(self.structure)

    def _use(self, name: str, labels: Tensor, kind: Literal["makes", "adjusts", "reads"]) -> None:
        if name in self.shapes:
            found = _aligned(compact(self.structure.classes(labels)), len(self.shapes[name]))
            self.uses.setdefault(name, []).append(_Use(name, found, kind))

    def number(self, text: str) -> int:
        """Return the number of a reason."""
        if text not in self._numbers:
            self._numbers[text] = len(self._texts)
            self._texts.append(text)
        return self._numbers[text]

    def text(self, number: int) -> str:
        """Return the reason of a number."""
        return self._texts[number]

    def main_reason(self, verdicts: Tensor) -> tuple[str, int]:
        """Return the most frequent reason of the severest of some verdicts, and how many of these there are."""
        worst = verdicts[verdicts >= int(verdicts.max()) // _SEVERITY * _SEVERITY]
        return self.text(int((worst % _RANK).mode().values)), worst.numel()

    def _flags(self, structure: Structure, name: str, more: str = "") -> Tensor:
        """Return, per class, the number of the first reason for a flag; 0 where it has none."""
        out = torch.zeros(self.size, dtype=torch.int64)
        for note in reversed(structure.notes.get(name, [])):
            out[self.structure.classes(note.labels)] = self.number(note.reason + more)
        return out

    def flag(self, name: str) -> Tensor:
        """Return, per class, the number of the first reason for a flag; 0 where it has none."""
        return self.flags.get(name, torch.zeros(self.size, dtype=torch.int64))

    def _read_elsewhere(self) -> Tensor:
        """Return, per class, the reading that is none of the recorded columns of a weight: a sum, a product."""
        columns: dict[int, list[Tensor]] = {}
        for r in self.structure.readers:
            columns.setdefault(r.order, []).append(self.structure.classes(r.labels).flatten())
        out = torch.zeros(self.size, dtype=torch.int64)
        for note in self.structure.notes.get("read", []):
            found = self.structure.classes(note.labels)
            known = columns.get(note.order, [])
            out[found[~torch.isin(found, torch.cat(known))] if known else found] = self.number(note.reason)
        return out

    def _stacked(self) -> Tensor:
        """Return the classes of recurrent layers that one module stacks, or runs in both directions."""
        out = torch.zeros(self.size, dtype=torch.int64)
        for node, family in self.families.items():
            if not isinstance(family, Recurrence) or len(family.layers) < 2:
                continue
            weights = {self.trace.sources[w].name for layer in family.layers for w in layer if w in self.trace.sources}
            text = self.number(f"layers stacked in one module have equal widths ({operation(node)}, {where(node)})")
            for use in (u for n in weights for u in self.uses.get(n, []) if u.kind == "makes"):
                out[use.present] = text
        return out

    def _padded(self, structure: Structure) -> Tensor:
        """Return the classes that are a constant, not zero, where what reads them has no bias to take it over."""
        out = torch.zeros(self.size, dtype=torch.int64)
        for node, family in self.families.items():
            if isinstance(family, Contraction) and family.padded:
                read, since = [family.x], "zeros are padded"
            elif isinstance(family, Recurrence) and any(m.bias is None for m in family.maps):
                read, since = [family.x], "the layer has none"
            elif isinstance(family, Product) and any(
                n in self.trace.sources and family.weighs(n) for n in family.inputs[:2]
            ):
                read, since = [family.a, family.b], "the sum has none"
            else:
                continue
            for held in (structure.words.get(n) for n in read):
                if isinstance(held, Tensor):
                    words = compact(held)
                    found = self.structure.classes(label_of(words)[(words >= 0) & (state_of(words) == FIXED)])
                    why = f"its constant goes into no bias, since {since}: one channel carries it for all"
                    out[found] = self.number(f"{why} ({operation(node)}, {where(node)})")
        return out

    @property
    def staying(self) -> tuple[Tensor, Tensor]:
        """Per class, where it is live, and where a padded constant, if biases, scales and norm parameters stay."""
        if self._staying is None:
            structure = _Staying(self.trace).structure
            live = self._flags(structure, "live", ", while biases or norm parameters stay")
            self._staying = live, self._padded(structure)
        return self._staying

    # who holds a class

    def _spread(self, index: Mapping[str, Tensor], *kinds: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, per class, the smallest and largest group of its weights, and the first and last parameter."""
        big = torch.iinfo(torch.int64).max
        low, high = torch.full((self.size,), big), torch.full((self.size,), -1)
        first, last = torch.full((self.size,), big), torch.full((self.size,), -1)
        for i, name in enumerate(self.names):
            for use in self.uses.get(name, []):
                if use.kind not in kinds:
                    continue
                group = index.get(name, torch.full([1] * use.classes.dim(), -1))
                axes = [a for a, n in enumerate(use.classes.shape) if n == 1]
                for out, values, how in ((low, _over(group, axes, "min"), "amin"), (high, _over(group, axes), "amax")):
                    c, v = (t.flatten() for t in torch.broadcast_tensors(use.classes, values))
                    out.scatter_reduce_(0, c[c >= 0], v[c >= 0], how)
                first[use.present] = first[use.present].clamp_max(i)
                last[use.present] = last[use.present].clamp_min(i)
        return low, high, first, last

    def owners(self, index: Mapping[str, Tensor]) -> _Owners:
        """Find for every class which group makes it alone, which reads it alone, and what then becomes of it."""
        low, high, *makers = self._spread(index, "makes")
        makes = torch.where((low == high) & (high >= 0), high, -1)
        stay_low, stay_high, first_adjuster, _ = self._spread(index, "adjusts")
        stays = (high >= 0) & (stay_high >= -1) & (first_adjuster < len(self.names))
        stays &= (stay_low != makes) | (stay_high != makes)
        low, high, *readers = self._spread(index, "reads")
        reads = torch.where((low == high) & (high >= 0), high, -1)
        return _Owners(makes, self._made(makes, stays, first_adjuster), reads, self._read(), makers, readers)

    def _made(self, makes: Tensor, stays: Tensor, adjuster: Tensor) -> Tensor:
        """Return the verdict on each class that one group makes alone."""
        out = torch.zeros(self.size, dtype=torch.int64)
        whole = self._in_whole_heads(makes)
        staying = bool((stays & (makes >= 0)).any())
        corrected = [
            self.padded,
            torch.where(stays, self.staying[1], 0) if staying else self.padded,
            self.flag("grouped"),
            self.stacked,
            torch.where(whole, 0, self._but("scores", ": heads stay of equal width, and the scale follows")),
            torch.where(whole, 0, self._but("value", ": heads stay of equal width")),
            self._but("norm", ": its weight and eps have to be corrected"),
        ]
        for text in corrected:
            out = torch.where(text > 0, _code(_COMPENSATED, 0, 0) + text, out)
        for name in reversed((*_HELD, "centered")):
            text = self.flag(name)
            out = torch.where(text > 0, _code(_KEPT, 0, 0) + text, out)
        if staying:
            live = stays & (self.staying[0] > 0) & (out < _KEPT * _SEVERITY)
            out = torch.where(live, _code(_KEPT, 0, 0) + self.staying[0], out)
            stuck = stays & (self.flag("norm") > 0) & (out < _KEPT * _SEVERITY)
            for i in adjuster[stuck].unique().tolist():
                text = self.number(f"{self.names[i]!r} keeps the channel from being zero where it is normalized")
                out = torch.where(stuck & (adjuster == i), _code(_KEPT, 0, text), out)
        return out

    def _but(self, name: str, more: str) -> Tensor:
        """Return the reasons for a flag, with something said after each."""
        text = self.flag(name)
        for i in text[text > 0].unique().tolist():
            text = torch.where(text == i, self.number(self.text(i) + more), text)
        return text

    def _in_whole_heads(self, makes: Tensor) -> Tensor:
        """Mark the values of heads that go whole: all of the head in one group, in every attention that sees it."""
        whole = torch.zeros(self.size, dtype=torch.bool)
        for broken in (False, True):
            for site in self.structure.heads:
                rows = self.structure.classes(site.labels)
                group = torch.where(rows >= 0, makes[rows.clamp_min(0)], -1)
                complete = (group[:, :1] >= 0) & (group == group[:, :1]).all(1, keepdim=True)
                found = rows[(complete != broken).expand(rows.shape)]
                whole[found[found >= 0]] = not broken
        return whole

    def _read(self) -> Tensor:
        """Return the verdict on each class that one group reads alone."""
        out = torch.where(self.flag("grouped") > 0, _code(_COMPENSATED, 1, 0) + self.flag("grouped"), 0)
        held = [self.flag(f) for f in ("frozen", "follower", "scores", "value", "norm", "output")]
        for text in (self.elsewhere, *held):
            out = torch.where(text > 0, _code(_KEPT, 1, 0) + text, out)
        return out

    # verdicts on groups

    @property
    def _unruled(self) -> int:
        return _code(_KEPT, 7, self.number("no operation with a rule uses it"))

    def _users(self, name: str) -> list[Node]:
        """Return the nodes that use a parameter."""
        return [n for node, s in self.trace.sources.items() if s.name == name for n in node.users]

    def _is_linear_in(self, name: str) -> bool:
        """Tell whether a parameter only multiplies, in contractions; those over positions make no channels of it."""
        users = self._users(name)
        return bool(users) and all(isinstance(self.families.get(n), Contraction) for n in users)

    def verdicts(self, index: Mapping[str, Tensor], count: int, owners: _Owners) -> Tensor:
        """Return the verdict on every group: the worst of its weights', each of which has the best of its reasons'."""
        out = torch.zeros(count, dtype=torch.int64)
        for name, group in index.items():
            best = torch.full((), self._unruled)
            if group.numel() == 1 and name not in self.uses and self._is_linear_in(name):
                best = torch.full((), _code(_EXACTLY, 6, 0))
            by_shape: dict[torch.Size, Tensor] = {}
            for use in self.uses.get(name, []):
                found = self._verdict(use, group, owners)
                by_shape[found.shape] = torch.minimum(found, by_shape.get(found.shape, found))
            for found in by_shape.values():  # in a lone group rows and columns are judged apart: the worst of either
                best = torch.minimum(*torch.broadcast_tensors(best, found.amax() if group.numel() == 1 else found))
            g, best = torch.broadcast_tensors(group, best)
            out.scatter_reduce_(0, g[g >= 0], best[g >= 0], "amax")
        return out

    def _verdict(self, use: _Use, group: Tensor, owners: _Owners) -> Tensor:
        """Return the verdict on the weights of a parameter by one of its uses."""
        reads = use.kind == "reads"
        if any(n > 1 and m == 1 for n, m in zip(group.shape, use.classes.shape, strict=True)):
            return torch.tensor(_code(_KEPT, 4 + reads, self.number("its group holds only a part of a channel")))
        c = use.classes.clamp_min(0)
        first, last = (t[c] for t in (owners.readers if reads else owners.makers))
        here = self.names.index(use.name)
        other = torch.where(first == here, last, first)
        out = torch.full_like(use.classes, _code(_KEPT, 7, 0))
        for i in other[use.classes >= 0].unique().tolist():
            out[other == i] = self._shared(i, here, reads)
        if group.numel() == 1:
            out[:] = _code(_EXACTLY, 6, 0)  # all that the parameter does is gone, even where it is added to the input
        out = torch.where(use.classes >= 0, out, self._unruled)
        owned = use.classes >= 0
        if group.numel() == 1:
            owned &= self.flag("input")[c] == 0
        for owner, verdict in ((owners.makes, owners.made), (owners.reads, owners.read)):
            mine = owned & (owner[c] == group)
            known = torch.minimum(verdict[c], out) if owner is owners.reads and not reads else verdict[c]
            out = torch.where(mine, torch.minimum(known, out) if reads else known, out)
        return out

    def _shared(self, other: int, here: int, reads: bool) -> int:
        if not 0 <= other < len(self.names):
            text = "no weight makes the channel that it adjusts"
        elif other == here:
            text = "its group holds only a part of a channel"
        else:
            text = f"{self.names[other]!r} {'reads' if reads else 'makes'} the same channel and is in no group with it"
        return _code(_KEPT, 2 + reads, self.number(text))

    # why there is no group, and what could go

    def why_ungated(self, name: str, kinds: set[str]) -> str:
        """Say what holds back the channels of a parameter without groups, or how it is used."""
        classes = [u.present for u in self.uses.get(name, []) if u.kind != "reads"]
        if classes and kinds & _OF_CHANNELS:
            found = torch.cat(classes)
            special = ("centered", "norm", "scores", "value") if kinds != {"channels"} else ()
            for flag in (*_HELD, *special):
                text = self.flag(flag)[found]
                if bool((text > 0).any()):
                    return self.text(int(text[text > 0].mode().values))
        users = self._users(name)
        if not users:
            return "the traced forward does not use it"
        return "" if classes else f"no rule makes channels of it ({operation(users[0])}, {where(users[0])})"

    def count_saved(self, parts: Sequence[Part]) -> int:
        """Count the weights of all groups that can go, and of all that nothing reads any more then."""
        dead = torch.zeros(self.size, dtype=torch.bool)
        own: dict[str, list[Tensor]] = {}
        for part in parts:
            assert part.owners is not None
            goes = part.verdicts < _KEPT * _SEVERITY
            owner = part.owners.makes
            dead |= (owner >= 0) & goes[owner.clamp_min(0)]
            for name, g in part.index.items():
                own.setdefault(name, []).append((g >= 0) & goes[g.clamp_min(0)])
        held, attended = torch.zeros_like(dead), (self.flag("scores") > 0) | (self.flag("value") > 0)
        for flag in ("frozen", "follower", "norm", "output", "input"):
            held |= self.flag(flag) > 0
        held |= (self.elsewhere > 0) & ~attended
        self._spread_death(dead, own, held | (self.flag("scores") > 0))
        values = [self.structure.classes(site.labels) for site in self.structure.heads]
        if values and all(bool(dead[v[v >= 0]].all()) for v in values):  # nobody asks for queries and keys any more
            dead |= (self.flag("scores") > 0) & ~held
            self._spread_death(dead, own, held)
        return sum(
            _count_any(
                shape,
                [*own.get(n, []), *((u.classes >= 0) & dead[u.classes.clamp_min(0)] for u in self.uses.get(n, []))],
            )
            for n, shape in self.shapes.items()
        )

    def _spread_death(self, dead: Tensor, own: Mapping[str, Sequence[Tensor]], held: Tensor) -> None:
        """Mark what no weight reads any more as dead too, in place, until nothing changes."""
        while True:
            alive, read = held.clone(), torch.zeros_like(held)
            for name, uses in self.uses.items():
                masks = [(u, (u.classes >= 0) & dead[u.classes.clamp_min(0)]) for u in uses]
                for use in (u for u in uses if u.kind == "reads"):
                    axes = [a for a, n in enumerate(use.classes.shape) if n == 1]
                    gone = torch.zeros([1] * use.classes.dim(), dtype=torch.bool)
                    for mask in [*own.get(name, []), *(m for u, m in masks if u is not use)]:
                        gone = gone | _over(mask, axes, "min")
                    read[use.present] = True
                    c, g = torch.broadcast_tensors(use.classes, gone)
                    alive[c[(c >= 0) & ~g]] = True
            new = read & ~alive & ~dead
            if not bool(new.any()):
                return
            dead |= new


@dataclass(frozen=True)
class _Owners:
    """Per class: the group that makes it alone, the verdict then; the group that reads it alone, the verdict then."""

    makes: Tensor
    made: Tensor
    reads: Tensor
    read: Tensor
    makers: list[Tensor]
    readers: list[Tensor]


class Part:
    """The groups of one grouping, numbered from 0, with their verdicts.

    Args:
        kind: Name of the grouping.
        all_labels: Its labels.
        labels: Those of them that are asked about.
        judge: Who decides; ``None`` if nothing was traced.
    """

    def __init__(self, kind: str, all_labels: Labels, labels: Labels, judge: Judge | None) -> None:
        self.kind, self.all_labels, self.labels = kind, all_labels, labels
        numbers = torch.cat([used(t) for t in labels.values()]).unique()
        self.count = numbers.numel()
        self.index = {n: torch.where(t >= 0, torch.searchsorted(numbers, t), -1) for n, t in labels.items()}
        self.owners: _Owners | None = None
        self.verdicts = torch.full((self.count,), -1)
        if judge is not None:
            self.index = {
                n: _aligned(compact(t), len(judge.shapes[n])) for n, t in self.index.items() if n in judge.shapes
            }
            self.owners = judge.owners(self.index)
            self.verdicts = judge.verdicts(self.index, self.count, self.owners)
        self.partners = _partners(labels)

    def on(self, name: str) -> Tensor:
        """Return the verdicts on the groups of a parameter."""
        return self.verdicts[used(self.index[name])]


def count_by_severity(verdicts: Tensor) -> tuple[int, int, int]:
    """Count the groups that go exactly, with compensation, and not."""
    severity = verdicts.div(_SEVERITY, rounding_mode="floor")
    return int((severity == _EXACTLY).sum()), int((severity == _COMPENSATED).sum()), int((severity == _KEPT).sum())


def _partners(labels: Labels) -> dict[str, tuple[str, ...]]:
    """Return, per parameter, the others on which its groups stand."""
    out: dict[str, tuple[str, ...]] = {}
    for part in components(labels):
        on = torch.zeros(len(part.names), part.num_groups if part.names[1:] else 0)
        for i, name in enumerate(part.names if part.names[1:] else ()):
            on[i, used(part.index[name])] = 1
        shared = (on @ on.T > 0).tolist()
        out |= {
            a: tuple(b for b, s in zip(part.names, row, strict=True) if s and b != a)
            for a, row in zip(part.names, shared, strict=True)
        }
    return out


def _aligned(t: Tensor, ndim: int) -> Tensor:
    return t.reshape([1] * (ndim - t.dim()) + list(t.shape))


def _over(t: Tensor, axes: Sequence[int], how: Literal["min", "max"] = "max") -> Tensor:
    """Reduce a tensor along axes, which stay with size 1."""
    axes = [a for a in axes if t.shape[a] > 1]
    if not axes:
        return t
    if t.dtype == torch.bool:
        return t.all(axes, keepdim=True) if how == "min" else t.any(axes, keepdim=True)
    return t.amin(axes, keepdim=True) if how == "min" else t.amax(axes, keepdim=True)


def _count_any(shape: torch.Size, masks: Sequence[Tensor]) -> int:
    """Count the elements of a tensor that any of the masks marks; masks broadcast to it."""
    by_axes: dict[tuple[int, ...], Tensor] = {}
    for m in (_aligned(compact(mask), len(shape)) for mask in masks):
        if bool(m.any()):
            axes = tuple(a for a, n in enumerate(m.shape) if n > 1)
            by_axes[axes] = by_axes[axes] | m if axes in by_axes else m
    flat = [a for axes in by_axes for a in axes]
    if len(set(flat)) < len(flat):  # marks that depend on the same axis
        marked = torch.zeros([1] * len(shape), dtype=torch.bool)
        for m in by_axes.values():
            marked = marked | m
        return int(marked.sum()) * (shape.numel() // marked.numel())
    left = torch.Size([n for a, n in enumerate(shape) if a not in flat]).numel()
    for m in by_axes.values():
        left *= int((~m).sum())
    return shape.numel() - left
