"""What a group costs: the parameters, or the multiply-adds, that go with it; the penalty may be weighted by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from .errors import PenaltyError
from .flops import flop_counter
from .gates import by_gates, require_gated
from .gating import without_gates
from .tracing import Structure, Trace, capture, find_structure
from .tracing.families import Attention, Bilinear, Contraction, Product, Recurrence
from .tracing.operations import describe, is_tensor, shape_of, varying_nodes
from .tracing.structure import UNMOVABLE, label_of, narrow


def group_costs(
    model: nn.Module,
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    unit: Literal["parameters", "flops"] = "parameters",
) -> dict[str, Tensor]:
    """Return what every group of a gated model costs, as weights of the penalty.

    A group costs its own weights; and of the channels that it alone produces, also the biases, the norm parameters and
    all weights that read them: what is cut out if it is dead and all other groups live. In FLOPs, a weight counts as
    often as it is multiplied in one forward. Products of activations, as in attention, count by the share that the
    group's channels have in an operand. Not counted are the queries and keys of a head, which go with its values, and
    readers of channels that stay, since a LayerNorm or GroupNorm mixes them.

    Args:
        model: A gated model. It is traced on an ungated copy, and left as it was.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.
        unit: ``"parameters"`` or ``"flops"``.

    Returns:
        Kind → float64 tensor of shape ``(G,)``, the groups of that kind in the order of ``dg.groups(model)``. The mean
        over all groups of the model is 1, so that λ keeps its scale. A group of cost 0 would not be penalized.

    Raises:
        NotGatedError: If the model holds no gates.
        PenaltyError: If the unit is unknown, or no group costs anything.
        TraceError: If example inputs are missing or do not fit, or the model cannot be traced.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> net, x = dg.gate(net, "filters"), torch.randn(5, 1, 8, 8)
        >>> dg.group_costs(net, x)["filters"].round(decimals=2).tolist()  # 28 parameters each, and 36 each
        [0.91, 0.91, 0.91, 0.91, 1.17, 1.17]
        >>> penalty = dg.Penalty(net, lam=1e-3, weights=dg.group_costs(net, x, unit="flops"))
    """
    tensors = require_gated(model, "cannot tell what groups cost")
    if unit not in ("parameters", "flops"):
        raise PenaltyError(
            f"unit={unit!r}.", expected="'parameters' or 'flops'", mend='dg.group_costs(model, x, unit="flops")'
        )
    trace = capture(without_gates(model), example_inputs, example_kwargs)
    own: dict[str, Tensor] = {}
    kinds: list[str] = []
    for gates, members in by_gates(tensors):
        for t in members:
            index = t.gate.index.cpu()
            index = torch.where(index >= 0, index + len(kinds), -1)
            own[t.name] = torch.maximum(own[t.name], index) if t.name in own else index
        kinds += [gates.kind] * gates.num_groups
    cost = _costs(trace, own, len(kinds), unit)
    if not cost.any():
        raise PenaltyError(
            f"no group has a share in the {unit} of this model.",
            expected="groups with weights that something is multiplied with",
            mend='dg.group_costs(model, x, unit="parameters")',
        )
    cost /= cost.mean()
    return {kind: cost[torch.tensor([k == kind for k in kinds])] for kind in dict.fromkeys(kinds)}


def _costs(trace: Trace, own: Mapping[str, Tensor], total: int, unit: str) -> Tensor:
    """Return the cost of every group; groups are numbered over the whole model, ``own`` has them per parameter."""
    structure = find_structure(trace)
    owners = _owners(structure, own, total)

    def owner(labels: Tensor) -> Tensor:
        classes = structure.classes(labels)
        return torch.where(classes >= 0, owners[classes.clamp_min(0)], -1)

    shapes: dict[str, torch.Size] = {s.name: s.value.shape for s in trace.sources.values() if s.kind == "parameter"}
    found = {name: [index] for name, index in own.items()}
    for s in (*structure.slots, *structure.readers):
        found.setdefault(s.name, []).append(owner(s.labels))
    weights = {n: _count(f, shapes[n].numel(), total) for n, f in found.items() if n in shapes}
    if unit == "parameters":
        return sum(weights.values(), torch.zeros(total, dtype=torch.float64))

    def share(node: Node) -> Tensor:
        """Return the share of each group in the elements of a node."""
        words = structure.words.get(node)
        return _count([owner(label_of(narrow(words)))] if isinstance(words, Tensor) else [], 1, total)

    cost = torch.zeros(total, dtype=torch.float64)
    uses: dict[int, set[str]] = {}
    for r in structure.readers:
        uses.setdefault(r.order, set()).add(r.name)
    varying = varying_nodes(trace)
    for order, node in enumerate(trace.nodes):
        family = describe(node, varying) if node.op == "call_function" else None
        if not isinstance(family, Contraction | Product | Attention | Recurrence | Bilinear):
            continue
        flops, read = _flops(node), uses.get(order, set())
        if read:
            cost += flops / sum(shapes[n].numel() for n in read) * sum(weights[n] for n in read)
        elif isinstance(family, Attention):
            wide, deep = shape_of(family.query)[-1], shape_of(family.value)[-1]
            scores, mixed = (
                torch.maximum(share(a), share(b)) for a, b in ((family.query, family.key), (family.value, node))
            )
            cost += flops * (wide * scores + deep * mixed) / (wide + deep)
        else:
            cost += flops * torch.stack([share(n) for n in (node, *node.all_input_nodes)]).amax(0)
    return cost


def _owners(structure: Structure, own: Mapping[str, Tensor], total: int) -> Tensor:
    """Return, per class of labels, the group that alone produces it and that it is cut with; -1 if there is none."""
    count = len(structure.sets)
    low, high = torch.full((count,), total), torch.full((count,), -1)
    for s in (s for s in structure.slots if s.producer):
        classes, group = torch.broadcast_tensors(structure.classes(s.labels), own.get(s.name, torch.tensor(-1)))
        made = classes >= 0
        low.scatter_reduce_(0, classes[made], group[made], "amin")
        high.scatter_reduce_(0, classes[made], group[made], "amax")
    stay = sorted(structure.flagged(*UNMOVABLE, "centered"))
    low[stay] = -1
    return torch.where(low == high, low, -1)


def _count(found: Iterable[Tensor], size: int, total: int) -> Tensor:
    """Count the elements of each group in a tensor of ``size`` elements, to which all these numberings broadcast.

    An element that several numberings give to the same group counts once.
    """
    out = torch.zeros(total, dtype=torch.float64)
    seen: list[Tensor] = []
    for numbers in found:
        left = numbers
        for s in seen:
            if torch.isin(left[left >= 0], s).any():
                left = torch.where(left == s, -1, left)
        out += torch.bincount(left.flatten() + 1, minlength=total + 1)[1:] * (size / left.numel())
        seen.append(numbers)
    return out


def _flops(node: Node) -> int:
    """Count the floating-point operations of one node, on tensors without values."""

    def empty(n: Node) -> Any:
        x = n.meta["val"]
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if is_tensor(n) else x

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), empty)
    with flop_counter() as counter, torch.no_grad():
        cast(Any, node.target)(*args, **kwargs)
    return counter.get_total_flops()
