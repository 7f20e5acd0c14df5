"""What an export removed, what it kept and why, and what that is worth."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..flops import count_flops
from ..pruning import PruneReport
from ..tracing import Inputs
from ..tracing.settings import evaluating, unchanged
from .certificate import Certificate

_APART = 1e-3
"""Gradients that differ by more than this, relative to the largest, are told of."""


@dataclass(frozen=True)
class Size:
    """The size of a network or of one of its modules.

    Args:
        parameters: Number of parameters.
        bytes: Memory of parameters and buffers.
        flops: Floating-point operations of one forward on the example.
        latency: Median seconds of one forward on the example; ``None`` if not measured.
    """

    parameters: int
    bytes: int
    flops: int
    latency: float | None = None


@dataclass(frozen=True)
class Kept:
    """Dead groups that could not be removed, for one reason.

    Args:
        parameter: The parameter on which they stand.
        reason: Why, with the operation and the source line.
        groups: Which ones, as positions in ``dg.groups(model)``.
    """

    parameter: str
    reason: str
    groups: list[int]


@dataclass(frozen=True)
class Report:
    """What `export` did.

    Args:
        before: Size of the whole network before, and after.
        after: Size of the whole network after.
        layers: Per module with parameters of its own, its size before and after.
        pruning: What was set to zero on the copy.
        removed: Number of dead groups that were removed whole.
        kept: Dead groups that stayed, with the reason.
        folded: Layers whose bias, or whose weights, took up the constants of removed channels.
        certificate: What was compared, and the largest differences.
        frozen: Modules in whose code sizes are written that had to stay whole; layers in them compute and read less.
        rewritten: Modules whose forward was written anew as a graph.
        gone: Modules that are gone with all their parameters: dead branches.
        inputs: Per input of which only some features are needed: per axis, their indices.
        config: Fields of the configuration that the model was made from, which express its new sizes, with their
            values; ``None`` if no values do.
        seconds: How long each phase of the export took.
    """

    before: Size
    after: Size
    layers: dict[str, tuple[Size, Size]]
    pruning: PruneReport
    removed: int
    kept: list[Kept]
    folded: list[str]
    certificate: Certificate
    frozen: list[str] = field(default_factory=list[str])
    rewritten: list[str] = field(default_factory=list[str])
    gone: list[str] = field(default_factory=list[str])
    inputs: dict[str, dict[int, list[int]]] = field(default_factory=dict[str, dict[int, list[int]]])
    config: dict[str, int] | None = field(default_factory=dict[str, int])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def speedup(self) -> float | None:
        """Latency before over latency after; ``None`` if not measured."""
        a, b = self.before.latency, self.after.latency
        return a / b if a and b else None

    def __str__(self) -> str:
        header = ("", "parameters", "FLOPs", "KiB", "latency")
        rows: list[tuple[str, ...]] = [header]
        for name, (a, b) in [*self.layers.items(), ("total", (self.before, self.after))]:
            latency = f"{a.latency * 1e3:.2f} → {b.latency * 1e3:.2f} ms" if a.latency and b.latency else ""
            kib = f"{a.bytes / 1024:.1f} → {b.bytes / 1024:.1f}"
            rows.append((name, f"{a.parameters:,} → {b.parameters:,}", f"{a.flops:,} → {b.flops:,}", kib, latency))
        widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.append(f"{self.pruning.dead} of {self.pruning.total} groups dead, {self.removed} of them removed")
        lines += [f"  kept: {len(k.groups)} of {k.parameter}: {k.reason}" for k in self.kept]
        errors = ", ".join(f"{v:.1e} in {k}" for k, v in self.certificate.max_error.items())
        skipped = f" ({len(self.certificate.skipped)} others skipped)" if self.certificate.skipped else ""
        lines.append(
            f"verified on {len(self.certificate.probes)} inputs{skipped}; largest relative difference {errors}"
        )
        if self.certificate.others:
            lines.append(
                f"computes something else than the gated model, or fails, with {', '.join(self.certificate.others)}"
            )
        if self.frozen:
            lines.append(f"sizes are kept for the code of {', '.join(p or 'the model' for p in self.frozen)} to run")
        if self.rewritten:
            lines.append(
                f"forwards written anew as graphs: {', '.join(p or 'the whole model' for p in self.rewritten)}"
            )
        if self.certificate.untrained:
            names = ", ".join(p or "the whole model" for p in self.certificate.untrained)
            lines.append(f"these do nothing else in training than in eval mode any more, as their code does: {names}")
        if (self.certificate.gradient_error or 0.0) > _APART:
            lines.append(f"gradients differ by {self.certificate.gradient_error:.1e}, by code that is lost in these")
        if self.gone:
            lines.append(f"gone with all their parameters: {', '.join(self.gone)}")
        if self.config is None:
            lines.append("its configuration cannot express the result, and stays as it was: save with dg.save")
        elif self.config:
            lines.append(f"its configuration says: {', '.join(f'{k} = {v}' for k, v in self.config.items())}")
        return "\n".join(lines)


def measure(model: nn.Module, inputs: Inputs) -> tuple[Size, dict[str, Size]]:
    """Count parameters, bytes and FLOPs of a network, in total and by module."""
    flops = count_flops(model, inputs)
    layers: dict[str, Size] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            held = [*own, *module.buffers(recurse=False)]
            layers[name or "(root)"] = Size(sum(p.numel() for p in own), _bytes(held), flops.get(name, 0))
    total = Size(
        sum(p.numel() for p in model.parameters()), _bytes([*model.parameters(), *model.buffers()]), flops.get("", 0)
    )
    return total, layers


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def latencies(
    a: tuple[nn.Module, Inputs], b: tuple[nn.Module, Inputs], seconds: float = 0.4
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure one forward of two networks that ran before, each on its inputs, in turn for about ``seconds`` in all.

    Returns:
        For each network, median seconds by module with parameters of its own; ``""`` is the whole network, measured in
        runs of its own.
    """
    times: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    device = next((x.device for x in a[1].leaves() if isinstance(x, Tensor)), torch.device("cpu"))
    undo = unchanged(a[0], buffers=True), unchanged(b[0], buffers=True)
    with evaluating(a[0]), evaluating(b[0]), undo[0], undo[1], torch.no_grad():
        start = time.perf_counter()
        rounds = 0
        while rounds < 2 or (time.perf_counter() - start < seconds and rounds < 200):
            for (model, inputs), record in zip((a, b), times, strict=True):
                if rounds % 4 == 0:
                    with _clocks(model, record, device):
                        inputs.call(model)
                _synchronize(device)
                given = inputs.map(Tensor.clone)
                t = time.perf_counter()
                model(*given.args, **given.kwargs)
                _synchronize(device)
                record.setdefault("", []).append(time.perf_counter() - t)
            rounds += 1
    first, second = ({n: statistics.median(t) for n, t in record.items()} for record in times)
    return first, second


@contextlib.contextmanager
def _clocks(model: nn.Module, record: dict[str, list[float]], device: torch.device) -> Generator[None]:
    """Add up, per module with parameters of its own, the seconds of its calls in one forward."""
    spent: dict[str, float] = {}
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        started: list[float] = []

        def before(*_: Any) -> None:
            _synchronize(device)
            started.append(time.perf_counter())

        def after(*_: Any) -> None:
            _synchronize(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started.pop()

        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    for name, module in model.named_modules():
        if name and next(module.parameters(recurse=False), None) is not None:
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, seconds in spent.items():
            record.setdefault(name, []).append(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_kept(
    parameter: str, index: Tensor, stays: Tensor, dead: Tensor, why: Tensor, reasons: list[str], start: int
) -> tuple[Tensor, list[Kept]]:
    """Find the dead groups that still have elements in a parameter, and why.

    Args:
        parameter: Its name.
        index: Groups of its elements, broadcasting to it.
        stays: Where anything stays, in the shape of the index.
        dead: Which groups are dead, shape ``(G,)``.
        why: Number of the reason, in that shape.
        reasons: The reasons.
        start: Position of group 0 in ``dg.groups(model)``.

    Returns:
        Which groups stay in part, shape ``(G,)``, and the reasons with their groups, the most frequent first.
    """
    hit = stays & (index >= 0) & dead[index.clamp_min(0)]
    first = torch.full(dead.shape, -1).scatter_reduce(0, index[hit], why[hit], "amax")
    found = {int(i): ((first == i).nonzero().flatten() + start).tolist() for i in first[first >= 0].unique()}
    kept = [Kept(parameter, reasons[i], groups) for i, groups in found.items()]
    return first >= 0, sorted(kept, key=lambda k: -len(k.groups))
