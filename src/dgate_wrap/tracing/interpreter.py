"""The label interpreter: walk the graph with labels instead of activations, one rule per family of operations.

Labels that must die together are united; whatever meets an operation without a rule is frozen, with the reason. Words
are kept narrow: a tensor that is constant along an axis is stored with stride 0 there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import singledispatchmethod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace, operation, where
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
from .operations import describe, is_tensor, shape_of, varying_nodes
from .structure import (
    CONSTANT,
    DATA,
    FIXED,
    LIVE,
    UNMOVABLE,
    ZERO,
    HeadSite,
    Reader,
    Role,
    Slot,
    Structure,
    compact,
    label_of,
    narrow,
    state_of,
)

_COPIES = frozenset({"aten.clone", "aten.contiguous", "aten._to_copy", "aten.to", "aten.alias", "aten.detach"})


class _Interpreter:
    """One walk over the graph, with one rule per family of operations."""

    def __init__(self, trace: Trace, mixers: frozenset[Node] = frozenset()) -> None:
        self.trace = trace
        self.mixers = set(mixers)
        """Contractions over positions, through which the channels pass; if given, what they make are the channels."""
        self.given = mixers
        self.structure = Structure()
        inputs = {n for n, s in trace.sources.items() if s.kind == "input"}
        self.varying = varying_nodes(trace.nodes, inputs)
        self.order = {n: i for i, n in enumerate(trace.nodes)}
        self.families: dict[Node, Family] = {
            n: describe(n, self.varying) for n in trace.nodes if n.op == "call_function" and _has_tensors(n)
        }
        self.makers = self._find_makers()
        self.attending: set[Node] = set()
        """Softmax values, and what was made of them by scaling, masking, moving or mixing heads."""
        self._axes: dict[tuple[Any, ...], Tensor] = {}
        """Labels along axes of a weight, as its first use gave them; later uses are united with them."""
        self._constants: dict[Node, Any] = {}
        self._inputs: list[Tensor] = []
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

    def _find_makers(self) -> set[Node]:
        """Return the parameters from which weights of contractions are computed, and all constants on the way."""
        found: set[Node] = set()
        reached = [f.weight for f in self.families.values() if isinstance(f, Contraction)]
        while reached:
            node = reached.pop()
            if node not in self.varying and node not in found:
                found.add(node)
                reached.extend(node.all_input_nodes)
        return found

    def _visit(self, family: Family, node: Node) -> None:
        """Apply the rule of a family; sums of products are one operation, and constants hold back nothing."""
        still = node not in self.varying
        if still and (
            isinstance(family, Barrier) or (isinstance(family, Contraction) and family.weight.op != "placeholder")
        ):
            self._set_all(node, CONSTANT)
        elif _summed_by(node) is not None:
            self._set_all(node, DATA)  # its sum reads the factors
        elif isinstance(family, Mixing) and (product := _summed_product(node, family)) is not None:
            self._label(product, node)
        else:
            self._label(family, node)

    def _receive(self, node: Node) -> None:
        """Give every element of a floating-point input a label of its own; the first contraction unites features."""
        source = self.trace.sources[node]
        if source.kind != "input" or not isinstance(source.value, Tensor):
            return
        if not source.value.is_floating_point() or source.value.numel() < 2:
            self._set(node, torch.full((), DATA))
            return
        labels = self.structure.sets.mint(source.value.numel()).view(source.value.shape)
        self._inputs.append(labels.flatten())
        self.structure.flag("input", labels, f"it is added to the model's input {node.name!r}")
        self._set(node, labels * 4 + LIVE)

    # words of nodes

    def _set(self, node: Node, words: Any) -> None:
        """Keep the words of a node, narrow, expanded to its shape; a list for several results."""
        if isinstance(words, list):
            values = cast("list[Any]", node.meta["val"])
            self.structure.words[node] = [
                compact(w).expand(tuple(v.shape)) if isinstance(v, Tensor) else w
                for w, v in zip(cast("list[Tensor]", words), values, strict=True)
            ]
        else:
            self.structure.words[node] = compact(words).expand(shape_of(node))

    def _set_all(self, node: Node, word: int) -> None:
        value = node.meta["val"]
        full = torch.full((), word)
        self._set(node, full if isinstance(value, Tensor) else [full] * len(value))

    def _words(self, node: Node) -> Any:
        """Return the words of a node; a parameter gets one label per element when it is first met as a value."""
        words = self.structure.words
        if node not in words:
            source = self.trace.sources.get(node)
            if source is None or not isinstance(source.value, Tensor):
                words[node] = torch.full((), CONSTANT)
            elif source.kind == "parameter" and source.value.numel() > 1:
                labels = self._axes.get((source.name,))
                if labels is None:
                    labels = self._axes[source.name,] = self._own_labels(node, source.value)
                    self.structure.slots.append(Slot(source.name, labels, "adjust"))
                words[node] = (labels * 4 + ZERO).expand(source.value.shape)
            else:
                words[node] = torch.full((), CONSTANT).expand(source.value.shape)
        return words[node]

    def _own_labels(self, node: Node, value: Tensor) -> Tensor:
        """Mint labels for a parameter that is used as a value: per row if a weight is computed from it, else each."""
        if value.dim() >= 2 and value.shape[0] > 1 and node in self.makers:
            return self.structure.sets.mint(value.shape[0]).view(-1, *[1] * (value.dim() - 1))
        return self.structure.sets.mint(value.numel()).view(value.shape)

    def _listed(self, node: Node) -> list[Tensor]:
        words = self._words(node)
        return cast("list[Tensor]", words) if isinstance(words, list) else [words]

    def _constant(self, node: Node) -> Any:
        """Return the value of a node that does not vary, or ``None`` where it cannot be known (the meta device)."""
        if node not in self._constants:
            self._constants[node] = self._evaluate(node) if node not in self.varying else None
        return self._constants[node]

    def _evaluate(self, node: Node) -> Any:
        if node.op == "placeholder":
            value = self.trace.sources[node].value
        elif node.op == "get_attr":
            value = getattr(self.trace.graph_module, cast(str, node.target))
        else:
            given = {n: self._constant(n) for n in node.all_input_nodes}
            if any(v is None for v in given.values()):
                return None
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), given.__getitem__)
            kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            with torch.no_grad():
                value = cast(Any, node.target)(*args, **kwargs)
        return None if isinstance(value, Tensor) and value.device.type == "meta" else value

    def _says(self, node: Node, what: str) -> str:
        return f"{what} ({operation(node)}, {where(node)})"

    def _varies(self, labels: Tensor, axis: int) -> bool:
        """Tell whether the united labels differ along an axis; positions without a label are neutral."""
        if labels.shape[axis] < 2:
            return False
        found = self.structure.sets.find(labels)
        return bool(((found != found.amax(axis, keepdim=True)) & (found >= 0)).any())

    def _unite_over(self, words: Tensor, axes: Iterable[int], why: str = "") -> Tensor:
        """Unite the labels along axes and return one word per remaining index, axes kept with size 1.

        Constants are neutral. Where a label meets data along these axes, its state becomes live.
        """
        words = narrow(words)
        axes = [a for a in axes if words.shape[a] > 1]
        if not axes or not words.numel():
            return words
        labels = label_of(words)
        top = labels.amax(axes, keepdim=True)
        self.structure.unite(labels, top)
        state = torch.where(words >= 0, state_of(words), ZERO).amax(axes, keepdim=True)
        data = (words == DATA).any(dim=tuple(axes), keepdim=True)
        mixed = data & (top >= 0)
        if mixed.any():
            state = torch.where(mixed, LIVE, state)
            self._enliven(top[mixed], why or "it is mixed with something live")
        return torch.where(top >= 0, top * 4 + state, torch.where(data, DATA, CONSTANT))

    def _enliven(self, labels: Tensor, why: str) -> None:
        self.structure.notes.setdefault("enlivened", []).append((labels[labels >= 0].unique(), why))

    def _consume(self, node: Node, words: Tensor) -> None:
        """A sum over channels reads these words: what is still live there cannot be ignored."""
        words = narrow(words)
        live = label_of(words)[(words >= 0) & (words % 4 == LIVE)]
        if live.numel():
            self.structure.flag("live", live, self._says(node, "it is not constant when its weights are zero"))
        self.structure.flag("read", label_of(words), self._says(node, "a contraction reads it"))

    # rules

    @singledispatchmethod
    def _label(self, family: Family, node: Node) -> None:
        """Barrier: freeze what goes in; what comes out is data."""
        assert isinstance(family, Barrier)
        for n in family.inputs:
            for w in self._listed(n) if n in self.structure.words or n in self.varying else []:
                self.structure.flag("frozen", label_of(narrow(w)), self._says(node, "an operation without a rule"))
        self._set_all(node, DATA)

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
        if operation(node) in ("aten.cat", "aten.stack"):
            axis = cast(int, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
            axis %= len(shape_of(node))
            if operation(node) == "aten.stack":
                parts = [p.unsqueeze(axis) for p in parts]
            self._couple(parts, axis)
        return None

    @staticmethod
    def _moved(family: Movement, parts: list[Tensor]) -> list[Tensor]:
        """Run a movement on words; padding gives constants."""
        stand_ins = [(narrow(p) - CONSTANT).double().expand(p.shape) for p in parts]
        try:
            moved = family.run(stand_ins)
        except RuntimeError:  # a view of an expanded tensor
            moved = family.run([s.contiguous() for s in stand_ins])
        return [compact(m).long() + CONSTANT for m in ([moved] if isinstance(moved, Tensor) else list(moved))]

    def _couple(self, parts: list[Tensor], axis: int) -> None:
        """Unite pieces that lie side by side along an axis, along the other axes: their sizes must agree."""
        ndim = max(p.dim() for p in parts)
        slices: list[Tensor] = []
        for p in parts:
            labels = label_of(narrow(p))
            if p.dim() == ndim and p.numel() and not self._varies(labels, axis):
                slices.append(labels.amax(axis))
        for piece in slices[1:]:
            self.structure.unite(slices[0], piece)

    @_label.register
    def _(self, family: Indexing, node: Node) -> None:
        parts = [self._words(n) for n in (family.x, family.source) if n is not None]
        values = {n: self._constant(n) for n in family.indices}
        known = all(v is not None for v in values.values()) and operation(node).rpartition(".")[2] not in (
            "index_add",
            "scatter",
            "scatter_add",
        )
        why = self._says(node, "positions are picked by value")
        if not known and any(self._varies(label_of(narrow(parts[0])), a) for a in family.axes):
            self.structure.flag("frozen", label_of(narrow(parts[0])), why)
            return self._set_all(node, DATA)
        if not known:
            united = self._unite_over(parts[0], family.axes, why)
            if family.source is not None:
                return self._write(family, node, united, parts[1])
            if family.same_axes:
                return self._set(node, _fit(united, shape_of(node)))
            parts = [united.expand(parts[0].shape)]
            values = {n: torch.zeros(shape_of(n), dtype=torch.int64) for n in family.indices}
            if any(n.meta["val"].dtype == torch.bool for n in family.indices):
                united = united.flatten(0, len(family.axes) - 1).narrow(0, 0, 1)
                return self._set(node, _fit(united, shape_of(node)))
        [moved] = self._moved(Movement((), lambda s: family.run(s, values)), parts)
        self._set(node, moved)
        if family.source is not None and len(family.axes) == 1 and parts[1].dim() == parts[0].dim():
            self._couple(parts, family.axes[0])
        return None

    def _write(self, family: Indexing, node: Node, united: Tensor, written: Tensor) -> None:
        """What is written or added at unknown positions is united with what lies there."""
        rest = [a for a in range(united.dim()) if a not in family.axes]
        tail = written.dim() - len(rest)
        source = self._unite_over(written, range(max(tail, 0)), self._says(node, "it is written at unknown positions"))
        shape = [1] * united.dim()
        for a, n in zip(reversed(rest), reversed(source.shape), strict=False):
            shape[a] = n
        source = source.reshape(shape)
        a, b = label_of(united), label_of(source)
        self.structure.unite(a, b)
        top = torch.where(a >= 0, a, b)
        state = torch.maximum(state_of(united), state_of(source))
        state = torch.where((united == CONSTANT) & (source >= 0), state_of(source).clamp_min(FIXED), state)
        data = (united == DATA) | (source == DATA)
        self._set(node, torch.where(top >= 0, top * 4 + state, torch.where(data, DATA, CONSTANT)))

    @_label.register
    def _(self, family: Pointwise, node: Node) -> None:
        shape = shape_of(node)
        operands = list(family.operands)
        words = [self._aligned(narrow(self._words(n)), len(shape)) for n in operands]
        real = [(1,) * (len(shape) - len(shape_of(n))) + shape_of(n) for n in operands]
        labels = [label_of(w) for w in words]
        for i, n in enumerate(operands):
            if self._follows(i, labels, real):
                if self._reads_outer(node, i, operands, words):
                    labels[i] = label_of(words[i])
                    continue
                self.structure.flag("follower", labels[i], self._says(node, "it acts on several channels at once"))
                words[i] = torch.where(words[i] >= 0, DATA if n in self.varying else CONSTANT, words[i])
                labels[i] = label_of(words[i])
        out = torch.full([1] * len(shape), -1)
        for label in labels:
            self.structure.unite(out, label)
            out = torch.where(out >= 0, out, label)
        if (
            operation(node) in ("aten.add", "aten.sub")
            and all(n in self.varying for n in operands)
            and len(operands) > 1
        ):
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
        self._set(node, torch.where(out >= 0, out * 4 + state, torch.where(data, DATA, CONSTANT)))

    def _reads_outer(self, node: Node, i: int, operands: list[Node], words: list[Tensor]) -> bool:
        """Tell whether a value times a weight of more axes reads it, as a contraction over nothing, and record it."""
        other = operands[1 - i] if len(operands) == 2 else operands[i]
        found = self._scattered(other, torch.full((), -1)) if other not in self.varying else None
        if operation(node) not in ("aten.mul", "aten.multiply") or not found or operands[i] not in self.varying:
            return False
        column = self._unite_over(words[i], [a for a in range(words[i].dim()) if words[1 - i].shape[a] == 1])
        self._consume(node, column)
        ndim = len(shape_of(other))
        read = label_of(column).expand([-1] * column.dim()).reshape(column.shape[column.dim() - ndim :])
        self._read(node, other, read)
        words[i] = torch.full_like(words[i], DATA)
        return True

    @staticmethod
    def _aligned(words: Tensor, ndim: int) -> Tensor:
        return words.reshape((1,) * (ndim - words.dim()) + tuple(words.shape))

    def _follows(self, i: int, labels: list[Tensor], real: list[tuple[int, ...]]) -> bool:
        """Tell whether an operand is broadcast along an axis along which another one's labels differ."""
        if not bool((labels[i] >= 0).any()):
            return False
        for axis, size in enumerate(real[i]):
            for j, other in enumerate(labels):
                if j != i and size == 1 and real[j][axis] > 1 and self._varies(other, axis):
                    return True
        return False

    def _probe(self, node: Node, family: Pointwise, words: list[Tensor]) -> Tensor:
        """Return the state of every output by running the real operation: zeros where operands are zero, else noise."""
        states = torch.stack(torch.broadcast_tensors(*(state_of(w) for w in words))) if words else torch.zeros(1, 1)
        codes = (states * torch.tensor([3**i for i in range(len(words))]).view(-1, *[1] * (states.dim() - 1))).sum(0)
        generator = torch.Generator().manual_seed(0)
        out = torch.zeros(3 ** len(words), dtype=torch.int64)
        for code in codes.unique().tolist():
            combination = [code // 3**i % 3 for i in range(len(words))]
            stand_in = {
                n: torch.zeros(64) if s == ZERO else torch.randn(64, generator=generator)
                for n, s in zip(family.operands, combination, strict=True)
            }
            out[code] = self._outcome(node, stand_in, combination)
        return out[codes]

    def _outcome(self, node: Node, stand_in: dict[Node, Tensor], states: list[int]) -> int:
        dead = all(s != LIVE for s in states)
        if ZERO not in states:
            return FIXED if dead else LIVE
        try:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self._stand_in(n, stand_in))
            kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            result = cast(Any, node.target)(*args, **kwargs)
            zero = isinstance(result, Tensor) and bool((result == 0).all())
        except (RuntimeError, TypeError, IndexError):
            zero = False  # the operation wants another dtype or shape: claim less
        return ZERO if zero else FIXED if dead else LIVE

    @staticmethod
    def _stand_in(n: Node, stand_in: dict[Node, Tensor]) -> Any:
        if n not in stand_in:
            return n.meta["val"]
        dtype = n.meta["val"].dtype
        return stand_in[n] > 0 if dtype == torch.bool else stand_in[n].to(dtype)

    # contractions

    @_label.register
    def _(self, family: Contraction, node: Node) -> None:
        if family.groups == 1 and not family.spatial and self._was_channels(family.weight):
            return self._multiply(_as_product(family, node), node)
        words = self._words(family.x)
        labels = label_of(narrow(words))
        axes = range(words.dim())
        passes = words.shape[family.x_axis] > 1 and not self._varies(labels, family.x_axis)
        passes = passes and bool((labels >= 0).any()) and not bool((narrow(words) == DATA).any())
        if passes and node not in self.given and any(self._varies(labels, a) for a in axes):
            return self._mix_tokens(family, node, words)
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

    def _was_channels(self, weight: Node) -> bool:
        """Tell whether a constant operand holds channels that weights produced from constants, and is no weight."""
        family = self.families.get(weight)
        if family is None or weight in self.varying:
            return False
        if isinstance(family, Contraction | Lookup):
            made_by = family.weight if isinstance(family, Contraction) else family.table
            return self._scattered(made_by, torch.full((), -1)) is not None
        size = torch.Size(shape_of(weight)).numel() if is_tensor(weight) else 0
        whole = [n for n in weight.all_input_nodes if not is_tensor(n) or torch.Size(shape_of(n)).numel() >= size]
        return any(self._was_channels(n) for n in whole)

    def _learned(self, node: Node) -> bool:
        """Tell whether a value is made from parameters, or varies."""
        source = self.trace.sources.get(node)
        if source is not None:
            return source.kind in ("parameter", "input")
        return node in self.varying or any(self._learned(n) for n in node.all_input_nodes)

    def _from_input(self, labels: Tensor) -> bool:
        """Tell whether these are features of the model's input, and no channels that it makes."""
        sets = self.structure.sets
        return any(bool(torch.isin(sets.find(labels), sets.find(x)).any()) for x in self._inputs)

    def _filter_fixed(self, family: Contraction, node: Node, words: Tensor) -> None:
        """A depthwise convolution with fixed weights (a blur) leaves every channel what it is."""
        out = self._unite_over(words, [a for a in range(words.dim()) if a != family.x_axis])
        out = out.repeat_interleave(shape_of(node)[family.out_axis] // family.groups, family.x_axis)
        floor = ZERO if family.bias is None else FIXED
        self._set(node, torch.where(out >= 0, label_of(out) * 4 + state_of(out).clamp_min(floor), out))

    @staticmethod
    def _columns(family: Contraction, column: Tensor, size: int) -> Tensor:
        """Lay the labels of input channels over the weight; in a grouped convolution rows read different ones."""
        ndim = len(shape_of(family.weight))
        if family.groups == 1 or family.w_in == 0:
            return column.view([-1 if a == family.w_in else 1 for a in range(ndim)])
        blocks = column.view(family.groups, -1).repeat_interleave(size // family.groups, 0)
        return blocks.view(*blocks.shape, *[1] * (ndim - 2))

    @staticmethod
    def _rows(family: Contraction, rows: Tensor) -> Tensor:
        """Lay the labels of output channels over the weight; a grouped transposed convolution has them per block."""
        shape = shape_of(family.weight)
        if family.groups == 1 or family.w_out == 0:
            return rows.view([-1 if a == family.w_out else 1 for a in range(len(shape))])
        blocks = rows.view(family.groups, -1).repeat_interleave(shape[0] // family.groups, 0)
        return blocks.view(*blocks.shape, *[1] * (len(shape) - 2))

    def _key(self, node: Node) -> Any:
        source = self.trace.sources.get(node)
        return source.name if source is not None else node

    def _share(self, key: tuple[Any, ...], labels: Tensor) -> bool:
        """Unite labels with those of the same axes of the same weight; tell whether this is its first use."""
        key = (self._key(key[0]), *key[1:])
        known = self._axes.setdefault(key, labels)
        self.structure.unite(known, labels)
        return known is labels

    def _read(self, node: Node, weight: Node, labels: Tensor) -> None:
        """Record which label each input column reads; uses of the same weight share their columns."""
        self._share((weight, "read", *(a for a in range(labels.dim()) if labels.shape[a] > 1)), labels)
        for name, found in self._scattered(weight, labels) or []:
            self.structure.readers.append(Reader(name, found, self.order[node]))

    def _produce(self, node: Node, weight: Node, labels: Tensor, role: Role, key: tuple[Any, ...]) -> int:
        """Give the rows of a weight the labels of the output channels; return the state that zeroing them leaves."""
        first = self._share(key, labels)
        for axis in range(labels.dim()):  # a tied weight: its rows here may be its columns elsewhere
            self._share((weight, "read", axis), labels) if labels.shape[axis] > 1 and role == "table" else None
        family = self.families.get(weight)
        if isinstance(family, NormedWeight):
            return self._produce_normed(family, labels, role)
        slots = self._scattered(weight, labels)
        if slots is not None:
            if first:
                self.structure.slots.extend(Slot(name, found, role) for name, found in slots)
            return ZERO
        if weight in self.varying or not self._produce_computed(weight, labels):
            why = "its weight is computed from other values" if weight.op != "placeholder" else "its weight is fixed"
            self.structure.flag("frozen", labels, self._says(node, why))
        return ZERO

    def _produce_normed(self, family: NormedWeight, labels: Tensor, role: Role) -> int:
        """Weight normalization: zero the norms if there is one per row, else the rows of the direction."""
        rows = [a for a in range(labels.dim()) if labels.shape[a] > 1]
        target = family.g if rows in ([], [family.axis % labels.dim()]) else family.v
        if target is family.v:
            self.structure.flag("follower", label_of(self._words(family.g)), "it scales all channels of a weight")
        for name, found in self._scattered(target, labels) or []:
            self.structure.slots.append(Slot(name, found, role))
        return ZERO

    def _produce_computed(self, weight: Node, labels: Tensor) -> bool:
        """A weight that is computed from parameters: its rows die if they are zero when those of the parameters are."""
        words = self._words(weight)
        found = label_of(words)
        if bool((state_of(words) != ZERO).any()) or bool((found < 0).any()):
            return False
        along = [a for a in range(labels.dim()) if labels.shape[a] > 1]
        if any(self._varies(narrow(found), a) for a in range(found.dim()) if a not in along):
            return False  # its rows are not the parameter's rows
        self.structure.unite(narrow(found), labels)
        made = self.structure.sets.find(labels)
        for i, s in enumerate(self.structure.slots):
            touched = torch.isin(self.structure.sets.find(s.labels), made)
            if not s.producer and touched.any():
                self.structure.slots[i] = Slot(s.name, torch.where(touched, s.labels, -1), "row")
        return True

    def _scattered(self, node: Node, labels: Tensor) -> list[tuple[str, Tensor]] | None:
        """Carry labels of a weight back to the parameters that it was moved from; ``None`` if it is no such weight."""
        source = self.trace.sources.get(node)
        if source is not None:
            return [(source.name, labels)] if source.kind == "parameter" else None
        family = self.families.get(node)
        if isinstance(family, Pick):
            family = self.families.get(family.source)
        if isinstance(family, Pointwise) and operation(node) in _COPIES:
            return self._scattered(family.operands[0], labels)
        if not isinstance(family, Movement) or node in self.varying:
            return None
        index = cast(Pick, self.families[node]).index if isinstance(self.families[node], Pick) else 0
        return self._scattered_back(family, index, labels.expand(shape_of(node)))

    def _scattered_back(self, family: Movement, index: int, labels: Tensor) -> list[tuple[str, Tensor]] | None:
        sizes = [torch.Size(shape_of(n)).numel() for n in family.inputs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        stand_ins = [
            torch.arange(1 + start, 1 + start + size, dtype=torch.float64).view(shape_of(n))
            for n, start, size in zip(family.inputs, starts, sizes, strict=True)
        ]
        moved = family.run(stand_ins)
        places = (moved if isinstance(moved, Tensor) else moved[index]).long() - 1
        out: list[tuple[str, Tensor]] = []
        for n, start, size in zip(family.inputs, starts, sizes, strict=True):
            inside = (places >= start) & (places < start + size)
            found = torch.full((size,), -1)
            found[places[inside] - start] = labels[inside]
            self.structure.unite(found[places[inside] - start], labels[inside])
            inner = self._scattered(n, compact(found.view(shape_of(n))))
            if inner is None:
                return None
            out.extend(inner)
        return out

    def _adjust(self, parameter: Node, axis: int, labels: Tensor) -> int:
        """Unite a vector of parameters with the channels it adjusts; return the state that zeroing it leaves."""
        source = self.trace.sources.get(parameter)
        if source is not None and source.kind != "parameter":
            return FIXED
        if source is not None and source.value.numel() == 1 and parameter not in self.structure.words:
            fresh = self.structure.sets.mint(1).view(source.value.shape)
            self.structure.slots.append(Slot(source.name, fresh, "adjust"))
            self._axes[source.name,] = fresh
            self.structure.words[parameter] = fresh * 4 + ZERO
        words = self._words(parameter)
        shape = [-1 if a == axis else 1 for a in range(words.dim())]
        self.structure.unite(label_of(words), labels.view(shape))
        return int(state_of(narrow(words)).max()) if words.numel() else ZERO

    def _mix_tokens(self, family: Contraction, node: Node, words: Tensor) -> None:
        """The channels lie on another axis, and this contraction mixes positions: they pass through it."""
        self.mixers.add(node)
        first = self._unite_over(words, [family.x_axis])
        floor = FIXED if family.bias is not None else ZERO
        worst = torch.where(first >= 0, label_of(first) * 4 + state_of(first).clamp_min(floor), first)
        self._set(node, worst.movedim(family.x_axis, family.out_axis))

    @_label.register
    def _(self, family: Product, node: Node) -> None:
        if family.addend is None and (family.a in self.varying) != (family.b in self.varying):
            if family.a in self.varying:
                x, w, x_axes, w_axes = family.a, family.b, family.a_axes, family.b_axes
            else:
                x, w, x_axes, w_axes = family.b, family.a, family.b_axes, family.a_axes
            made = set(w_axes) - set(x_axes)
            if not self._was_channels(w) and (made or set(w_axes) & set(x_axes) - set(family.out_axes)):
                return self._contract_batched(family, node, x, w, x_axes, w_axes)
        return self._multiply(family, node)

    def _contract_batched(self, family: Product, node: Node, x: Node, w: Node, x_axes: str, w_axes: str) -> None:
        """A weight with several channel axes, or with one weight per index of a batch axis."""
        words = self._words(x)
        column = self._unite_over(words, [i for i, c in enumerate(x_axes) if c not in w_axes])
        self._consume(node, column)
        read = _laid(label_of(column), x_axes, w_axes)
        sizes = dict(zip(w_axes, shape_of(w), strict=True))
        out_axes = [c for c in w_axes if c in family.out_axes]
        fresh = self.structure.sets.mint(int(torch.Size([sizes[c] for c in out_axes]).numel()))
        rows = fresh.view([sizes[c] if c in out_axes else 1 for c in w_axes])
        self._read(node, w, read)
        kept = tuple(i for i, c in enumerate(w_axes) if c in out_axes)
        state = self._produce(node, w, rows, "row", (w, *kept) if len(kept) > 1 else (w, kept[0] if kept else -1))
        self._set(node, _laid(rows, w_axes, family.out_axes) * 4 + state)

    def _multiply(self, family: Product, node: Node) -> None:
        """Two activations: queries with keys, attention weights with values, and their kin."""
        words = {"a": narrow(self._words(family.a)), "b": narrow(self._words(family.b))}
        axes = {"a": family.a_axes, "b": family.b_axes}
        summed = (set(family.a_axes) | set(family.b_axes)) - set(family.out_axes)
        self._consume(node, words["a"])
        self._consume(node, words["b"])
        along = {s: self._varies_along(words[s], axes[s], summed) for s in "ab"}
        for s in "ab":
            if along[s]:
                why = self._says(node, "it is summed in a product of activations")
                self.structure.flag("scores", label_of(words[s]), why)
        if along["a"] and along["b"]:
            common = "".join(c for c in family.a_axes if c in family.b_axes)
            over = {s: [i for i, c in enumerate(axes[s]) if c not in common] for s in "ab"}
            self.structure.pair(*(_laid(label_of(self._unite_over(words[s], over[s])), axes[s], common) for s in "ab"))
        free = {s: set(axes[s]) - summed for s in "ab"}
        shared = free["a"] & free["b"]
        own = {s: not along[s] and self._varies_along(words[s], axes[s], free[s] - shared or free[s]) for s in "ab"}
        if family.a in self.attending or family.b in self.attending:
            weights, values = ("a", "b") if family.a in self.attending else ("b", "a")
            if not along[values] and not self._differ(words[values], axes[values], summed):
                self._attend_values(node, words[values], axes[values], axes[weights], summed)
        for s in ("b", "a"):
            other = "a" if s == "b" else "b"
            if own[s] or (not along[s] and not own[other] and bool((words[s] >= 0).any())):
                summed_axes = [i for i, c in enumerate(axes[s]) if c in summed]
                kept = self._unite_over(words[s], summed_axes)
                if family.a not in self.attending:  # the rows of a softmax sum to one: a constant comes out unchanged
                    kept = torch.where((kept >= 0) & (kept % 4 == FIXED), kept + LIVE - FIXED, kept)
                if own[other] and not family.addend:
                    self._attend_values(node, words[s], axes[s], axes[other], summed)
                if not along[other]:
                    self.structure.flag("follower", label_of(words[other]), self._says(node, "an outer product"))
                out = _laid(kept, axes[s], family.out_axes)
                return self._set(node, torch.where(out >= 0, out, DATA))
        return self._set_all(node, DATA if node in self.varying else CONSTANT)

    def _varies_along(self, words: Tensor, axes: str, letters: Iterable[str]) -> bool:
        return any(self._varies(label_of(words), i) for i, c in enumerate(axes) if c in letters)

    def _differ(self, words: Tensor, axes: str, summed: set[str]) -> bool:
        """Tell whether each index along the summed axes has weights of its own: experts, not keys of one projection."""
        over = [i for i, c in enumerate(axes) if c in summed]
        rows = label_of(words).movedim(over, list(range(len(over)))).flatten(0, len(over) - 1)
        return rows.shape[0] > 1 and rows.flatten(1).unique(dim=0).shape[0] == rows.shape[0]

    def _attend_values(self, node: Node, words: Tensor, axes: str, weights: str, summed: set[str]) -> None:
        """Record the heads of an attention: one for each index that the attention weights have too."""
        leading = [i for i, c in enumerate(axes) if c in weights and c not in summed]
        self._add_site(node, words.movedim(leading, list(range(len(leading)))), len(leading))

    def _add_site(self, node: Node, words: Tensor, leading: int) -> None:
        labels = label_of(words)
        self.structure.flag("value", labels, self._says(node, "it is a value of an attention"))
        rows = labels.reshape(torch.Size(labels.shape[:leading]).numel(), -1)
        alive = bool((state_of(words)[words != CONSTANT] == LIVE).any())
        self.structure.heads.append(HeadSite(rows.unique(dim=0), alive, self.order[node], self._says(node, "")))

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

    def _attend(self, family: Family, node: Node) -> None:
        """Follow attention weights from their softmax to where they meet the values."""
        if isinstance(family, Mixing) and operation(node) in ("aten.softmax", "aten._softmax"):
            self.attending.add(node)
        elif isinstance(family, Movement | Mixing | Contraction | Pointwise | Pick | Indexing):
            read = family.operands if isinstance(family, Pointwise) else node.all_input_nodes
            read = [n for n in read if n in self.varying]
            bare = all(
                n in self.attending or not bool((narrow(self._words(n)) >= 0).any()) for n in read if is_tensor(n)
            )
            if any(n in self.attending for n in read) and bare:
                self.attending.add(node)

    # norms, statistics, tables, recurrence

    @_label.register
    def _(self, family: Mixing, node: Node) -> None:
        words = self._words(family.x)
        results = node.meta["val"]
        mixed = sorted(family.mixed)
        if family.kind == "norm":
            out = self._normalize(family, node, words)
        elif family.kind == "pool":
            out = self._unite_over(words, mixed, self._says(node, "it is mixed with something live"))
        else:
            out = self._keep_if_constant(family, node, words, mixed)
        for axis in sorted((a for a, b in enumerate(family.out_axis) if b is None), reverse=True):
            out = out.select(axis, 0)
        if isinstance(results, Tensor):
            self._set(node, _fit(out, shape_of(node)))
        else:
            rest = [torch.full((), DATA)] * (len(results) - 1)
            self._set(node, [_fit(out, tuple(int(n) for n in results[0].shape)), *rest])

    def _normalize(self, family: Mixing, node: Node, words: Tensor) -> Tensor:
        """Normalize: over the channels it is a width statistic; its affine parameters die with their channels."""
        words = narrow(words)
        if family.parameters:
            channels = sorted({x_axis for _, _, x_axis in family.parameters})
            words = self._unite_over(words, [a for a in range(words.dim()) if a not in channels])
        labels = label_of(words)
        over = any(self._varies(labels, a) for a in family.mixed)
        if over:
            self.structure.flag("norm", labels, self._says(node, "it is normalized over the channels"))
        if over and not family.keeps_zero:
            self.structure.flag(
                "centered", labels, self._says(node, "the mean over the channels depends on their number")
            )
        state = state_of(words)
        if over:
            state = torch.where((state == ZERO) & family.keeps_zero, ZERO, LIVE)
        elif not family.keeps_zero:
            state = state.clamp_min(FIXED)
        states: list[int] = []
        for parameter, axis, x_axis in family.parameters:
            others = [a for a in range(labels.dim()) if a != x_axis]
            top = labels.amax(others) if others else labels
            states.append(self._adjust(parameter, axis, top.expand(shape_of(parameter)[axis])))
        affine = [s for s, (n, _, _) in zip(states, family.parameters, strict=True) if self._is_parameter(n)]
        vectors = len({n for n, _, _ in family.parameters if self._is_parameter(n)})
        if affine and max(affine) == ZERO and vectors >= (1 if family.keeps_zero or len(family.parameters) == 1 else 2):
            state = torch.full_like(words, ZERO)
        lively = (words >= 0) & (state == LIVE)
        if lively.any():
            self._enliven(labels[lively], self._says(node, "its normalized value depends on the other channels"))
        return torch.where(words >= 0, labels * 4 + state, words)

    def _is_parameter(self, node: Node) -> bool:
        words = self.structure.words.get(node)
        return isinstance(words, Tensor) and bool((words >= 0).all())

    def _keep_if_constant(self, family: Mixing, node: Node, words: Tensor, axes: list[int]) -> Tensor:
        """A statistic along axes keeps a label that is constant along them, and loses the others."""
        words = narrow(words)
        labels = label_of(words)
        wide = [a for a in axes if words.shape[a] > 1]
        if not wide:
            same, top, data = torch.full_like(labels, True, dtype=torch.bool), labels, words == DATA
            state = state_of(words)
        else:
            found = self.structure.sets.find(labels)
            top = found.amax(wide, keepdim=True)
            same = ((found == top) | (words == CONSTANT)).all(dim=tuple(wide), keepdim=True)
            lost = labels.masked_fill(same.expand(labels.shape), -1)
            if family.kind == "scan":
                self.structure.flag("frozen", lost, self._says(node, "it is compared with other channels"))
            elif not family.keeps_zero:
                self.structure.flag("norm", lost, self._says(node, "a statistic over the channels"))
            else:
                self._consume(node, torch.where(lost >= 0, words, CONSTANT))
            state = torch.where(words >= 0, state_of(words), ZERO).amax(wide, keepdim=True)
            data = (words == DATA).any(dim=tuple(wide), keepdim=True)
            data = data | (lost >= 0).any(dim=tuple(wide), keepdim=True)
        if (family.kind == "scan" and operation(node) != "aten.cumsum") or operation(node) == "aten.logsumexp":
            state = state.clamp_min(FIXED)
        return torch.where(same & (top >= 0), top * 4 + state, torch.where(data, DATA, CONSTANT))

    @_label.register
    def _(self, family: Lookup, node: Node) -> None:
        width = shape_of(family.table)[1]
        fresh = self.structure.sets.mint(width).view(1, -1)
        if self._scattered(family.table, fresh) is None:
            if family.table in self.structure.words and bool((self._words(family.table) >= 0).any()):
                column = self._unite_over(self._words(family.table), [0])
                return self._set(node, column.squeeze(0))
            return self._set_all(node, DATA if node in self.varying else CONSTANT)
        state = self._produce(node, family.table, fresh, "table", (family.table, 1))
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
        if operation(node).startswith("aten.arg"):
            return self._set_all(node, DATA)
        if is_tensor(node):
            return self._set(node, _fit(out, shape_of(node)))
        values = cast("list[Any]", node.meta["val"])
        first = _fit(out, tuple(int(n) for n in values[0].shape))
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
        ndim = x.dim()
        layers = [family.layers[i : i + family.directions] for i in range(0, len(family.layers), family.directions)]
        column = self._unite_over(x, range(ndim - 1))
        out = column
        units_of_all: list[Tensor] = []
        for layer in layers:
            self._consume(node, column)
            outs: list[Tensor] = []
            for weights in layer:
                units, hidden = self._recur(node, family, weights, label_of(column).flatten())
                units_of_all.append(units)
                outs.append(hidden)
            out = torch.cat(outs)
            column = out.view([1] * (ndim - 1) + [-1])
        if is_tensor(node):
            return self._set(node, column.flatten())
        values = cast("list[Any]", node.meta["val"])
        if len(family.layers) == 1 and len(values) == 2 and len(values[0].shape) == ndim == len(values[1].shape):
            single = operation(node).endswith("_cell")
            states = [column.flatten(), units_of_all[0] if single else column.flatten()]
            return self._set(node, states)
        finals = torch.stack(
            [w.flatten() for w in (units_of_all if len({w.numel() for w in units_of_all}) == 1 else [out])]
        )
        shape = [len(finals), *[1] * (len(values[1].shape) - 2), finals.shape[1]]
        last = finals.view(shape)
        first = column.flatten() if not operation(node).endswith("_cell") else units_of_all[0]
        projected = family.layers[0][4] is not None
        h = last if not projected else torch.full((), DATA)
        return self._set(node, [first, h, *([last] * (len(values) - 2))])

    def _recur(
        self, node: Node, family: Recurrence, weights: tuple[Node | None, ...], column: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One layer in one direction: return the words of its units, and of what it gives to the next layer."""
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        assert w_ih is not None
        assert w_hh is not None
        size = shape_of(w_ih)[0] // family.gates
        units = self.structure.sets.mint(size)
        rows = units.repeat(family.gates).view(-1, 1)
        state = ZERO
        self._read(node, w_ih, column.expand(shape_of(w_ih)[1]).view(1, -1))
        for w in (w_ih, w_hh):
            state = max(state, self._produce(node, w, rows, "recurrent", (w, 0)))
        for b in (b_ih, b_hh):
            if b is not None:
                state = max(state, self._adjust(b, 0, rows.flatten()))
        hidden = units
        if w_hr is not None:
            hidden = self.structure.sets.mint(shape_of(w_hr)[0])
            self._read(node, w_hr, units.view(1, -1))
            self._produce(node, w_hr, hidden.view(-1, 1), "row", (w_hr, 0))
        self._read(node, w_hh, hidden.view(1, -1))
        for s in family.states:
            state = max(state, self._start(node, s, hidden if s is family.states[0] else units))
        return units * 4 + state, hidden * 4 + state

    def _start(self, node: Node, state: Node, labels: Tensor) -> int:
        """Unite an initial state with the units it belongs to; return what it leaves when they are dead."""
        value = self._constant(state)
        if isinstance(value, Tensor) and not value.any():
            return ZERO
        words = self._words(state)
        found = self._unite_over(words, range(words.dim() - 1), self._says(node, "its initial state is live")).flatten()
        self.structure.unite(label_of(found), labels)
        if bool((found == DATA).any()) or bool((state_of(found) == LIVE).any()):
            self._enliven(labels, self._says(node, "its initial state is live"))
            return LIVE
        return FIXED if bool((found == CONSTANT).any()) else int(state_of(found).max())

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


def _has_tensors(node: Node) -> bool:
    return is_tensor(node) or isinstance(node.meta.get("val"), tuple | list)


def _summed_by(node: Node) -> Node | None:
    """Return the sum that alone reads a product of two tensors, if there is one: together they are a contraction."""
    if operation(node) != "aten.mul" or len(node.users) != 1 or len(node.all_input_nodes) != 2:
        return None
    (user,) = node.users
    keeps = len(shape_of(user)) == len(shape_of(node)) if operation(user) == "aten.sum" else True
    return None if keeps else user


def _summed_product(node: Node, family: Mixing) -> Product | None:
    """Return the contraction that a sum makes of the product that it alone reads."""
    if _summed_by(family.x) is not node:
        return None
    shape = shape_of(family.x)
    letters, spare = "abcdefghijklmnop"[: len(shape)], iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    a, b = family.x.all_input_nodes

    def axes(n: Node) -> str:
        own = list(
            zip(
                letters[len(shape) - len(shape_of(n)) :],
                shape_of(n),
                shape[len(shape) - len(shape_of(n)) :],
                strict=True,
            )
        )
        return "".join(c if have == full else next(spare) for c, have, full in own)

    held = "".join(c for i, c in enumerate(letters) if i not in family.mixed)
    return Product((a, b), a, b, axes(a), axes(b), held)


def _as_product(family: Contraction, node: Node) -> Product:
    """Write a contraction with letters, as a product of two activations."""
    letters = "abcdefghij"[: len(shape_of(family.x))]
    k = letters[family.x_axis]
    weight = "".join(k if a == family.w_in else "n" for a in range(2))
    out = "".join("n" if c == k else c for c in letters)
    assert family.x_axis == family.out_axis
    return Product((family.x, family.weight), family.x, family.weight, letters, weight, out, family.bias)


def _laid(t: Tensor, axes: str, target: str) -> Tensor:
    """Lay a tensor with lettered axes out over other letters, with size 1 for those it lacks; others must be single."""
    drop = [i for i, c in enumerate(axes) if c not in target]
    for i in reversed(drop):
        t = t.amax(i)
    held = [c for c in axes if c in target]
    order = sorted(range(len(held)), key=lambda i: target.index(held[i]))
    t = t.permute(order)
    shape = iter(t.shape)
    return t.reshape([next(shape) if c in held else 1 for c in target])


def _fit(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast words to a shape; pooling and keepdim change sizes along axes of equal words."""
    for axis, (have, want) in enumerate(zip(words.shape, shape, strict=True)):
        if have != want and have > 1:
            words = words.narrow(axis, 0, 1)
    return words.expand(shape)


_STRUCTURES: weakref.WeakKeyDictionary[Trace, Structure] = weakref.WeakKeyDictionary()


def find_structure(trace: Trace) -> Structure:
    """Interpret a trace with labels, and return what they say; asked again for the same trace, the same answer."""
    if trace not in _STRUCTURES:
        first = _Interpreter(trace)
        if first.mixers:
            _add_token_units(first, _Interpreter(trace, frozenset(first.mixers)))
        _STRUCTURES[trace] = first.structure
    return _STRUCTURES[trace]


def _add_token_units(first: _Interpreter, second: _Interpreter) -> None:
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
