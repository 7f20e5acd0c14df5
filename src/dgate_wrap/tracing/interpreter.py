"""The label interpreter: walk the graph with labels instead of activations, one rule per family of operations.

Labels that must die together are united; whatever meets an operation without a rule is frozen, with the reason. What
the rules do alike lies below: `words`, `weights`, `products`, `elements`, `layers`.
"""

from __future__ import annotations

import weakref
from functools import singledispatchmethod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace
from .families import (
    Attention,
    Barrier,
    Bilinear,
    Contraction,
    Creation,
    Family,
    Halves,
    Indexing,
    Lookup,
    Mixing,
    Movement,
    NormedWeight,
    Pick,
    Pointwise,
    Product,
    Ranking,
    Recurrence,
)
from .layers import Layers
from .nodes import is_tensor, op_name, shape_of
from .operations import COPIES, gives_zero
from .products import as_product, summed_by, summed_product
from .structure import (
    CONSTANT,
    DATA,
    FIXED,
    LIVE,
    UNMOVABLE,
    ZERO,
    Reader,
    Role,
    Slot,
    Structure,
    label_of,
    narrow,
    state_of,
)
from .sums import is_sparse
from .words import fit


class Interpreter(Layers):
    """One walk over the graph, with one rule per family of operations."""

    def __init__(self, trace: Trace, mixers: frozenset[Node] = frozenset()) -> None:
        super().__init__(trace)
        self.mixers = set(mixers)
        """Contractions over positions, through which the channels pass; if given, what they make are the channels."""
        self.given = mixers
        for node in trace.nodes:
            if node.op == "placeholder":
                self._receive(node)
            elif node.op == "get_attr" and is_tensor(node):
                self._set(node, torch.full((), CONSTANT))
            elif node in self.families:
                self._visit(self.families[node], node)
                self._attend(self.families[node], node)
            elif node.op == "output":
                for n in trace.outputs or node.all_input_nodes:
                    for w in self._listed(n):
                        self.structure.flag("output", label_of(narrow(w)), "it is an output of the model")

    def _visit(self, family: Family, node: Node) -> None:
        """Apply the rule of a family; sums of products are one operation, and constants hold back nothing."""
        still = node not in self.varying
        if still and (
            isinstance(family, Barrier) or (isinstance(family, Contraction) and family.weight.op != "placeholder")
        ):
            self._set_all(node, CONSTANT)
        elif (total := summed_by(node)) is not None and not self._adds_up_positions(node, total):
            self._set_all(node, DATA)  # its sum reads the factors
        elif (
            isinstance(family, Mixing)
            and (product := summed_product(node, family)) is not None
            and not self._adds_up_positions(family.x, node)
        ):
            self._label(product, node)
        else:
            self._label(family, node)

    def _adds_up_positions(self, node: Node, total: Node) -> bool:
        """Tell whether both factors of a product have channels along axes that its sum leaves, or one is known."""
        mixed, dims = cast(Mixing, self.families[total]).mixed, len(shape_of(node))
        words = [self._aligned(narrow(self._words(n)), dims) for n in node.all_input_nodes]
        a, b = ({axis for axis in range(dims) if self._varies(label_of(w), axis)} for w in words)
        known = any(
            n in self.varying and bool((w == CONSTANT).all()) for n, w in zip(node.all_input_nodes, words, strict=True)
        )
        return (bool(a & b) or known) and (a | b).isdisjoint(mixed)

    def _receive(self, node: Node) -> None:
        """Give every element of an input of features a label of its own; the first contraction unites them."""
        source = self.trace.sources[node]
        if source.kind != "input" or not isinstance(source.value, Tensor):
            return
        if node not in self.features:
            self._set(node, torch.full((), DATA))
            return
        labels = self.structure.sets.mint(source.value.numel()).view(source.value.shape)
        self._inputs.append(labels.flatten())
        self.structure.flag("input", labels, f"it is added to the model's input {node.name!r}")
        self._set(node, labels * 4 + LIVE)

    # rules

    @singledispatchmethod
    def _label(self, family: Family, node: Node) -> None:
        """Barrier: freeze what goes in; what comes out is data."""
        assert isinstance(family, Barrier)
        for n in family.inputs:
            self._freeze(n, self._says(node, "an operation without a rule"))
        self._set_all(node, DATA)

    def _freeze(self, node: Node, why: str) -> None:
        for w in self._listed(node) if node in self.structure.words or node in self.varying else []:
            self.structure.flag("frozen", label_of(narrow(w)), why)

    @_label.register
    def _(self, family: Creation, node: Node) -> None:
        self._set_all(node, CONSTANT)

    @_label.register
    def _(self, family: Pick, node: Node) -> None:
        words = self._words(family.source)
        self._set(node, words[family.index] if isinstance(words, list) else words)

    @_label.register
    def _(self, family: Movement, node: Node) -> None:
        parts = [self._words(n) for n in family.inputs]
        flat = [int(p.flatten()[0]) for p in map(narrow, parts) if p.numel() == 1]
        if len(flat) == len(parts) and set(flat) in ({DATA}, {CONSTANT}):
            return self._set_all(node, flat[0])
        moved = self._moved(family, parts)
        self._set(node, moved[0] if is_tensor(node) else moved)
        picks = [self.families.get(n) for n in family.inputs]
        alike = {p.source if isinstance(p, Pick) else None for p in picks}  # heads of one projection, say, may differ
        if op_name(node) in ("cat", "stack") and (len(alike) > 1 or alike == {None}):
            axis = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
            axis %= len(shape_of(node))
            if op_name(node) == "stack":
                parts = [p.unsqueeze(axis) for p in parts]
            self._couple(parts, axis)
        return None

    @_label.register
    def _(self, family: Indexing, node: Node) -> None:
        if self._looks_up(family):
            return self._label(Lookup(family.x, *family.indices), node)
        parts = [self._words(n) for n in (family.x, family.source) if n is not None]
        values = {n: self._fixed(n) for n in family.indices}
        known = all(v is not None for v in values.values()) and not family.adds
        why = self._says(node, "positions are picked by value")
        labels = label_of(narrow(parts[0]))
        apart = any(self._varies(labels, a) for a in family.axes)
        if not known and apart and not (family.axes == (0,) and self._from_input(labels)):  # rows: of nodes, say
            self.structure.flag("frozen", label_of(narrow(parts[0])), why)
            return self._set_all(node, DATA)
        if not known:
            united = self._unite_over(parts[0], family.axes, why)
            if family.source is not None:
                return self._write(family, node, united, parts[1])
            if family.same_axes:
                return self._set(node, fit(united, shape_of(node)))
            parts = [united.expand(parts[0].shape)]
            values = {n: torch.zeros(shape_of(n), dtype=torch.int64) for n in family.indices}
            if any(n.meta["val"].dtype == torch.bool for n in family.indices):
                united = united.flatten(0, len(family.axes) - 1).narrow(0, 0, 1)
                return self._set(node, fit(united, shape_of(node)))
        [moved] = self._moved(Movement((), lambda s: family.run(s, values)), parts)
        self._set(node, moved)
        if family.source is not None and len(family.axes) == 1 and parts[1].dim() == parts[0].dim():
            self._couple(parts, family.axes[0])
        return None

    def _looks_up(self, family: Indexing) -> bool:
        """Tell whether data look rows of a table up."""
        if family.source is not None or family.axes != (0,) or family.x in self.varying or len(shape_of(family.x)) != 2:
            return False
        [rows] = family.indices
        return rows in self.varying and rows.meta["val"].dtype in (torch.int64, torch.int32)

    @_label.register
    def _(self, family: Pointwise, node: Node) -> None:
        shape = shape_of(node)
        operands = list(family.operands)
        zeros = {n for n in operands if self._is_zero(n)}
        if zeros and gives_zero(node, family, zeros):
            self.cancelled.add(node)
            return self._set(node, torch.full([1] * len(shape), CONSTANT))
        words = [self._aligned(narrow(self._words(n)), len(shape)) for n in operands]
        real = [(1,) * (len(shape) - len(shape_of(n))) + shape_of(n) for n in operands]
        labels = [label_of(w) for w in words]
        order = list(range(len(operands)))
        if sum(self._follows(i, labels, real) for i in order) > 1:  # of those that follow each other, the widest stays
            order.sort(key=lambda i: int(labels[i].unique().numel()))
        for i in order:
            n = operands[i]
            if self._follows(i, labels, real):
                if self._reads_outer(node, family, i, words):
                    labels[i] = label_of(words[i])
                    continue
                self._gather_adjusting(i, operands, words)
                labels = [label_of(w) for w in words]
                if not self._follows(i, labels, real):
                    continue
                self.structure.flag("follower", labels[i], self._says(node, "it acts on several channels at once"))
                words[i] = torch.where(words[i] >= 0, DATA if n in self.varying else CONSTANT, words[i])
                labels[i] = label_of(words[i])
        out = torch.full([1] * len(shape), -1)
        for label in labels:
            self.structure.unite(out, label)
            out = torch.where(out >= 0, out, label)
        if op_name(node) == "sub" and self._is_centered(operands):
            self.structure.flag("centered", out, self._says(node, "the mean over the channels depends on their number"))
        if op_name(node) in ("add", "sub") and len(operands) > 1 and self.varying.issuperset(operands):
            self.structure.flag("added", out, self._says(node, "it is added to others"))
        state = self._probe(node, family, words)
        data = torch.full([1] * len(shape), False)
        for w in words:
            data = data | (w == DATA)
        lively = (out >= 0) & (state == LIVE)
        for w in words:
            lively = lively & ~((w >= 0) & (w % 4 == LIVE))
        if lively.any():
            self._enliven(out.expand(lively.shape)[lively], self._says(node, "something live is combined with it"))
        return self._set(node, torch.where(out >= 0, out * 4 + state, torch.where(data, DATA, CONSTANT)))

    def _is_centered(self, operands: list[Node]) -> bool:
        """Tell whether a value is centered by its own mean over the channels, as in a norm that is written by hand."""
        if len(operands) != 2:
            return False
        x, mean = map(self._copied, operands)
        family = self.families.get(mean)
        if not isinstance(family, Mixing) or not family.averages or self._copied(family.x) is not x:
            return False
        return any(self._varies(label_of(narrow(self._words(x))), a) for a in family.mixed)

    def _copied(self, node: Node) -> Node:
        """Return what a node is a copy of, perhaps in another precision."""
        while op_name(node) in COPIES and node.op == "call_function":
            node = node.all_input_nodes[0]
        return node

    # contractions

    @_label.register
    def _(self, family: Contraction, node: Node) -> None:
        if family.groups == 1 and not family.spatial and self._was_channels(family.weight):
            return self._multiply(as_product(family, node), node)
        words = self._words(family.x)
        labels = label_of(narrow(words))
        axes = range(words.dim())
        passes = words.shape[family.x_axis] > 1 and not self._varies(labels, family.x_axis)
        passes = passes and bool((labels >= 0).any()) and not bool((narrow(words) == DATA).any())
        along = {a for a in axes if self._varies(labels, a)}
        kernel = shape_of(family.weight)[2:] if family.spatial else ()
        spanned = {words.dim() - len(kernel) + i for i, size in enumerate(kernel) if size > 1}  # by words in a row, say
        if passes and along and node not in self.given and not along & spanned:
            return self._mix_tokens(family, node, words, spanned)
        column = self._unite_over(words, [a for a in axes if a != family.x_axis], self._says(node, "live in part"))
        self._consume(node, column)
        column = label_of(column).flatten().expand(words.shape[family.x_axis])
        size = shape_of(node)[family.out_axis]
        if family.groups > 1 and family.groups == len(column) and not self._learned(family.weight):
            return self._filter_fixed(family, node, words)
        self._read(node, family.weight, self._columns(family, column, size))
        fresh = self.structure.sets.mint(size)
        if family.groups > 1 and family.groups == len(column) and not self._from_input(column):
            repeated = column.repeat_interleave(size // family.groups)
            self.structure.unite(repeated, fresh)
            fresh = torch.where(repeated >= 0, repeated, fresh)
        elif family.groups > 1:
            self.structure.flag("grouped", column, self._says(node, "its groups must stay of equal size"))
            self.structure.flag("grouped", fresh, self._says(node, "its groups must stay of equal size"))
        state = self._produce(node, family.weight, self._rows(family, fresh), "row", (family.weight, family.w_out))
        if family.bias is not None:
            state = max(state, self._adjust(family.bias, 0, fresh))
        shape = [size if a == family.out_axis else 1 for a in range(len(shape_of(node)))]
        self._set(node, (fresh * 4 + state).view(shape))
        return None

    def _filter_fixed(self, family: Contraction, node: Node, words: Tensor) -> None:
        """A depthwise convolution with fixed weights (a blur) leaves every channel what it is."""
        out = self._unite_over(words, [a for a in range(words.dim()) if a != family.x_axis])
        out = out.repeat_interleave(shape_of(node)[family.out_axis] // family.groups, family.x_axis)
        floor = ZERO if family.bias is None else FIXED
        self._set(node, torch.where(out >= 0, label_of(out) * 4 + state_of(out).clamp_min(floor), out))

    def _mix_tokens(self, family: Contraction, node: Node, words: Tensor, spanned: set[int]) -> None:
        """The channels lie on another axis, and this contraction mixes positions: they pass through it."""
        self.mixers.add(node)
        first = self._unite_over(words, [family.x_axis, *spanned])  # along a border, zeros may lie
        floor = FIXED if family.bias is not None else ZERO
        worst = torch.where(first >= 0, label_of(first) * 4 + state_of(first).clamp_min(floor), first)
        self._set(node, fit(worst.movedim(family.x_axis, family.out_axis), shape_of(node)))

    @_label.register
    def _(self, family: Product, node: Node) -> None:
        if (family.a in self.varying) != (family.b in self.varying) and not any(map(is_sparse, family.inputs)):
            if family.a in self.varying:
                x, w, x_axes, w_axes = family.a, family.b, family.a_axes, family.b_axes
            else:
                x, w, x_axes, w_axes = family.b, family.a, family.b_axes, family.a_axes
            made = set(w_axes) - set(x_axes)
            if not self._was_channels(w) and (made or set(w_axes) & set(x_axes) - set(family.out_axes)):
                return self._contract_batched(family, node, x, w, x_axes, w_axes)
        return self._multiply(family, node)

    @_label.register
    def _(self, family: Attention, node: Node) -> None:
        query, key, value = (self._words(n) for n in (family.query, family.key, family.value))
        for n in set(family.inputs) - {family.query, family.key, family.value}:
            self.structure.flag("follower", label_of(narrow(self._words(n))), self._says(node, "it masks an attention"))
        if family.repeats > 1:
            key, value = (w.repeat_interleave(family.repeats, -3) for w in (key, value))
        ndim = query.dim()
        query, key = (self._unite_over(w, [ndim - 2]) for w in (query, key))
        self._consume(node, query)
        self._consume(node, key)
        self.structure.pair(label_of(query), label_of(key))
        for w in (query, key):
            self.structure.flag("scores", label_of(w), self._says(node, "it is a query or a key"))
        self._consume(node, value)
        self._add_site(node, narrow(value), ndim - 2)
        self._set(node, self._unite_over(value, [ndim - 2]))

    # norms, statistics, tables, recurrence

    @_label.register
    def _(self, family: Mixing, node: Node) -> None:
        words = self._words(family.x)
        results = node.meta["val"]
        mixed = sorted(family.mixed)
        for n in family.where:
            self._freeze(n, self._says(node, "it says what is taken from where"))
        if family.kind == "norm":
            out = self._normalize(family, node, words)
        elif family.kind == "pool":
            out = self._unite_over(words, mixed, self._says(node, "it is mixed with something live"))
        else:
            out = self._keep_if_constant(family, node, words, mixed)
        for axis in sorted((a for a, b in enumerate(family.out_axis) if b is None), reverse=True):
            out = out.select(axis, 0)
        if isinstance(results, Tensor):
            self._set(node, fit(out, shape_of(node)))
        else:
            first = fit(out, tuple(int(n) for n in results[0].shape))
            alike = family.kind == "reduction"  # variance and mean
            self._set(node, [first, *[first if alike else torch.full((), DATA)] * (len(results) - 1)])

    @_label.register
    def _(self, family: Lookup, node: Node) -> None:
        width = shape_of(family.table)[1]
        fresh = self.structure.sets.mint(width).view(1, -1)
        if self._scattered(family.table, fresh) is None:
            if family.table in self.structure.words and bool((self._words(family.table) >= 0).any()):
                column = self._unite_over(self._words(family.table), [0])
                return self._set(node, column.squeeze(0))
            return self._set_all(node, DATA if node in self.varying else CONSTANT)
        role: Role = "adjust" if self._follows_weights(family.indices) else "table"  # a bias of the expert, say
        state = self._produce(node, family.table, fresh, role, (family.table, 1))
        words = fresh.squeeze(0) * 4 + state
        if is_tensor(node):
            return self._set(node, words)
        rest = [torch.full((), DATA)] * (len(cast("list[Any]", node.meta["val"])) - 1)
        return self._set(node, [words, *rest])

    @_label.register
    def _(self, family: Ranking, node: Node) -> None:
        words = narrow(self._words(family.x))
        labels = label_of(words)
        if self._varies(labels, family.axis):
            self.structure.flag("frozen", labels, self._says(node, "it is compared with other channels"))
            words = torch.full((), DATA).expand(words.shape)
        out = words.narrow(family.axis, 0, 1) if words.shape[family.axis] else words
        out = out if family.keeps_axis else out.squeeze(family.axis)
        if op_name(node).startswith("arg"):
            return self._set_all(node, DATA)
        if is_tensor(node):
            return self._set(node, fit(out, shape_of(node)))
        values = cast("list[Any]", node.meta["val"])
        first = fit(out, tuple(int(n) for n in values[0].shape))
        return self._set(node, [first, *[torch.full((), DATA)] * (len(values) - 1)])

    @_label.register
    def _(self, family: Bilinear, node: Node) -> None:
        for x, axis in ((family.x1, 1), (family.x2, 2)):
            words = self._words(x)
            column = self._unite_over(words, range(words.dim() - 1))
            self._consume(node, column)
            self._read(node, family.weight, label_of(column).flatten().view([-1 if a == axis else 1 for a in range(3)]))
        fresh = self.structure.sets.mint(shape_of(family.weight)[0])
        state = self._produce(node, family.weight, fresh.view(-1, 1, 1), "row", (family.weight, 0))
        if family.bias is not None:
            state = max(state, self._adjust(family.bias, 0, fresh))
        self._set(node, fresh * 4 + state)

    @_label.register
    def _(self, family: Recurrence, node: Node) -> None:
        x = self._words(family.x)
        column = self._unite_over(x, range(x.dim() - 1))
        units: list[Tensor] = []
        for i in range(0, len(family.layers), family.directions):
            self._consume(node, column)
            cells = [self._recur(node, family, c, column) for c in family.layers[i : i + family.directions]]
            units += [own for own, _ in cells]
            column = torch.cat([hidden for _, hidden in cells]).view(*[1] * (x.dim() - 1), -1)
        out = column.flatten()
        if is_tensor(node):
            return self._set(node, out)
        if family.single:
            return self._set(node, [out, *units])
        results = cast("list[Any]", node.meta["val"])
        finals = torch.stack(units).view(len(units), *[1] * (results[1].dim() - 2), -1)
        h = finals if family.layers[0].w_hr is None else torch.full((), DATA)
        return self._set(node, [out, h, *[finals] * (len(results) - 2)])

    @_label.register
    def _(self, family: Halves, node: Node) -> None:
        words = self._words(family.x)
        a, b = words.chunk(2, family.axis)
        self.structure.unite(label_of(a), label_of(b))
        state = torch.maximum(state_of(a), torch.where(state_of(a) == ZERO, ZERO, state_of(b)))
        top = torch.maximum(label_of(a), label_of(b))
        self._set(node, torch.where(top >= 0, top * 4 + state, torch.minimum(a, b)))

    @_label.register
    def _(self, family: NormedWeight, node: Node) -> None:
        self._set_all(node, CONSTANT)


_STRUCTURES: weakref.WeakKeyDictionary[Trace, Structure] = weakref.WeakKeyDictionary()


def find_structure(trace: Trace) -> Structure:
    """Interpret a trace with labels, and return what they say; asked again for the same trace, the same answer."""
    if trace not in _STRUCTURES:
        first = Interpreter(trace)
        if first.mixers:
            _add_token_units(first, Interpreter(trace, frozenset(first.mixers)))
        _STRUCTURES[trace] = first.structure
    return _STRUCTURES[trace]


def _add_token_units(first: Interpreter, second: Interpreter) -> None:
    """Add the units between two maps over positions: a position has one label, so a second walk finds them.

    There the maps over positions make the channels. Of what it finds, only units that nothing else makes are taken.
    """
    a, b = first.structure, second.structure
    weights = {n for m in first.mixers for n in m.all_input_nodes if n in first.trace.sources}
    names = {first.trace.sources[n].name for n in weights}
    mine = b.classes_in(s.labels for s in b.slots if s.producer and s.name in names)
    mine -= b.classes_in(s.labels for s in b.slots if s.name not in names) | b.flagged(
        *UNMOVABLE, "norm", "scores", "value"
    )
    wanted = torch.tensor(sorted(mine & b.flagged("read")), dtype=torch.int64)
    fresh = a.sets.mint(len(wanted))

    def carried(labels: Tensor) -> Tensor:
        found = b.classes(labels)
        inside = torch.isin(found, wanted)
        return torch.where(inside, fresh[torch.searchsorted(wanted, found).clamp_max(len(wanted) - 1)], -1)

    if len(wanted):
        a.slots.extend(Slot(s.name, carried(s.labels), s.role) for s in b.slots if s.name in names)
        a.readers.extend(Reader(r.name, carried(r.labels), r.order) for r in b.readers if r.name in names)
        a.flag("read", fresh, "a contraction over positions reads it")
