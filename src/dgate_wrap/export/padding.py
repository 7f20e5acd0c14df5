"""Keep a smaller network able to take an attention mask, where the model takes one and the example has none.

Code may read integers with a mask that it does not read without one, such as how often keys are repeated. What runs
and equals the dense model on the example shows nothing of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..tracing import Inputs
from .culprits import failing
from .integers import Patch
from .plan import remembering
from .verify import finite, relative_error, run

_TRIES = 64
"""How many integers are tried."""

_TOLERANCE = 1e-3
"""Far above rounding, and far below heads that are mixed up."""


def padded(model: nn.Module, inputs: Inputs) -> Inputs | None:
    """Return inputs with a mask that hides the begin of the first sequence; ``None`` if the model takes none beside."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind_partial(*inputs.args, **inputs.kwargs).arguments
    except (TypeError, ValueError):
        return None
    tokens = next((x for x in inputs.leaves() if isinstance(x, Tensor)), torch.empty(0))
    taken = signature.parameters.values()
    any_name = not tokens.is_floating_point()  # a forward of tokens hands on whatever it is given, others may wonder
    beside = any(p.name == "attention_mask" or (any_name and p.kind is p.VAR_KEYWORD) for p in taken)
    if not beside or {**given, **inputs.kwargs}.get("attention_mask") is not None:
        return None
    if tokens.dim() < 2 or tokens.shape[1] < 2:
        return None
    mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    mask[0, : tokens.shape[1] // 2] = 0
    return Inputs(inputs.args, {**inputs.kwargs, "attention_mask": mask})


def find_patch(dense: nn.Module, small: nn.Module, inputs: Inputs, taken: Inputs) -> Patch:
    """Return the integers with which a smaller network takes a mask as the dense one does; none if it does already.

    Args:
        dense: The dense network.
        small: The smaller one.
        inputs: What the dense one is run on, with a mask.
        taken: The same as the smaller one takes it.
    """
    try:
        expected = run(dense, inputs)
    except Exception:
        return {}
    patch: Patch = {}
    tries = iter(range(_TRIES))
    while (failed := _failing(small, taken, patch)) is not None:
        path, done = failed
        better = (
            {**patch, name: {**patch.get(name, {}), owner: value}}
            for owner in _upward(path)
            for name, value in _smaller_integers(small.get_submodule(owner))
            if next(tries, None) is not None
        )
        found = next((p for p in better if _is_further(_failing(small, taken, p), path, done)), None)
        if found is None:
            return {}
        patch = found
    if not patch:
        return {}
    with remembering(small, patch):
        given = run(small, taken)
    return patch if finite(given) and relative_error(expected, given) < _TOLERANCE else {}


def _failing(small: nn.Module, inputs: Inputs, patch: Patch) -> tuple[str, int] | None:
    with remembering(small, patch):
        return failing(small, inputs)


def _is_further(failed: tuple[str, int] | None, path: str, done: int) -> bool:
    return failed is None or (failed[0] != path and failed[1] > done)


def _upward(path: str) -> list[str]:
    """Return a module and all that hold it, the nearest first: what fails may be a layer, wrapped in an adapter."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _smaller_integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the integers that a module holds, and smaller ones that they may be."""
    for name, value in vars(module).items():
        if type(value) is int:
            yield from ((name, n) for n in range(value - 1, 0, -1) if value % n == 0)
