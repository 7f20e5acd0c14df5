"""The families of operations: what an operation does to the axes of its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Movement:
    """Every output element is one input element, or a constant. ``run`` applies the operation to stand-ins."""

    inputs: tuple[Node, ...]
    run: Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Pointwise:
    """Every output element reads the elements at its own (broadcast) position. ``product``: zero absorbs."""

    operands: tuple[Node, ...]
    product: bool = False


@dataclass(frozen=True)
class Contraction:
    """A linear map of an activation by a weight: ``out = weight * x + bias``, summed over the channels of x.

    ``apply(x, weight)`` runs it without bias. The input channels are ``x_axis`` of x and ``w_in`` of the weight, the
    output channels ``out_axis`` and ``w_out``; other axes are kernel or position. ``padded`` means that some outputs
    see fewer inputs than others (zero padding, transposed convolution).
    """

    x: Node
    weight: Node
    bias: Node | None
    x_axis: int
    w_in: int
    w_out: int
    out_axis: int
    apply: Callable[[Tensor, Tensor], Tensor]
    groups: int = 1
    padded: bool = False
    spatial: bool = False

    @property
    def maps(self) -> tuple[Contraction, ...]:
        """The map itself, as the only one that reads x here."""
        return (self,)


@dataclass(frozen=True)
class Mixing:
    """Elements of x mix along some axes and never along the others.

    ``out_axis[a]`` is where axis ``a`` of x lies in the output, or ``None`` if it is gone. ``parameters`` are
    ``(node, its axis, the axis of x)``; an output is constant where ``scale`` is zero. ``kind`` says what happens
    along the mixed axes: a norm's statistics, a pooling, a reduction, or a softmax or cumulative sum. ``keeps_zero``:
    a slice of zeros stays zero whatever the others hold, before the parameters (RMSNorm; a sum). ``averages``: zeros
    along the mixed axes matter by their number only (a mean; RMSNorm's mean of squares). With ``groups``, axis 1 mixes
    within that many groups of channels only. ``where`` are operands that say which elements are mixed.
    """

    kind: Literal["norm", "pool", "reduction", "scan"]
    x: Node
    mixed: frozenset[int]
    out_axis: tuple[int | None, ...]
    parameters: tuple[tuple[Node, int, int], ...] = ()
    scale: Node | None = None
    keeps_zero: bool = False
    averages: bool = False
    groups: int = 1
    where: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Lookup:
    """Rows of a table by integer index."""

    table: Node
    indices: Node


@dataclass(frozen=True)
class Creation:
    """A tensor made from nothing."""


@dataclass(frozen=True)
class Pick:
    """One of several results of another node."""

    source: Node
    index: int


@dataclass(frozen=True)
class Barrier:
    """An operation without a rule: whatever goes in or comes out stays whole.

    Families derived from it are barriers to whoever has no rule of their own for them.
    """

    inputs: tuple[Node, ...]


@dataclass(frozen=True)
class Product(Barrier):
    """A sum of products of two operands, as an einsum: matmul and bmm of activations, or with a batched weight.

    Every axis has a letter. A letter that is missing from ``out_axes`` is summed over; an operand may have size 1 along
    a letter, and then it is broadcast. Along the letters in ``aligned``, its kernel reads several elements at a time.
    """

    a: Node
    b: Node
    a_axes: str
    b_axes: str
    out_axes: str
    aligned: str = ""

    @property
    def operands(self) -> tuple[tuple[Node, str], tuple[Node, str]]:
        """Both operands, with the letters of their axes."""
        return (self.a, self.a_axes), (self.b, self.b_axes)

    def weighs(self, operand: Node) -> bool:
        """Tell whether an operand is a weight: it tells apart whatever is summed over."""
        [(own, other)] = [(x, y) for (n, x), (_, y) in (self.operands, self.operands[::-1]) if n is operand][:1]
        return all(c in self.out_axes or (c in own and c in other) for c in own + other)

    def summed(self, operand: Node) -> list[tuple[int, Node, int]]:
        """Return the axes of an operand over which it is summed with the other, the other, and its axes."""
        found = [(x, m, y) for (n, x), (m, y) in (self.operands, self.operands[::-1]) if n is operand][:1]
        return [(x.index(c), m, y.index(c)) for x, m, y in found for c in x if c in y and c not in self.out_axes]


@dataclass(frozen=True)
class Attention(Barrier):
    """Scaled dot-product attention; ``repeats`` query heads share a key-value head, on axis -3."""

    query: Node
    key: Node
    value: Node
    repeats: int


class Cell(NamedTuple):
    """The weights of one layer and direction of a recurrence."""

    w_ih: Node
    w_hh: Node
    b_ih: Node | None = None
    b_hh: Node | None = None
    w_hr: Node | None = None


@dataclass(frozen=True)
class Recurrence(Barrier):
    """An LSTM, GRU or plain RNN, or a single step of one.

    ``layers`` lists the cells, layer by layer and direction by direction. The last axis of x holds its channels;
    ``states`` are the initial states. ``single`` marks a single step.
    """

    x: Node
    states: tuple[Node, ...]
    layers: tuple[Cell, ...]
    directions: int
    gates: int
    single: bool = False

    @property
    def maps(self) -> tuple[Contraction, ...]:
        """How the first layer reads x: a linear map per direction."""
        first = self.layers[: self.directions]
        return tuple(Contraction(self.x, c.w_ih, c.b_ih, -1, 1, 0, -1, torch.nn.functional.linear) for c in first)


@dataclass(frozen=True)
class Indexing(Barrier):
    """Elements of x picked along some axes by integer (or boolean) tensors, all others whole: index, gather and kin.

    ``source`` is ``None``, or what is written there (index_put). ``run`` applies the operation to stand-ins of x and
    the written tensor, given the values of the indices. ``same_axes`` tells that output axes lie where those of x do,
    ``adds`` that what is written is combined with what is there (index_add), which moves nothing, and ``each`` that
    there is an index for every element (gather, scatter). ``over``: it is not added, but takes its place, or the
    larger of both does, so that zeros are not nothing.
    """

    x: Node
    axes: tuple[int, ...]
    indices: tuple[Node, ...]
    run: Callable[[list[Tensor], dict[Node, Tensor]], Tensor]
    source: Node | None = None
    same_axes: bool = True
    adds: bool = False
    each: bool = False
    over: bool = False

    @property
    def moved(self) -> tuple[Node, ...]:
        """The operands whose elements end up in the result."""
        return (self.x,) if self.source is None else (self.x, self.source)


@dataclass(frozen=True)
class Ranking(Barrier):
    """Elements of x picked along an axis by comparing them: topk, sort, max; the first result holds them."""

    x: Node
    axis: int
    keeps_axis: bool


@dataclass(frozen=True)
class Bilinear(Barrier):
    """``out_o = x1 W_o x2 + bias_o`` over the last axes, with a weight ``(out, in1, in2)``."""

    x1: Node
    x2: Node
    weight: Node
    bias: Node | None


@dataclass(frozen=True)
class Halves(Barrier):
    """A gated linear unit: the first half along an axis times a function of the second."""

    x: Node
    axis: int


@dataclass(frozen=True)
class NormedWeight(Barrier):
    """Weight normalization ``w = g · v / ‖v‖``, one ``g`` per index along an axis of v."""

    v: Node
    g: Node
    axis: int


Family: TypeAlias = Movement | Pointwise | Contraction | Mixing | Lookup | Creation | Pick | Barrier

OpRule: TypeAlias = Callable[[Node, frozenset[Node]], "Family | None"]
"""``(node, the varying nodes) → its family``, or ``None`` where the rule does not cover it."""
