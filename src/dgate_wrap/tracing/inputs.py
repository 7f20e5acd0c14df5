"""Example inputs, and their names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import TraceError
from .settings import sound_attention, unchanged

PLAIN = (int, float, complex, str, bytes, type(None))
"""Types of values that are compared as such."""


@dataclass(frozen=True)
class Inputs:
    """Example inputs, as positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> list[Any]:
        """Return every leaf, tensors and others, in the order of the graph's placeholders."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """The size of every axis of every tensor, by the tensor's position among them and the axis."""
        tensors = (x for x in self.leaves() if isinstance(x, Tensor))
        return {(i, axis): size for i, x in enumerate(tensors) for axis, size in enumerate(x.shape)}

    def is_like(self, other: Inputs) -> bool:
        """Tell whether other inputs have the same shapes, and the same values beside tensors."""
        mine, others = (
            [x.shape if isinstance(x, Tensor) else x if isinstance(x, PLAIN) else type(x) for x in i.leaves()]
            for i in (self, other)
        )
        return mine == others

    def map(self, fn: Any) -> Inputs:
        """Return the inputs with ``fn`` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, fn, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def call(self, model: nn.Module, **extra: Any) -> Any:
        """Call a model that may write into its inputs, its attributes and its buffers; nothing of that stays."""
        return self.calls(model, 1, **extra)[0]

    def calls(self, model: nn.Module, times: int, /, **extra: Any) -> list[Any]:
        """Call a model several times, each call on what the ones before left of its state; nothing of that stays."""
        given = [self.map(Tensor.clone) for _ in range(times)]
        buffers = {b.untyped_storage().data_ptr() for b in model.buffers() if b.layout == torch.strided}

        def apart(x: Tensor) -> Tensor:  # what is a buffer, or a view of one, would be put back as it was too
            strided = x.layout == torch.strided
            return x.clone() if strided and x.untyped_storage().data_ptr() in buffers else x

        with unchanged(model, buffers=True), sound_attention():
            outputs = (model(*x.args, **x.kwargs, **extra) for x in given)
            return [pytree.tree_map_only(Tensor, apart, output) for output in outputs]


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


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Name every leaf of the inputs as the model's forward does, such as ``x`` or ``batch['mask']``."""
    parameters = signature(model)
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [(positional[i] if i < len(positional) else f"args_{i}", x) for i, x in enumerate(inputs.args)]
    named += inputs.kwargs.items()
    return [n + pytree.keystr(path) for n, x in named for path, _ in pytree.tree_flatten_with_path(x)[0]]


def signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's forward by name; none if they are not known."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


@contextlib.contextmanager
def without_cache(model: nn.Module, inputs: Inputs) -> Generator[dict[str, Any]]:
    """Turn off key/value caches unless the inputs ask for them; yield what the forward takes beside its inputs."""
    found, extra = _caching(model, inputs)
    for config in found:
        config.use_cache = False
    try:
        yield extra
    finally:
        for config in found:
            config.use_cache = True


def has_cache(model: nn.Module, inputs: Inputs) -> bool:
    """Tell whether a model has a key/value cache that is turned on if the inputs do not ask for another thing."""
    return any(_caching(model, inputs))


def _caching(model: nn.Module, inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """Return the configurations that turn a cache on, and what the forward takes that turns it off."""
    names = list(signature(model))
    if "use_cache" in inputs.kwargs or "use_cache" in names[: len(inputs.args)]:
        return [], {}
    configs: dict[int, Any] = {id(x): x for m in model.modules() if (x := getattr(m, "config", None)) is not None}
    found = [x for x in configs.values() if getattr(x, "use_cache", None) is True]
    return found, {"use_cache": False} if "use_cache" in names else {}
