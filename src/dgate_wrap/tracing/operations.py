"""What each operation of a graph does to the axes of its operands: one table from operations to families.

Whoever walks the graph (labels, constants, liveness, cutting) asks `describe` for the family of a node and has one
rule per family. An operation that stands in no table is a `Barrier`: whatever meets it is kept whole.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .families import Barrier, Contraction, Creation, Family, Mixing, Movement, OpRule, Pick, Pointwise
from .mixings import MIXINGS
from .movements import MOVEMENTS, source_indices
from .nodes import is_random, is_tensor, names, op_name, shape_of, tensor_inputs, tensor_of
from .sums import SUMS

if TYPE_CHECKING:
    from .capture import Trace

__all__ = ["describe", "gives_zero", "is_tensor", "op_name", "shape_of", "source_indices", "varying_nodes"]

_ALSO_POINTWISE = names(
    """
    clone contiguous alias detach _to_copy to dropout feature_dropout alpha_dropout lift_fresh_copy zeros_like
    ones_like full_like empty_like hardswish where masked_fill rsub fill rrelu add mul sub div neg abs clamp
    sigmoid log_sigmoid polar floor_divide isclose real imag complex _conj
    _conj_physical resolve_conj resolve_neg __and__ __or__ __xor__ __lshift__ __rshift__
    """
)
"""Operations that go element by element and that torch does not tag so; it never tags an alias."""

COPIES = names("clone contiguous _to_copy to alias detach")
"""Operations that give what they are given."""
_CREATIONS = names(
    """
    zeros ones full arange scalar_tensor eye linspace tril_indices triu_indices new_zeros new_ones new_full
    """
)
_RULES: dict[str, OpRule] = {
    **MOVEMENTS,
    **SUMS,
    **MIXINGS,
    "type_as": lambda node, varying: Pointwise((cast(Node, node.args[0]),)),
    "_prelu_kernel": lambda node, varying: Pointwise(tensor_inputs(node)),
}


def describe(node: Node, varying: frozenset[Node]) -> Family:
    """Return the family of a ``call_function`` node.

    Args:
        node: The node.
        varying: The nodes that depend on the model's inputs.
    """
    family, inputs = _describe(node, varying), tensor_inputs(node)
    empty = any(0 in shape_of(n) for n in (node, *inputs) if is_tensor(n))
    if empty and not isinstance(family, Movement | Pick | Creation):
        return Barrier(inputs)  # an expert that gets none of the example's tokens: nothing shows what it computes
    return family


def _describe(node: Node, varying: frozenset[Node]) -> Family:
    if node.target is operator.getitem:
        return Pick(cast(Node, node.args[0]), cast(int, node.args[1]))
    name, inputs = op_name(node), tensor_inputs(node)
    if name in _RULES:
        return _RULES[name](node, varying) or Barrier(inputs)
    if is_random(node):
        return Barrier(inputs)
    tags = cast("list[torch.Tag]", getattr(node.target, "tags", []))
    if (torch.Tag.pointwise in tags or name in _ALSO_POINTWISE) and is_tensor(node):
        return Pointwise(inputs, product=name == "mul")
    if name in _CREATIONS and (name.startswith("new_") or not inputs):
        return Creation()
    return Barrier(inputs)


def has_rule(node: Node) -> bool:
    """Tell whether any rule knows an operation."""
    name, tags = op_name(node), cast("list[torch.Tag]", getattr(node.target, "tags", []))
    return name in _RULES or name in _ALSO_POINTWISE or name in _CREATIONS or torch.Tag.pointwise in tags


def varying_nodes(trace: Trace) -> frozenset[Node]:
    """Return the nodes whose value depends on the model's inputs, or on chance."""
    found = {n for n, s in trace.sources.items() if s.kind == "input"}
    for node in trace.nodes:
        read = node.all_input_nodes[: 1 if op_name(node) == "type_as" else None]  # of the other, the dtype alone
        if any(n in found for n in read) or is_random(node):
            found.add(node)
    return frozenset(found)


def feature_inputs(trace: Trace, families: Mapping[Node, Family], varying: frozenset[Node]) -> frozenset[Node]:
    """Return the inputs whose elements are features: floating-point ones, and whole numbers that a layer computes with.

    Whole numbers are so where they, made floats and moved as they may be, are what weights multiply: images of bytes,
    counts. Indices, and masks that other values are multiplied by, are not.
    """
    given = {n for n, s in trace.sources.items() if s.kind == "input" and isinstance(s.value, Tensor)}
    alone: dict[Node, frozenset[Node]] = {n: frozenset((n,)) for n in given if not tensor_of(n).is_complex()}
    """What is made of inputs without weights that multiply it, and of which ones."""
    found = {n for n in alone if tensor_of(n).is_floating_point()}
    for node, family in families.items():
        made = [alone.get(n, frozenset[Node]()) for n in node.all_input_nodes if n in varying]
        if isinstance(family, Contraction) and family.weight not in varying:
            found |= alone.get(family.x, frozenset())
        elif isinstance(family, Movement) or (isinstance(family, Pointwise | Mixing | Pick) and len({*made}) == 1):
            alone[node] = frozenset[Node]().union(*made)
    return frozenset(n for n in found if trace.sources[n].value.numel() > 1)


def gives_zero(
    node: Node, family: Pointwise, zeros: Collection[Node], known: Mapping[Node, Tensor] | None = None
) -> bool:
    """Tell whether an operation gives zero where some operands are, whatever the others hold: by running it.

    Operands that are ``known`` to be single numbers, such as the bounds of a clamp, hold these.
    """
    generator = torch.Generator().manual_seed(0)

    def stand_in(n: Node) -> Any:
        if n not in family.operands:
            return tensor_of(n)
        if known and n in known and n not in zeros:
            return known[n].cpu()
        noise = torch.zeros(64) if n in zeros else 3 * torch.randn(64, generator=generator)
        dtype = tensor_of(n).dtype
        return noise > 0 if dtype == torch.bool else noise.to(dtype)

    try:
        args, kwargs = cast("tuple[Any, Any]", torch.fx.map_arg((node.args, node.kwargs), stand_in))
        result = cast(Any, node.target)(*args, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})
    except (RuntimeError, TypeError, IndexError):
        return False  # the operation wants another dtype or shape: claim less
    return isinstance(result, Tensor) and bool((result == 0).all())
