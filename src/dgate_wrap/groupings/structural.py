"""Groupings that the shapes of stock layers tell, without a trace: weights, neurons, filters, kernels, in_channels.

Zeroing a filter or a neuron makes its output channel constant (its bias); zeroing an input channel makes the layer
deaf to it. Which of them can then be cut out, exactly and with everything that belongs to them, `export` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import GateError
from ..labels import along, disjoint
from ..tracing.settings import evaluating
from .registry import register_grouping

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _weights_of(model: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield the weight's name, the layer and the weight of every layer of these types, tied weights once."""
    seen: dict[int, Tensor] = {}  # holds the tensors: a parametrized weight is made at each access, and ids are reused
    for prefix, module in model.named_modules():
        if not isinstance(module, types):
            continue
        with evaluating(module):  # a spectrally normalized weight changes its state when it is read in train mode
            weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or id(weight) in seen:
            continue
        if isinstance(weight, nn.UninitializedParameter):
            raise GateError(
                f"{prefix}.weight has no shape yet: {type(module).__name__} is lazy.",
                expected="parameters with shapes",
                mend="run the model once on an example, then gate it",
            )
        seen[id(weight)] = weight
        yield f"{prefix}.weight" if prefix else "weight", module, weight


def _filter_axis(layer: Any, weight: Tensor) -> Tensor:
    """Number the output channels: rows, or for a transposed convolution (group of rows) × column."""
    if not isinstance(layer, _TRANSPOSED_CONVS):
        return along(weight, 0)
    return _grouped(weight, layer.groups)


def _channel_axis(layer: Any, weight: Tensor) -> Tensor:
    """Number the input channels: columns, offset by the group of the row; rows of a transposed convolution."""
    if isinstance(layer, _TRANSPOSED_CONVS):
        return along(weight, 0)
    return _grouped(weight, getattr(layer, "groups", 1))


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """Number the columns of each of ``groups`` equal blocks of rows with numbers of their own."""
    rows, columns = weight.shape[:2]
    row_group = torch.arange(rows).div(rows // groups, rounding_mode="floor") if groups > 1 else torch.zeros(1).long()
    labels = row_group.unsqueeze(1) * columns + torch.arange(columns)
    return labels.view(*labels.shape, *[1] * (weight.dim() - 2))


@register_grouping("weights")
def weights(model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Every single weight of every parameter with two or more dimensions.

    Biases and norm parameters are left alone. With D=2 this is an exact L1 solver (spred), with D>2 deep weight
    factorization. Zeros stay in place: a single weight is no structure that could be cut out.
    """
    whole: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if ".parametrizations." not in f".{n}"}
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):  # a weight that others compute: `gate` refuses it, in words
            names = cast("dict[str, Any]", module.parametrizations)
            with evaluating(module):
                whole |= {f"{prefix}.{n}" if prefix else n: getattr(module, n) for n in names}
    return disjoint((n, along(p, range(p.dim()))) for n, p in whole.items() if p.dim() >= 2)


@register_grouping("neurons")
def neurons(model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Every output unit of every linear layer.

    A group is one row of ``nn.Linear.weight``: the incoming weights of a unit. The last layer's rows are the model's
    outputs; leave them out with ``exclude``.
    """
    return disjoint((n, along(w, 0)) for n, _, w in _weights_of(model, (nn.Linear,)))


@register_grouping("filters")
def filters(model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Every output channel of every convolution.

    1d, 2d and 3d, transposed, grouped and depthwise. A group is all the weights that produce the channel.
    """
    found = _weights_of(model, (*_CONVS, *_TRANSPOSED_CONVS))
    return disjoint((n, _filter_axis(layer, w)) for n, layer, w in found)


@register_grouping("kernels")
def kernels(model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Every spatial kernel of every convolution: one output channel × one input channel."""
    return disjoint((n, along(w, (0, 1))) for n, _, w in _weights_of(model, (*_CONVS, *_TRANSPOSED_CONVS)))


@register_grouping("in_channels")
def in_channels(model: nn.Module, trace: Any) -> dict[str, Tensor]:
    """Every input channel of every convolution and every input of every linear layer.

    A group is all the weights that read the channel; in a grouped convolution, those of its own group of filters.
    """
    found = _weights_of(model, (*_CONVS, *_TRANSPOSED_CONVS, nn.Linear))
    return disjoint((n, _channel_axis(layer, w)) for n, layer, w in found)
