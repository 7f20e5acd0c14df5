"""Capture a model as a functional graph of ATen operations.

``torch.export`` writes it; where that refuses (a branch on the value of a tensor), the recorder runs the model once and
exports the recorded run instead. ``run_decompositions({})`` makes the graph functional and leaves linear, convolution,
attention and norms whole. Every parameter and buffer is a named input of it. Structure is found on models without
gates: a gated model is traced on an ungated copy.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.nn.modules import transformer
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import TraceError, TraceWarning
from .lowering import is_symbol, lower
from .recorder import (
    FOLLOWED,
    PREFIX,
    Recording,
    Spot,
    UnrecordableError,
    is_foreign,
    quiet,
    record,
    same_random_numbers,
    show,
    spots_of_error,
    storage_of,
    tensors_in,
    unchanged,
)
from .rewrite import split_einsums

PATIENCE = 100.0
"""Seconds that a trace with open sizes may take; it is done without if it takes longer."""

Kind = Literal["parameter", "buffer", "constant", "input"]

_KINDS: dict[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.CUSTOM_OBJ: "constant",
    InputKind.USER_INPUT: "input",
}


@dataclass(frozen=True)
class Inputs:
    """Example inputs, as positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> list[Any]:
        """Return every leaf, tensors and others, in the order of the graph's placeholders."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def map(self, fn: Any) -> Inputs:
        """Return the inputs with ``fn`` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, fn, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def call(self, model: nn.Module, **extra: Any) -> Any:
        """Call a model that may write into its inputs, and into its attributes; neither stays."""
        given = self.map(Tensor.clone)
        with unchanged(model):
            return model(*given.args, **given.kwargs, **extra)


def normalize_inputs(example_inputs: object, example_kwargs: Mapping[str, Any] | None = None) -> Inputs:
    """Return example inputs as positional and keyword arguments.

    Args:
        example_inputs: A tensor, a tuple or list of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.

    Raises:
        TraceError: If there are none, or they are of another type.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), kwargs)
    if isinstance(example_inputs, tuple | list):
        return Inputs(tuple(cast("tuple[Any, ...]", example_inputs)), kwargs)
    if isinstance(example_inputs, Mapping):
        return Inputs((), {**cast("Mapping[str, Any]", example_inputs), **kwargs})
    if example_inputs is None and kwargs:
        return Inputs((), kwargs)
    raise TraceError(
        "example inputs are needed here and were not given."
        if example_inputs is None
        else f"example_inputs is a {type(example_inputs).__name__}.",
        expected="a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        mend="example_inputs=torch.randn(2, 3, 32, 32), as the model's forward takes it",
    )


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


def operation(node: Node) -> str:
    """Return the name of a node's operation without its overload, such as ``aten.conv2d``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


def owners(node: Node) -> dict[str, str]:
    """Return the modules in whose forward a node was made, the outermost first: their paths, by call."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    inside = {call: path for call, (path, _) in stack.items() if f"{path}.".startswith(PREFIX)}
    return {call: path.removeprefix(PREFIX[:-1]).removeprefix(".") for call, path in inside.items()}


def owner(node: Node) -> str | None:
    """Return the path of the module whose own forward made a node, or ``None`` if that is not known."""
    return next(reversed(owners(node).values()), None)


def where(node: Node) -> str:
    """Return the source line that made a node, such as ``model.py:12 in forward``, or the node's name."""
    spot = _spot_of(node)
    return f"node {node.name}" if spot is None else show(spot)


def _spot_of(node: Node) -> Spot | None:
    """Return the innermost line of the user's code that made a node, else that of torch."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    spots: list[Spot] = [(path, int(line), function) for path, line, function in found]
    theirs = [s for s in spots if is_foreign(s[0])]
    return (theirs or spots or [None])[-1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[nn.Module]:
    """Put a model into eval mode, and every module back into its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


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
    with evaluating(model), without_cache(model, inputs) as extra, torch.no_grad(), quiet(), masks_as_given():
        call = _Forward(model, extra)
        try:
            trace, refused = trace_of(model, inputs, _export(model, call, inputs)), None
        except Exception as e:
            trace, refused = None, e
        if trace is None:
            trace = _recorded(model, call, inputs, cast(Exception, refused))
    if trace.notes:
        warnings.warn(TraceWarning(_says(model, trace.notes)), stacklevel=3)
    return trace


class _Forward(nn.Module):
    """A model whose output is the list of all tensors in the user's own output, whatever holds them there."""

    def __init__(self, model: nn.Module, extra: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._extra = model, extra
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return list(tensors_in(self.model(*args, **kwargs, **self._extra), set()))


def _export(model: nn.Module, call: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Export, and require that no shape depends on the values of tensors."""
    with unchanged(model), same_random_numbers(model):
        exported = lower(torch.export.export(call, inputs.args, inputs.kwargs, strict=False))
    for node in exported.graph.nodes:
        if any(_is_symbolic(x) for x in pytree.tree_leaves(node.meta.get("val"))):
            raise UnrecordableError(_spot_of(node), "a shape depends on the values of a tensor")
    if not exported.graph_signature.user_outputs:
        raise UnrecordableError(None, "its output holds no tensor")
    return exported


@contextlib.contextmanager
def export_open(model: nn.Module, inputs: Inputs) -> Generator[tuple[torch.export.ExportedProgram, Inputs]]:
    """Export with every size of the inputs left open that the model leaves open, inside the settings of a capture.

    Raises:
        TimeoutError: If that takes longer than ``PATIENCE``: sizes of windows that are padded and cut again and again
            grow into formulas over which torch ponders for many minutes.
    """

    def left_open(x: Any) -> Any:
        return dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None

    marked = inputs.map(Tensor.detach)  # torch notes on the tensors themselves which of their sizes are open
    given = (*marked.args, *marked.kwargs.values())
    sizes = {"args": pytree.tree_map(left_open, given)}
    with evaluating(model), without_cache(model, inputs) as extra, torch.no_grad(), quiet(), masks_as_given():
        call = _Positional(model, extra, list(inputs.kwargs))
        with unchanged(model), same_random_numbers(model):
            exported = torch.export.export(call, given, dynamic_shapes=sizes, strict=False)
            exported._guards_code = []  # conditions on sizes, which a second trace would take minutes to write down
            yield lower(exported), inputs


class _Positional(_Forward):
    """A model that takes its keyword inputs as the last positional ones, whose sizes can be left open."""

    def __init__(self, model: nn.Module, extra: dict[str, Any], names: list[str]) -> None:
        super().__init__(model, extra)
        self._names = names

    def forward(self, *args: Any) -> list[Tensor]:
        count = len(args) - len(self._names)
        with _Deadline(PATIENCE):
            return super().forward(*args[:count], **dict(zip(self._names, args[count:], strict=True)))


class _Deadline(TorchFunctionMode):
    """Ends a forward that takes too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError
        return func(*args, **(kwargs or {}))


def _is_symbolic(value: Any) -> bool:
    sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else [value]
    return any(is_symbol(n) for n in sizes)


def trace_of(
    model: nn.Module, inputs: Inputs, exported: torch.export.ExportedProgram, notes: tuple[str, ...] = ()
) -> Trace:
    """Name every placeholder of an exported graph as the user does."""
    sources: dict[Node, Source] = {}
    leaves = iter(zip(_input_names(model, inputs), inputs.leaves(), strict=True))
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
        raise _untraceable(model, None, "a ScriptModule does not show its operations") from refused
    recording, exported, failed = _record(model, call, inputs)
    if isinstance(failed, UnrecordableError):
        raise _untraceable(model, failed.spot, str(failed)) from refused
    if recording is None or exported is None:
        _require_running(model, call, inputs)
        raise _untraceable(model, _innermost(failed) or _innermost(refused), _of(failed or refused)) from refused
    notes = (*recording.notes, *(f"{show(s)}: takes values out of torch; {FOLLOWED}" for s in recording.outside))
    trace = trace_of(model, inputs, exported, notes)
    if not _repeats(trace, model, call, inputs, recording):
        if recording.outside:
            reason = "values leave torch here, and what becomes of them outside cannot be followed"
            raise _untraceable(model, recording.outside[0], reason) from refused
        raise _untraceable(model, _innermost(refused), _of(refused)) from refused
    return trace


def _record(
    model: nn.Module, call: _Forward, inputs: Inputs
) -> tuple[Recording | None, torch.export.ExportedProgram | None, Exception | None]:
    """Record a run and export it; return the error instead of raising it, so that it chains to none."""
    try:
        with unchanged(model, buffers=True), same_random_numbers(model):
            given = inputs.map(Tensor.clone)
            recording = record(model, call, given.args, given.kwargs)
        return recording, _export(model, recording.replay, inputs), None
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


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Name every leaf of the inputs as the model's forward does, such as ``x`` or ``batch['mask']``."""
    parameters = _signature(model)
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [(positional[i] if i < len(positional) else f"args_{i}", x) for i, x in enumerate(inputs.args)]
    named += inputs.kwargs.items()
    return [n + pytree.keystr(path) for n, x in named for path, _ in pytree.tree_flatten_with_path(x)[0]]


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


@contextlib.contextmanager
def without_cache(model: nn.Module, inputs: Inputs) -> Generator[dict[str, Any]]:
    """Turn off key/value caches unless the inputs ask for them; yield what the forward takes beside its inputs."""
    names = list(_signature(model))
    if "use_cache" in inputs.kwargs or "use_cache" in names[: len(inputs.args)]:
        yield {}
        return
    configs: dict[int, Any] = {id(x): x for m in model.modules() if (x := getattr(m, "config", None)) is not None}
    found = [x for x in configs.values() if getattr(x, "use_cache", None) is True]
    for config in found:
        config.use_cache = False
    try:
        yield {"use_cache": False} if "use_cache" in names else {}
    finally:
        for config in found:
            config.use_cache = True


@contextlib.contextmanager
def masks_as_given() -> Generator[None]:
    """Let nn.Transformer and its parts take masks as they are, and not look whether they are causal: no trace can."""
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks


def _require_running(model: nn.Module, call: nn.Module, inputs: Inputs) -> None:
    """Require that the model runs on the example inputs."""
    try:
        with unchanged(model, buffers=True), same_random_numbers(model):
            inputs.call(call)
    except Exception as e:
        if any(isinstance(x, Tensor) and x.is_meta for x in inputs.leaves()) and "meta" in str(e):
            return  # it runs, but not without values
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs.leaves()]
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs, of shapes {shapes}: {_of(e)}",
            expected="inputs on which model(*example_inputs) runs",
            mend="pass what your training loop passes: example_inputs=next(iter(loader))[0]",
        ) from e


def _untraceable(model: nn.Module, spot: Spot | None, reason: str) -> TraceError:
    code = getattr(model.forward, "__code__", None)
    if spot is None and code is not None and is_foreign(code.co_filename):
        spot = code.co_filename, code.co_firstlineno, code.co_name
    return TraceError(
        f"{type(model).__name__} cannot be traced: {show(spot)}: {reason}",
        expected="a forward made of torch operations. Without a trace, the groupings "
        '"weights", "neurons", "filters", "kernels" and "in_channels" work, and so does dg.Select',
        mend=f"move that line out of forward, or {_gate_a_child(model)}",
    )


def _says(model: nn.Module, notes: tuple[str, ...]) -> str:
    return (
        f"{type(model).__name__} was traced for the example inputs only:\n  " + "\n  ".join(notes) + "\n"
        "Expected: a forward that does the same whatever values its tensors hold.\n"
        f"Mend: make sure that all inputs take this path, or {_gate_a_child(model)}"
    )


def _gate_a_child(model: nn.Module) -> str:
    """Say how to gate the largest child of a model instead of the whole."""
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if not any(sizes.values()):
        return "gate a submodule that has no such line"
    name = max(sizes, key=lambda n: sizes[n])
    child = f"model.{name}" if name.isidentifier() else f'model.get_submodule("{name}")'
    return f'gate a submodule: dg.gate({child}, "channels", example_inputs=...)'


def _innermost(error: BaseException | None) -> Spot | None:
    """Return the innermost line of the user's code that an error, or one that caused it, passed through."""
    seen: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in seen:
        if spots := spots_of_error(step):
            return spots[-1]
        seen.append(step)
        step = step.__cause__ or step.__context__
    return None


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under all of their names, a tied one several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _lookup(exported: torch.export.ExportedProgram, name: str) -> Any:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]


def _of(error: Exception) -> str:
    """Return the type and the first line of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line}"
