"""`export`: from a gated model to a smaller dense network that is proven equal."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ExportError, TraceError
from ..gates import GatedTensor, Gates, by_gates, require_gated
from ..gating import ungate
from ..pruning import PruneReport, prune
from ..tracing import Inputs, capture, normalize_inputs
from ..tracing.capture import all_tensors
from ..tracing.inputs import without_cache
from ..tracing.refusals import require_running
from ..tracing.settings import evaluating, forget_results, full_precision
from .alignment import find_orders, reorder_, reordered
from .certificate import Certificate, constant_output
from .configs import express
from .copies import SparingParameters, WritesParameterError, flatten_, separate_, share, weight_bytes
from .cuts import Cut
from .facts import Facts
from .masks import on_axis
from .plan import Plan
from .report import Kept, Report, Size, find_kept, latencies, measure
from .search import Found, differing, smallest
from .selection import reduced
from .subject import Subject
from .training import gradient_error, lost_in_training
from .verify import Verifier, finite, run, to_double

_LARGE = 2 * 2**30
"""Bytes of weights above which a copy in float64 is not made: then float64 is used operation by operation."""


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
        example: What it was exported on, which `expand` compares on.
    """

    model: nn.Module
    plan: Plan
    report: Report
    signature: dict[str, tuple[tuple[int, ...], str]]
    dropped: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    example: Inputs | None = field(default=None, repr=False)


def signature(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every parameter and buffer of a model, by first name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (tuple(t.shape), str(t.dtype)) for n, t in tensors.items()}


def export(
    model: nn.Module,
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    batches: Iterable[object] = (),
    tol: float | None = None,
    latency: bool = True,
    rewrite: bool = True,
    select_inputs: bool = True,
    dynamic: Literal["all", "batch"] = "all",
) -> Exported:
    """Make a smaller dense network from a gated model, and prove it equal before handing it over.

    On a copy, groups with ``‖w_g‖ ≤ tol`` are set to zero and the gates are folded into the weights. Then, over the
    traced graph, constants are propagated forward and liveness backward; what is neither live nor needed for the code
    to run is cut out of the modules. The constants that dead channels leave behind (a BatchNorm's β after a dead
    filter) are folded into what follows, through a zero-padded convolution as one merged constant channel. What cannot
    be removed exactly is kept, and the report says why. The given model stays gated, trainable and as it was.

    Folding is an identity of eval mode. Constants are exact for finite activations.

    The outputs are compared on the example, on random inputs (also with other sizes of every axis that the given model
    lets vary, all axes of one size together), and on ``batches``: in the model's own precision, and in float64 where
    the model runs in it; above 2 GiB of weights in float64 on the example and one random input only.

    Args:
        model: A gated model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.
        batches: Inputs of your own to compare on too, each in the form of ``example_inputs`` (keyword inputs stay those
            of the example) and without labels: of a loader of pairs, ``(x for x, y in loader)``. Read once, at the end.
        tol: Norm at or below which a group counts as dead; 1e-6 if not given. ``dg.groups(model)`` shows the gap.
        latency: Whether to measure the latency before and after (about half a second).
        rewrite: Whether the forward of a module may be written anew as a graph, where its own code cannot follow the
            smaller tensors and much would have to stay otherwise.
        select_inputs: Whether the smaller model still takes whole inputs and selects the features that it needs itself;
            otherwise it takes only those, which ``report.inputs`` names.
        dynamic: Which sizes of the inputs may be others than in the example, wherever the given model lets them vary:
            ``"all"``, or that of the ``"batch"`` alone (the first axis). Where a forward does other things at other
            image sizes, such as to shift windows or not, it can be written anew for one image size only.

    Returns:
        `Exported`: ``.model``, ``.plan`` and ``.report``.

    Raises:
        NotGatedError: If the model holds no gates.
        PruneError: If tol is negative or not finite.
        TraceError: If example inputs are missing or do not fit, or the model cannot be traced.
        ExportError: If ``dynamic`` is neither, if the pruned model's output no longer depends on its input, is not
            finite on the example or on one of the batches, or if no smaller network was found equal; it names the first
            module that differs.

    Example:
        >>> import dgate_wrap as dg
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = dg.gate(net, "neurons", exclude="2.*")
        >>> _ = dg.prune(net, ratio=0.5)
        >>> dg.export(net, torch.randn(3, 4), latency=False).model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    require_gated(model, "cannot export")
    if dynamic not in ("all", "batch"):
        raise ExportError(
            f"dynamic is {dynamic!r}.",
            expected='"all" sizes of the inputs, or that of the "batch" alone',
            mend='leave it out, or pass dynamic="batch"',
        )
    inputs = normalize_inputs(example_inputs, example_kwargs)
    clock = _Clock()
    with torch.no_grad(), full_precision():
        with clock("copy"):
            pruned, pruning = _pruned(model, tol)
        with clock("verification"):
            try:
                as_gated = _outputs(pruned, inputs)
            except WritesParameterError:
                pruned, pruning = _pruned(model, tol, called_on=inputs)
                as_gated = run(pruned, inputs)
        with clock("copy"):
            tensors = require_gated(pruned, "cannot export")
            dead = _dead_groups(tensors)
            labels = [(gates, [(t.name, t.gate.index.cpu()) for t in members]) for gates, members in by_gates(tensors)]
            dense = ungate(pruned)
            implied = _with_epsilons(dense)
        subject, doubled, given, why = _analyse(dense, inputs, clock)
        _require_varying_output(subject.facts, pruning)
        large = weight_bytes(dense) > _LARGE
        on_cpu = subject.model if any(p.device.type != "cpu" for p in dense.parameters()) else None
        verifier = Verifier(
            dense,
            doubled,
            inputs,
            why,
            given,
            one_by_one=large,
            dynamic=dynamic,
            follows=bool(subject.facts.trace.notes),
            on_cpu=on_cpu,
        )
        verifier.require_same(as_gated)
        options = {"rewrite": rewrite, "select_inputs": select_inputs}
        with clock("analysis"):
            orders = find_orders(subject.model, subject.facts, verifier)
        found = _in_order(dense, subject, verifier, orders, options, clock) if orders else None
        if found is None:
            orders = {}
            with clock("search"):
                found = smallest(dense, subject, verifier, **options)
        clock.seconds["search"] -= verifier.checking
        certificate = _check_batches(verifier, found, batches, example_kwargs)
        certificate = verifier.check_arguments(found.small, certificate, found.plan.taken)
        clock.seconds["verification"] += verifier.preparing + verifier.checking
        with clock("verification"):
            certificate = _look_at_training(dense, found, inputs, certificate)
        taken = [reduced(x, found.small, found.plan.taken) for x in verifier.inputs]
        with clock("report"):
            config = express(dense, found.small, taken)
    with torch.no_grad():
        separate_(found.small, model, dense)
        flatten_(found.small)
        with clock("report"):
            report = _report(dense, found, certificate, inputs, pruning, _in_new_order(labels, orders), dead, latency)
        _forget_epsilons(found, implied)
    for name, module in found.small.named_modules():
        module.training = model.get_submodule(name).training
    report = replace(report, config=config, seconds=clock.seconds)
    plan = _with_orders(found.plan, orders)
    return Exported(found.small, plan, report, signature(dense), _dropped(dense, found), inputs)


def _pruned(model: nn.Module, tol: float | None, called_on: Inputs | None = None) -> tuple[nn.Module, PruneReport]:
    """Copy a gated model, and prune the copy.

    Args:
        model: The model.
        tol: As of `prune`.
        called_on: What a copy that shares no parameter is called on first, where a call writes into parameters, as the
            first one in eval mode of RWKV does.
    """
    pruned = _copy(model, whole=called_on is not None).eval()  # to read a spectrally normalized weight may change it
    forget_results(pruned)
    if called_on is not None:
        with evaluating(pruned), without_cache(pruned, called_on) as extra:
            given = called_on.map(Tensor.clone)
            pruned(*given.args, **given.kwargs, **extra)  # what it writes stays
    return pruned, prune(pruned, tol=tol)


def _outputs(pruned: nn.Module, inputs: Inputs) -> list[Any] | None:
    """Run the pruned model while it is gated; ``None`` where it does not run, which the trace says in better words.

    Raises:
        WritesParameterError: If it would write into a parameter.
    """
    try:
        with SparingParameters(pruned):
            return run(pruned, inputs)
    except WritesParameterError:
        raise
    except Exception:
        return None


def _with_epsilons(model: nn.Module) -> set[str]:
    """Write down the epsilons that norms take from their dtype, of narrow ones those of float32; return which norms do.

    What makes up for cut dimensions divides them by the share that is left, also where all is analysed in float64.
    """
    found = {n: m for n, m in model.named_modules() if type(m) is nn.RMSNorm and m.eps is None and m.elementwise_affine}
    for module in found.values():
        wide = module.weight.dtype == torch.float64
        module.eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    return {*found}


def _forget_epsilons(found: Found, implied: set[str]) -> None:
    """Let norms take their epsilon from their dtype again, but for those that got another one."""
    for path, module in found.small.named_modules():
        if path in implied and "eps" not in found.plan.attributes.get(path, {}):
            cast(Any, module).eps = None


def _dropped(dense: nn.Module, found: Found) -> dict[str, Tensor]:
    """Return what of the original the smaller network has no part of, under every name."""
    held = {n for n, _ in all_tensors(found.small)}
    return {n: t.detach().to("cpu", copy=True) for n, t in all_tensors(dense) if n not in held}


class _Clock:
    """Adds up the seconds that each phase takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def _copy(model: nn.Module, *, whole: bool = False) -> nn.Module:
    """Copy a gated model; what has no gates lies where it did, unless the ``whole`` of it is copied."""
    tensors = require_gated(model, "cannot export")
    gated = [p for t in tensors for p in (t.omega, t.gates.gamma)]
    indices = [t.gate._gather for t in tensors if t.gate._gather is not None]
    return share(model, own=[*model.parameters()] if whole else gated, shared=indices)


def _check_batches(
    verifier: Verifier, found: Found, batches: Iterable[object], example_kwargs: dict[str, Any] | None
) -> Certificate:
    """Compare on the user's own batches too."""
    given = (normalize_inputs(batch, example_kwargs) for batch in batches)
    try:
        return verifier.check_batches(found.small, found.exact, found.certificate, given, found.plan.taken)
    except ExportError as e:
        if verifier.mismatch is None:
            raise
        path = differing(found.subject, found.exact, found.widths, found.plan, verifier.mismatch)
        raise verifier.mismatch.error(path) from e


def _look_at_training(dense: nn.Module, found: Found, inputs: Inputs, certificate: Certificate) -> Certificate:
    """See what is lost in training of the code of modules whose forward is written anew."""
    if not found.plan.recipes:
        return certificate
    untrained = lost_in_training(dense, found.plan.recipes, inputs)
    if weight_bytes(dense) > _LARGE:
        return replace(certificate, untrained=untrained)
    here, models = found.subject.inputs, (found.subject.model, found.exact)
    given = here, reduced(here, found.exact, found.plan.taken)
    look = functools.partial(gradient_error, models, given, found.plan.cuts)
    errors = [look(training=False), None if untrained else look(training=True)]
    apart = max((e for e in errors if e is not None), default=None)
    return replace(certificate, untrained=untrained, gradient_error=apart)


def _dead_groups(tensors: list[GatedTensor]) -> dict[int, Tensor]:
    """Return which groups are exactly zero, per ``id(gates)``, before the gates are gone."""
    return {id(gates): (gates.gamma == 0).any(1).cpu() for gates, _ in by_gates(tensors)}


def _analyse(
    dense: nn.Module, inputs: Inputs, clock: _Clock
) -> tuple[Subject, nn.Module | None, list[Any] | None, str]:
    """Trace and analyse on the CPU, in float64 where the model allows and fits, so that constants are exact.

    Returns:
        What was analysed, the model in float64 and its outputs if there are any, and which precisions are compared.
    """
    here = inputs.map(Tensor.cpu)
    if weight_bytes(dense) > _LARGE:
        on_cpu = all(t.device.type == "cpu" for t in [*dense.parameters(), *dense.buffers()])
        model = dense if on_cpu else share(dense).cpu()
        why = "its own, and float64 operation by operation on two inputs: the weights take more than 2 GiB"
        return _subject(model, here, clock), None, None, why
    doubled, exact = share(dense).cpu().double(), here.map(to_double)
    try:
        with clock("verification"):
            given = run(doubled, exact)  # some operations know float32 only
        if not finite(given) and finite(run(dense, inputs)):
            raise ArithmeticError
        return _subject(doubled, exact, clock), doubled, given, "float64, and its own"
    except Exception as e:
        why = f"its own alone: it does not run or trace in float64, or gives no finite numbers ({type(e).__name__})"
        with evaluating(dense), torch.no_grad():
            require_running(dense, dense, inputs)
        return _subject(share(dense).cpu(), here, clock), None, None, why


def _subject(model: nn.Module, inputs: Inputs, clock: _Clock) -> Subject:
    with clock("trace"):
        trace = capture(model, inputs.args, inputs.kwargs)
    with clock("analysis"):
        return Subject(model, inputs, Facts(trace))


_Labels = list[tuple[Gates, list[tuple[str, Tensor]]]]


def _in_order(
    dense: nn.Module,
    subject: Subject,
    verifier: Verifier,
    orders: dict[str, Cut],
    options: dict[str, bool],
    clock: _Clock,
) -> Found | None:
    """Search with the indices of parameters in another order; ``None`` if no network is found equal so."""
    try:
        other = _subject(reorder_(share(subject.model), orders), subject.inputs, clock)
        with clock("search"):
            return smallest(reorder_(share(dense), orders), other, verifier, **options)
    except (ExportError, TraceError):
        return None


def _in_new_order(labels: _Labels, orders: dict[str, Cut]) -> _Labels:
    return [
        (gates, [(n, reordered(index, orders[n]) if n in orders else index) for n, index in members])
        for gates, members in labels
    ]


def _with_orders(plan: Plan, orders: dict[str, Cut]) -> Plan:
    """Return a plan for tensors whose indices are in the order of the user's model; new biases follow their weights."""
    for path in plan.new_biases:
        weight, bias = (f"{path}.{leaf}" if path else leaf for leaf in ("weight", "bias"))
        order = orders[weight].axes.get(0) if weight in orders else None
        if order is not None:
            orders = {**orders, bias: Cut((len(order),), {0: order})}
    cuts = {n: orders[n].then(cut) if n in orders else cut for n, cut in plan.cuts.items()}
    return replace(plan, cuts={**orders, **cuts})


def _require_varying_output(facts: Facts, pruning: PruneReport) -> None:
    outputs = [n for node in facts.nodes if node.op == "output" for n in node.all_input_nodes]
    varies = any(bool(facts.unknown[n].any()) for n in outputs if isinstance(facts.unknown[n], Tensor))
    if not varies:
        raise constant_output(f"{pruning.dead} of {pruning.total} groups are dead")


def _report(
    dense: nn.Module,
    found: Found,
    certificate: Certificate,
    inputs: Inputs,
    pruning: PruneReport,
    labels: _Labels,
    dead: dict[int, Tensor],
    latency: bool,
) -> Report:
    small, widths, plan = found.small, found.widths, found.plan
    gone = {f"{path}.{n}" if path else n for path, recipe in plan.recipes.items() for n in recipe.drops}
    taken, gone_modules = reduced(inputs, small, plan.taken), _gone(dense, small)
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
    single = widths.reason("a single number has no axis along which to cut")
    hint = '; its new forward would hold at the example\'s sizes only: see dynamic="batch"' if found.by_batch else ""
    texts = [f"{text}{hint}" if i in widths.written else text for i, text in enumerate(widths.reasons)]
    cached = "; it goes with use_cache=False: its new forward would take no cache"
    own = {n: p.shape for n, p in small.named_parameters()} if found.uncached else {}
    for gates, members in labels:
        stays = torch.zeros_like(dead[id(gates)])
        for name, index in members:
            if name in gone:
                continue
            why = torch.full(index.shape, -1)
            vectors = widths.why[nodes[name]]
            for axis in (a for a, n in enumerate(index.shape) if n > 1):
                why = torch.maximum(why, on_axis(vectors[axis], axis, index.dim()))
            if index.numel() == 1:  # one group is the whole tensor
                why.fill_(max((int(v.max()) for v in vectors), default=single))
            mask = _stays(plan.cuts.get(name), index)
            said = texts if found.uncached.get(name) == own.get(name) else [f"{text}{cached}" for text in texts]
            part, reasons = find_kept(name, index, mask, dead[id(gates)], why, said, start)
            stays |= part
            kept += reasons
        removed += int((dead[id(gates)] & ~stays).sum())
        start += gates.num_groups
    folded = [f"{n.name}: bias" if f.carrier is None else f"{n.name}: one channel" for n, f in widths.folds.items()]
    folded += [f"{n.name}: one term" for n in (*widths.merged, *widths.added)]
    return Report(
        replace(before, latency=times[0].get("")),
        replace(after, latency=times[1].get("")),
        layers,
        pruning,
        removed,
        kept,
        folded,
        replace(certificate, removed=_removed(dense, small), gone=gone_modules, rewritten=sorted(plan.recipes)),
        sorted(found.frozen.reshapes | found.frozen.modules),
        sorted(plan.recipes),
        gone_modules,
        dict(plan.inputs),
    )


def _stays(cut: Cut | None, index: Tensor) -> Tensor:
    """Mark, in the shape of a parameter's groups, where anything of it stays."""
    if cut is None:
        return torch.ones(index.shape, dtype=torch.bool)
    shared = [a for a, n in enumerate(index.shape) if n == 1]
    if cut.gathers:
        return cut.mask().any(shared, keepdim=True) if shared else cut.mask()
    out = torch.ones(index.shape, dtype=torch.bool)
    for axis, kept in cut.axes.items():
        if axis not in shared:
            mask = torch.zeros(index.shape[axis], dtype=torch.bool)
            mask[kept] = True
            out = out & on_axis(mask, axis, index.dim())
    return out


def _removed(dense: nn.Module, small: nn.Module) -> dict[str, tuple[list[int], list[int] | None]]:
    """Return the shapes before and after of every parameter and buffer that is smaller or gone."""
    (before, after) = (dict(all_tensors(m)) for m in (dense, small))
    shapes = {n: (list(t.shape), list(after[n].shape) if n in after else None) for n, t in before.items()}
    return {n: (a, b) for n, (a, b) in shapes.items() if a != b}


def _gone(dense: nn.Module, small: nn.Module) -> list[str]:
    """Return the outermost modules all of whose parameters are gone."""
    left = {f"{n}." for n, _ in small.named_parameters(remove_duplicate=False)}
    found: list[str] = []
    for path, module in dense.named_modules(remove_duplicate=False):
        if path and next(module.parameters(), None) is not None and not any(path.startswith(f"{p}.") for p in found):
            found += [path] * (not any(n.startswith(f"{path}.") for n in left))
    return found
