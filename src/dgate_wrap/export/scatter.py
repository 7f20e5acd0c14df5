"""Partial sums: a layer computes only those of its outputs that are not dead, and scatters them to where they belong.

A channel that is dead in one branch of a residual sum stays in the sum, as the others need it. The layer that ends the
branch need not compute it: ``y = 0; y[kept] = W[kept] x``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing.families import Contraction
from .demands import some_weight
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
        if self.filled:
            layer.register_buffer("_filled", cast(Tensor, constants).to(weight), persistent=False)
        layer.register_forward_hook(self)

    def __call__(self, layer: Any, args: Any, out: Tensor) -> Tensor:
        """Return all channels."""
        shape = list(out.shape)
        shape[self.axis] = len(self.stays)
        if self.filled:
            full = layer._filled.to(out.dtype).view(-1, *[1] * (-1 - self.axis)).expand(shape)
        else:
            full = out.new_zeros(shape)
        return full.index_copy(self.axis, layer._kept, out)


def partial_rows(widths: Widths, layers: Mapping[Node, str]) -> frozenset[Node]:
    """Return the contractions some of whose outputs need not be computed, where this makes the network faster.

    Args:
        widths: What is kept if each of them computes all outputs that stay.
        layers: The stock layer behind each contraction that may scatter its outputs.
    """
    dead: dict[str, Tensor] = {}
    calls: dict[str, list[Node]] = {}
    for node, path in layers.items():
        kept = widths.keep[node][cast(Contraction, widths.facts.families[node]).out_axis]
        calls.setdefault(path, []).append(node)
        dead[path] = dead.get(path, torch.ones_like(kept)) & kept & ~some_weight(widths.facts, node)
    return frozenset(n for p, nodes in calls.items() if _worth(widths, nodes[0], dead[p]) for n in nodes)


def _worth(widths: Widths, node: Node, dead: Tensor) -> bool:
    """Tell whether the multiplications that are spared take more time than the scattering."""
    family = cast(Contraction, widths.facts.families[node])
    kept = int(widths.keep[node][family.out_axis].sum())
    weight = widths.keep[family.weight]
    inputs = torch.Size(int(k.sum()) for a, k in enumerate(weight) if a != family.w_out).numel()
    return 0 < int(dead.sum()) < kept and int(dead.sum()) * inputs > _WORTH * kept


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
