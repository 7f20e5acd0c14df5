"""Layers that compute only those of their outputs that are not dead, and read only those of their inputs.

A channel that is dead in one branch of a residual sum stays in the sum, as the others need it. The layer that ends the
branch need not compute it: ``y = 0; y[kept] = W[kept] x``. Between layers whose code has sizes written in it, as an
attention that splits its heads, dead channels stay too. The layer behind need not read them:
``y = W[:, read] x[read]``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing.families import Contraction
from .demands import computed_rows, read_columns
from .widths import Widths

_WORTH = 96
"""Scattering costs about as much time as this many multiplications and additions for each element of the full output.

Measured on CPU, one thread, float32: 0.3–2 ns for an element, at 90 GFLOP/s of matrix product.
"""


def filled_name(path: str) -> str:
    """Return the name of the buffer of a layer that holds the constants between what it computes."""
    return f"{path}._filled" if path else "_filled"


@dataclass(frozen=True)
class Scatter:
    """A forward hook that spreads the outputs of a layer over more channels.

    Args:
        axis: The channels' axis, from the end.
        stays: Which of its outputs there are, of all that it had.
        kept: Which of those it computes.
        filled: Whether the others hold constants, in the buffer ``_filled``, and not zeros.
    """

    axis: int
    stays: list[int]
    kept: list[int]
    filled: bool = False

    def attach(self, layer: nn.Module, constants: Tensor | None = None) -> None:
        """Make a layer give all channels."""
        weight = cast(Tensor, layer.weight)
        layer.register_buffer("_kept", torch.tensor(self.kept, device=weight.device), persistent=False)
        hook = copy.copy(self)
        if self.filled:
            layer.register_buffer("_filled", cast(Tensor, constants).to(weight), persistent=False)
            hook.__dict__["constants"] = layer._filled
        layer.register_forward_hook(hook)
        self.name_size(layer)

    def following(self, layer: nn.Module) -> Scatter:
        """Return the hook of a layer whose buffer may hold less than it did."""
        hook = copy.copy(self)
        hook.__dict__["kept"] = _places(layer, "_kept", self.kept)
        return hook

    def name_size(self, layer: nn.Module) -> None:
        """Let a layer name as many outputs as it gives, which adapters and code around it go by."""
        _name(layer, ("out_features", "out_channels", "nf"), len(self.stays))

    def __call__(self, layer: Any, args: Any, out: Tensor) -> Tensor:
        """Return all channels."""
        shape = list(out.shape)
        shape[self.axis] = len(self.stays)
        if self.filled:
            filled = _held(layer, "_filled", self.__dict__["constants"]).to(out)
            full = filled.view(-1, *[1] * (-1 - self.axis)).expand(shape)
        else:
            full = out.new_zeros(shape)
        return full.index_copy(self.axis, _held(layer, "_kept", self.kept).to(out.device), out)


def _held(layer: nn.Module, name: str, otherwise: Tensor | list[int]) -> Tensor:
    """Return a buffer of a layer, or what it held.

    Of a layer that took over its hooks alone, as a quantized one does, or that came back from the meta device, to which
    its buffers, which are in no state dict, were lost.
    """
    held = layer._buffers.get(name)
    weight = getattr(layer, "weight", None)
    lost = held is None or (held.is_meta and isinstance(weight, Tensor) and not weight.is_meta)
    return torch.as_tensor(otherwise) if lost else cast(Tensor, held)


@dataclass(frozen=True)
class Picked:
    """A forward pre-hook that hands a layer some channels of its input.

    Args:
        axis: The channels' axis, from the end.
        read: Which of them it reads.
        count: How many there are.
    """

    axis: int
    read: list[int]
    count: int

    def attach(self, layer: nn.Module) -> None:
        """Make a layer take all channels."""
        device = cast(Tensor, layer.weight).device
        layer.register_buffer("_read", torch.tensor(self.read, device=device), persistent=False)
        layer.register_forward_pre_hook(self, with_kwargs=True)
        self.name_size(layer)

    def following(self, layer: nn.Module) -> Picked:
        """Return the hook of a layer whose buffer may hold less than it did."""
        return replace(self, read=_places(layer, "_read", self.read))

    def name_size(self, layer: nn.Module) -> None:
        """Let a layer name as many inputs as it takes."""
        _name(layer, ("in_features", "in_channels", "nx"), self.count)

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """Return the arguments with the channels that the layer reads."""
        if args:
            args = (self._of(layer, args[0]), *args[1:])
        elif kwargs:
            kwargs = kwargs | {"input": self._of(layer, kwargs["input"])}
        return args if kwargs is None else (args, kwargs)

    def _of(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x.index_select(self.axis, _held(layer, "_read", self.read).to(x.device))


def _places(layer: nn.Module, name: str, otherwise: list[int]) -> list[int]:
    held = layer._buffers.get(name)
    return otherwise if held is None or held.is_meta else held.tolist()


def _name(layer: nn.Module, names: Collection[str], size: int) -> None:
    for name in names:
        if name in layer.__dict__:
            setattr(layer, name, size)


def name_sizes(layer: nn.Module) -> None:
    """Let a layer name the sizes that its hooks make of those of its weight, and those know what they spread."""
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key, hook in hooks.items():
            if isinstance(hook, Scatter | Picked):
                hooks[key] = hook.following(layer)
                hook.name_size(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Tell whether a layer computes or reads some channels only, since an earlier export."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return any(isinstance(h, Scatter | Picked) for h in hooks)


def held_by_code(widths: Widths, layers: Mapping[Node, str]) -> set[str]:
    """Return the layers around which something dead stays for the user's code only."""
    written, found = torch.tensor(sorted(widths.written), dtype=torch.int64), set[str]()

    def held(node: Node, axis: int) -> Tensor:
        return widths.keep[node][axis] & torch.isin(widths.why[node][axis], written)

    for node, path in layers.items():
        family = cast(Contraction, widths.facts.families[node])
        made, read = held(node, family.out_axis), held(family.x, family.x_axis)
        if bool(made.any()):
            made = made & ~computed_rows(widths.facts, node, idle=True)
        if bool(read.any()):
            read = read & ~read_columns(widths.facts, node)
        if bool(made.any() or read.any()):
            found.add(path)
    return found


def partial_columns(widths: Widths, layers: Mapping[Node, str], chosen: Collection[str]) -> frozenset[Node]:
    """Return the contractions that need not read all inputs that stay; the arguments are those of `partial_rows`."""
    dead: dict[str, Tensor] = {}
    calls: dict[str, list[Node]] = {}
    for node, path in layers.items():
        family = cast(Contraction, widths.facts.families[node])
        kept = widths.keep[family.x][family.x_axis]
        zero = kept & ~read_columns(widths.facts, node)
        calls.setdefault(path, []).append(node)
        varies = family.x in widths.facts.varying
        dead[path] = dead.get(path, torch.ones_like(kept)) & zero if varies else torch.zeros_like(kept)
    return _all_calls(widths, calls, dead, chosen, inputs=True)


def find_picks(widths: Widths, layers: Mapping[Node, str]) -> dict[str, Picked]:
    """Return, per layer that reads some of its inputs only, which."""
    picks: dict[str, Picked] = {}
    for node in widths.allowed.picking:
        family = cast(Contraction, widths.facts.families[node])
        read = read_of(widths, node)
        if not read.all():
            axis = family.x_axis - len(widths.keep[family.x])
            picks[layers[node]] = Picked(axis, read.nonzero().flatten().tolist(), read.numel())
    return picks


def read_of(widths: Widths, node: Node) -> Tensor:
    """Return which inputs a contraction reads, of those that stay."""
    family = cast(Contraction, widths.facts.families[node])
    return widths.keep[family.weight][family.w_in][widths.keep[family.x][family.x_axis]]


def partial_rows(
    widths: Widths, layers: Mapping[Node, str], chosen: Collection[str] = (), *, idle: bool = False
) -> frozenset[Node]:
    """Return the contractions some of whose outputs need not be computed, where this makes the network faster.

    Args:
        widths: What is kept if each of them computes all outputs that stay.
        layers: The stock layer behind each contraction that may scatter its outputs.
        chosen: Layers that do so whether this is faster or not.
        idle: Whether outputs on which nothing depends need not be computed either.
    """
    dead: dict[str, Tensor] = {}
    calls: dict[str, list[Node]] = {}
    for node, path in layers.items():
        kept = widths.keep[node][cast(Contraction, widths.facts.families[node]).out_axis]
        calls.setdefault(path, []).append(node)
        dead[path] = dead.get(path, torch.ones_like(kept)) & kept & ~computed_rows(widths.facts, node, idle=idle)
    return _all_calls(widths, calls, dead, chosen, inputs=False)


def _all_calls(
    widths: Widths,
    calls: Mapping[str, list[Node]],
    dead: Mapping[str, Tensor],
    chosen: Collection[str],
    *,
    inputs: bool,
) -> frozenset[Node]:
    """Return all calls of the layers that should leave out what is dead of their inputs, or of their outputs."""
    found: set[Node] = set()
    for path, nodes in calls.items():
        f = cast(Contraction, widths.facts.families[nodes[0]])
        at = (f.x, f.x_axis, f.w_in) if inputs else (nodes[0], f.out_axis, f.w_out)
        found |= {*nodes} if _worth(widths, nodes[0], at, dead[path], path in chosen) else set()
    return frozenset(found)


def _worth(widths: Widths, node: Node, at: tuple[Node, int, int], dead: Tensor, chosen: bool) -> bool:
    """Tell whether a layer should leave out what is dead: a chosen one if it can, others if that spares time.

    Args:
        widths: What is kept.
        node: Its contraction.
        at: The tensor that stays whole, its axis, and the axis of the weight along which is left out.
        dead: What may be left out.
        chosen: Whether it is a chosen one.
    """
    x, axis, w_axis = at
    stays, count = int(widths.keep[x][axis].sum()), int(dead.sum())
    if chosen:  # of one in which all are dead, one stays
        return min(count, stays - 1) > 0
    weight = widths.keep[cast(Contraction, widths.facts.families[node]).weight]
    each = torch.Size(int(k.sum()) for a, k in enumerate(weight) if a != w_axis).numel()
    moved = stays if x is node else stays - count
    return 0 < count < stays and count * each > _WORTH * moved


def find_scatters(widths: Widths, layers: Mapping[Node, str]) -> tuple[dict[str, Scatter], dict[str, Tensor]]:
    """Return, per layer that leaves out some of its outputs, how it scatters the others, and what those hold."""
    scatters: dict[str, Scatter] = {}
    constants: dict[str, Tensor] = {}
    for node in widths.allowed.scattered:
        family = cast(Contraction, widths.facts.families[node])
        kept, held = places_of(widths, node)
        if not kept.all():
            stays, places = (k.nonzero().flatten().tolist() for k in (widths.keep[node][family.out_axis], kept))
            axis = family.out_axis - len(widths.keep[node])
            scatters[layers[node]] = Scatter(axis, stays, places, held is not None)
            if held is not None:
                constants[layers[node]] = held
    return scatters, constants


def places_of(widths: Widths, node: Node) -> tuple[Tensor, Tensor | None]:
    """Return which outputs of a layer are computed, of those that stay, and what all hold before, if not zeros."""
    family = cast(Contraction, widths.facts.families[node])
    stays = widths.keep[node][family.out_axis]
    kept = widths.rows(node)[stays]
    if family.bias is None:
        return kept, None
    bias = widths.facts.values[family.bias][stays]
    return kept, torch.where(kept, 0.0, bias) if bool((bias[~kept] != 0).any()) else None
