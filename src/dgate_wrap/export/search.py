"""Search the smallest network that is equal: the user's own code first, rewritten forwards where it must be."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import ExportError
from ..tracing import Inputs
from ..tracing.families import NormedWeight
from ..tracing.inputs import has_cache
from ..tracing.symbolic import Symbolic, is_open
from .certificate import Certificate, Mismatch, Unsteady
from .children import changing
from .copies import share
from .culprits import (
    Call,
    Culprit,
    Expected,
    find_culprit,
    first_difference,
    record_calls,
    values_on,
)
from .dead import Branch, beside_others, find_dead
from .dropouts import attention_dropouts
from .facts import Facts
from .freezing import colder
from .grafts import Grafts, Parts
from .integers import Integers, Patch
from .padding import find_patch, padded
from .plan import Draft, Permissions, Plan, make_plan
from .scatter import held_by_code, partial_columns, partial_rows
from .selection import is_selectable, reduced
from .silence import Seen, sizes_in
from .subject import Subject
from .uses import MASK, cached_uses, given_caches, training_fails
from .vectors import Allowed, Frozen
from .verify import Verifier
from .widths import Widths

_WORTH = 0.98
"""Rewritten forwards are worth it if they leave at most this share of what the user's own code needs."""

_MUCH = 2**30
"""Modules are compared if the activations on the example take at most so many bytes; it takes several times that."""

_SIZES = 4
"""At how many other sizes of the inputs constants are looked at, before a network counts as different."""

_FINE = 1e-9
"""How much modules may differ where a network does and none of them by more than rounding usually does."""


@dataclass(frozen=True)
class Found:
    """A smaller network that is equal."""

    small: nn.Module
    exact: nn.Module
    subject: Subject
    widths: Widths
    plan: Plan
    certificate: Certificate
    frozen: Frozen
    by_batch: bool = False
    """Whether a smaller one was equal at the example's sizes, and not at others."""
    uncached: Mapping[str, torch.Size] = field(default_factory=dict[str, torch.Size])
    """The shapes of the parameters of a smaller one that was equal, and of no use with a cache."""

    @property
    def size(self) -> int:
        """Number of elements of its parameters and buffers."""
        return _elements(self.small)


def _elements(model: nn.Module) -> int:
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()])


def smallest(dense: nn.Module, subject: Subject, verifier: Verifier, *, rewrite: bool, select_inputs: bool) -> Found:
    """Return the smallest network that is equal.

    The user's own code runs the boldest plan if it can. If it cannot, modules that fail get other integers in place of
    those that they remember; or else they keep the sizes whole that are written in their code, or get a forward that is
    written anew, which has to be worth it.

    Raises:
        ExportError: If no network was found equal, or none can be compared.
    """
    search = _Search(dense, subject, verifier, select_inputs=select_inputs)
    found: Found | None = None
    try:
        try:
            found = _smallest(search, rewrite=rewrite)
        except ExportError:
            if not search.takes_less:
                raise
        if found is None or (search.takes_less and found.frozen != search.start):  # some code asks for whole inputs
            search.whole_inputs = True
            with contextlib.suppress(ExportError) if found is not None else contextlib.nullcontext():
                whole = _smallest(search, rewrite=rewrite)
                if found is None or whole.size < found.size or (whole.size == found.size and not found.plan.inputs):
                    found = whole
        return found
    except Unsteady as e:
        raise e.error() from e


def _smallest(search: _Search, *, rewrite: bool) -> Found:
    failure: ExportError | None = None
    own: Found | None = None
    try:
        own = search.repaired(rewrite=False)
    except ExportError as e:
        failure = e
    dead = rewrite and bool(find_dead(search.subject.facts))
    held = own is not None and (own.frozen != search.start or own.widths.held_by_code)
    if own is not None and not dead and not (held and search.could_gain(own)):
        return own
    lossy: Found | None = None
    uncached = dict[str, torch.Size]()
    while rewrite and (search.open() or search.open_parts()):
        try:
            rewritten = search.repaired(rewrite=True)
        except ExportError as e:
            failure = failure or e
            rewritten = None
        if rewritten is None or (own is not None and rewritten.size >= (own.size if dead else _WORTH * own.size)):
            if search.open_elsewhere() or search.open_parts():
                continue
            break
        if search.keeps_uses(rewritten, masks=own is not None and not held):
            return search.sparser(replace(rewritten, uncached=uncached))
        lossy = lossy or rewritten
        if search.loses_cache(rewritten):
            uncached = {n: p.shape for n, p in rewritten.small.named_parameters()}
        if not search.spare_caches():
            break
    own = own or lossy
    if own is None:
        assert failure is not None
        raise search.named(failure) from failure
    return search.sparser(replace(own, by_batch=search.by_batch, uncached={} if own is lossy else uncached))


def differing(subject: Subject, exact: nn.Module, widths: Widths, plan: Plan, mismatch: Mismatch) -> str | None:
    """Return the first module of a network that differs, where it does; ``None`` if unknown."""
    inputs = subject.in_precision(mismatch.inputs)
    taken = reduced(inputs, exact, plan.taken)
    return first_difference(subject.model, exact, widths.facts.trace, widths, (inputs, taken))


class _Search:
    def __init__(self, dense: nn.Module, subject: Subject, verifier: Verifier, *, select_inputs: bool) -> None:
        self.dense, self.verifier = dense, verifier
        self._failed: dict[int, tuple[ExportError, Mismatch, nn.Module, Widths, Plan]] = {}
        self._tried_to_open = self._tried_elsewhere = False
        self._set(subject)
        self._select_inputs = select_inputs
        self.takes_less = False
        """Whether a network was tried that takes less than whole inputs."""
        self.whole_inputs = False
        self._spared: frozenset[str] = frozenset()
        self.by_batch = False
        """Whether forwards that were written anew were equal at the example's sizes, and not at others."""
        self._parts: Parts | None = None
        self._hopeless: set[tuple[str, str]] = set()
        """Modules, with the sizes that changed there, which no other integers help."""

    def _set(self, subject: Subject) -> None:
        self.subject = subject
        self.permissions = Permissions(subject.model, subject.facts)
        self._calls: list[Call] | None = None
        self._elsewhere: list[dict[str, list[Seen]]] | None = None
        self._runs: tuple[dict[Node, float], frozenset[str]] | None = None

    def could_gain(self, own: Found) -> bool:
        """Tell whether forwards that are written anew could make it enough smaller, if no code stood in the way."""
        plan, tensors = make_plan(
            self._widths(self.start, rewrite=True), self.permissions, select_inputs=self._select_inputs
        )
        return _elements(plan.apply(share(self.subject.model), tensors)) < _WORTH * own.size

    def keeps_uses(self, found: Found, *, masks: bool) -> bool:
        """Tell whether a network does with its cache, and with ``masks`` when given one, what the dense one does."""
        return not {*self._lost_uses(found)} - (set() if masks else {MASK})

    def sparser(self, found: Found) -> Found:
        """Let layers compute and read less than the sizes around them, where code keeps these or it spares time.

        And let dead modules whose results lie beside others give nothing.
        """
        before = self.subject
        if before is not found.subject:
            self._set(found.subject)
        try:
            return self._sparser(self._without_remains(found))
        finally:
            if before is not found.subject:
                self._set(before)

    def _without_remains(self, found: Found) -> Found:
        gone = beside_others(self.subject.facts) if found.widths.allowed.rewrite else None
        if not gone:
            return found
        widths = Widths(self.subject.facts, replace(found.widths.allowed, gone=gone))
        return self._better(found, widths) or found

    def _better(self, found: Found, widths: Widths) -> Found | None:
        """Return the network of other widths, if it is equal, smaller than one that was found, and as usable."""
        draft = Draft(*make_plan(widths, self.permissions, select_inputs=self._select_inputs))
        try:
            better = self._first_proven(draft, widths, found.frozen, rewrite=widths.allowed.rewrite)
        except ExportError:
            return None
        if not isinstance(better, Found) or better.size >= found.size:
            return None
        if {*self._lost_uses(better)} - {*self._lost_uses(found)} or self._fails_in_training(better) is not None:
            return None
        return replace(better, by_batch=found.by_batch, uncached=found.uncached)

    def _sparser(self, found: Found) -> Found:
        frozen, allowed, layers = found.frozen, found.widths.allowed, self.permissions.scattering
        now = {n: p.shape for n, p in found.small.named_parameters()}
        tied = {n for n, shape in found.uncached.items() if now.get(n) != shape}
        chosen = {p for p in layers.values() if (f"{p}.weight" if p else "weight") in tied}
        chosen |= held_by_code(found.widths, layers)
        idle = not frozen.idle  # else code that the graph does not show reads what nothing in it depends on
        rows = partial_rows(found.widths, layers, chosen, idle=idle)
        columns = partial_columns(found.widths, layers, chosen)
        if rows == allowed.scattered and not columns:
            return found
        widths = Widths(self.subject.facts, replace(allowed, scattered=rows, leaves_idle=idle, picking=columns))
        return self._better(found, widths) or found

    def loses_cache(self, found: Found) -> bool:
        """Tell whether a network cannot be used with a cache as the dense one can."""
        return bool({*self._lost_uses(found)} - {MASK})

    def _lost_uses(self, found: Found) -> dict[str, str]:
        """Return what a smaller network cannot do that the dense one can, and the modules in which it fails."""
        inputs = self.verifier.inputs[0]
        here = cached_uses(found.small, reduced(inputs, found.small, found.plan.taken))
        return {use: path for use, path in here.items() if path is not None and self._uses.get(use, "") is None}

    @functools.cached_property
    def _uses(self) -> dict[str, str | None]:
        return cached_uses(self.dense, self.verifier.inputs[0])

    def _fails_cached(self, found: Found) -> str | None:
        """Return the module that fails when a network is used with a cache as the dense one can be; or ``None``."""
        if not has_cache(self.dense, self.verifier.inputs[0]):
            return None
        return next((path for use, path in self._lost_uses(found).items() if use != MASK), None)

    def _fails_in_training(self, found: Found) -> str | None:
        """Return the module that fails in train mode, where none of the dense network does; or ``None``."""
        start, inputs = time.perf_counter(), self.verifier.inputs[0]
        path = training_fails(found.small, reduced(inputs, found.small, found.plan.taken))
        if path is not None and training_fails(self.dense, inputs) is not None:
            path = None
        self.verifier.checking += time.perf_counter() - start
        return path

    def spare_caches(self) -> bool:
        """Let modules that are given a cache keep their own code from now on; tell whether that is news."""
        earlier, self._spared = self._spared, given_caches(self.dense, self.verifier.inputs[0])
        return self._spared != earlier

    def open(self) -> bool:
        """Analyse the graph with open sizes; tell whether there is one."""
        if not self._tried_to_open:
            self._tried_to_open = True
            self._set(self.subject.opened(self.verifier.dynamic))
            if self.subject.symbolic is not None:
                self.verifier.probe_beyond(self.subject.symbolic.bounds)
        return self.subject.symbolic is not None

    def open_elsewhere(self) -> bool:
        """Analyse a graph with open sizes that was traced at other sizes; tell whether more of them are open there."""
        stuck = set() if self._tried_elsewhere else self._stuck(self.subject)
        self._tried_elsewhere = True
        if self.subject.symbolic is None or self.subject.symbolic.by_batch:
            return False
        here = self.subject.inputs.sizes
        probes = (x for x in self.verifier.inputs[1:] if stuck and all(x.sizes[at] != here[at] for at in stuck))
        probe = next(probes, None)
        if probe is None:
            return False
        elsewhere = replace(self.subject, inputs=self.subject.in_precision(probe)).opened(self.verifier.dynamic)
        if elsewhere.symbolic is None or self._stuck(elsewhere):
            return False
        self._set(elsewhere)
        return True

    def open_parts(self) -> bool:
        """Trace modules alone from now on where sizes do not stay open in the whole; tell whether that is news."""
        whole = self.subject.symbolic
        news = self._parts is None and (whole is None or bool(self._stuck(self.subject)))
        if news and whole is None:
            trace = self.subject.facts.trace
            fixed = Symbolic(
                trace.graph_module.graph, {n: n for n in trace.nodes if n.op != "output"}, [], by_batch=True
            )
            self._set(replace(self.subject, symbolic=fixed))
        self._parts = Parts(self.subject.model) if news else self._parts
        return news

    def _stuck(self, opened: Subject) -> set[tuple[int, int]]:
        """Return the axes of which sizes vary among the probes and not in a graph, as `Inputs.sizes` names them.

        Such as one that a buffer is cut to, and that is as long as the buffer in the example.
        """
        if opened.symbolic is None:
            return set()
        given = opened.given
        return {(i, axis) for i, axis in self._varied if not is_open(given[i].meta["val"].shape[axis])}

    @property
    def _varied(self) -> set[tuple[int, int]]:
        """The axes of which the dense model takes other sizes than the example's, as `Inputs.sizes` names them."""
        sizes = [x.sizes for x in self.verifier.inputs]
        return {at for at, size in sizes[0].items() if any(s[at] != size for s in sizes)}

    @property
    def calls(self) -> list[Call]:
        """Every call of the dense model's modules."""
        if self._calls is None:
            probes = (self.subject.in_precision(x) for x in self.verifier.inputs[1:])
            self._calls = record_calls(self.subject.model, self.subject.inputs, probes)
        return self._calls

    def _widths(self, frozen: Frozen, *, rewrite: bool) -> Widths:
        p = self.permissions
        allowed = Allowed(
            p.can_bias,
            p.can_carry,
            p.can_regroup,
            p.can_rescale,
            self._can_select,
            unit=_unit(self.dense),
            rewrite=rewrite,
            frozen=frozen,
        )
        widths = Widths(self.subject.facts, allowed)
        if differing := widths.differing():
            allowed = replace(
                allowed,
                can_bias=functools.partial(_but, differing, p.can_bias),
                can_carry=functools.partial(_but, differing, p.can_carry),
            )
            widths = Widths(self.subject.facts, allowed)
        partial = partial_rows(widths, p.scattering)
        return Widths(self.subject.facts, replace(allowed, scattered=partial)) if partial else widths

    def _can_select(self, node: Node, axis: int) -> bool:
        """Tell whether an input may be cut along an axis: one of its own size, of a plain argument."""
        subject = self.subject
        source = subject.facts.trace.sources[node]
        if self.whole_inputs or node not in subject.facts.features:
            return False
        if not is_selectable(source.name, subject.inputs, self.dense):
            return False
        if subject.symbolic is None:  # sizes that vary are told from others only if something can be gained
            return axis > 0 and not self._tried_to_open
        given = subject.given
        [i] = [i for i, n in enumerate(given) if subject.symbolic.twins[n] is node]
        return not is_open(given[i].meta["val"].shape[axis]) or (i, axis) not in self._varied

    def _proven(
        self, draft: Draft, widths: Widths, frozen: Frozen, *, agreed: bool = False, masked: bool = False
    ) -> Found:
        """Make the smaller network, in its own precision and in that of the analysis, and require that it is equal.

        ``agreed`` tells that its modules were compared already, and ``masked`` that it takes an attention mask.
        """
        plan = draft.plan
        own = {n: t.to(_like(self.dense, n, t)) for n, t in draft.tensors.items()}
        small = plan.apply(share(self.dense), own)
        exact = small if self.subject.model is self.dense else self._exact(draft)
        try:
            certificate = self.verifier.check(small, exact, plan.taken, computed=self._computed(draft, widths))
            if exact is not small and not agreed and self._activation_bytes <= _MUCH:
                self._require_agreement(draft, widths)
        except ExportError as e:
            mismatch = cast(Mismatch, self.verifier.mismatch)
            self._failed[id(e)] = e, mismatch, exact, widths, plan
            here = self.verifier.inputs[0].sizes
            elsewhere = any(n != here[at] for at, n in mismatch.inputs.sizes.items() if at in here and at[1] > 0)
            self.by_batch = self.by_batch or (elsewhere and bool(plan.recipes))
            raise
        if not masked and (patch := self._patch_for_masks(small, plan)):
            with contextlib.suppress(ExportError):
                return self._proven(draft.patched(patch), widths, frozen, agreed=True, masked=True)
        return Found(small, exact, self.subject, widths, plan, certificate, frozen)

    def _patch_for_masks(self, small: nn.Module, plan: Plan) -> Patch:
        """Return the integers that a network needs to take an attention mask, beside those that the example needs."""
        inputs = padded(self.dense, self.verifier.inputs[0])
        if inputs is None:
            return {}
        return find_patch(self.dense, small, inputs, reduced(inputs, small, plan.taken))

    @property
    def _activation_bytes(self) -> int:
        """How much the activations on the example take."""
        facts = self.subject.facts
        made = (v for n in facts.varying if isinstance(v := facts.values.get(n), Tensor))
        return sum(v.nbytes for v in made if v.layout == torch.strided)

    def _require_agreement(self, draft: Draft, widths: Widths) -> None:
        """Require that every module gives what it should: of what code gets wrong, saturated outputs show nothing."""
        start, differs = time.perf_counter(), False
        with contextlib.suppress(Exception):  # a model that cannot be watched is compared by its outputs alone
            # far above rounding, in float32 too, and far below another scale
            expected = self._expected(widths, least=1e-3)
            differs = find_culprit(self._exact(draft), self._taken(draft), expected) is not None
        self.verifier.checking += time.perf_counter() - start
        if differs:
            found = "its outputs are, but a module gives something else than it gave"
            self.verifier.mismatch = Mismatch(self.verifier.inputs[0], False, found)
            raise self.verifier.mismatch.error()

    def _expected(self, widths: Widths, **bounds: float) -> Expected:
        return Expected(self.subject.facts.values, widths, self.calls, **bounds)

    def _taken(self, draft: Draft) -> Inputs:
        """Return what a smaller network takes of the example."""
        return reduced(self.subject.inputs, self.dense, draft.plan.taken)

    def _computed(self, draft: Draft, widths: Widths) -> bool:
        """Tell whether a tensor may hold more than what stays of one: a folded constant, or a rescaled norm."""
        owners = [self.dense.get_submodule(n.rpartition(".")[0]) for n in draft.tensors]
        new = any(n not in draft.plan.cuts for n in draft.tensors)
        scaled = any(isinstance(f, NormedWeight) for f in widths.facts.families.values())
        folded = bool(widths.folds or widths.merged or widths.added)
        return new or scaled or folded or any(isinstance(m, nn.RMSNorm) for m in owners)

    def named(self, failure: ExportError) -> ExportError:
        """Return an error that names the first module that differs."""
        return self._failed[id(failure)][1].error(self._differing(failure))

    def _differing(self, failure: ExportError) -> str | None:
        _, mismatch, exact, widths, plan = self._failed[id(failure)]
        return differing(self.subject, exact, widths, plan, mismatch)

    def _exact(self, draft: Draft) -> nn.Module:
        """Make the smaller network in the precision of the analysis."""
        return draft.plan.apply(share(self.subject.model), draft.tensors)

    def repaired(self, *, rewrite: bool) -> Found:
        """Repair one module after the other, until the network is equal.

        Raises:
            ExportError: If it never is.
        """
        frozen, earlier = self.start, dict(self._failed)
        while True:
            self._failed = dict(earlier)  # with what is tried no more, its tensors go
            widths = self._widths(frozen, rewrite=rewrite)
            plain = Draft(*make_plan(widths, self.permissions, select_inputs=self._select_inputs))
            self.takes_less = self.takes_less or bool(plain.plan.inputs)
            if plain.plan.inputs and not self._tried_to_open:
                self.open()
                continue
            try:
                found = self._first_proven(plain, widths, frozen, rewrite=rewrite)
            except ExportError as e:
                if self._learns():
                    continue
                path, failure = self._differing(e) if id(e) in self._failed else None, e
            else:
                if not isinstance(found, Found):
                    path, failure = found[0].path, found[1]
                elif (path := self._fails_in_training(found)) is not None:
                    failure = _cannot_train(path)
                elif rewrite or (path := self._fails_cached(found)) is None:
                    return found
                else:
                    failure = _cannot_cache(path)
            more = None if path is None else colder(self.subject, self.calls, frozen, path, widths.filled)
            if more is None:
                raise failure
            frozen = more

    def _learns(self) -> bool:
        """See which constants are others at the sizes at which a network differed last; tell whether that is news."""
        mismatch, facts = self.verifier.mismatch, self.subject.facts
        sized = mismatch is not None and (mismatch.resized or facts.trace.notes)
        if mismatch is None or not sized or len(facts.elsewhere) >= _SIZES:
            return False
        try:
            values = values_on(self.subject.model, facts.trace, self.subject.in_precision(mismatch.inputs))
        except Exception:  # it cannot be traced on these
            return False
        learned = Facts(facts.trace, [*facts.elsewhere, values])
        self._set(replace(self.subject, facts=learned))
        return any(bool((m & ~facts.sized[n]).any() if n in facts.sized else m.any()) for n, m in learned.sized.items())

    def _first_proven(
        self, plain: Draft, widths: Widths, frozen: Frozen, *, rewrite: bool
    ) -> Found | tuple[Culprit, ExportError]:
        """Return the boldest network that is equal; or else what fails in the plainest.

        Raises:
            ExportError: If the network is not equal though none of its modules fails.
        """
        grafts = self._grafts(widths, plain) if rewrite else None
        drafts = [*self._without_dead(plain, grafts), plain]
        while True:
            draft = drafts.pop(0)
            try:
                return self._proven(draft, widths, frozen)
            except ExportError as e:
                failure = e
            try:
                draft, culprit = self._repair(draft, widths, grafts)
            except Exception:  # the model does not run in the precision of the analysis
                if not drafts:
                    raise failure from None
                continue
            try:
                if culprit is None:
                    return self._proven(draft, widths, frozen, agreed=True)
            except ExportError as e:
                if not drafts:
                    raise e from failure
            if not drafts:
                assert culprit is not None
                return culprit, failure

    def _grafts(self, widths: Widths, draft: Draft) -> Grafts | None:
        symbolic = self.subject.symbolic
        if symbolic is None:
            return None
        return Grafts(
            self.subject.model,
            symbolic,
            widths,
            draft.plan,
            self.permissions,
            self.calls,
            self._spared,
            self._parts,
            *self._seen(),
            self._sizes_elsewhere(),
        )

    def _sizes_elsewhere(self) -> list[dict[str, list[Seen]]]:
        """Return the sizes in calls on other inputs, if the graph holds at the example's only and modules are dead."""
        if not self._stuck(self.subject) or not find_dead(self.subject.facts):
            return []
        if self._elsewhere is None:
            probes = [x for x in self.verifier.inputs[1:] if x.sizes != self.verifier.inputs[0].sizes]
            recorded = (record_calls(self.subject.model, self.subject.in_precision(x)) for x in probes)
            self._elsewhere = [sizes_in(self.calls, there) for there in recorded]
        return self._elsewhere

    def _seen(self) -> tuple[dict[Node, float], frozenset[str]]:
        """Return how much each attention drops in training, and the modules whose attributes change in a run."""
        if self._runs is None:
            model, inputs = self.subject.model, self.subject.inputs
            self._runs = attention_dropouts(model, inputs, self.subject.facts), changing(model, inputs)
        return self._runs

    def _without_dead(self, draft: Draft, grafts: Grafts | None) -> Iterator[Draft]:
        """Yield drafts without dead branches, the boldest first."""
        branches = find_dead(self.subject.facts) if grafts is not None else []
        if grafts is None or not branches:
            return
        yield grafts.without(draft, branches)
        if any(b.meets is not None for b in branches):
            yield grafts.without(draft, [Branch((p,), None) for b in branches for p in b.paths])

    @property
    def start(self) -> Frozen:
        """What is kept from the start."""
        return Frozen(idle=frozenset(self.subject.passed_to(self.subject.training_calls)))

    def _repair(self, draft: Draft, widths: Widths, grafts: Grafts | None) -> tuple[Draft, Culprit | None]:
        """Give modules other integers, or forwards that are written anew; return the first that this does not help."""
        integers = Integers(self.subject.model, widths)
        expected, inputs = self._expected(widths), self._taken(draft)
        first = draft
        while True:
            exact = self._exact(draft)
            culprit = find_culprit(exact, inputs, expected)
            here = self.verifier.mismatch is not None and not self.verifier.mismatch.resized
            if culprit is None and draft is first and here:  # it differs by less than rounding does elsewhere
                expected = self._expected(widths, most=_FINE)
                culprit = find_culprit(exact, inputs, expected)
            if culprit is None:
                break
            sizes = culprit.path, str(integers.sizes.get(culprit.path))
            patch = None
            if sizes not in self._hopeless:
                patch = integers.helping(exact, inputs, expected, culprit)
                self._hopeless |= {sizes} if patch is None else set()
            better = None if patch is None else draft.patched(patch)
            if better is not None and better.plan.attributes == draft.plan.attributes:  # a layer sets its own sizes
                better = None
            if better is None and grafts is not None:
                better = grafts.onto(draft, culprit.path)
            if better is None:
                break
            draft = better
        return draft, culprit


def _unit(model: nn.Module) -> int:
    """Return how many elements 16 bytes hold, as kernels read them; none of them takes doubles."""
    sizes = (p.element_size() for p in model.parameters() if p.is_floating_point())
    return max((16 // n for n in sizes if n < 8), default=1)


def _cannot_train(path: str) -> ExportError:
    return ExportError(
        f"the smaller network cannot be trained any more: {path or 'its forward'} fails in train mode.",
        expected="code that reads in training what it reads in eval mode, or sizes that follow its weights",
        mend="gate no weights that meet, in training only, others of their size",
    )


def _cannot_cache(path: str) -> ExportError:
    return ExportError(
        f"the smaller network cannot be used with a cache any more: {path or 'its forward'} fails.",
        expected="code that takes the sizes of its cache from its weights, or from integers of its own",
        mend='turn the cache off: dg.export(model, {**inputs, "use_cache": False})',
    )


def _like(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a tensor of the dtype and device that a new value takes: the old one's; of a new one, its module's."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, leaf, None)
    if isinstance(held, Tensor):
        return held
    held = getattr(module, "weight", None)
    held = held if isinstance(held, Tensor) else next(module.parameters(), value)
    return held if value.is_floating_point() else value.to(held.device)


def _but(others: set[Node], can: Callable[[Node], bool], node: Node) -> bool:
    """Tell whether something can be done to a node that is none of some others."""
    return node not in others and can(node)
