"""Compare two networks on the example, on random inputs of other sizes and on the user's own, before anything is given.

What is compared in float64 leaves rounding no room to hide an error. In the model's own precision the tolerance follows
from how far the reference itself is from float64.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..tracing import Inputs
from ..tracing.inputs import PLAIN, without_cache
from ..tracing.recorder import tensors_in
from ..tracing.settings import evaluating
from .arguments import left_out, other_values, with_other_floats
from .certificate import Certificate, Mismatch, Probe, Unsteady, constant_output
from .copies import InDouble
from .draws import BESIDE, Draws, holds_few, in_words, resizings
from .rounding import moves
from .selection import Kept, reduced

OWN, _DOUBLE = "own precision", "float64"

_NARROW = 1e-5
"""How far float32 rounds at most; what differs more by other rounding jumps."""

_SMALL = 1e-3
_LARGE_BATCH = 16
_FLOATS = "example with other numbers"

_ROUNDINGS = 20
"""How many times as far as the reference itself from float64 a network may be from it, in the model's own precision."""

_NOTHING = 1e-5
"""The share of the largest of all outputs below which one is not measured by its own size."""

_FAR = 16
"""How many times as large as in the example a size may be at which networks are compared."""

_SPREADS = (1.0, 10.0, 1000.0)
"""How far random inputs spread, in deviations of the example, until one of them moves an output."""


def to_double(x: Tensor) -> Tensor:
    """Return a floating-point tensor in float64, and any other as it is."""
    return x.double() if x.is_floating_point() else x


def run(model: nn.Module, inputs: Inputs, times: int = 1) -> list[Any]:
    """Run a model in eval mode, as it was traced, and return the leaves of its outputs, one run after the other."""
    quiet = warnings.catch_warnings()
    with evaluating(model), torch.no_grad(), without_cache(model, inputs) as extra, quiet:
        warnings.simplefilter("ignore")  # of sizes that no one has asked for
        return [part for leaf in pytree.tree_leaves(inputs.calls(model, times, **extra)) for part in parts_of(leaf)]


def parts_of(leaf: Any) -> list[Any]:
    """Return a leaf of an output, and the tensors that it holds where it is an object, such as a dataclass."""
    return [leaf] if isinstance(leaf, (Tensor, *PLAIN)) else [leaf, *tensors_in(leaf, set())]


def relative_error(reference: list[Any], other: list[Any], *, any_dtype: bool = False) -> float:
    """Return the largest difference over all outputs, relative to the largest reference; infinite if shapes differ.

    An output that is next to nothing beside others, such as what rounding leaves of zero, is measured by these.
    """
    if len(reference) != len(other):
        return float("inf")
    reference, other = ([_as_real(x) for x in leaves] for leaves in (reference, other))
    worst, floor = 0.0, 1e-30
    for a in reference:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            floor = max(floor, _NOTHING * _largest(a))
    for a, b in zip(reference, other, strict=True):
        if not isinstance(a, Tensor):
            same = a == b if isinstance(a, PLAIN) else type(a) is type(b)
            worst = worst if same else float("inf")
        elif not isinstance(b, Tensor) or a.shape != b.shape or (a.dtype != b.dtype and not any_dtype):
            return float("inf")
        elif a.numel():
            least = floor if a.is_floating_point() else 1e-30
            a, b = a.cpu().double(), b.cpu().double()  # noqa: PLW2901
            error = float(torch.where(a == b, 0, a - b).abs().max()) / max(_largest(a), least)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def _largest(x: Tensor) -> float:
    """Return the largest size of finite numbers; 0 if there are none."""
    known = x[x.isfinite()]
    return float(known.abs().max()) if known.numel() else 0.0


def _as_real(leaf: Any) -> Any:
    """Return the two parts of complex numbers, and anything else as it is."""
    return torch.view_as_real(leaf.resolve_conj()) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Tell whether two inputs are the same; those that are not drawn anew, such as sparse ones, are."""
    return a is b or torch.equal(a, b)


def _shrunk(x: Tensor) -> Tensor:
    return (x.double() * _SMALL).to(x.dtype) if x.is_floating_point() else x


def finite(outputs: list[Any]) -> bool:
    """Tell whether all of some outputs are finite, but for what a mask with minus infinity leaves of scores."""

    def may_be(x: Tensor) -> bool:
        known = x.isfinite()
        return bool(known.all()) or (not x.is_complex() and bool(known.any() and (known | x.isneginf()).all()))

    return all(may_be(x) for x in outputs if isinstance(x, Tensor))


def _shapes(inputs: Inputs) -> list[list[int]]:
    return [list(x.shape) for x in inputs.leaves() if isinstance(x, Tensor)]


@dataclass(frozen=True)
class _Reference:
    """What the reference gives for one input; without outputs where it was not run."""

    name: str
    inputs: Inputs
    own: list[Any]
    double: list[Any] | None = None
    jumps: dict[str, float] = field(default_factory=dict[str, float])
    """Per precision, how far other rounding of sums moves it, where that was asked for."""

    @functools.cached_property
    def rounding(self) -> float:
        """How far the reference is from itself in float64; 0 where that is not known, or is no number."""
        far = 0.0 if self.double is None else relative_error(self.double, self.own, any_dtype=True)
        return far if math.isfinite(far) else 0.0

    def tolerance(self, least: dict[str, float]) -> dict[str, float]:
        """Return the tolerances on this input, where the model's own rounding may be larger than elsewhere.

        What rounds to 5 % in float32 does so by 5 % of float64's share of that, 1e-10, in float64. What rounds to more
        is not compared in float32 by that: any other network would be equal.
        """
        own = _ROUNDINGS * self.rounding
        allowed = {OWN: own if own < 1 else 0.0, _DOUBLE: own * self._finer}
        return {k: max(x, allowed[k]) for k, x in least.items()}

    @property
    def noise(self) -> bool:
        """Whether even in float64 it is known to fewer digits than a smaller network has to agree in."""
        return _ROUNDINGS * self.rounding * self._finer > _NARROW

    @property
    def _finer(self) -> float:
        """How much finer float64 is than what the reference computes in."""
        own = [torch.finfo(x.dtype).eps for x in self.own if isinstance(x, Tensor) and x.is_floating_point()]
        return torch.finfo(torch.float64).eps / max(own, default=1.0)


class Verifier:
    """The outputs of a network on all probes, against which smaller networks are compared.

    Args:
        model: The reference, without gates; in its own precision.
        doubled: The same on the CPU in float64; ``None`` where it does not run so, or would not fit.
        example: Example inputs.
        precision: Which precisions are compared, and why not others.
        given: What ``doubled`` gives on the example, if it was run already.
        one_by_one: Whether to compare in float64 after all, by widening operation by operation.
        dynamic: Which sizes may be others than in the example.
        follows: Whether the graph follows values of the example, so that more random inputs are worth their time.
        on_cpu: The reference on the CPU if it lies elsewhere. It runs random inputs first, since an index out of bounds
            is an error there, and the end of the process on a GPU.

    Raises:
        ExportError: If the reference is not finite on the example, draws random numbers, or gives the same for all
            inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        doubled: nn.Module | None,
        example: Inputs,
        precision: str,
        given: list[Any] | None = None,
        *,
        one_by_one: bool = False,
        dynamic: str = "all",
        follows: bool = False,
        on_cpu: nn.Module | None = None,
    ) -> None:
        start = time.perf_counter()
        self._model, self._doubled, self._one_by_one, self._on_cpu = model, doubled, one_by_one, on_cpu
        self.precision, self.dynamic = precision, dynamic
        self.mismatch: Mismatch | None = None
        self.skipped: list[Probe] = []
        self._draws = Draws(example)
        self._beside: tuple[int, int] | None = None
        first = _Reference("example", example, run(model, example), given or self._in_double(example))
        self._require_finite(first)
        self._tolerance = self._tolerances(first)
        self._require_repeatable(first)
        self._references = [first]
        self._require_varying(first)
        self._add_beside()
        for ways in resizings(example, dynamic):
            alone = ways[:-1] or ways
            accepted = [self._add_resized(name, sizes) for name, sizes in alone]
            if len(ways) > 1 and not all(accepted):
                self._add_resized(*ways[-1])
        self._add_small()
        if follows:
            self._add_many()
        self._add_floats()
        self.preparing, self.checking = time.perf_counter() - start, 0.0

    def probe_beyond(self, bounds: Iterable[tuple[list[tuple[int, int]], int, int | None]]) -> None:
        """Compare on sizes too at which the reference takes other branches than a trace shows, as far as they are near.

        Args:
            bounds: Per size that varies, the axes that have it, and the least and largest one that the trace holds for.
        """
        start, example = time.perf_counter(), self._references[0].inputs
        for places, least, largest in bounds:
            size = example.sizes[places[0]]
            news = [] if largest is None or largest >= _FAR * size else [largest + 1]
            news += [least - 1] if least > 2 else []  # a trace never holds for 1, which is a probe anyway
            for new in news:
                self._add_resized(in_words(places, size, new), dict.fromkeys(places, new))
        self.preparing += time.perf_counter() - start

    def require_same(self, gated: list[Any] | None) -> None:
        """Require that the gated model, if it ran, gives on the example what the reference does, its gates folded.

        It does not where a forward goes through the parameters themselves: of a gated model these are its factors.
        """
        if gated is not None and not relative_error(self._references[0].own, gated) <= self._tolerance[OWN]:
            raise ExportError(
                "the gated model gives something else on the example than the same model with its gates folded into "
                "the weights.",
                expected="a forward that reads its weights as attributes, such as self.fc.weight: self.parameters() "
                "and state_dict() of a gated model hold its factors",
                mend="take what is computed of all parameters, such as a penalty, out of the forward",
            )

    @property
    def inputs(self) -> list[Inputs]:
        """Everything on which networks are compared."""
        return [r.inputs for r in self._references]

    def _in_double(self, inputs: Inputs) -> list[Any] | None:
        """Run the reference in float64; ``None`` if it is not to be."""
        if self._doubled is not None:
            return run(self._doubled, self._analysed(inputs))
        if not self._one_by_one:
            return None
        try:
            with InDouble():
                return run(self._model, inputs.map(to_double))
        except Exception as e:
            self._one_by_one = False
            self.precision = f"own precision alone: it does not run in float64 ({_first_line(e)})"
            return None

    def _add(self, name: str, inputs: Inputs) -> bool:
        """Add a random probe, unless the reference refuses it or has no finite answer."""
        shapes = _shapes(inputs)
        try:
            if self._on_cpu is not None:
                run(self._on_cpu, self._analysed(inputs))
            own, double = run(self._model, inputs), None
            if not self._one_by_one or len(self._references) == 2:  # slow: the example, and one of another size
                double = self._in_double(inputs)
        except Exception as e:
            self.skipped.append(Probe(name, shapes, skipped=f"the reference refuses it: {_first_line(e)}"))
            return False
        if not finite(own) or (double is not None and not finite(double)):
            self.skipped.append(Probe(name, shapes, skipped="the reference's own output is not finite"))
            return False
        reference = _Reference(name, inputs, own, double)
        if reference.noise:
            self.skipped.append(
                Probe(name, shapes, skipped="the reference's own output is what rounding leaves of zero")
            )
            return False
        self._references.append(reference)
        return True

    def _tolerances(self, first: _Reference) -> dict[str, float]:
        dtypes = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        narrow = any(d.itemsize < 4 for d in dtypes)
        least = 5e-2 if narrow else 1e-5 if dtypes != {torch.float64} else 1e-10
        return first.tolerance({OWN: least}) | ({_DOUBLE: 1e-10} if first.double is not None else {})

    def _require_finite(self, reference: _Reference) -> None:
        if not finite(reference.own):
            raise ExportError(
                f"the pruned model's own output on the {reference.name} is not finite, so nothing can be compared "
                "with it.",
                expected="finite outputs",
                mend="check the inputs and the weights: torch.isfinite(model(x)).all()",
            )

    def _require_repeatable(self, first: _Reference) -> None:
        """Require that further runs give the same, up to the order in which parallel sums are added."""
        again = relative_error(first.own * 2, run(self._model, first.inputs, 2))
        if again > min(1e-6 if self._tolerance[OWN] < 1e-2 else 1e-2, self._tolerance[OWN]):
            raise ExportError(
                "the model's own output on the same input differs from run to run, so nothing can be compared with it.",
                expected="a forward that draws no random numbers in eval mode",
                mend="F.dropout(x, p, training=self.training), or nn.Dropout, in place of dropout that is always on",
            )

    def _require_varying(self, first: _Reference) -> None:
        """Add random inputs of the example's shapes, ever larger, until one of them moves an output."""
        still = {i for i, x in enumerate(first.inputs.leaves()) if isinstance(x, Tensor) and x.numel()}
        for spread in _SPREADS:
            inputs = self._draws(spread=spread)
            if spread > 1 and not any(x.is_floating_point() for x in inputs.leaves() if isinstance(x, Tensor)):
                return
            if not self._add("random, as large as the example" if spread == 1 else f"random, {spread:g}×", inputs):
                continue
            given, example = inputs.leaves(), first.inputs.leaves()
            still -= {i for i in still if not _same_values(given[i], example[i])}
            latest = self._references[-1]
            exact = first.double is not None and latest.double is not None
            if relative_error(*((r.double if exact else r.own) or [] for r in (first, latest))) > 0:
                return
        floats = [x for x in first.own if isinstance(x, Tensor) and x.is_floating_point()]
        kinds = {x.is_floating_point() for x in first.inputs.leaves() if isinstance(x, Tensor)}
        if floats and not still and len(kinds) == 1:  # indices beside features may count, at values not in the example
            seen = "its outputs are the same on the example and on random inputs"
            raise constant_output(f"{seen}; if others move them, export on those")

    def _add_beside(self) -> None:
        """Add whole numbers that the example does not hold, where it holds few: lengths that are all 0 say little.

        A model may refuse some, such as a class too many or a length of none; others are tried then.
        """
        if not any(holds_few(x) for x in self._references[0].inputs.leaves()):
            return
        skipped = len(self.skipped)
        for beside in BESIDE:
            del self.skipped[skipped:]
            if self._add("random, of other whole numbers", self._draws(beside=beside)):
                self._beside = beside
                return

    def _add_many(self) -> None:
        """Add random inputs that may take other branches than the example: some of its sizes, and a large batch."""
        for spread in _SPREADS:
            self._add("random, another", self._draws(spread=spread))
        ways = next((w for w in resizings(self._references[0].inputs, "batch")), None)
        if ways is not None:
            places = ways[-1][1]
            new = _LARGE_BATCH * max(1, *(self._references[0].inputs.sizes[at] for at in places))
            self._add_resized(f"random, batch {new}", dict.fromkeys(places, new))

    def _add_small(self) -> None:
        """Add an example that is next to nothing, where the epsilons of norms and the biases are all that counts."""
        example = self._references[0].inputs
        if any(x.is_floating_point() for x in example.leaves() if isinstance(x, Tensor)):
            self._add(f"example times {_SMALL:g}", example.map(_shrunk))

    def _add_floats(self) -> None:
        """Add other numbers where the example gives some, unless they draw something (a dropout's probability)."""
        inputs = with_other_floats(self._references[0].inputs)
        if inputs is None or not self._add(_FLOATS, inputs):
            return
        latest = self._references[-1]
        if relative_error(latest.own, run(self._model, inputs)) > self._tolerance[OWN]:
            self._references.pop()
            self.skipped.append(Probe(_FLOATS, _shapes(inputs), skipped="the reference differs from run to run"))

    def _add_resized(self, name: str, sizes: dict[tuple[int, int], int]) -> bool:
        """Add a random probe of other sizes, with whole numbers that the example does not hold if it is taken so."""
        if self._beside is not None and self._add(name, self._draws(sizes, beside=self._beside)):
            return True
        if self._beside is not None:
            self.skipped.pop()
        return self._add(name, self._draws(sizes))

    def check(
        self, small: nn.Module, exact: nn.Module, kept: Kept | None = None, *, computed: bool = True
    ) -> Certificate:
        """Compare a smaller network with the reference.

        Args:
            small: The smaller network in the model's own precision.
            exact: The same in the precision of the analysis, with constants that were folded in it.
            kept: What it takes of the inputs, if that is less than the reference takes.
            computed: Whether any of its tensors was computed anew, not only cut.

        Raises:
            ExportError: If it fails to run where the reference does, or differs by more than rounding; ``mismatch``
                says on what.
            Unsteady: If rounding alone moves the reference on the example as far as they differ.
        """
        start = time.perf_counter()
        try:
            return self._check(small, exact, kept or {}, self._tolerance_of(computed=computed))
        finally:
            self.checking += time.perf_counter() - start

    def agrees(self, exact: nn.Module) -> bool:
        """Tell whether a network in the precision of the analysis computes what the reference does.

        It is run at the example's sizes, and at one more beside another batch: where a sequence has a single element,
        say, attention moves nothing.
        """
        sizes = self._references[0].inputs.sizes
        alike = [r for r in self._references if r.inputs.sizes == sizes]
        others = (r for r in self._references if any(n > sizes[at] for at, n in r.inputs.sizes.items() if at[1] > 0))
        return all(self._agrees(exact, r) for r in (*alike, *itertools.islice(others, 1)))

    def _agrees(self, exact: nn.Module, r: _Reference) -> bool:
        reference = r.own if self._doubled is None or r.double is None else r.double
        return relative_error(reference, run(exact, self._analysed(r.inputs))) <= self._tolerance[OWN]

    def _analysed(self, inputs: Inputs) -> Inputs:
        """Return inputs as the analysis takes them: on the CPU, in float64 if there is a reference in it."""
        here = inputs.map(Tensor.cpu)
        return here if self._doubled is None else here.map(to_double)

    def _tolerance_of(self, *, computed: bool) -> dict[str, float]:
        """Return the tolerances: constants that were computed in the model's own precision are as exact as that."""
        rough = self._one_by_one and computed and _DOUBLE in self._tolerance
        return self._tolerance | ({_DOUBLE: self._tolerance[OWN]} if rough else {})

    def _check(self, small: nn.Module, exact: nn.Module, kept: Kept, tolerance: dict[str, float]) -> Certificate:
        allowed = [r.tolerance(tolerance) for r in self._references]
        probes: list[Probe] = []
        skipped = list(self.skipped)
        for reference, t in zip(self._references, allowed, strict=True):
            earlier = self.mismatch
            try:
                probes.append(self._compare(small, exact, reference, kept, t))
            except Unsteady as e:
                if reference is self._references[0]:
                    raise
                skipped.append(Probe(reference.name, _shapes(reference.inputs), skipped=e.why))
            except ExportError as e:
                said = self._excuse(reference, e)
                if not said:
                    raise
                self.mismatch = earlier
                skipped.append(Probe(reference.name, _shapes(reference.inputs), skipped=said))
        tolerance = {k: max(t[k] for t in allowed) for k in tolerance}
        worst = {k: max(p.errors.get(k, 0.0) for p in probes) for k in tolerance}
        return Certificate(worst, tolerance, self.precision, probes, skipped, dynamic=self.dynamic)

    def _excuse(self, reference: _Reference, failure: ExportError) -> str:
        """Return why a failure does not count; empty if it does."""
        if reference.name == _FLOATS and failure.__cause__ is not None:
            return f"the smaller network refuses it: {_first_line(failure.__cause__)}"
        mixes = self._mixes(reference)
        return "the reference mixes the examples of the batch, since the size only seems to fit" if mixes else ""

    def _jump(self, reference: _Reference, precision: str) -> float:
        """Return how far other rounding of sums moves the reference."""
        if precision not in reference.jumps:
            before = (reference.own if precision == OWN else reference.double) or []

            def again() -> list[Any]:
                return (
                    run(self._model, reference.inputs) if precision == OWN else self._in_double(reference.inputs) or []
                )

            try:
                reference.jumps[precision] = moves(again, lambda after: relative_error(before, after))
            except Exception:  # what moves by rounding may not be accepted, such as a probability above 1
                reference.jumps[precision] = 0.0
        return reference.jumps[precision]

    def _mixes(self, reference: _Reference) -> bool:
        """Tell whether outputs are as many as the inputs of a batch in the example, and here are not.

        Such as of ``view(-1, 400)`` of images a little larger, of 4 by 3 places in place of 3 by 3.
        """

        def counts(r: _Reference) -> tuple[list[int], list[int]]:
            given, gives = (
                [x.shape[0] for x in xs if isinstance(x, Tensor) and x.dim()] for xs in (r.inputs.leaves(), r.own)
            )
            return given[:1], gives

        (given, gives), (given_here, gives_here) = counts(self._references[0]), counts(reference)
        return {*gives} == {*given} and not {*gives_here} <= {*given_here}

    def _compare(
        self, small: nn.Module, exact: nn.Module, probe: _Reference, kept: Kept, tolerance: dict[str, float]
    ) -> Probe:
        errors: dict[str, float] = {}
        for precision, reference in ((_DOUBLE, probe.double), (OWN, probe.own)):
            if reference is None:
                continue
            model, inputs = small, reduced(probe.inputs, small, kept)
            mode: Any = contextlib.nullcontext()
            if precision == _DOUBLE:
                model, inputs = exact, inputs.map(Tensor.cpu).map(to_double)
                if self._doubled is None:
                    mode = InDouble()
            try:
                with mode:
                    outputs = run(model, inputs)
            except Exception as e:
                self._fail(probe.inputs, f"it does not run on the {probe.name}: {_first_line(e)}", e)
                raise
            as_read = precision == _DOUBLE and self._doubled is None  # a parameter that is given out is not widened
            errors[precision] = relative_error(reference, outputs, any_dtype=as_read)
            if tolerance[precision] < errors[precision] <= _NARROW:
                throughout = self._error_throughout(exact, inputs.map(Tensor.cpu).map(to_double), probe)
                errors[precision] = min(errors[precision], throughout)
            if errors[precision] > tolerance[precision]:
                where = "its own precision" if precision == OWN else precision
                found = f"on the {probe.name}, in {where}, it differs by {errors[precision]:.2e} of the largest output"
                jump = self._jump(probe, precision)
                if jump < max(errors[precision] / _ROUNDINGS, self._tolerance[OWN], _NARROW):
                    self._fail(probe.inputs, found)
                unsteady = Unsteady(found, jump)
                if precision == _DOUBLE or _DOUBLE not in errors:
                    raise unsteady
                del errors[OWN]
                return Probe(probe.name, _shapes(probe.inputs), errors, f"in {where}, {unsteady.why}")
        return Probe(probe.name, _shapes(probe.inputs), errors)

    def _error_throughout(self, exact: nn.Module, inputs: Inputs, probe: _Reference) -> float:
        """Compare in float64 also what a forward computes in less, whose rounding depends on the sizes; or infinity."""
        if self._doubled is None:
            return float("inf")
        try:
            with InDouble():
                reference = run(self._doubled, probe.inputs.map(Tensor.cpu).map(to_double))
                return relative_error(reference, run(exact, inputs))
        except Exception:  # it writes to what it made narrower
            return float("inf")

    def _fail(self, inputs: Inputs, found: str, cause: Exception | None = None) -> None:
        self.mismatch = Mismatch(inputs, not inputs.is_like(self._references[0].inputs), found)
        raise self.mismatch.error() from cause

    def check_arguments(self, small: nn.Module, certificate: Certificate, kept: Kept) -> Certificate:
        """Compare with other flags and whole numbers than the example's too, and add what is found to a certificate."""
        start, example = time.perf_counter(), self._references[0].inputs
        probes: list[Probe] = []
        for name, inputs in other_values(self._model, example):
            try:
                first = run(self._model, inputs)
            except Exception:  # the reference refuses it
                continue
            try:
                error = relative_error(first, run(small, reduced(inputs, small, kept)))
                if error > (least := certificate.tolerance[OWN]) and self._draws_numbers(inputs, first, least):
                    continue
                far = Probe(name, _shapes(inputs), skipped="the smaller network gives outputs of other shapes")
                probes.append(Probe(name, _shapes(inputs), {OWN: error}) if math.isfinite(error) else far)
            except Exception as e:
                probes.append(Probe(name, _shapes(inputs), skipped=f"the smaller network fails: {_first_line(e)}"))
        self.checking += time.perf_counter() - start
        return replace(certificate, arguments=probes, left_out=left_out(self._model, example))

    def _draws_numbers(self, inputs: Inputs, first: list[Any], tolerance: float) -> bool:
        """Tell whether the reference gives something else when it is run again."""
        return relative_error(first, run(self._model, inputs)) > tolerance

    def check_batches(
        self,
        small: nn.Module,
        exact: nn.Module,
        certificate: Certificate,
        batches: Iterable[Inputs],
        kept: Kept | None = None,
    ) -> Certificate:
        """Compare on the user's own batches too, one after the other, and add them to a certificate.

        Raises:
            ExportError: As `check`; also if the reference refuses a batch, or has no finite answer to it.
        """
        start = time.perf_counter()
        worst, probes, allowed = dict(certificate.max_error), list(certificate.probes), dict(certificate.tolerance)
        skipped = list(certificate.skipped)
        for i, inputs in enumerate(batches):
            name = f"batch {i} of yours"
            try:
                reference = _Reference(name, inputs, run(self._model, inputs), self._in_double(inputs))
            except Exception as e:
                raise ExportError(
                    f"the model does not run on the {name}, of shapes {_shapes(inputs)}: {_first_line(e)}",
                    expected="batches in the form of example_inputs, without labels",
                    mend="dg.export(model, x, batches=[x for x, y in loader])",
                ) from e
            self._require_finite(reference)
            tolerance = reference.tolerance(certificate.tolerance)
            try:
                probe = self._compare(small, exact, reference, kept or {}, tolerance)
            except Unsteady as e:
                skipped.append(Probe(name, _shapes(inputs), skipped=e.why))
                continue
            allowed = {k: max(v, tolerance[k]) for k, v in allowed.items()}
            probes.append(probe)
            worst = {k: max(v, probe.errors.get(k, 0.0)) for k, v in worst.items()}
        self.checking += time.perf_counter() - start
        return replace(certificate, max_error=worst, tolerance=allowed, probes=probes, skipped=skipped)


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {next(iter(str(e).splitlines()), 'no message')}"
