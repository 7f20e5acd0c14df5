"""Compare two networks on the example and on random inputs, before anything is handed over."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..tracing import Inputs
from ..tracing.capture import evaluating
from .selection import Kept, reduced

_SEED = 20250923


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far it differed.

    Args:
        max_error: Per precision, the largest difference over all probes, relative to the largest output.
        probes: The inputs: the example, and random ones with their batch sizes.
        seed: Seed of the random inputs.
    """

    max_error: dict[str, float]
    probes: list[str]
    seed: int = _SEED


def probe_inputs(example: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield the example, and random inputs like it: the same batch size, one more, and one.

    Floating-point inputs are drawn from a normal distribution with the mean and deviation of the example; integers and
    booleans are drawn from the values of the example.
    """
    yield "example", example
    generator = torch.Generator().manual_seed(_SEED)
    batch = next((x.shape[0] for x in example.leaves() if isinstance(x, Tensor) and x.dim()), 0)
    for size in dict.fromkeys((batch, batch + 1, 1)):

        def draw(x: Tensor, size: int = size) -> Tensor:
            shape = (size, *x.shape[1:]) if x.dim() and x.shape[0] == batch else x.shape
            if x.is_floating_point():
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                spread = x.double().std().nan_to_num(1.0) if x.numel() > 1 else torch.ones(())
                return (noise.to(x.device) * spread.clamp_min(1e-3) + x.double().mean()).to(x.dtype)
            picks = torch.randint(max(1, x.numel()), shape, generator=generator).to(x.device)
            return x.flatten()[picks] if x.numel() else x

        yield f"random, batch {size}", example.map(draw)


def to_double(x: Tensor) -> Tensor:
    """Return a floating-point tensor in float64, and any other as it is."""
    return x.double() if x.is_floating_point() else x


def run(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Run a model in eval mode and return the leaves of its output."""
    with evaluating(model), torch.no_grad():
        return pytree.tree_leaves(model(*inputs.args, **inputs.kwargs))


def relative_error(reference: list[Any], other: list[Any], *, any_dtype: bool = False) -> float:
    """Return the largest difference over all outputs, relative to the largest reference; infinite if shapes differ."""
    if len(reference) != len(other):
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if not isinstance(a, Tensor):
            worst = worst if a == b else float("inf")
        elif not isinstance(b, Tensor) or a.shape != b.shape or (a.dtype != b.dtype and not any_dtype):
            return float("inf")
        elif a.numel():
            a, b = a.cpu().double(), b.cpu().double()  # noqa: PLW2901
            error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            worst = max(worst, error if error == error else float("inf"))
    return worst


@dataclass(frozen=True)
class _Probe:
    name: str
    inputs: Inputs
    reference: list[Any]


class Verifier:
    """The reference outputs of a network on all probes, against which smaller networks are compared.

    Everything is compared in float64, which leaves rounding no room to hide an error, and in the model's own
    precision. There the tolerance follows from how far the reference itself is from float64.

    Args:
        model: The reference, without gates; in its own precision.
        example: Example inputs.

    Raises:
        ExportError: If the reference is not finite on the example, or draws random numbers.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self._own = _references(model, example)
        self._double: list[_Probe] = []
        try:
            self._double = _references(copy.deepcopy(model).cpu().double(), example.map(Tensor.cpu).map(to_double))
        except Exception as e:
            self.only_own = f"{type(e).__name__} in float64"
        if not all(bool(x.isfinite().all()) for x in self._own[0].reference if isinstance(x, Tensor)):
            raise ExportError(
                "the pruned model's own output on the example is not finite, so nothing can be compared with it.",
                expected="finite outputs",
                mend="check the inputs and the weights: torch.isfinite(model(x)).all()",
            )
        if relative_error(self._own[0].reference, run(model, example)) > 0:
            raise ExportError(
                "the model's own output on the same input differs from run to run, so nothing can be compared with it.",
                expected="a forward that draws no random numbers in eval mode",
                mend="F.dropout(x, p, training=self.training), or nn.Dropout, in place of dropout that is always on",
            )
        rounding = (
            relative_error(self._double[0].reference, self._own[0].reference, any_dtype=True) if self._double else 0.0
        )
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        narrow = any(d.itemsize < 4 for d in dtypes)
        self._tolerance = max(5e-2 if narrow else 1e-5 if dtypes != {torch.float64} else 1e-10, 20 * rounding)

    def check(self, small: nn.Module, exact: nn.Module, kept: Kept | None = None) -> Certificate:
        """Compare a smaller network with the reference.

        Args:
            small: The smaller network in the model's own precision.
            exact: The same in float64, with constants that were folded in float64.
            kept: What it takes of the inputs, if that is less than the reference takes.

        Raises:
            ExportError: If it fails to run where the reference does, or differs by more than rounding.
        """
        errors = {"own precision": self._compare(small, self._own, self._tolerance, "its own precision", kept or {})}
        if self._double:
            errors["float64"] = self._compare(exact, self._double, 1e-10, "float64", kept or {})
        return Certificate(errors, [p.name for p in self._own])

    def _compare(self, small: nn.Module, probes: list[_Probe], tolerance: float, precision: str, kept: Kept) -> float:
        worst = 0.0
        for probe in probes:
            try:
                error = relative_error(probe.reference, run(small, reduced(probe.inputs, small, kept)))
            except Exception as e:
                first = next(iter(str(e).splitlines()), "no message")
                raise _mismatch(f"it does not run on the {probe.name}: {type(e).__name__}: {first}") from e
            if error > tolerance:
                raise _mismatch(f"on the {probe.name}, in {precision}, it differs by {error:.2e} of the largest output")
            worst = max(worst, error)
        return worst


def _references(model: nn.Module, example: Inputs) -> list[_Probe]:
    """Run the reference on the example, and on every random input that it accepts."""
    probes: list[_Probe] = []
    for name, inputs in probe_inputs(example):
        try:
            probes.append(_Probe(name, inputs, run(model, inputs)))
        except Exception:
            if not probes:
                raise
    return probes


def _mismatch(what: str) -> ExportError:
    return ExportError(
        f"the smaller network is not equal to the gated one: {what}.",
        expected="equal outputs on the example and on random inputs",
        mend="report the model; dg.ungate(model) gives the full-size network meanwhile",
    )
