"""`export`: from a gated model to a smaller dense network that is proven equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import ExportError
from ..gates import GatedTensor, by_gates, require_gated
from ..gating import ungate
from ..pruning import PruneReport, prune
from ..tracing import Inputs, capture, normalize_inputs
from ..tracing.capture import operation
from .facts import Facts
from .plan import Permissions, Plan, make_plan
from .report import Kept, Report, find_kept, latencies, measure
from .verify import Certificate, Verifier, to_double
from .widths import Widths


@dataclass(frozen=True)
class Exported:
    """A smaller dense network, with what was done to get there.

    Args:
        model: A copy of the user's model, of the same classes, ungated and smaller.
        plan: What stays of which parameter; `save` writes it.
        report: Sizes before and after, what stayed and why, and the certificate of equality.
        signature: Shapes and dtypes of the original model's parameters and buffers.
    """

    model: nn.Module
    plan: Plan
    report: Report
    signature: dict[str, tuple[tuple[int, ...], str]]


def signature(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every parameter and buffer of a model, by first name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()}


def export(
    model: nn.Module,
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    tol: float | None = None,
    latency: bool = True,
) -> Exported:
    """Make a smaller dense network from a gated model, and prove it equal before handing it over.

    On a copy, groups with ``‖w_g‖ ≤ tol`` are set to zero and the gates are folded into the weights. Then, over the
    traced graph, constants are propagated forward and liveness backward; what is neither live nor needed for the code
    to run is cut out of the modules. The constants that dead channels leave behind (a BatchNorm's β after a dead
    filter) are folded into what follows, through a zero-padded convolution as one merged constant channel. What cannot
    be removed exactly is kept, and the report says why. The given model stays gated, trainable and as it was.

    Folding is an identity of eval mode. Constants are exact for finite activations.

    Args:
        model: A gated model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.
        tol: Norm at or below which a group counts as dead; 1e-6 if not given. ``dg.groups(model)`` shows the gap.
        latency: Whether to measure the latency before and after (about half a second).

    Returns:
        `Exported`: ``.model``, ``.plan`` and ``.report``.

    Raises:
        NotGatedError: If the model holds no gates.
        PruneError: If tol is negative or not finite.
        TraceError: If example inputs are missing or do not fit, or the model cannot be traced.
        ExportError: If the pruned model's output no longer depends on its input, its own output is not finite, or no
            smaller network was found equal.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = dg.gate(net, "neurons", exclude="2.*")
        >>> _ = dg.prune(net, ratio=0.5)
        >>> dg.export(net, torch.randn(3, 4), latency=False).model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    require_gated(model, "cannot export")
    inputs = normalize_inputs(example_inputs, example_kwargs)
    with torch.no_grad():
        pruned = _copy(model).eval()  # reading a spectrally normalized weight in train mode would change it
        pruning = prune(pruned, tol=tol)
        tensors = require_gated(pruned, "cannot export")
        dead = _dead_groups(tensors)
        dense = ungate(pruned)
        facts, analysed = _analyse(dense, inputs)
        _require_varying_output(facts, pruning)
        verifier = Verifier(dense, inputs)
        small, widths, plan, certificate, frozen = _smallest(dense, analysed, facts, verifier)
        report = _report(dense, small, inputs, widths, plan, pruning, tensors, dead, certificate, frozen, latency)
    for name, module in small.named_modules():
        module.training = model.get_submodule(name).training
    return Exported(small, plan, report, signature(dense))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise ExportError(
            f"{type(model).__name__} cannot be copied: {type(e).__name__}: {e}",
            expected="a model that copy.deepcopy copies",
            mend="drop tensors that are results of a forward from its attributes (they carry autograd history)",
        ) from e


def _dead_groups(tensors: list[GatedTensor]) -> dict[int, Tensor]:
    """Return which groups are exactly zero, per ``id(gates)``, before the gates are gone."""
    return {id(gates): (gates.gamma == 0).any(1).cpu() for gates, _ in by_gates(tensors)}


def _analyse(dense: nn.Module, inputs: Inputs) -> tuple[Facts, nn.Module]:
    """Trace and analyse on the CPU, in float64 where the model allows, so that constants are exact."""
    inputs = inputs.map(Tensor.cpu)
    doubled, exact = copy.deepcopy(dense).cpu().double(), inputs.map(to_double)
    try:
        return Facts(capture(doubled, exact.args, exact.kwargs)), doubled
    except Exception:
        plain = copy.deepcopy(dense).cpu()
        return Facts(capture(plain, inputs.args, inputs.kwargs)), plain


def _require_varying_output(facts: Facts, pruning: PruneReport) -> None:
    outputs = [n for node in facts.nodes if node.op == "output" for n in node.all_input_nodes]
    varies = any(bool(facts.unknown[n].any()) for n in outputs if isinstance(facts.unknown[n], Tensor))
    if not varies:
        raise ExportError(
            f"the pruned network is constant: no output depends on the input any more "
            f"({pruning.dead} of {pruning.total} groups are dead).",
            expected="a network that still computes something",
            mend="train with a smaller lam, or prune at a smaller tol or ratio; dg.groups(model) shows the norms",
        )


def _permutes(node: Node) -> bool:
    """Tell whether a movement has no sizes of its own."""
    return operation(node).removeprefix("aten.") in ("permute", "transpose", "t", "cat")


def _adapts(node: Node) -> bool:
    """Tell whether a movement's Python code is likely to follow other sizes."""
    name = operation(node).removeprefix("aten.")
    if name not in ("view", "reshape", "_unsafe_view"):
        return name in ("permute", "transpose", "t", "cat", "stack", "unsqueeze", "squeeze", "flatten")
    before, after = (tuple(cast(Any, n).meta["val"].shape) for n in (node.args[0], node))
    return len(after) < len(before) and after[:-1] == before[: len(after) - 1]


_WRITTEN_SIZES: tuple[tuple[str, Callable[[Node], bool]], ...] = (
    ("", lambda _: True),
    ("reshapes other than flattening, and slices", _adapts),
    ("all reshapes and slices", _permutes),
)
"""Which movements are trusted, in turn, to follow the smaller tensors in the user's code; the others stay whole."""


def _smallest(
    dense: nn.Module, analysed: nn.Module, facts: Facts, verifier: Verifier
) -> tuple[nn.Module, Widths, Plan, Certificate, str]:
    """Return the smallest network that the user's own code runs and that is equal, trying the boldest plan first."""
    permissions = Permissions(analysed, facts.trace, facts.families)
    failure: ExportError | None = None
    for frozen, follows in _WRITTEN_SIZES:
        widths = Widths(
            facts,
            can_bias=permissions.can_bias,
            can_carry=permissions.can_carry,
            can_regroup=permissions.can_regroup,
            follows=follows,
        )
        plan, tensors = make_plan(widths, permissions)
        small, exact = copy.deepcopy(dense), copy.deepcopy(analysed)
        plan.apply(exact, tensors)
        plan.apply(small, {n: t.to(_twin(dense, n, t)) for n, t in tensors.items()})
        try:
            return small, widths, plan, verifier.check(small, exact), frozen
        except ExportError as e:
            failure = failure or e
    assert failure is not None
    raise failure


def _twin(model: nn.Module, name: str, fallback: Tensor) -> Tensor:
    """Return the tensor whose dtype and device a new value takes: the old one; of a new bias, its layer's weight."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, leaf, None)
    held = getattr(module, "weight", None) if held is None else held
    return held if isinstance(held, Tensor) else fallback


def _report(
    dense: nn.Module,
    small: nn.Module,
    inputs: Inputs,
    widths: Widths,
    plan: Plan,
    pruning: PruneReport,
    tensors: list[GatedTensor],
    dead: dict[int, Tensor],
    certificate: Certificate,
    frozen: str,
    latency: bool,
) -> Report:
    (before, layers_before), (after, layers_after) = measure(dense, inputs), measure(small, inputs)
    times: tuple[dict[str, float], dict[str, float]] = latencies(dense, small, inputs) if latency else ({}, {})
    layers = {
        n: (replace(size, latency=times[0].get(n)), replace(layers_after[n], latency=times[1].get(n)))
        for n, size in layers_before.items()
    }
    nodes = {s.name: n for n, s in widths.facts.trace.sources.items() if s.kind == "parameter"}
    removed = start = 0
    kept: list[Kept] = []
    for gates, members in by_gates(tensors):
        stays = torch.zeros_like(dead[id(gates)])
        for t in members:
            cut = plan.cuts.get(t.name)
            mask = torch.ones(t.omega.shape, dtype=torch.bool) if cut is None else cut.mask()
            index = t.gate.index.cpu()
            why = widths.element_why(nodes[t.name], [a for a, n in enumerate(index.shape) if n > 1])
            part, found = find_kept(t.name, index, mask, dead[id(gates)], why, widths.reasons, start)
            stays |= part
            kept += found
        removed += int((dead[id(gates)] & ~stays).sum())
        start += gates.num_groups
    folded = [f"{n.name}: bias" if f.carrier is None else f"{n.name}: one channel" for n, f in widths.folds.items()]
    return Report(
        replace(before, latency=times[0].get("")),
        replace(after, latency=times[1].get("")),
        layers,
        pruning,
        removed,
        kept,
        folded,
        certificate,
        frozen,
    )
