"""Groupings that are read off the labels of a trace: channels and the special kinds of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import GroupingError
from ..tracing import Structure, Trace, find_structure
from ..tracing.structure import UNMOVABLE, Flag, UnionFind
from .registry import register_grouping


def _require(labels: dict[str, Tensor], what: str, reasons: Iterable[str], mend: str) -> dict[str, Tensor]:
    """Return the labels, or raise with the reasons that held back what could have been a group."""
    if any(bool((t >= 0).any()) for t in labels.values()):
        return labels
    most = Counter(reasons).most_common(3)
    why = "; ".join(f"{n} held back: {reason}" for reason, n in most) or "the trace holds nothing of the kind"
    raise GroupingError(
        f"the model has no {what} that can be gated ({why}).", expected=f"at least one {what}", mend=mend
    )


def _select(
    structure: Structure, classes: set[int], flags: tuple[Flag, ...], what: str, mend: str
) -> dict[str, Tensor]:
    """Return the labels of those of the classes that have none of the flags, or raise with the reasons."""
    labels = structure.select(classes - structure.flagged(*flags))
    return labels or _require(labels, what, structure.reasons(classes, *flags).values(), mend)


def _add(labels: dict[str, Tensor], name: str, found: Tensor) -> None:
    """Add labels of a parameter to those that it has already, which stay."""
    if bool((found >= 0).any()):
        old = labels.get(name, found)
        labels[name] = torch.where(old >= 0, old, found)


@register_grouping("channels", needs_trace=True)
def channels(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every channel with all weights that make it, coupled from end to end.

    A group is the rows that produce the channel, their biases and the norm parameters that adjust it, on every layer
    that is added to the same residual stream. Zeroing the group makes the channel exactly zero, or a constant, wherever
    it is read. Channels that reach the model's output, or an operation without a rule, are left alone.
    """
    structure = find_structure(trace)
    mend = 'dg.gate(model, "neurons") gates without a trace'
    return _select(structure, structure.produced(), UNMOVABLE, "channel", mend)


@register_grouping("hidden", needs_trace=True)
def hidden(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every unit between two linear maps: of an MLP or FFN, of a gated one (SwiGLU, GEGLU) too, or of a convolution.

    These are the channels that contractions alone consume: nothing normalizes over them, they are no query, key or
    value and no unit of a recurrent layer. A group is the rows, and biases, that produce the unit, in a gated MLP those
    of both halves. Zeroing it makes the unit zero or constant, so that it can be cut without a trace.
    """
    structure = find_structure(trace)
    made = structure.produced("row") - structure.produced("table", "recurrent")
    mend = 'dg.explain(model, "channels", example_inputs=x) shows what holds them'
    return _select(
        structure, made & structure.flagged("read"), (*UNMOVABLE, "norm", "scores", "value"), "hidden unit", mend
    )


@register_grouping("heads", needs_trace=True)
def heads(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every attention head: the value weights, and value bias, of the head.

    Found from the value operand of each attention, whatever the layout of its weights. A group is all value rows of one
    index along the heads; key-value heads that serve several query heads are one group. Zeroing it makes the output of
    the head exactly zero, so that its queries, keys and output columns do nothing any more.
    """
    structure = find_structure(trace)
    held = structure.flagged(*UNMOVABLE)
    together = UnionFind()
    together.mint(len(structure.sets))
    members: list[Tensor] = []
    reasons: list[str] = []
    readers = [(r.order, structure.sets.find(r.labels).unique()) for r in structure.readers]
    for site in structure.heads:
        rows = structure.sets.find(site.labels)
        own = rows.unique()
        early = any(order < site.order and torch.isin(own[own >= 0], read).any() for order, read in readers)
        stuck = set(structure.classes(own).tolist()) & held
        if early or site.alive or stuck or not bool((own >= 0).any()):
            first = next(iter(structure.reasons(stuck, *UNMOVABLE).values()), "")
            reasons.append((first or "its values are read elsewhere too, or are no projection") + site.place)
            continue
        together.unite(rows, rows.amax(1, keepdim=True))
        members.append(own[own >= 0])
    mine = torch.cat(members).unique() if members else torch.empty(0, dtype=torch.int64)
    labels: dict[str, Tensor] = {}
    for s in structure.slots:
        found = structure.sets.find(s.labels)
        found = torch.where(torch.isin(found, mine), together.find(found), -1)
        _add(labels, s.name, found)
    return _require(labels, "attention head", reasons, 'dg.gate(model, "hidden", example_inputs=x)')


@register_grouping("input_features", needs_trace=True)
def input_features(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every feature of every input that weights multiply, also of whole numbers: the weights that read it.

    A feature is what one weight column reads: a column of a table, a channel of an image, a dimension of a token. A
    group is that column in every first contraction that sees the feature. Zeroing it makes the model deaf to the
    feature, whose value may then be anything.
    """
    structure = find_structure(trace)
    features = structure.flagged("input")
    flags: tuple[Flag, ...] = ("frozen", "output", "norm", "follower", "scores", "value")
    wanted = torch.tensor(sorted(features - structure.flagged(*flags)), dtype=torch.int64)
    labels: dict[str, Tensor] = {}
    reading = [(r.name, r.labels) for r in structure.readers]
    reading += [(s.name, s.labels) for s in structure.slots if s.role == "row"]  # a depthwise weight's rows
    for name, read in reading:
        found = structure.classes(read)
        found = torch.where(torch.isin(found, wanted), found, -1)
        _add(labels, name, found)
    reasons = structure.reasons(features, *flags).values()
    return _require(labels, "input feature", reasons, "gate the first layer's columns: groups=dg.Select(..., axis=1)")


@register_grouping("embedding_dims", needs_trace=True)
def embedding_dims(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every dimension of an embedding, and of the residual stream of a transformer, where its norms allow it.

    A group is the embedding column and all that is written to the same dimension: rows of the projections that are
    added to it, position tables, norm weights. Zeroing it makes the dimension zero in the whole stream. RMSNorm can be
    corrected exactly for the dimensions that are gone; LayerNorm subtracts a mean over the width, and refuses. What
    meets in products is a query or key where there are heads of attention; elsewhere it is a factor, as of users and
    items.
    """
    structure = find_structure(trace)
    stream = structure.produced("row") & structure.flagged("added") & structure.flagged("norm")
    dims = structure.produced("table") | stream
    dims -= structure.flagged("scores", "value") if structure.heads else set[int]()
    mend = 'dg.gate(model, "channels", example_inputs=x) gates them without removing them'
    return _select(structure, dims, (*UNMOVABLE, "centered"), "embedding dimension", mend)


@register_grouping("rnn", needs_trace=True)
def rnn(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Every hidden unit of every LSTM, GRU and plain recurrent layer.

    A unit of a loop written by hand is one too: a weight, used more than once, reads what it made.

    A group is the unit's row in all gates of the input and recurrent weights, and its biases. Zeroing it keeps the
    unit's state at zero from the first step on; the recurrent columns and those of the next layer then read a zero.
    """
    structure = find_structure(trace)
    units = structure.produced("recurrent") | _recurring(structure)
    return _select(structure, units, UNMOVABLE, "recurrent unit", 'dg.gate(model, "weights")')


def _writes(structure: Structure, name: str) -> set[int]:
    """Return the classes that a weight produces, as rows or as columns of a table."""
    return structure.classes_in(s.labels for s in structure.slots if s.name == name and s.producer)


def _recurring(structure: Structure) -> set[int]:
    """Return the classes that a weight both reads and writes, in more than one use."""
    uses: dict[str, set[int]] = {}
    for r in structure.readers:
        uses.setdefault(r.name, set()).add(r.order)
    out: set[int] = set()
    for name in (n for n, orders in uses.items() if len(orders) > 1):
        read = structure.classes_in(r.labels for r in structure.readers if r.name == name)
        out |= read & _writes(structure, name)
    return out
