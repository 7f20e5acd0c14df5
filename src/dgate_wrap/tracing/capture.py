"""Capture a model as a functional graph of ATen operations, by ``torch.export``.

``run_decompositions({})`` makes the graph functional and leaves linear, convolution, attention and norms whole. Every
parameter and buffer is a named input of it. Structure is found on models without gates: a gated model is traced on an
ungated copy.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..errors import TraceError

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


@dataclass(frozen=True)
class Trace:
    """A model as a graph.

    Args:
        graph_module: Functional ATen operations; placeholders are parameters, buffers, constants, then inputs.
        sources: What each placeholder stands for.
    """

    graph_module: GraphModule
    sources: dict[Node, Source]

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
                    values[node] = cast(Any, node.target)(*args, **kwargs)
        return values


def operation(node: Node) -> str:
    """Return the name of a node's operation without its overload, such as ``aten.conv2d``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


def where(node: Node) -> str:
    """Return the source line that made a node, such as ``model.py:12 in forward``, or its module path."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', node.meta.get("stack_trace") or "")
    inside = [f for f in found if "/torch/" not in f[0]] or found
    if inside:
        path, line, function = inside[-1]
        return f"{path.rsplit('/', 1)[-1]}:{line} in {function}"
    return f"node {node.name}"


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

    Args:
        model: The model; put back into its own training mode afterwards.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        example_kwargs: Keyword inputs beside positional ones.

    Returns:
        The `Trace`.

    Raises:
        TraceError: If the inputs are missing or do not fit the model, or ``torch.export`` refuses the model.
    """
    inputs = normalize_inputs(example_inputs, example_kwargs)
    with evaluating(model), torch.no_grad():
        try:
            model(*inputs.args, **inputs.kwargs)
        except Exception as e:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs.leaves()]
            raise TraceError(
                f"{type(model).__name__} does not run on the example inputs, of shapes {shapes}: "
                f"{type(e).__name__}: {_first_line(e)}",
                expected="inputs on which model(*example_inputs) runs",
                mend="pass what your training loop passes: example_inputs=next(iter(loader))[0]",
            ) from e
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals
            try:
                exported = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
                exported = exported.run_decompositions({})
            except Exception as e:
                raise TraceError(
                    f"{type(model).__name__} cannot be traced: {type(e).__name__}: {_first_line(e)}",
                    expected="a forward that torch.export follows, with no branch on the values of tensors",
                    mend="move the branch out of forward, or gate and export the submodule that can be traced",
                ) from e
    sources: dict[Node, Source] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    leaves = iter(inputs.leaves())
    first: dict[int, str] = {}
    alias = {n: first.setdefault(id(t), n) for n, t in _all_tensors(model)}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        kind = _KINDS[spec.kind]
        name = spec.target if spec.target is not None else node.name
        value = next(leaves) if kind == "input" else _lookup(exported, name)
        sources[node] = Source(kind, alias.get(name, name), value)
    return Trace(exported.graph_module, sources)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under all of their names, a tied one several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _lookup(exported: torch.export.ExportedProgram, name: str) -> Any:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
