"""Find the module whose own code fails, or differs, on the smaller tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..tracing import Inputs, Trace, capture
from ..tracing.capture import evaluating, without_cache
from ..tracing.origins import operation
from .constants import rounding
from .cuts import Cut, cut_axes
from .recipes import bind, plain_signature
from .widths import Widths


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Args:
        path: The module.
        arguments: Its arguments by name, and its result, as they were before later code wrote to them.
        result: Its result.
        sized: Which leaves of its arguments are whole numbers that follow from the sizes of the model's inputs.
    """

    path: str
    arguments: dict[str, Any]
    result: Any
    sized: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Culprit:
    """A module that fails: whose code it is, how many calls had ended well before, and the call itself."""

    path: str
    done: int
    call: str


@contextlib.contextmanager
def watching(model: nn.Module, calls: list[Call], open_calls: list[str]) -> Generator[None]:
    """Note every call of every module, in the order in which they end, and which ones are open."""
    handles: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        arguments: list[dict[str, Any]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            open_calls.append(path)
            arguments.append(_copied(bind(signature, args, kwargs)))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            open_calls.pop()
            calls.append(Call(path, arguments.pop(), _copied(result)))

        signature = plain_signature(module)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    for path, module in model.named_modules():
        watch(path, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(tree: Any) -> Any:
    """Copy the tensors of a tree: an activation in place writes to what a module before it gave."""
    return pytree.tree_map_only(Tensor, Tensor.clone, tree)


def record_calls(model: nn.Module, inputs: Inputs, elsewhere: Iterable[Inputs] = ()) -> list[Call]:
    """Run a model in eval mode and return every call of its modules.

    Args:
        model: The model.
        inputs: What it is run on.
        elsewhere: Inputs of other sizes. Numbers that are others there follow from the sizes.
    """
    calls: list[Call] = []
    with evaluating(model), torch.no_grad(), without_cache(model, inputs) as extra, watching(model, calls, []):
        inputs.call(model, **extra)
    numbers = [_numbers(c) for c in calls]
    for other in elsewhere if any(numbers) else ():
        there = record_calls(model, other)
        if [c.path for c in there] == [c.path for c in calls]:
            for i, call in enumerate(there):
                found = _numbers(call)
                sized = {at for at, n in numbers[i].items() if found.get(at, n) != n}
                calls[i] = replace(calls[i], sized=calls[i].sized | sized)
    return calls


def _numbers(call: Call) -> dict[int, int]:
    """Return the whole numbers among the leaves of a call's arguments, by their places."""
    return {at: x for at, x in enumerate(pytree.tree_leaves(call.arguments)) if type(x) is int}


def find_culprit(
    model: nn.Module, inputs: Inputs, values: Mapping[Node, Any], widths: Widths, expected: list[Call]
) -> Culprit | None:
    """Return the first module that fails or differs, the innermost one; ``None`` if none does.

    Args:
        model: The smaller model.
        inputs: What it is run on.
        values: Per node of the graph, its value in the dense model on the same inputs.
        widths: What is kept of them.
        expected: The calls of the dense model's modules.
    """
    calls: list[Call] = []
    open_calls: list[str] = []
    failed: str | None = None
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            without_cache(model, inputs) as extra,
            watching(model, calls, open_calls),
        ):
            inputs.call(model, **extra)
    except Exception:
        failed = open_calls[-1] if open_calls else ""
    by_value = _Values(values, widths)
    wanted: dict[str, list[Call]] = {}
    for call in expected:
        wanted.setdefault(call.path, []).append(call)
    for done, call in enumerate(calls):  # what fails may be the victim of one that ran, and gave something else
        known = wanted.get(call.path)
        if not known or not by_value.agree(known.pop(0).result, call.result):
            return Culprit(_with_code(model, call.path), done, call.path)
    return None if failed is None else Culprit(_with_code(model, failed), len(calls), failed)


def raised_in(model: nn.Module, error: BaseException) -> str | None:
    """Return the innermost module in whose code an error, or what caused it, was raised; ``None`` if in none."""
    paths = {id(m): n for n, m in model.named_modules()}
    found: str | None = None
    trace = (error.__cause__ or error).__traceback__
    while trace is not None:
        found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


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
        if values is not None:
            found = find_culprit(small, inputs[1], values, widths, record_calls(dense, inputs[0]))
            return None if found is None else found.call
    return None


def values_on(dense: nn.Module, trace: Trace, inputs: Inputs) -> dict[Node, Any] | None:
    """Return the value of every node of a trace on other inputs, of other sizes too; ``None`` if the graph differs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first capture gave them
        here = trace if _alike(trace.inputs, inputs) else capture(dense, inputs.args, inputs.kwargs)
    if [operation(n) for n in here.nodes] != [operation(n) for n in trace.nodes]:
        return None
    placeholders = [n for n, s in here.sources.items() if s.kind == "input"]
    values = here.run(dict(zip(placeholders, inputs.leaves(), strict=True)))
    return {n: values[m] for n, m in zip(trace.nodes, here.nodes, strict=True) if m in values}


def _alike(a: Inputs, b: Inputs) -> bool:
    """Tell whether inputs have the same shapes."""
    return [getattr(x, "shape", x) for x in a.leaves()] == [getattr(x, "shape", x) for x in b.leaves()]


def _with_code(model: nn.Module, path: str) -> str:
    """Return the module whose own code called a stock layer, or the module itself."""
    module = model.get_submodule(path)
    stock = type(module).__module__.startswith("torch.nn") and not list(module.children())
    return path.rpartition(".")[0] if path and stock else path


def same_value(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same but for rounding: torch has faster ways to run some layers in eval mode."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    bound = rounding(a) * float(a.abs().max()) if a.numel() else 0.0
    first = [x.flatten()[:64] for x in (a, b)]  # most others differ here
    return all(bool(((x - y).abs() <= bound).all()) for x, y in (first, (a, b)))


class _Values:
    """Tells what a tensor of the dense model should be in the smaller one."""

    def __init__(self, values: Mapping[Node, Any], widths: Widths) -> None:
        self.values, self.widths = values, widths
        self._nodes: dict[tuple[Any, ...], list[Node]] = {}
        for node, value in values.items():
            if isinstance(value, Tensor) and node in widths.keep:
                self._nodes.setdefault((tuple(value.shape), value.dtype), []).append(node)

    def agree(self, dense: Any, small: Any) -> bool:
        """Tell whether a result of the smaller model is a result of the dense one, cut."""
        a, b = (pytree.tree_leaves(r) for r in (dense, small))
        pairs = [(x, y) for x, y in zip(a, b, strict=False) if isinstance(x, Tensor) and y is not None]  # None: unread
        return len(a) == len(b) and all(isinstance(y, Tensor) and self._agree(x, y) for x, y in pairs)

    def _agree(self, x: Tensor, y: Tensor) -> bool:
        nodes = [n for n in self._nodes.get((tuple(x.shape), x.dtype), []) if same_value(self.values[n], x)]
        if not nodes:
            return True  # not in the graph: nothing to compare with
        return any(self._same(n, y) for n in nodes)

    def _same(self, node: Node, y: Tensor) -> bool:
        cut = Cut((), cut_axes(self.widths.keep[node]))
        x = cut.apply(self.values[node])
        if x.shape != y.shape:
            return False
        if not x.is_floating_point():
            return torch.equal(x, y)
        scale = float(x.abs().max()) if x.numel() else 0.0
        same = (x - y).abs() <= 1e-6 * scale + 1e-30
        return bool((same | cut.apply(self._idle(node))).all())

    def _idle(self, node: Node) -> Tensor:
        """Mark what nobody needs, which may be anything."""
        facts = self.widths.facts
        known = facts.values.get(node)
        if not isinstance(known, Tensor) or known.shape != self.values[node].shape:  # other inputs, of other sizes
            return torch.zeros(self.values[node].shape, dtype=torch.bool)
        return facts.unknown[node] & ~facts.needed(node)
