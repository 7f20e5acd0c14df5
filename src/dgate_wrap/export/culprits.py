"""Find the module whose own code fails, or differs, on the smaller tensors."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import DGateError
from ..tracing import Inputs, Trace, capture
from ..tracing.inputs import PLAIN, without_cache
from ..tracing.origins import operation, owner
from ..tracing.settings import evaluating, same_random_numbers, unfused
from .constants import rounding
from .cuts import Cut, cut_axes
from .rewritten import bind, plain_signature
from .widths import Widths

APART = 1e-5
"""How far values may lie apart, relative to the largest, in a model of float64 of which parts run in float32."""

_MASKING = 1e4
"""Larger numbers are those that mask others."""


@dataclass(frozen=True)
class Begun:
    """The begin of a call.

    Args:
        within: The modules it is within, from the outermost to the called one.
        arguments: Its arguments by name.
        objects: Per leaf of the arguments, the ``id`` of the object that was given.
    """

    within: tuple[str, ...]
    arguments: dict[str, Any]
    objects: tuple[int, ...]

    @property
    def path(self) -> str:
        """The module."""
        return self.within[-1]


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Args:
        chain: The calls within which it was made, from the outermost to itself.
        result: Its result; that, and arguments, are as they were before later code wrote to them.
        sized: Which leaves of its arguments are whole numbers that follow from the sizes of the model's inputs.
        gives_sizes: Whether any of its result is such a number.
    """

    chain: tuple[Begun, ...]
    result: Any
    sized: frozenset[int] = frozenset()
    gives_sizes: bool = False

    @property
    def path(self) -> str:
        """The module."""
        return self.chain[-1].path

    @property
    def arguments(self) -> dict[str, Any]:
        """Its arguments by name."""
        return self.chain[-1].arguments


@dataclass(frozen=True)
class Culprit:
    """A module that fails: whose code it is, how many calls had ended well before, and the call itself."""

    path: str
    done: int
    call: str


@contextlib.contextmanager
def _watching(
    model: nn.Module,
    inputs: Inputs,
    calls: list[Call],
    open_calls: list[Begun],
    expected: Expected | None = None,
    within: str = "",
) -> Generator[dict[str, Any]]:
    """Note every call of every module, or of those within one, in the order in which they end, and which ones are open.

    Yields what the model's forward takes beside its inputs, to run as it was traced.
    """
    handles: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            within = (*(begun.path for begun in open_calls), path)
            arguments = bind(signature, args, kwargs)
            open_calls.append(Begun(within, _copied(arguments), tuple(map(id, pytree.tree_leaves(arguments)))))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            calls.append(Call(tuple(open_calls), _copied(result)))
            if expected is not None and not expected.agrees(calls[-1]):
                raise _Enough
            open_calls.pop()

        signature = plain_signature(module)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    for path, module in model.get_submodule(within).named_modules(prefix=within):
        watch(path, module)
    try:
        with _running(model, inputs) as extra:
            yield extra
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _running(model: nn.Module, inputs: Inputs) -> Generator[dict[str, Any]]:
    """Let a model run as it was traced; yield what its forward takes beside its inputs."""
    with evaluating(model), torch.no_grad(), unfused(), without_cache(model, inputs) as extra:
        yield extra


def _copied(tree: Any) -> Any:
    """Copy the tensors of a tree, each once: an activation in place writes to what a module before it gave."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.clone()
        return copies[id(x)]

    return pytree.tree_map_only(Tensor, copied, tree)


def record_calls(model: nn.Module, inputs: Inputs, elsewhere: Iterable[Inputs] = ()) -> list[Call]:
    """Run a model in eval mode and return every call of its modules.

    Args:
        model: The model.
        inputs: What it is run on.
        elsewhere: Inputs of other sizes. Numbers that are others there follow from the sizes.
    """
    calls: list[Call] = []
    with _watching(model, inputs, calls, []) as extra:
        inputs.call(model, **extra)
    numbers = [(_numbers(c.arguments), _numbers(c.result)) for c in calls]
    for other in elsewhere if any(map(any, numbers)) else ():
        for i, call in paired_calls(calls, record_calls(model, other)):
            sized, given = (
                {at for at, n in ours.items() if found.get(at, n) != n}
                for ours, found in zip(numbers[i], (_numbers(call.arguments), _numbers(call.result)), strict=True)
            )
            calls[i] = replace(calls[i], sized=calls[i].sized | sized, gives_sizes=calls[i].gives_sizes or bool(given))
    return calls


def paired_calls(here: list[Call], there: list[Call]) -> list[tuple[int, Call]]:
    """Return the places of calls with those elsewhere, of the modules that are called as often there."""
    ours, theirs = (_by_path(calls) for calls in (here, there))
    alike = [path for path, calls in ours.items() if len(calls) == len(theirs.get(path, []))]
    return [(i, call) for path in alike for (i, _), (_, call) in zip(ours[path], theirs[path], strict=True)]


def _by_path(calls: list[Call]) -> dict[str, list[tuple[int, Call]]]:
    """Return the calls of every module, with their places among all."""
    found: dict[str, list[tuple[int, Call]]] = {}
    for i, call in enumerate(calls):
        found.setdefault(call.path, []).append((i, call))
    return found


def calls_in_training(model: nn.Module, inputs: Inputs) -> list[Call]:
    """Return the outermost calls that a model makes in training only, such as of an auxiliary classifier.

    The modules with code of their own are told that they train, and torch's layers are not, so that values stay the
    same; what draws random numbers gives others.
    """
    usual, calls, open_calls = {c.path for c in record_calls(model, inputs)}, list[Call](), list[Begun]()
    with _watching(model, inputs, calls, open_calls) as extra, same_random_numbers(model):
        for module in model.modules():
            module.training = not type(module).__module__.startswith("torch.nn.")
        inputs.call(model, **extra)
    return [c for c in calls if c.path not in usual and all(b.path in usual for b in c.chain[:-1])]


def _numbers(tree: Any) -> dict[int, int]:
    """Return the whole numbers among the leaves of arguments, or of a result, by their places."""
    return {at: x for at, x in enumerate(pytree.tree_leaves(tree)) if type(x) is int}


def find_culprit(model: nn.Module, inputs: Inputs, expected: Expected, within: str = "") -> Culprit | None:
    """Return the first module that fails or differs, the innermost one; ``None`` if none does.

    Of a module that was given something else, the one in whose code that was made.

    Args:
        model: The smaller model.
        inputs: What it is run on.
        expected: What its modules should give.
        within: The module that is run, if it is not the model; ``inputs`` are what it is given then.
    """
    calls, failed, _ = _watched(model, inputs, within, expected)
    if calls and not expected.agrees(calls[-1]):  # what fails may be the victim of one that ran, and gave others
        return _blamed(model, calls[-1].chain, len(calls) - 1, expected)
    return None if failed is None else _blamed(model, failed, len(calls), expected)


def given_to(model: nn.Module, inputs: Inputs, path: str) -> list[Inputs]:
    """Return what a module is given in each of its calls, until one fails; none if that is more than plain values."""
    given: list[Inputs] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(Inputs(*_copied((args, kwargs))))

    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _running(model, inputs) as extra, contextlib.suppress(Exception):
            inputs.call(model, **extra)
    finally:
        handle.remove()
    plain = all(isinstance(x, (Tensor, *PLAIN)) for i in given for x in i.leaves())
    return given if plain else []


def failing(model: nn.Module, inputs: Inputs) -> tuple[str, int] | None:
    """Return the module in whose own code a run fails, and how many calls had ended well; ``None`` if it does not."""
    calls, failed, error = _watched(model, inputs)
    if failed is None or isinstance(error, DGateError):  # a refusal in words
        return None
    return (with_code(model, failed[-1].path) if failed else ""), len(calls)


class _Enough(BaseException):
    """Ends a run at the first call that gives something else than it should."""


def _watched(
    model: nn.Module, inputs: Inputs, within: str = "", expected: Expected | None = None
) -> tuple[list[Call], tuple[Begun, ...] | None, Exception | None]:
    """Run a model, or a module of it, up to the first call that gives something else than is expected.

    Returns:
        The calls that ended, and if it failed the calls that were open then, and the error.
    """
    calls: list[Call] = []
    open_calls: list[Begun] = []
    try:
        with _watching(model, inputs, calls, open_calls, expected, within) as extra:
            inputs.call(model.get_submodule(within), **({} if within else extra))
    except _Enough:
        return calls, None, None
    except Exception as e:
        return calls, tuple(open_calls), e
    return calls, None, None


def _blamed(model: nn.Module, chain: tuple[Begun, ...], done: int, expected: Expected) -> Culprit:
    if not chain:
        return Culprit("", done, "")
    path = next((begun.path for begun in reversed(chain) if expected.takes(begun)), chain[-1].path)
    return Culprit(with_code(model, path), done, path)


def first_difference(
    dense: nn.Module, small: nn.Module, trace: Trace, widths: Widths, inputs: tuple[Inputs, Inputs]
) -> str | None:
    """Return the first module of a smaller model that differs from the dense one on any inputs; ``None`` if unknown.

    Args:
        dense: The dense model.
        small: The smaller one, in the same precision.
        trace: The dense model's trace.
        widths: What is kept, on the nodes of this trace.
        inputs: What the dense model is run on, and the smaller one.
    """
    with contextlib.suppress(Exception):  # a name is a help; without one the error is raised all the same
        values = values_on(dense, trace, inputs[0])
        found = find_culprit(small, inputs[1], Expected(values, widths, record_calls(dense, inputs[0])))
        if found is None:  # in another graph, of which no value tells what modules should give, one may fail
            return (failing(small, inputs[1]) or (None, 0))[0]
        return found.call
    return None


def values_on(dense: nn.Module, trace: Trace, inputs: Inputs) -> dict[Node, Any]:
    """Return the values of the nodes of a trace on other inputs, of those that the graph has there too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first capture gave them
        as_traced = trace.inputs.is_like(inputs) and not trace.notes  # which hold for the example alone
        here = trace if as_traced else capture(dense, inputs.args, inputs.kwargs)
    placeholders = [n for n, s in here.sources.items() if s.kind == "input"]
    values = here.run(dict(zip(placeholders, inputs.leaves(), strict=True)))
    return {n: values[m] for n, m in _paired(trace.nodes, here.nodes) if m in values}


def _paired(nodes: list[Node], others: list[Node]) -> list[tuple[Node, Node]]:
    """Pair the nodes of two graphs that do the same, in order: one may have steps, such as of padding, between them."""
    if [*map(operation, nodes)] == [*map(operation, others)]:
        return [*zip(nodes, others, strict=True)]
    steps = ([(operation(n), owner(n)) for n in some] for some in (nodes, others))
    blocks = difflib.SequenceMatcher(None, *steps, autojunk=False).get_matching_blocks()
    return [(nodes[b.a + k], others[b.b + k]) for b in blocks for k in range(b.size)]


def with_code(model: nn.Module, path: str) -> str:
    """Return the module whose own code called a stock layer, or the module itself."""
    module = model.get_submodule(path)
    stock = type(module).__module__.startswith("torch.nn") and not list(module.children())
    silent = type(module).forward is nn.Module.forward  # a list of modules
    return with_code(model, path.rpartition(".")[0]) if path and (stock or silent) else path


def same_value(a: Tensor, b: Tensor, least: float = 0.0) -> bool:
    """Tell whether two tensors are the same but for rounding: torch has faster ways to run some layers in eval mode.

    ``least`` is the least relative difference that counts.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    bound = max(rounding(a), least) * float(a.abs().max()) if a.numel() else 0.0
    first = [x.flatten()[:64] for x in (a, b)]  # most others differ here
    return all(bool(((x - y).abs() <= bound).all()) for x, y in (first, (a, b)))


def _in_order(some: tuple[str, ...], everything: tuple[str, ...]) -> bool:
    """Tell whether names come in the same order among others."""
    rest = iter(everything)
    return all(name in rest for name in some)


def _largest(tree: Any) -> float:
    """Return the largest number of a tree, but for those that only mask others."""
    floats = [x.detach().abs() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
    return max((float(x[x < _MASKING].amax()) for x in floats if bool((x < _MASKING).any())), default=0.0)


def _tolerance(x: Tensor) -> float:
    """Return how far values may lie apart, relative to the largest."""
    return APART if x.dtype == torch.float64 else 1e-4 if x.dtype == torch.float32 else 5e-2


def _same(x: Tensor, idle: Tensor, y: Tensor, bounds: tuple[float, float], largest: float) -> bool:
    if x.shape != y.shape:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    finite = x[x.isfinite()]  # of masks
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = min(max(_tolerance(x), bounds[0]), bounds[1])
    bound = tolerance * scale + 16 * torch.finfo(x.dtype).eps * largest + 1e-30  # what rounding leaves of zero
    same = (x == y) | ((x - y).abs() <= bound)
    return bool((same | idle).all())


class Expected:
    """What the modules of the smaller model should give.

    Args:
        values: Per node of the graph, its value in the dense model on the same inputs.
        widths: What is kept of them.
        calls: The calls of the dense model's modules.
        least: How much elements may differ at least, relative to the largest one.
        most: How much they may differ at most, also where rounding is seen to do more.
    """

    def __init__(
        self,
        values: Mapping[Node, Any],
        widths: Widths,
        calls: Iterable[Call],
        least: float = 0.0,
        most: float = 1.0,
    ) -> None:
        self.values, self.widths, self._bounds = values, widths, (least, most)
        self._calls: dict[str, list[Call]] = {}
        for call in calls:
            self._calls.setdefault(call.path, []).append(call)
        self._kept: dict[tuple[int, bool], list[list[tuple[Tensor, Tensor]] | None]] = {}
        self._nodes: dict[tuple[Any, ...], list[Node]] = {}
        for node, value in values.items():
            if isinstance(value, Tensor) and node in widths.keep:
                self._nodes.setdefault((tuple(value.shape), value.dtype), []).append(node)

    def agrees(self, call: Call) -> bool:
        """Tell whether the result of a call is that of the dense model, cut."""
        return any(self._same(known, call.result, given=False) is True for known in self._alike(call.chain[-1]))

    def takes(self, begun: Begun) -> bool:
        """Tell whether the arguments of a call are those of the dense model, cut; so are ones of another form."""
        return any(self._same(known, begun.arguments, given=True) is not False for known in self._alike(begun))

    def _alike(self, begun: Begun) -> list[Call]:
        """Return the calls of the same module within the same ones; forwards written anew leave some of these out."""
        return [c for c in self._calls.get(begun.path, []) if _in_order(begun.within, c.chain[-1].within)]

    def _same(self, call: Call, tree: Any, *, given: bool) -> bool | None:
        """Tell whether a call is given, or gives, what it should; ``None`` if that has another form."""
        known, found = self._leaves(call, given), pytree.tree_leaves(tree)
        if len(known) != len(found):
            return None
        pairs = [(x, y) for x, y in zip(known, found, strict=True) if x is not None and y is not None]  # None: unread
        if all(isinstance(y, Tensor) and self._any_same(x, y, 0.0) for x, y in pairs):
            return True
        largest = _largest((call.arguments, call.result))
        return all(isinstance(y, Tensor) and self._any_same(x, y, largest) for x, y in pairs)

    def _any_same(self, known: list[tuple[Tensor, Tensor]], y: Tensor, largest: float) -> bool:
        """Tell whether a tensor is one of some, but for what nobody needs; of what is not in the graph, it is."""
        return not known or any(_same(x, idle, y, self._bounds, largest) for x, idle in known)

    def _leaves(self, call: Call, given: bool) -> list[list[tuple[Tensor, Tensor]] | None]:
        """Return, per leaf that is a tensor, what it may be when cut, and what nobody needs of that."""
        key = (id(call), given)
        if key not in self._kept:
            leaves = pytree.tree_leaves(call.arguments if given else call.result)
            self._kept[key] = [self._cut(x) if isinstance(x, Tensor) else None for x in leaves]
        return self._kept[key]

    def _cut(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        alike = self._nodes.get((tuple(x.shape), x.dtype), [])
        nodes = [n for n in alike if same_value(self.values[n], x, APART)]
        cuts = [(n, Cut((), cut_axes(self.widths.keep[n]))) for n in nodes]
        return [(cut.apply(self.values[n]), cut.apply(self._idle(n))) for n, cut in cuts]

    def _idle(self, node: Node) -> Tensor:
        """Mark what nobody needs, which may be anything."""
        facts = self.widths.facts
        known = facts.values.get(node)
        if not isinstance(known, Tensor) or known.shape != self.values[node].shape:  # other inputs, of other sizes
            return torch.zeros(self.values[node].shape, dtype=torch.bool)
        return facts.unknown[node] & ~facts.needed(node)
