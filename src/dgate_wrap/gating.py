"""Attach gates to a model, and fold them back into plain weights. Everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import GateError, GroupingError
from .gates import (
    GatedWeight,
    Gates,
    balance_members,
    by_gates,
    gated_tensors,
    parametrizations_of,
    require_gated,
)
from .groupings.registry import needs_trace, resolve
from .groupings.select import restrict
from .labels import Component, components, overlap
from .tracing import capture


def gate(
    model: nn.Module,
    groups: object = "filters",
    D: int = 3,
    *,
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: Literal["ones", "balanced"] = "ones",
    train: Literal["all", "gates"] = "all",
) -> nn.Module:
    """Attach gates to a model, in place, and return it.

    Every group of weights becomes ``w_g = ω_g · γ_{g,1} ··· γ_{g,D-1}``. The gates start at one, so that no output bit
    changes; ω stays the user's ``Parameter``. Plain L2 on the factors (`Penalty`) is then the group penalty
    ``‖w_g‖^{2/D}``: D=2 is the group lasso, larger D is non-convex and sparser.

    Args:
        model: Any module, fresh or pretrained. Gate it before DistributedDataParallel, ``fully_shard`` or compile.
        groups: A registered name (`groupings`), a `Select`, a mapping from parameter names to labels, a callable
            ``(model, trace) → labels``, or a list of these that share no weight.
        D: Number of factors, an integer of at least 2.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs; only for groupings that
            read the trace.
        example_kwargs: Keyword inputs beside positional ``example_inputs``.
        include: Glob, or globs, on parameter names: only groups that lie wholly in matching parameters.
        exclude: Glob, or globs: no group that stands on a matching parameter.
        init: ``"ones"``, or ``"balanced"``: ω and gates of equal norm, which starts at zero misalignment and changes
            the weights by rounding only. Groups of zero norm keep gates of one, since balanced zeros never reopen.
        train: ``"all"``, or ``"gates"``, which freezes every other parameter until `ungate`.

    Returns:
        The same model, gated.

    Raises:
        UnknownGroupingError: If no grouping has that name.
        GroupingError: If labels do not fit the model, select nothing, or overlap.
        GateError: If an argument is wrong, or a parameter cannot be gated. The model is then as it was.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> net = dg.gate(net, "filters", D=3)
        >>> len(dg.groups(net))
        12

    Reference:
        Kolb, Frost, Bischl, Rügamer, "Differentiable Sparsity via D-Gating", arXiv 2509.23898.
    """
    _check_arguments(model, D, init, train)
    trace = None
    if needs_trace(groups):
        trace = capture(model, example_inputs, example_kwargs)
    pairs = [(kind, restrict(labels, model, include, exclude)) for kind, labels in resolve(groups, model, trace)]
    _check_disjoint(pairs)
    _check_parameters(model, {name for _, labels in pairs for name in labels})

    hosts = _hosts(model)
    orders = {id(m): tuple(m._parameters) for m in model.modules()}
    earlier = {id(t.gates.gamma) for t in gated_tensors(model)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in earlier] if train == "gates" else []
    for kind, labels in pairs:
        for part in components(labels):
            _attach(kind, part, D, hosts, orders)
    tensors = gated_tensors(model)
    for p in frozen:
        p.requires_grad_(False)
    if frozen:
        tensors[0].gates.frozen.extend(frozen)
    if init == "balanced":
        for _, members in by_gates(tensors):
            balance_members(members, keep_zero_groups=True)
    return model


def _check_arguments(model: object, D: object, init: object, train: object) -> None:
    problem = None
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        problem = (
            f"the model is a {type(model).__name__}",
            "a torch.nn.Module that is not scripted",
            "pass the module itself",
        )
    elif not isinstance(D, int) or isinstance(D, bool) or D < 2:
        problem = f"D={D!r}", "an integer of at least 2", 'dg.gate(model, "filters", D=3)'
    elif init not in ("ones", "balanced"):
        problem = f"init={init!r}", "'ones' or 'balanced'", 'dg.gate(model, ..., init="balanced")'
    elif train not in ("all", "gates"):
        problem = f"train={train!r}", "'all' or 'gates'", 'dg.gate(model, ..., train="gates")'
    if problem:
        found, expected, mend = problem
        raise GateError(f"cannot gate: {found}.", expected=expected, mend=mend)
    wrapped = [
        type(m).__name__ for m in cast(nn.Module, model).modules() if isinstance(m, nn.parallel.DistributedDataParallel)
    ]
    if wrapped:
        raise GateError(
            f"cannot gate a model inside {wrapped[0]}: its buckets would not know the gates.",
            expected="a model that is not wrapped yet",
            mend="model = DistributedDataParallel(dg.gate(model, ...))",
        )
    lazy = [n for n, p in cast(nn.Module, model).named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise GateError(
            f"cannot gate: {', '.join(map(repr, lazy))} of a lazy module have no shape yet.",
            expected="parameters with shapes",
            mend="run the model once on an example, then gate it",
        )


def _check_disjoint(pairs: Sequence[tuple[str, dict[str, Tensor]]]) -> None:
    clashes = [
        f"{a!r} and {b!r} both gate weights of {', '.join(map(repr, sorted(shared)))}"
        for i, (a, labels_a) in enumerate(pairs)
        for b, labels_b in pairs[i + 1 :]
        if (shared := overlap(labels_a, labels_b))
    ]
    if clashes:
        raise GroupingError(
            "overlapping groupings: " + "; ".join(clashes) + ".",
            expected="every weight in at most one group",
            mend="subtract one from the other: dg.Select(first) | (dg.Select(second) - first), or use exclude=",
        )


def _check_parameters(model: nn.Module, names: set[str]) -> None:
    """Raise one error that lists every parameter which cannot carry a gate."""
    parameters = dict(model.named_parameters())
    taken, twins = _taken(model), _twins(parameters)
    bad: list[str] = []
    for n in sorted(names):
        if n in taken:
            bad.append(taken[n])
            continue
        p = parameters[n]
        if p.device.type == "meta":
            bad.append(f"{n!r} is on the meta device and has no values")
        elif not p.is_floating_point():
            bad.append(f"{n!r} is of {p.dtype}")
        elif type(p.data) is not Tensor:
            bad.append(f"{n!r} is a {type(p.data).__name__}, sharded or wrapped")
        elif n in twins:
            bad.append(f"{n!r} shares memory with {twins[n]!r} but is another Parameter")
    if bad:
        raise GateError(
            "cannot gate: " + "; ".join(dict.fromkeys(bad)) + ".",
            expected="plain floating-point parameters that carry no gate and no other parametrization",
            mend="exclude them, give all groupings in one dg.gate(model, [a, b]) call, call dg.ungate or "
            "torch.nn.utils.parametrize.remove_parametrizations first, or gate before sharding",
        )


def _taken(model: nn.Module) -> dict[str, str]:
    """Say of every name of a parametrized weight, the plain one and those of its parts, what stands on it."""
    taken: dict[str, str] = {}
    for prefix, host in model.named_modules():
        for name, chain in parametrizations_of(host).items():
            dot = f"{prefix}." if prefix else ""
            gated = any(isinstance(p, GatedWeight) for p in chain)
            why = f"{dot + name!r} " + ("is gated already" if gated else "has another parametrization")
            parts = chain.named_parameters(f"{dot}parametrizations.{name}", remove_duplicate=False)
            taken |= dict.fromkeys([dot + name, *(n for n, _ in parts)], why)
    return taken


def _twins(parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Map each parameter whose memory overlaps that of another to the other; a common storage alone is no overlap."""
    spans: list[tuple[int, int, str]] = []
    for n, p in parameters.items():
        if type(p.data) is Tensor and p.device.type != "meta" and p.numel():
            last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((p.data_ptr(), p.data_ptr() + (last + 1) * p.itemsize, n))
    twins: dict[str, str] = {}
    stop, widest = 0, ""
    for start, end, n in sorted(spans):
        if start < stop:
            twins[n] = widest
            twins.setdefault(widest, n)
        if end > stop:
            stop, widest = end, n
    return twins


def _hosts(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Map each parameter's first name to every (module, name) under which it is registered."""
    first: dict[int, str] = {id(p): n for n, p in model.named_parameters()}
    hosts: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            hosts.setdefault(first[id(p)], []).append((module, name))
    return hosts


def _attach(
    kind: str,
    part: Component,
    D: int,
    hosts: dict[str, list[tuple[nn.Module, str]]],
    orders: dict[int, tuple[str, ...]],
) -> None:
    """Register the gates of one component on all of its parameters, under all of their names."""
    parameters = {n: _original(*hosts[n][0]) for n in part.names}
    dtype = torch.float32
    for p in parameters.values():
        dtype = torch.promote_types(dtype, p.dtype)
    device = parameters[part.names[0]].device
    gates = Gates(kind, part.num_groups, D, dtype, device)
    for n, p in parameters.items():
        index = part.index[n]
        index = index.view(*[1] * (p.dim() - index.dim()), *index.shape).to(p.device)
        for host, name in hosts[n]:
            gate = GatedWeight(gates, index, orders[id(host)])
            parametrize.register_parametrization(host, name, gate, unsafe=True)
            if isinstance(host, nn.RNNBase):
                _make_flat_weights_live(host)


def _original(host: nn.Module, name: str) -> nn.Parameter:
    """Return ω, whether the parameter is gated by now or not."""
    chain = parametrizations_of(host).get(name)
    return cast(nn.Parameter, getattr(host, name) if chain is None else chain.original)


def _make_flat_weights_live(rnn: nn.RNNBase) -> None:
    """Let an RNN, which keeps a list of its weights from when it was made, read the gated weights at each call."""

    def read(self: nn.RNNBase) -> list[Any]:
        return [getattr(self, n) if hasattr(self, n) else None for n in self._flat_weights_names]

    def ignore(self: nn.RNNBase, value: object) -> None:
        """The list is derived."""

    rnn.__dict__.pop("_flat_weights", None)
    type(rnn)._flat_weights = property(read, ignore)  # pyright: ignore[reportAttributeAccessIssue]


def ungate(model: nn.Module) -> nn.Module:
    """Fold the gates into plain weights, in place, and return the model.

    ``w = ω · Π γ`` is written into the user's own ``Parameter`` objects; module classes, names and the order of the
    state dict are as before `gate`, and what ``train="gates"`` had frozen is trainable again. Other copies of the
    model are left alone.

    Args:
        model: A gated model.

    Returns:
        The same model, without gates.

    Raises:
        NotGatedError: If it holds no gates.
        GateError: If another parametrization was put on top of a gate.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3))
        >>> before = {k: v.clone() for k, v in net.state_dict().items()}
        >>> after = dg.ungate(dg.gate(net, "filters")).state_dict()
        >>> list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
        True
    """
    tensors = require_gated(model, "cannot ungate")
    hosts = {(id(h), n): (h, n) for t in tensors for h, n in t.hosts}.values()
    topped = [
        t.name
        for t in tensors
        for h, n in t.hosts[:1]
        if not all(isinstance(p, GatedWeight) for p in parametrizations_of(h)[n])
    ]
    if topped:
        raise GateError(
            f"cannot fold the gates of {', '.join(map(repr, topped))}: another parametrization stands on that weight.",
            expected="gates alone",
            mend="torch.nn.utils.parametrize.remove_parametrizations(module, name) for the other one first",
        )
    with torch.no_grad():
        weights = [(t.omega, getattr(*t.hosts[0]).detach()) for t in tensors]
    frozen = [p for gates, _ in by_gates(tensors) for p in gates.frozen]
    for host, name in hosts:
        orders = [p.order for chain in parametrizations_of(host).values() for p in chain if isinstance(p, GatedWeight)]
        _own_class(host)
        parametrize.remove_parametrizations(host, name, leave_parametrized=False)
        _restore_order(host, max(orders, key=len))
    with torch.no_grad():
        for omega, weight in weights:
            omega.copy_(weight)
            omega.grad = None
    for p in frozen:
        p.requires_grad_(True)
    for host in {id(h): h for h, _ in hosts}.values():
        if isinstance(host, nn.RNNBase):
            host._init_flat_weights()
    return model


def _own_class(host: nn.Module) -> None:
    """Give a host its own copy of its injected class: a deep copy shares it, and losing a property breaks both."""
    shared = type(host)
    host.__class__ = cast(type[nn.Module], type(shared.__name__, shared.__bases__, dict(shared.__dict__)))


def _restore_order(host: nn.Module, order: Sequence[str]) -> None:
    for name in order:
        if name in host._parameters:
            host._parameters[name] = host._parameters.pop(name)
