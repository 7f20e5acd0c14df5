"""What an export removed, what it kept and why, and what that is worth."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning import PruneReport, count_flops
from ..tracing import Inputs
from ..tracing.capture import evaluating
from .verify import Certificate


@dataclass(frozen=True)
class Size:
    """The size of a network or of one of its modules.

    Args:
        parameters: Number of parameters.
        bytes: Memory of parameters and buffers.
        flops: Floating-point operations of one forward on the example.
        latency: Median seconds of one forward on the example, of the whole network only; ``None`` if not measured.
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
        groups: How many.
        reason: Why, with the operation and the source line.
    """

    parameter: str
    groups: int
    reason: str


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
        frozen: What had to stay whole for the user's code to run; empty if nothing.
    """

    before: Size
    after: Size
    layers: dict[str, tuple[Size, Size]]
    pruning: PruneReport
    removed: int
    kept: list[Kept]
    folded: list[str]
    certificate: Certificate
    frozen: str = ""

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
        lines += [f"  kept: {k.groups} of {k.parameter}: {k.reason}" for k in self.kept]
        errors = ", ".join(f"{v:.1e} in {k}" for k, v in self.certificate.max_error.items())
        lines.append(f"verified on {len(self.certificate.probes)} inputs; largest relative difference {errors}")
        if self.frozen:
            lines.append(f"kept whole for the code to run: {self.frozen}")
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


def latencies(a: nn.Module, b: nn.Module, inputs: Inputs, seconds: float = 0.6) -> tuple[float, float]:
    """Return the median seconds of one forward of two networks, run in turn for about ``seconds`` in all."""
    times: tuple[list[float], list[float]] = ([], [])
    device = next((x.device for x in inputs.leaves() if isinstance(x, Tensor)), torch.device("cpu"))
    with evaluating(a), evaluating(b), torch.no_grad():
        start = time.perf_counter()
        while len(times[0]) < 4 or (time.perf_counter() - start < seconds and len(times[0]) < 200):
            for model, record in zip((a, b), times, strict=True):
                _synchronize(device)
                t = time.perf_counter()
                model(*inputs.args, **inputs.kwargs)
                _synchronize(device)
                record.append(time.perf_counter() - t)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_kept(
    parameter: str, index: Tensor, stays: Tensor, dead: Tensor, why: Tensor, reasons: list[str]
) -> tuple[Tensor, list[Kept]]:
    """Find the dead groups that still have elements in a parameter, and why.

    Args:
        parameter: Its name.
        index: Groups of its elements, broadcasting to it.
        stays: Which elements stay, in its shape.
        dead: Which groups are dead, shape ``(G,)``.
        why: Number of the reason of every element, in its shape.
        reasons: The reasons.

    Returns:
        Which groups stay in part, shape ``(G,)``, and the reasons with their counts.
    """
    index = index.expand(stays.shape)
    hit = stays & (index >= 0) & dead[index.clamp_min(0)]
    if not hit.any():
        return torch.zeros_like(dead), []
    first = torch.full(dead.shape, -1).scatter_reduce(0, index[hit], why[hit], "amax")
    found = Counter(reasons[i] for i in first[first >= 0].tolist())
    return first >= 0, [Kept(parameter, n, r) for r, n in found.most_common()]
