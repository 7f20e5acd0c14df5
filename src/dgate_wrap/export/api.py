"""`export`: from a gated model to a smaller dense network that is proven equal."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..gates import GatedTensor, by_gates, require_gated
from ..gating import ungate
from ..pruning import PruneReport, prune
from ..tracing import Inputs, normalize_inputs
from ..tracing.capture import all_tensors
from .configs import express
from .facts import Facts
from .plan import Plan
from .report import Kept, Report, Size, find_kept, latencies, measure
from .search import Found, Subject, smallest
from .selection import reduced
from .verify import Verifier, run, to_double


@dataclass(frozen=True)
class Exported:
    """A smaller dense network, with what was done to get there.

    Args:
        model: A copy of the user's model, ungated and smaller, of the same classes but for modules that
            ``report.rewritten`` names.
        plan: What stays of which parameter; `save` writes it.
        report: Sizes before and after, what stayed and why, and the certificate of equality.
        signature: Shapes and dtypes of the original model's parameters and buffers.
        dropped: On the CPU, the parameters and buffers of dead branches that the smaller network does without; `expand`
            needs them.
    """

    model: nn.Module
    plan: Plan
    report: Report
    signature: dict[str, tuple[tuple[int, ...], str]]
    dropped: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


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
    rewrite: bool = True,
    select_inputs: bool = True,
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
        rewrite: Whether the forward of a module may be written anew as a graph, where its own code cannot follow the
            smaller tensors and much would have to stay otherwise.
        select_inputs: Whether the smaller model still takes whole inputs and selects the features that it needs itself;
            otherwise it takes only those, which ``report.inputs`` names.

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
        subject = _analyse(dense, inputs)
        _require_varying_output(subject.facts, pruning)
        verifier = Verifier(dense, inputs)
        found = smallest(dense, subject, verifier, rewrite=rewrite, select_inputs=select_inputs)
        report = _report(dense, found, inputs, pruning, tensors, dead, latency)
        taken = inputs if found.plan.select_inputs else reduced(inputs, found.small, found.plan.inputs)
        report = replace(report, config=express(dense, found.small, taken))
    for name, module in found.small.named_modules():
        module.training = model.get_submodule(name).training
    return Exported(found.small, found.plan, report, signature(dense), _dropped(dense, found))


def _dropped(dense: nn.Module, found: Found) -> dict[str, Tensor]:
    """Return what of the original the smaller network has no part of, under every name."""
    held = {n for n, _ in all_tensors(found.small)}
    return {n: t.detach().to("cpu", copy=True) for n, t in all_tensors(dense) if n not in held}


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


def _analyse(dense: nn.Module, inputs: Inputs) -> Subject:
    """Trace and analyse on the CPU, in float64 where the model allows, so that constants are exact."""
    inputs = inputs.map(Tensor.cpu)
    doubled, exact = copy.deepcopy(dense).cpu().double(), inputs.map(to_double)
    try:
        run(doubled, exact)  # some operations know float32 only
        return Subject.of(doubled, exact)
    except Exception:
        return Subject.of(copy.deepcopy(dense).cpu(), inputs)


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


def _report(
    dense: nn.Module,
    found: Found,
    inputs: Inputs,
    pruning: PruneReport,
    tensors: list[GatedTensor],
    dead: dict[int, Tensor],
    latency: bool,
) -> Report:
    small, widths, plan = found.small, found.widths, found.plan
    gone = {f"{path}.{n}" if path else n for path, recipe in plan.recipes.items() for n in recipe.drops}
    taken = inputs if plan.select_inputs else reduced(inputs, small, plan.inputs)
    (before, layers_before), (after, layers_after) = measure(dense, inputs), measure(small, taken)
    times: tuple[dict[str, float], dict[str, float]] = (
        latencies((dense, inputs), (small, taken)) if latency else ({}, {})
    )
    layers = {
        n: (
            replace(size, latency=times[0].get(n)),
            replace(layers_after.get(n, Size(0, 0, 0)), latency=times[1].get(n)),
        )
        for n, size in layers_before.items()
    }
    nodes = {s.name: n for n, s in widths.facts.trace.sources.items() if s.kind == "parameter"}
    removed = start = 0
    kept: list[Kept] = []
    for gates, members in by_gates(tensors):
        stays = torch.zeros_like(dead[id(gates)])
        for t in members:
            cut = plan.cuts.get(t.name)
            mask = torch.full(t.omega.shape, t.name not in gone) if cut is None or t.name in gone else cut.mask()
            index = t.gate.index.cpu()
            why = widths.element_why(nodes[t.name], [a for a, n in enumerate(index.shape) if n > 1])
            part, reasons = find_kept(t.name, index, mask, dead[id(gates)], why, widths.reasons, start)
            stays |= part
            kept += reasons
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
        found.certificate,
        sorted(found.frozen.reshapes | found.frozen.modules),
        sorted(plan.recipes),
        _gone(dense, small),
        dict(plan.inputs),
    )


def _gone(dense: nn.Module, small: nn.Module) -> list[str]:
    """Return the outermost modules all of whose parameters are gone."""
    left = {f"{n}." for n, _ in small.named_parameters(remove_duplicate=False)}
    found: list[str] = []
    for path, module in dense.named_modules(remove_duplicate=False):
        if path and next(module.parameters(), None) is not None and not any(path.startswith(f"{p}.") for p in found):
            found += [path] * (not any(n.startswith(f"{path}.") for n in left))
    return found
