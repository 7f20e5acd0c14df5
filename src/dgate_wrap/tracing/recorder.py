"""Record one real run of a model, where ``torch.export`` refuses it.

A record is a straight line of ATen operations. The run happens below autograd, so that linear, convolution, attention
and norms arrive whole. Branches are followed as the example takes them, numbers read off tensors become literals, and
each such spot of the source is noted. The record may still write in place: `Replay` is a module that repeats it, which
``torch.export`` then makes functional.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import linecache
import operator
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .parts import is_masked_number

aten = torch.ops.aten

Spot: TypeAlias = tuple[str, int, str]
"""A line of source: file, line number, function."""

PREFIX = "model."
"""How the module that runs the user's model calls it."""

FOLLOWED = "followed as the example inputs take it"

MOST = 30_000
"""Operations of the longest run that is recorded."""

_BRANCHES = {aten.is_nonzero, aten.equal, aten.allclose}
_NUMBER = "reads a number off a tensor"
_NUMBERS = {aten.item, aten._local_scalar_dense}
_OUTSIDE = {
    *("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"),
    *("apply_", "map_", "map2_", "__reduce_ex__", "__deepcopy__"),
}
"""Methods of tensors after which Python works on their memory, unseen by torch."""
SAME = {aten.lift_fresh.default, aten.detach_.default, aten.lift.default}
"""Operations that return their operand."""


class UnrecordableError(Exception):
    """A run cannot be written down as operations of torch: says where, and why."""

    def __init__(self, spot: Spot | None, reason: str) -> None:
        self.spot = spot
        super().__init__(reason)


@dataclass(frozen=True)
class Recording:
    """One run of a module.

    Args:
        replay: A module that repeats it on other values.
        outputs: What the run returned.
        notes: Where the run followed the values of tensors, one line each.
        outside: Where tensors left torch, to numpy or a pointer; what came back is a constant of the recording.
    """

    replay: nn.Module
    outputs: list[Tensor]
    notes: tuple[str, ...]
    outside: tuple[Spot, ...]


_NOT_THEIRS = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(__file__).parent) + os.sep,
    "<eval_with_key",
    "<string>",
    "<frozen",
)


def is_foreign(path: str) -> bool:
    """Tell whether a source file is neither torch's nor the tracer's own."""
    return not path.startswith(_NOT_THEIRS)


def _is_module(path: str) -> bool:
    return path.startswith(str(Path(nn.__file__).parent / "modules"))


def spots_of_error(error: BaseException) -> list[Spot]:
    """Return the source lines that an error passed through, outermost first, without torch's and the tracer's own."""
    spots: list[Spot] = []
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if is_foreign(step.tb_frame.f_code.co_filename):
            spots.append((step.tb_frame.f_code.co_filename, step.tb_lineno, step.tb_frame.f_code.co_name))
        step = step.tb_next
    return spots


def _frames(until: CodeType, wanted: Callable[[str], bool] = is_foreign) -> Iterator[Spot]:
    """Yield the source lines that are being executed, innermost first, up to a function of the tracer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        if wanted(frame.f_code.co_filename):
            yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def says_at(spot: Spot | None, what: str) -> str:
    """Say where a trace follows the example inputs."""
    return f"{show(spot)}: {what}; {FOLLOWED}"


def says_read(spot: Spot | None) -> str:
    """Say where a trace takes a number of the example inputs for a constant."""
    return says_at(spot, _NUMBER)


def show(spot: Spot | None) -> str:
    """Return a source line as ``model.py:12 in forward``."""
    if spot is None:
        return "its forward"
    path, line, function = spot
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line} in {function}"


def tensors_in(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield every tensor in an output: in containers, dataclasses and other plain objects."""
    if isinstance(output, Tensor):
        yield output
        return
    if (
        isinstance(output, str | bytes | int | float | complex | type | nn.Module)
        or output is None
        or id(output) in seen
    ):
        return
    seen.add(id(output))
    if isinstance(output, Mapping):
        parts = list(cast("Mapping[Any, Any]", output).values())
    elif isinstance(output, list | tuple | set | frozenset):
        parts = list(cast("list[Any]", output))
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, f.name) for f in dataclasses.fields(output)]
    else:
        leaves = pytree.tree_leaves(output)
        parts = list(getattr(output, "__dict__", {}).values()) if len(leaves) == 1 and leaves[0] is output else leaves
    for part in parts:
        yield from tensors_in(part, seen)


class _Leaving(TorchFunctionMode):
    """Watch for methods that hand a tensor's values to Python without any operation."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and (name == "tolist" or name in _OUTSIDE):
            with torch._C.DisableTorchFunction():
                if name == "tolist":
                    self.recorder.read(args[0], _NUMBER)
                else:
                    self.recorder.leave(args[0])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Write every operation into a graph, on its way to being executed.

    Args:
        attributes: Parameters and buffers by the name under which the replay finds them.
        inputs: Every leaf of the inputs.
    """

    def __init__(self, attributes: dict[str, Tensor], inputs: list[Any]) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self.notes: dict[str, None] = {}
        self.outside: dict[Spot, None] = {}
        self._nodes: Any = WeakTensorKeyDictionary()
        self._owners: dict[int, tuple[str, Tensor, Node]] = {}
        """The parameter or buffer in a storage."""
        self._varies: dict[int, bool] = {}
        """Whether what lies in a storage depends on inputs or parameters."""
        self.within: list[tuple[str, int]] = []
        """The modules whose forward runs, the outermost first, and the numbers of their calls."""
        for i, value in enumerate(inputs):
            node = self.graph.placeholder(f"input_{i}")
            if isinstance(value, Tensor):
                self._nodes[value] = node
                self._varies[storage_of(value)] = True
        for name, value in attributes.items():
            node = self.graph.create_node("get_attr", name)
            self._nodes[value] = node
            self._owners[storage_of(value)] = name, value, node
            self._varies[storage_of(value)] = isinstance(value, nn.Parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            static = _STATIC.get(func)
            if static is not None:
                with self:
                    result = static(self, func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return self._record(func, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        packet = getattr(func, "overloadpacket", None)
        if not isinstance(func, torch._ops.OpOverload):
            raise UnrecordableError(self._spot(), f"{func} is not an operation on tensors alone")
        varies = any(self._varies.get(storage_of(x), False) for x in operands)
        if packet in _BRANCHES or packet in _NUMBERS:
            for x in operands:
                self.read(x, "branches on the value of a tensor" if packet in _BRANCHES else _NUMBER)
            return func(*args, **kwargs)
        if func in SAME:
            node = self._node(args[0])
            self._nodes[result := func(*args, **kwargs)] = node
            return result
        self._refuse_writing_parameters(func, args, kwargs)
        nodes = pytree.tree_map_only(Tensor, self._node, (args, kwargs))
        before = {storage_of(x) for x in operands}
        result = func(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if tensors or func._schema.is_mutable:
            node = self.graph.call_function(func, *nodes)
            node.meta["stack_trace"] = self._stack_trace()
            self._assign(node, result)
            if len(self.graph.nodes) > MOST:
                raise UnrecordableError(
                    self._spot(), f"it runs more than {MOST} operations, as a loop without end does"
                )
            for key in {*(before if func._schema.is_mutable else ()), *map(storage_of, tensors)}:
                self._varies[key] = varies or (key in before and self._varies.get(key, False))
        return result

    def _assign(self, node: Node, result: Any) -> None:
        """Let tensors stand for nodes from here on; what was written in place keeps its own."""
        if isinstance(result, Tensor):
            if result not in self._nodes:
                self._nodes[result] = node
        elif isinstance(result, tuple | list):
            for i, x in enumerate(cast("list[Any]", result)):
                if isinstance(x, Tensor) and x not in self._nodes:
                    pick = self.graph.call_function(operator.getitem, (node, i))
                    pick.meta.update(node.meta)
                    self._nodes[x] = pick

    def _node(self, x: Tensor) -> Node:
        """Return the node of a tensor; one that was made outside of the run is a view of a parameter, or a constant."""
        if x not in self._nodes:
            _, owner, node = self._owners.get(storage_of(x), (None, None, None))
            if owner is not None and owner.dtype == x.dtype:
                geometry = list(x.shape), list(x.stride()), x.storage_offset()
                made = self.graph.call_function(aten.as_strided.default, (node, *geometry))
                made.meta["stack_trace"] = self._stack_trace()
            else:
                name = f"constant_{len(self.constants)}"
                self.constants[name] = x.detach().clone()
                made = self.graph.create_node("get_attr", name)
            self._nodes[x] = made
        return self._nodes[x]

    def finish(self, outputs: list[Tensor]) -> None:
        """Write down what the run returned."""
        self.graph.output([self._node(x) for x in outputs])

    def read(self, x: Tensor, what: str) -> None:
        """Note a spot that depends on the values of a tensor, if these depend on inputs or parameters."""
        if self._varies.get(storage_of(x), False):
            self.notes[says_at(self._spot(), what)] = None

    def leave(self, x: Tensor) -> None:
        """Note a spot where the memory of a tensor leaves torch."""
        spot = self._spot()
        if spot is not None and self._varies.get(storage_of(x), False):
            self.outside[spot] = None

    def _refuse_writing_parameters(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in written_by(func, args, kwargs):
            name, owner, _ = self._owners.get(storage_of(x), (None, None, None))
            if isinstance(owner, nn.Parameter):
                reason = f"it writes into the parameter {str(name).removeprefix(PREFIX)!r}"
                raise UnrecordableError(self._spot(), reason)

    def _spot(self) -> Spot | None:
        return next(_frames(record.__code__), None)

    def _stack_trace(self) -> str:
        """Return the lines that run, as Python shows them, and the modules; this outlasts a trace of the replay."""
        frames = list(_frames(record.__code__)) or list(_frames(record.__code__, _is_module))
        lines = [f'  File "{f}", line {n}, in {c}\n    {linecache.getline(f, n).strip()}\n' for f, n, c in frames[::-1]]
        return "".join([*(f'  Module "{path}", call {i}\n' for path, i in self.within), *lines])


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors into which an operation writes."""
    if not func._schema.is_mutable:
        return []
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in written]
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int:
    """Return what tells the memory of a living tensor from any other."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(x)


# Operations whose shapes depend on values, as operations whose shapes are those of the example.


def _size(recorder: _Recorder, x: Tensor, measure: Callable[[Tensor], Tensor]) -> int:
    """Return a size that depends on the values of a tensor, and note that it does."""
    recorder.read(x, "gives a shape that depends on the values of a tensor")
    with _disable_current_modes():
        return int(measure(x))


def _nonzero(recorder: _Recorder, func: Any, x: Tensor) -> Tensor:
    return aten.nonzero_static.default(x, size=_size(recorder, x, torch.count_nonzero))


def _nonzero_tuple(recorder: _Recorder, func: Any, x: Tensor) -> list[Tensor]:
    return list(_nonzero(recorder, func, x.unsqueeze(0) if x.dim() == 0 else x).unbind(1))


def _masked_select(recorder: _Recorder, func: Any, x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    places: list[Any] = list(_nonzero_tuple(recorder, func, mask))
    return aten.index.Tensor(x, places)


def _index(recorder: _Recorder, func: Any, x: Tensor, indices: list[Tensor | None], *rest: Any, **options: Any) -> Any:
    if not any(i is not None and i.dtype in _MASKS for i in indices):
        return NotImplemented
    if rest and is_masked_number(indices, rest[0]):
        return NotImplemented
    places: list[Tensor | None] = []
    for i in indices:
        places += _nonzero_tuple(recorder, func, i) if i is not None and i.dtype in _MASKS else [i]
    return func(x, places, *rest, **options)


_MASKS = (torch.bool, torch.uint8)


def _repeat_interleave(recorder: _Recorder, func: Any, repeats: Tensor, *, output_size: int | None = None) -> Any:
    if output_size is not None:
        return NotImplemented
    return func(repeats, output_size=_size(recorder, repeats, torch.sum))


def _bincount(recorder: _Recorder, func: Any, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    size = max(_size(recorder, x, lambda x: x.max() + 1 if x.numel() else x.sum()), minlength)
    ones = torch.ones_like(x) if weights is None else weights
    return torch.zeros(size, dtype=ones.dtype, device=x.device).scatter_add(0, x.long(), ones)


def _runs(recorder: _Recorder, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value of every run of equal numbers, the run that each number is in, and how long every run is."""
    new = torch.cat([torch.ones_like(flat[:1], dtype=torch.bool), flat[1:] != flat[:-1]])
    first = _nonzero(recorder, None, new).squeeze(1)
    which = new.cumsum(0) - 1
    return flat[first], which, torch.zeros_like(first).scatter_add(0, which, torch.ones_like(which))


def _unique(
    recorder: _Recorder, func: Any, x: Tensor, in_order: bool = True, inverse: bool = False, counts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    flat, order = x.flatten().sort()
    values, which, count = _runs(recorder, flat)
    return values, torch.zeros_like(which).scatter(0, order, which).view(x.shape), count


def _unique_runs(
    recorder: _Recorder, func: Any, x: Tensor, inverse: bool = False, counts: bool = False, dim: int | None = None
) -> Any:
    if dim is not None and x.dim() > 1:
        return NotImplemented
    values, which, count = _runs(recorder, x.flatten())
    return values, which.view(x.shape), count


def _conjugate(counts: list[int]) -> list[int]:
    """Return how many sequences have each step, of their lengths, the longest first; or these lengths of that."""
    return [sum(n > i for n in counts) for i in range(counts[0])]


def _packed_rows(batch_sizes: list[int]) -> list[list[int]]:
    """Return the row of every step of every packed sequence: first steps of all come first, then second ones."""
    starts = [0, *itertools.accumulate(batch_sizes)]
    return [[starts[t] + i for t in range(n)] for i, n in enumerate(_conjugate(batch_sizes))]


def _listed(recorder: _Recorder, x: Tensor) -> list[int]:
    """Return whole numbers on which shapes depend, and note that they do."""
    recorder.read(x, "gives a shape that depends on the values of a tensor")
    with _disable_current_modes():
        return cast("list[int]", x.tolist())


def _constant(values: Any, device: torch.device) -> Tensor:
    with _disable_current_modes():
        return torch.tensor(values, dtype=torch.long, device=device)


def _pack(recorder: _Recorder, func: Any, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    sizes = _conjugate(_listed(recorder, lengths))
    x = x.transpose(0, 1) if batch_first else x
    rows = [t * x.shape[1] + i for t, n in enumerate(sizes) for i in range(n)]
    return x.flatten(0, 1).index_select(0, _constant(rows, x.device)), _constant(sizes, torch.device("cpu"))


def _pad(
    recorder: _Recorder, func: Any, data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total: int
) -> tuple[Tensor, Tensor]:
    rows = _packed_rows(_listed(recorder, batch_sizes))
    steps = max(total, len(rows[0]))
    places = [[own[t] if t < len(own) else 0 for own in rows] for t in range(steps)]
    beyond = _constant([[t >= len(own) for own in rows] for t in range(steps)], data.device)
    padded = data.index_select(0, _constant(places, data.device).flatten()).unflatten(0, (steps, len(rows)))
    with _disable_current_modes():
        mask = beyond.bool().view(*beyond.shape, *[1] * (data.dim() - 1))
    padded = padded.masked_fill(mask, value)
    lengths = _constant([len(own) for own in rows], torch.device("cpu"))
    return padded.transpose(0, 1) if batch_first else padded, lengths


def _packed_recurrence(
    recorder: _Recorder, func: Any, data: Tensor, batch_sizes: Tensor, hx: Any, *rest: Any
) -> tuple[Tensor, ...]:
    """Run the sequences of each length by themselves: as what is not packed, which has rules."""
    rows = _packed_rows(_listed(recorder, batch_sizes))
    given: list[int] = []
    results: list[tuple[Tensor, ...]] = []
    for steps, alike in itertools.groupby(range(len(rows)), lambda i: len(rows[i])):
        group = list(alike)
        places = [rows[i][t] for t in range(steps) for i in group]
        given += places
        x = data.index_select(0, _constant(places, data.device)).unflatten(0, (steps, len(group)))
        several = isinstance(hx, list | tuple)
        states = [h.narrow(1, group[0], len(group)).contiguous() for h in (hx if several else [hx])]
        start = states if several else states[0]
        results.append(func.overloadpacket.input(x, start, *rest, False))
    out = torch.cat([r[0].flatten(0, 1) for r in results])
    order = _constant(sorted(range(len(given)), key=given.__getitem__), data.device)
    return out.index_select(0, order), *(torch.cat(s, 1) for s in zip(*(r[1:] for r in results), strict=True))


def _decompose(recorder: _Recorder, func: Any, *args: Any, **kwargs: Any) -> Any:
    return func.decompose(*args, **kwargs)


_STATIC: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.nonzero_numpy.default: _nonzero_tuple,
    aten.where.default: _nonzero_tuple,
    aten.argwhere.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten.index_put.default: _index,
    aten.index_put_.default: _index,
    aten.bincount.default: _bincount,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten._unique2.default: _unique,
    aten.unique_consecutive.default: _unique_runs,
    aten._pack_padded_sequence.default: _pack,
    aten._pad_packed_sequence.default: _pad,
    **dict.fromkeys((aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data), _packed_recurrence),
    **dict.fromkeys((aten.repeat_interleave.self_Tensor, aten.one_hot.default), _decompose),
}


class Replay(nn.Module):
    """Repeat a recorded run on the parameters and buffers that the model holds now, and on other inputs.

    Args:
        model: The model that was recorded, for its parameters and buffers.
        graph: The recorded operations; attributes are found below this module.
        constants: Tensors that were made outside of the run.
    """

    def __init__(self, model: nn.Module, graph: Graph, constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self._graph = model, graph
        for name, value in constants.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the recorded operations; every new node inherits the source line of the old one."""
        with fx_traceback.preserve_node_meta():
            return Interpreter(self, graph=self._graph).run(*pytree.tree_leaves((args, kwargs)))


@contextlib.contextmanager
def _following(model: nn.Module, within: list[tuple[str, int]]) -> Generator[None]:
    """Keep a list of the modules whose forward runs."""
    numbers = itertools.count()

    def enter(path: str, *_: Any) -> None:
        within.append((path, next(numbers)))

    def leave(*_: Any) -> None:
        within.pop()

    handles = [m.register_forward_pre_hook(functools.partial(enter, n)) for n, m in model.named_modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, call: Callable[..., list[Tensor]], args: tuple[Any, ...], kwargs: Any) -> Recording:
    """Run a model once and write down what it does.

    Args:
        model: The model; its buffers may change by the run as they do by any.
        call: Runs it and returns the tensors of its output.
        args: Positional inputs; they are copied first.
        kwargs: Keyword inputs; they are copied first.

    Returns:
        The `Recording`.

    Raises:
        UnrecordableError: If it writes into its parameters, or uses what is no operation on tensors.
    """
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
    attributes = {PREFIX + n: t for n, t in [*model.named_parameters(), *model.named_buffers()]}
    recorder = _Recorder(attributes, pytree.tree_leaves((args, kwargs)))
    with (
        torch.no_grad(),
        torch._C._AutoDispatchBelowAutograd(),
        _following(model, recorder.within),
        recorder,
        _Leaving(recorder),
    ):
        outputs = call(*args, **kwargs)
    recorder.finish(outputs)
    replay = Replay(model, recorder.graph, recorder.constants)
    return Recording(replay, [x.detach().clone() for x in outputs], tuple(recorder.notes), tuple(recorder.outside))
