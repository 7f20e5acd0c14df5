"""Capture a model as a functional graph of ATen operations.

``torch.export`` writes it; where that refuses (a branch on the value of a tensor), the recorder runs the model once and
exports the recorded run instead. ``run_decompositions({})`` makes the graph functional and leaves linear, convolution,
attention and norms whole. Every parameter and buffer is a named input of it. Structure is found on models without
gates: a gated model is traced on an ungated copy.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import TraceError, TraceWarning
from .checks import PassChecks
from .inputs import Inputs, input_names, normalize_inputs, without_cache
from .lowering import is_symbol, lower
from .origins import name_owners, recorded_owners, spot_of
from .recorder import PREFIX, Recording, UnrecordableError, record, says_at, storage_of, tensors_in
from .refusals import first_line, innermost, require_running, says_followed, untraceable
from .rewrite import OpenSteps, split_einsums
from .settings import (
    caches_kept,
    calls_shown,
    evaluating,
    forget_results,
    lstm_states,
    masks_as_given,
    quiet,
    same_random_numbers,
    unchanged,
)

PATIENCE = 10.0, 0.02
"""Seconds that a trace with open sizes may take, and how many more for each operation; else it is done without."""

Kind = Literal["parameter", "buffer", "constant", "input"]

_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.CUSTOM_OBJ: "constant",
    InputKind.USER_INPUT: "input",
}


@dataclass(frozen=True)
class Source:
    """What a placeholder of the graph stands for.

    Args:
        kind: Parameter, buffer, constant that the forward made, or input of the model.
        name: Its first qualified name; of an input, its placeholder.
        value: The tensor (or other object).
    """

    kind: Kind
    name: str
    value: Any


@dataclass(frozen=True, eq=False)
class Trace:
    """A model as a graph. Two traces are equal only if they are the same object.

    Args:
        graph_module: Functional ATen operations; placeholders are parameters, buffers, constants, then inputs. It
            returns the new values of buffers that the forward writes, then every tensor of the model's output, however
            deep it is nested there.
        sources: What each placeholder stands for.
        outputs: The nodes of the model's own output, without the buffers.
        notes: What holds for the example inputs only: where the model follows the values of tensors, one line each.
        inputs: The inputs that it was traced on.
    """

    graph_module: GraphModule
    sources: dict[Node, Source]
    outputs: tuple[Node, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Inputs = field(default_factory=lambda: Inputs((), {}))

    @property
    def nodes(self) -> list[Node]:
        """All nodes in order of execution."""
        return list(self.graph_module.graph.nodes)

    def run(self, replace: Mapping[Node, Any] | None = None) -> dict[Node, Any]:
        """Run the graph, without autograd, and return the value of every node.

        Args:
            replace: Other values for placeholders than those of the example and the model.
        """
        given = replace or {}
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "placeholder":
                    values[node] = given.get(node, self.sources[node].value)
                elif node.op == "get_attr":
                    values[node] = getattr(self.graph_module, cast(str, node.target))
                elif node.op == "call_function":
                    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    # strides may be others than a trace foresees: those of what a batch norm gives are
                    same = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
                    values[node] = cast(Any, same)(*args, **kwargs)
        return values


def capture(model: nn.Module, example_inputs: object, example_kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Trace a model without gates, in eval mode, on example inputs.

    The model is left as it was: modes, buffers, attributes, and the process's random numbers. Of a model on the meta
    device, inputs are moved there. A forward that takes ``use_cache``, or whose ``config`` holds it, is traced without
    its cache unless the inputs say otherwise.

    Args:
        model: The model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.

    Returns:
        The `Trace`. Where the model branches on values or reads numbers off tensors, it holds for the example inputs,
        its ``notes`` say where, and a `TraceWarning` is given.

    Raises:
        TraceError: If the inputs are missing or do not fit the model, or its forward is not made of torch operations.
    """
    inputs = normalize_inputs(example_inputs, example_kwargs)
    if lazy := [n for n, t in all_tensors(model) if is_lazy(t)]:
        raise TraceError(
            f"{type(model).__name__} has no shapes yet: {', '.join(lazy)}.",
            expected="a model whose parameters all exist",
            mend="run the model once before: model(*example_inputs)",
        )
    if any(p.is_meta for p in model.parameters()):
        inputs = inputs.map(_to_meta)
    with _settings(model, inputs) as extra:
        call = _Forward(model, extra)
        try:
            trace, refused = trace_of(model, inputs, _export(model, call, inputs)), None
        except Exception as e:
            trace, refused = None, e
        if trace is None:
            trace = _recorded(model, call, inputs, cast(Exception, refused))
        if call.checks.passed:
            call.checks.off = True
            require_running(model, call, inputs)
    if trace.notes:
        warnings.warn(TraceWarning(says_followed(model, trace.notes)), stacklevel=3)
    return trace


@contextlib.contextmanager
def _settings(model: nn.Module, inputs: Inputs) -> Generator[dict[str, Any]]:
    """Set a model and the process up for a trace; yield what the forward takes beside its inputs."""
    with (
        evaluating(model),
        without_cache(model, inputs) as extra,
        torch.no_grad(),
        calls_shown(model),
        caches_kept(model),
        quiet(),
        masks_as_given(),
        lstm_states(),
    ):
        yield extra


class _Forward(nn.Module):
    """A model whose output is the list of all tensors in the user's own output, whatever holds them there."""

    def __init__(self, model: nn.Module, extra: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._extra = model, extra
        self.training = model.training
        self.checks, self.spaced = PassChecks(), OpenSteps()

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        with _ViewsThatFit(), self.spaced, self.checks:  # which look at the line that asks
            return list(tensors_in(self.model(*args, **kwargs, **self._extra), set()))


class _ViewsThatFit(TorchFunctionMode):
    """Takes views that a model takes of tensors whose strides a trace foresees otherwise: those of batch norms are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except ValueError:
            if func is not Tensor.view:
                raise
            return args[0].reshape(*args[1:])


def _export(model: nn.Module, call: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Export, and require that no shape depends on the values of tensors."""
    with unchanged(model), same_random_numbers(model):
        forget_results(model)
        exported = lower(torch.export.export(call, inputs.args, inputs.kwargs, strict=False))
    for node in exported.graph.nodes:
        if any(_is_symbolic(x) for x in pytree.tree_leaves(node.meta.get("val"))):
            raise UnrecordableError(spot_of(node), "a shape depends on the values of a tensor")
    name_owners(exported.graph, model)
    if not exported.graph_signature.user_outputs:
        raise UnrecordableError(None, "its output holds no tensor")
    return exported


@contextlib.contextmanager
def export_open(
    model: nn.Module, inputs: Inputs, axes: Collection[tuple[int, int]] | None = None, *, as_given: bool = False
) -> Generator[tuple[torch.export.ExportedProgram, Inputs]]:
    """Export with every size of the inputs left open that the model leaves open, inside the settings of a capture.

    Args:
        model: The model.
        inputs: Its inputs.
        axes: The axes whose sizes are left open, as `Inputs.sizes` names them; ``None`` for all.
        as_given: Whether a tensor that is given several times (attention of ``x, x, x``) is one for the forward too.

    Raises:
        TimeoutError: If that takes longer than ``PATIENCE``: sizes of windows that are padded and cut again and again
            grow into formulas over which torch ponders for many minutes.
    """
    positions = iter(range(len(inputs.leaves())))

    def left_open(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        i = next(positions)
        return {axis: torch.export.Dim.AUTO for axis in range(x.dim()) if axes is None or (i, axis) in axes}

    marked = inputs.map(Tensor.detach)  # torch notes on the tensors themselves which of their sizes are open
    given = (*marked.args, *marked.kwargs.values())
    sizes = {"args": pytree.tree_map(left_open, given)}
    with _settings(model, inputs) as extra:
        call = _Positional(model, extra, list(inputs.kwargs), _first_places(inputs.leaves()) if as_given else None)
        with unchanged(model), same_random_numbers(model):
            forget_results(model)
            exported = torch.export.export(call, given, dynamic_shapes=sizes, strict=False)
            lowered = lower(exported)
            call.spaced.restore(lowered.graph)
            name_owners(lowered.graph, model)
            yield lowered, inputs


class _Positional(_Forward):
    """A model that takes its keyword inputs as the last positional ones, whose sizes can be left open."""

    def __init__(
        self, model: nn.Module, extra: dict[str, Any], names: list[str], places: list[int] | None = None
    ) -> None:
        super().__init__(model, extra)
        self._names, self._places = names, places

    def forward(self, *args: Any) -> list[Tensor]:
        if self._places is not None:
            leaves, form = pytree.tree_flatten(args)
            args = pytree.tree_unflatten([leaves[i] for i in self._places], form)
        count = len(args) - len(self._names)
        with _Deadline(*PATIENCE):
            return super().forward(*args[:count], **dict(zip(self._names, args[count:], strict=True)))


def _first_places(leaves: list[Any]) -> list[int]:
    """Return, per leaf, where the same tensor stands first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(x), i) if isinstance(x, Tensor) else i for i, x in enumerate(leaves)]


class _Deadline(TorchFunctionMode):
    """Ends a forward that takes too long for its number of operations."""

    def __init__(self, seconds: float, each: float) -> None:
        super().__init__()
        self._end, self._each = time.monotonic() + seconds, each

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError
        self._end += self._each
        return func(*args, **(kwargs or {}))


def _is_symbolic(value: Any) -> bool:
    sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else [value]
    return any(is_symbol(n) for n in sizes)


def trace_of(
    model: nn.Module, inputs: Inputs, exported: torch.export.ExportedProgram, notes: tuple[str, ...] = ()
) -> Trace:
    """Name every placeholder of an exported graph as the user does."""
    sources: dict[Node, Source] = {}
    leaves = iter(zip(input_names(model, inputs), inputs.leaves(), strict=True))
    first: dict[int, str] = {}
    alias = {n: first.setdefault(id(t), n) for n, t in all_tensors(model)}
    owners = {_geometry(p): (n, p) for n, p in model.named_parameters()}
    storages = {storage_of(p): n for n, p in model.named_parameters()}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        kind = _KINDS[spec.kind]
        if kind == "input":
            name, value = next(leaves)
        else:
            target = cast(str, spec.target)
            name, value = target.removeprefix(PREFIX), _lookup(exported, target)
            name = alias.get(name, name)
        if kind == "constant" and isinstance(value, Tensor) and _geometry(value) in owners:
            kind, (name, value) = "parameter", owners[_geometry(value)]
        elif kind == "constant" and isinstance(value, Tensor) and storage_of(value) in storages:
            raise UnrecordableError(None, f"{name} is a view of {storages[storage_of(value)]}, made outside of forward")
        sources[node] = Source(kind, name, value)
    split_einsums(exported.graph_module)
    [results] = [n.args[0] for n in exported.graph.nodes if n.op == "output"]
    kinds = [s.kind for s in exported.graph_signature.output_specs]
    own = [n for n, kind in zip(results, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
    return Trace(exported.graph_module, sources, tuple(own), notes, inputs)


def _recorded(model: nn.Module, call: _Forward, inputs: Inputs, refused: Exception) -> Trace:
    """Trace one recorded run, after ``torch.export`` refused."""
    if isinstance(model, torch.jit.ScriptModule):
        raise untraceable(model, None, "a ScriptModule does not show its operations") from refused
    recording, exported, failed = _record(model, call, inputs)
    if isinstance(failed, UnrecordableError):
        raise untraceable(model, failed.spot, str(failed)) from refused
    if recording is None or exported is None:
        require_running(model, call, inputs)
        raise untraceable(model, innermost(failed) or innermost(refused), first_line(failed or refused)) from refused
    notes = (*recording.notes, *(says_at(s, "takes values out of torch") for s in recording.outside))
    trace = trace_of(model, inputs, exported, notes)
    if not _repeats(trace, model, call, inputs, recording):
        if recording.outside:
            reason = "values leave torch here, and what becomes of them outside cannot be followed"
            raise untraceable(model, recording.outside[0], reason) from refused
        raise untraceable(model, innermost(refused), first_line(refused)) from refused
    return trace


def _record(
    model: nn.Module, call: _Forward, inputs: Inputs
) -> tuple[Recording | None, torch.export.ExportedProgram | None, Exception | None]:
    """Record a run and export it; return the error instead of raising it, so that it chains to none."""
    try:
        with unchanged(model, buffers=True), same_random_numbers(model):
            forget_results(model)
            given = inputs.map(Tensor.clone)
            recording = record(model, call, given.args, given.kwargs)
        exported = _export(model, recording.replay, inputs)
        recorded_owners(exported.graph)
        return recording, exported, None
    except Exception as e:
        return None, None, e


def _repeats(trace: Trace, model: nn.Module, call: _Forward, inputs: Inputs, recording: Recording) -> bool:
    """Tell whether a recorded run gives what the model gives, on the example and near it."""
    if any(x.is_meta for x in recording.outputs):
        return not recording.outside
    placeholders = [n for n, s in trace.sources.items() if s.kind == "input"]

    def run(given: Inputs) -> list[Tensor]:
        with unchanged(model, buffers=True), same_random_numbers(model):
            values = trace.run(dict(zip(placeholders, given.leaves(), strict=True)))
            return [values[n] for n in trace.outputs]

    if not _close(run(inputs), recording.outputs):
        return False
    if recording.notes:  # near the example the model may take another path, and one that never ends
        return not recording.outside
    with same_random_numbers(model):
        near = inputs.map(_near)
        kept = [(p, p.detach().clone()) for p in model.parameters()]
        try:
            for p, value in kept:
                p.data.copy_(_near(value))
            try:
                with unchanged(model, buffers=True), same_random_numbers(model):
                    expected = near.call(call)
                same = _close(run(near), expected)
            except Exception:  # what came from outside does not fit any more
                same = False
        finally:
            for p, value in kept:
                p.data.copy_(value)
    return same


def _near(x: Tensor) -> Tensor:
    """Return a tensor a few percent away."""
    if not x.is_floating_point() or not x.numel():
        return x
    return x + 0.05 * x.abs().mean() * torch.randn_like(x)


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(_near_enough(x, y) for x, y in zip(a, b, strict=True))


def _near_enough(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    tol = 0.05 if torch.finfo(x.dtype).bits <= 16 else 1e-4
    scale = float(y[y.isfinite()].abs().max()) if bool(y.isfinite().any()) else 1.0
    return torch.allclose(x, y, rtol=tol, atol=tol * scale, equal_nan=True)


def _to_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def _geometry(x: Tensor) -> tuple[Any, ...]:
    """Return what two tensors share only if they are the same piece of memory, seen in the same way."""
    strided = (x.storage_offset(), x.stride()) if x.layout is torch.strided else None
    return storage_of(x), strided, x.shape, x.dtype


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under all of their names, a tied one several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _lookup(exported: torch.export.ExportedProgram, name: str) -> Any:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
