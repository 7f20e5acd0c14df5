"""Attach gates to a model, and fold them back into plain weights. Everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .copying import deep_copy
from .errors import GateError, GroupingError
from .gates import (
    GatedWeight,
    Gates,
    balance_members,
    by_gates,
    computed_weights,
    gated_tensors,
    parametrizations_of,
    require_gated,
)
from .groupings import groupings
from .groupings.registry import kinds, needs_trace, resolve
from .groupings.select import restrict
from .labels import Component, Labels, components, drop_groups, overlap, touching
from .tracing import capture


def gate(
    model: nn.Module,
    groups: object = "filters",
    D: int | Mapping[str, int] = 3,
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
    changes, unless a forward computes with what ``parameters()`` gives; ω stays the user's ``Parameter``. Plain L2 on
    the factors (`Penalty`) is then the group penalty ``‖w_g‖^{2/D}``: D=2 is the group lasso, larger D is non-convex
    and sparser.

    A gated model can be gated again, by groups of weights that have no gate yet; they are found as if it had none.

    Args:
        model: Any module, fresh or pretrained. Gate it before DistributedDataParallel, ``fully_shard`` or compile.
        groups: A registered name (`groupings`), a `Select`, a mapping from parameter names to labels, a callable
            ``(model, trace) → labels``, or a list of these that share no weight.
        D: Number of factors, an integer of at least 2; or a mapping that has it for every kind of group:
            ``D={"heads": 2, "hidden": 3}``.
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
        GateError: If an argument is wrong, a parameter cannot be gated, or a weight has a gate. The model is then as it
            was.

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
    factors = _factors(D, kinds(groups))
    plain = without_gates(model)
    trace = None
    if needs_trace(groups):
        trace = capture(plain, example_inputs, example_kwargs)
    pairs = [(kind, restrict(kind, found, plain, include, exclude)) for kind, found in resolve(groups, plain, trace)]
    _check_parameters(plain, {name for _, labels in pairs for name in labels})
    _check_disjoint(pairs, _taken(model), plain, trace is not None)

    hosts, orders = _hosts(model, plain)
    earlier = {id(t.gates.gamma) for t in gated_tensors(model)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in earlier] if train == "gates" else []
    for kind, labels in pairs:
        for part in components(labels):
            _attach(kind, part, factors[kind], hosts, orders)
    tensors = gated_tensors(model)
    for p in frozen:
        p.requires_grad_(False)
    if frozen:
        tensors[0].gates.frozen.extend(frozen)
    if init == "balanced":
        for gates, members in by_gates(tensors):
            if id(gates.gamma) not in earlier:
                balance_members(members, keep_zero_groups=True)
    return model


def without_gates(model: nn.Module) -> nn.Module:
    """Return the model, or of a gated one an ungated copy that shares all parameters without gates with it."""
    tensors = gated_tensors(model)
    if not tensors:
        return model
    gated = {id(t.omega) for t in tensors}
    try:
        plain = deep_copy(model, {id(p): p for p in model.parameters() if id(p) not in gated})
    except Exception as e:
        raise GateError(
            f"{type(model).__name__} is gated and cannot be copied: {type(e).__name__}: {e}",
            expected="a model that copy.deepcopy copies, to find groups on a copy without gates",
            mend="dg.gate(model, [first, second]) gates all groupings in one call",
        ) from e
    for t in gated_tensors(plain):
        t.gates.frozen.clear()  # they are the model's own, and stay frozen
    return ungate(plain)


def _factors(D: int | Mapping[str, int], found: list[str]) -> dict[str, int]:
    """Return D of every kind."""
    if isinstance(D, int):
        return dict.fromkeys(found, D)
    missing, unknown = ([k for k in dict.fromkeys(a) if k not in b] for a, b in ((found, D), (D, found)))
    if missing or unknown:
        said = [f"has no number for {', '.join(map(repr, missing))}"] if missing else []
        said += [f"names {', '.join(map(repr, unknown))}, of which no group is asked for"] if unknown else []
        right = ", ".join(f'"{k}": {D.get(k, 3)}' for k in dict.fromkeys(found))
        raise GateError(
            f"cannot gate: D={dict(D)!r} {' and '.join(said)}.",
            expected="one number for all kinds, or a mapping with one for each kind that is gated",
            mend=f"dg.gate(model, ..., D={{{right}}})",
        )
    return dict(D)


def _values(D: object) -> list[object]:
    """Return the numbers of factors that were given."""
    return list(cast("Mapping[str, object]", D).values()) if isinstance(D, Mapping) else [D]


def _check_arguments(model: object, D: object, init: object, train: object) -> None:
    problem = None
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        problem = (
            f"the model is a {type(model).__name__}",
            "a torch.nn.Module that is not scripted",
            "pass the module itself",
        )
    elif not all(isinstance(d, int) and not isinstance(d, bool) and d >= 2 for d in _values(D)):
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


def _check_disjoint(
    pairs: Sequence[tuple[str, dict[str, Tensor]]],
    taken: Mapping[str, dict[str, Tensor]],
    plain: nn.Module,
    traced: bool,
) -> None:
    """Raise if two groupings share weights, or one shares them with gates that the model has."""
    shapes = {n: p.shape for n, p in plain.named_parameters()}

    def clash(a: str, labels_a: Labels, b: str, labels_b: Labels) -> list[str]:
        shared = {
            n: int(((labels_a[n] >= 0) & (labels_b[n] >= 0)).expand(shapes[n]).sum())
            for n in sorted(overlap(labels_a, labels_b))
        }
        where = [f"{count} of {n!r}" for n, count in shared.items()]
        more = f" and of {len(where) - 4} more" if where[4:] else ""
        return [f"{a!r} and {b} share {sum(shared.values())} weights: {', '.join(where[:4])}{more}"] if where else []

    gated = [
        text
        for kind, labels in pairs
        for other, there in taken.items()
        for text in clash(kind, labels, f"{other!r}, which is gated already,", there)
    ]
    if gated:
        raise GateError(
            "cannot gate: " + "; ".join(gated) + ".",
            expected="every weight in at most one group",
            mend=_apart(pairs, taken, traced) + ", or dg.ungate(model) first",
        )
    clashes = [
        text
        for i, (kind, labels) in enumerate(pairs)
        for other, there in pairs[i + 1 :]
        for text in clash(kind, labels, repr(other), there)
    ]
    if clashes:
        raise GroupingError(
            "overlapping groupings: " + "; ".join(clashes) + ".",
            expected="every weight in at most one group",
            mend=_apart(pairs, {}, traced),
        )


def _apart(pairs: Sequence[tuple[str, dict[str, Tensor]]], taken: Mapping[str, dict[str, Tensor]], traced: bool) -> str:
    """Write the call that leaves every shared weight to one kind: of two new ones, the one that more groups are of."""
    if not {kind for kind, _ in pairs} | taken.keys() <= groupings().keys():
        return (
            "subtract one from the other, whole groups: dg.gate(model, [a, b - a]) with a = dg.Select(...), or exclude="
        )
    left = [(kind, labels) for kind, labels in [*taken.items(), *pairs]]
    fixed, without = len(taken), [""] * len(left)
    for j in range(len(left)):
        for i in range(j):
            (first, a), (second, b) = left[i], left[j]
            if (i < fixed and j < fixed) or not overlap(a, b):
                continue
            rest_a, rest_b = drop_groups(a, touching(a, b)), drop_groups(b, touching(b, a))
            if i >= fixed and rest_a and (not rest_b or _count(rest_a) > _count(rest_b)):
                left[i], without[i] = (first, rest_a), f'{without[i]} - "{second}"'
            else:
                left[j], without[j] = (second, rest_b), f'{without[j]} - "{first}"'
    terms = [
        f'dg.Select("{kind}"){less}' if less else f'"{kind}"'
        for (kind, labels), less in zip(left[fixed:], without[fixed:], strict=True)
        if labels
    ]
    if not terms:
        return "leave these groups out: each of them holds a weight that is gated"
    inputs = ", example_inputs=x" if traced else ""
    return f"dg.gate(model, {terms[0] if len(terms) == 1 else '[' + ', '.join(terms) + ']'}{inputs})"


def _count(labels: Labels) -> int:
    return torch.cat([t.unique() for t in labels.values()]).unique().numel()


def _check_parameters(model: nn.Module, names: set[str]) -> None:
    """Raise one error that lists every parameter which cannot carry a gate; the model has none yet."""
    parameters = dict(model.named_parameters())
    parametrized, twins = _parametrized(model), _twins(parameters)
    scripts = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    scripted = {id(p) for m in scripts for p in m.parameters(recurse=False)}
    bad: list[str] = []
    for n in sorted(names):
        if n in parametrized:
            bad.append(f"{n!r} has another parametrization")
            continue
        p = parameters[n]
        if p.device.type == "meta":
            bad.append(f"{n!r} is on the meta device and has no values")
        elif not p.is_floating_point():
            bad.append(f"{n!r} is of {p.dtype}")
        elif id(p) in scripted:
            bad.append(f"{n!r} is in a ScriptModule, whose code is fixed")
        elif type(p.data) is not Tensor:
            bad.append(f"{n!r} is a {type(p.data).__name__}, sharded or wrapped")
        elif n in twins:
            bad.append(f"{n!r} shares memory with {twins[n]!r} but is another Parameter")
    if bad:
        raise GateError(
            "cannot gate: " + "; ".join(dict.fromkeys(bad)) + ".",
            expected="plain floating-point parameters that carry no other parametrization",
            mend="exclude them, use a grouping that reads the trace (it gates what they are computed from), call "
            "torch.nn.utils.parametrize.remove_parametrizations first (remove_weight_norm, remove_spectral_norm or "
            "prune.remove for the older ones), or gate before sharding",
        )


def _parametrized(model: nn.Module) -> set[str]:
    """Return the names of weights that others are computed into, of which a trace tells more."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, host in model.named_modules()
        for name in computed_weights(host)
    }


def _taken(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return, per kind of gates that the model has, labels that are at least 0 where a weight is gated."""
    taken: dict[str, dict[str, Tensor]] = {}
    for t in gated_tensors(model):
        of_kind = taken.setdefault(t.gates.kind, {})
        index = t.gate.index.cpu()
        of_kind[t.name] = torch.maximum(of_kind[t.name], index) if t.name in of_kind else index
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


def _hosts(
    model: nn.Module, plain: nn.Module
) -> tuple[dict[str, list[tuple[nn.Module, str]]], dict[int, tuple[str, ...]]]:
    """Map each parameter's first name to every (module, name) under which it is registered, as without gates.

    And map the ``id`` of each module to the names of its parameters, in order.
    """
    first: dict[int, str] = {id(p): n for n, p in plain.named_parameters()}
    hosts: dict[str, list[tuple[nn.Module, str]]] = {}
    orders: dict[int, tuple[str, ...]] = {}
    for prefix, module in plain.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters no gate can be put on
            continue
        own = model.get_submodule(prefix)
        orders[id(own)] = tuple(module._parameters)
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            hosts.setdefault(first[id(p)], []).append((own, name))
    return hosts, orders


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
        index = index.view([1] * (p.dim() - index.dim()) + list(index.shape)).to(p.device)
        for host, name in hosts[n]:
            gate = GatedWeight(gates, index, orders[id(host)])
            if parametrize.is_parametrized(host):
                _own_class(host)
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
    with torch.no_grad():  # one after the other: all weights at once would take their memory twice
        for t in {id(t.omega): t for t in tensors}.values():
            t.omega.copy_(getattr(*t.hosts[0]).detach())
            t.omega.grad = None
    frozen = [p for gates, _ in by_gates(tensors) for p in gates.frozen]
    for host, name in hosts:
        orders = [p.order for chain in parametrizations_of(host).values() for p in chain if isinstance(p, GatedWeight)]
        _own_class(host)
        parametrize.remove_parametrizations(host, name, leave_parametrized=False)
        _restore_order(host, max(orders, key=len))
    for p in frozen:
        p.requires_grad_(True)
    for host in {id(h): h for h, _ in hosts}.values():
        if isinstance(host, nn.RNNBase):
            host._init_flat_weights()
    return model


def _own_class(host: nn.Module) -> None:
    """Give a host its own copy of its injected class: a deep copy shares it, and a change of it would break both."""
    shared = type(host)
    host.__class__ = cast(type[nn.Module], type(shared.__name__, shared.__bases__, dict(shared.__dict__)))


def _restore_order(host: nn.Module, order: Sequence[str]) -> None:
    for name in order:
        if name in host._parameters:
            host._parameters[name] = host._parameters.pop(name)
