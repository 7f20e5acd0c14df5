"""Count the floating-point operations of a forward, also where torch runs a whole layer as one operation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .tracing import Inputs
from .tracing.settings import evaluating, unchanged, unfused

_Shape = Sequence[int]


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Queries times keys, and weights times values; keys and values may serve several heads."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _layers(x: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    """All layers of a recurrent network: every weight matrix is read once per step."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _layer(x: _Shape, of_inputs: _Shape, of_states: _Shape, *_: Any, **__: Any) -> int:
    """One layer of an LSTM in one direction."""
    return _layers(x, [of_inputs, of_states])


def _bilinear(first: _Shape, weight: _Shape, second: _Shape, *_: Any, **__: Any) -> int:
    """Every weight is multiplied with an element of each input, in every example."""
    return 2 * math.prod(first[:-1]) * math.prod(weight)


_OPERATIONS = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "mkldnn_rnn_layer": _layer,
    "_cudnn_rnn": _layers,
    "_trilinear": _bilinear,
}

_FORMULAS: dict[Any, Callable[..., int]] = {getattr(torch.ops.aten, n): f for n, f in _OPERATIONS.items()}
"""Operations that torch's counter leaves out, or refuses where a key serves several queries, as in torch 2.11."""


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which knows these operations too."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def count_flops(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Count the floating-point operations of one forward in eval mode, by module name; ``""`` is the whole model.

    That one alone where the forward takes gradients itself (``torch.func.grad``): what tells modules apart fails there.
    """
    try:
        return _count(model, inputs, flop_counter())
    except RuntimeError:
        counter = flop_counter()
        counter.mod_tracker = cast(Any, _Untold())
        return _count(model, inputs, counter)


class _Untold(contextlib.nullcontext[None]):
    """Tells no module from another."""

    parents = frozenset({"Global"})


def _count(model: nn.Module, inputs: Inputs, counter: FlopCounterMode) -> dict[str, int]:
    # detached: the counter's hooks fail on views of parameters that are made without autograd
    detached = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    with evaluating(model), unchanged(model, buffers=True), torch.no_grad(), unfused(), counter:
        given = inputs.map(Tensor.clone)
        torch.func.functional_call(model, detached, given.args, given.kwargs)
    root = type(model).__name__
    found: dict[str, int] = {}
    for name, by_op in counter.get_flop_counts().items():
        short = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        found[short] = max(found.get(short, 0), sum(by_op.values()))
    return found
