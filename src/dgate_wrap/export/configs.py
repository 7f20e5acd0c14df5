"""Find the configuration from which a model's own class builds the smaller network, so that it saves and loads itself.

A model that was made from a configuration (``type(model)(model.config)``, as those of Hugging Face) is often expressed,
when smaller, by other numbers in it: fewer heads, fewer hidden units. Which ones, the names of its fields do not tell;
so numbers are tried that stand in proportion to the sizes that changed, and what a fresh model has and does decides.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from ..tracing import Inputs
from ..tracing.origins import place
from .verify import relative_error, run

Field: TypeAlias = tuple[str | int, ...]
"""Where a number stands in a configuration: names of attributes, and places in lists."""
Shapes: TypeAlias = dict[str, tuple[int, ...]]

_MOST = 200
"""How many configurations are tried."""
_TOLERANCE = 1e-5
"""Largest relative difference of two networks of the same weights and code."""


def express(dense: nn.Module, small: nn.Module, inputs: Sequence[Inputs]) -> dict[str, int] | None:
    """Set the numbers in a smaller network's configuration from which its class builds a network of its sizes.

    A configuration is accepted only if a fresh model that is built from it, as it would be after saving and loading,
    has exactly the parameters and buffers of the smaller network, and computes the same with its weights.

    Args:
        dense: The network of the original sizes.
        small: The smaller network; its configuration is changed in place.
        inputs: Inputs on which it was compared, as it takes them.

    Returns:
        The fields that changed, with their new values; none if nothing had to. ``None`` if no configuration was found.
    """
    config = getattr(small, "config", None)
    before, after = _shapes(dense), _shapes(small)
    if not callable(getattr(config, "to_dict", None)) or before == after:
        return {}
    if type(small) is not type(dense) or set(before) != set(after) or _uneven(config, before, after):
        return None
    if _built(dense, config, {}) != before:
        return None
    for changes in _fitting(dense, config, before, after):
        if _builds_the_same(small, config, changes, inputs) and _changed(small, config, changes, inputs):
            return {".".join(map(str, field)): value for field, value in changes.items()}
    return None


def _uneven(config: Any, before: Shapes, after: Shapes) -> bool:
    """Tell whether layers that were alike have other sizes now, which a configuration without lists cannot express."""
    if any(isinstance(field[-1], int) for field, _ in _numbers(config)):
        return False
    sizes: dict[Any, tuple[int, ...]] = {}
    alike = (((place(n), shape), after[n]) for n, shape in before.items())
    return any(sizes.setdefault(layer, new) != new for layer, new in alike)


def _shapes(model: nn.Module) -> Shapes:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {n: tuple(t.shape) for n, t in named}


def _fitting(model: nn.Module, config: Any, before: Shapes, after: Shapes) -> Iterator[dict[Field, int]]:
    """Yield changes of a configuration that give the wanted shapes: best first, each step with fewer wrong shapes."""
    sizes = {(a, b) for n in before for a, b in zip(before[n], after[n], strict=True) if a != b}
    options = {field: list(_options(value, sizes)) for field, value in _numbers(config)}
    pins = _pins(model, config)
    pins = pins if pins and _built(model, config, pins) == before else {}
    order = count()
    front: list[tuple[int, int, int, dict[Field, int]]] = [(len(after), 0, next(order), pins)]
    tried: set[frozenset[tuple[Field, int]]] = set()
    while front:
        wrong, _, _, changes = heapq.heappop(front)
        if wrong == 0:
            for field in pins:  # what is not needed is not changed
                fewer = {f: v for f, v in changes.items() if f != field or v != pins[field]}
                changes = fewer if _built(model, config, fewer) == after else changes
            yield changes
            continue
        for field, values in options.items():
            for value in values if changes.get(field) == pins.get(field) else ():
                more = {**changes, field: value}
                key = frozenset(more.items())
                if key in tried or len(tried) >= _MOST:
                    continue
                tried.add(key)
                found = _built(model, config, more)
                left = sum(found.get(n) != shape for n, shape in after.items()) if found else wrong
                if found is not None and found.keys() == after.keys() and left < wrong and left < len(after):
                    heapq.heappush(front, (left, len(more), next(order), more))


def _pins(model: nn.Module, config: Any) -> dict[Field, int]:
    """Return what modules remember and the configuration leaves open, such as a width that it derives from others."""
    found: dict[str, set[int]] = {}
    for module in model.modules():
        for name, value in vars(module).items() if not type(module).__module__.startswith("torch.") else ():
            if type(value) is int and value > 1 and _get(config, (name,)) is None:
                found.setdefault(name, set()).add(value)
    return {(name,): next(iter(values)) for name, values in found.items() if len(values) == 1}


def _options(value: int | None, sizes: set[tuple[int, int]]) -> Iterator[int]:
    """Yield what a number may become: in proportion to a size that changed; of one that is left open, the size."""
    found: set[int] = set()
    for a, b in sizes:
        if value is None:
            found.add(b)
        elif (a % value == 0 or value % a == 0) and (value * b) % a == 0:
            found.add(value * b // a)
    yield from sorted(found - {value, 0})


def _numbers(config: Any) -> Iterator[tuple[Field, int | None]]:
    """Yield the whole numbers of a configuration above one, and what is left open, with their places."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if callable(getattr(value, "to_dict", None)):
            yield from (((name, *field), n) for field, n in _numbers(value))
        elif isinstance(value, list | tuple):
            listed = cast("list[Any]", value)
            yield from (((name, i), n) for i, n in enumerate(listed) if type(n) is int and n > 1)
        elif value is None or (type(value) is int and value > 1):
            yield (name,), value


def _set(config: Any, changes: Mapping[Field, int]) -> None:
    """Set numbers in a configuration, in place."""
    for field, value in changes.items():
        *path, name = (step for step in field if isinstance(step, str))
        holder = config
        for step in path:
            holder = getattr(holder, step)
        new: Any = value
        if isinstance(field[-1], int):
            held = getattr(holder, name)
            new = type(held)([*held[: field[-1]], value, *held[field[-1] + 1 :]])
        setattr(holder, name, new)


def _fresh(model: nn.Module, config: Any, changes: Mapping[Field, int]) -> nn.Module:
    """Build a model from a changed configuration that went through a dictionary, as one does that was saved."""
    changed = copy.deepcopy(config)
    _set(changed, changes)
    kind = cast(Any, type(config))
    with torch.random.fork_rng(devices=[]):
        return cast(Any, type(model))(kind.from_dict(changed.to_dict()))


def _built(model: nn.Module, config: Any, changes: Mapping[Field, int]) -> Shapes | None:
    """Return the shapes of a model that is built from a changed configuration, or ``None`` if none can be."""
    try:
        with torch.device("meta"):
            return _shapes(_fresh(model, config, changes))
    except Exception:
        return None


def _builds_the_same(small: nn.Module, config: Any, changes: Mapping[Field, int], inputs: Sequence[Inputs]) -> bool:
    """Tell whether a model built from a changed configuration computes the same with the weights of the smaller one."""
    held = next(small.parameters())
    try:
        fresh = _fresh(small, config, changes).to(held.device, held.dtype)
        fresh.load_state_dict(small.state_dict())
        return _same(small, fresh, inputs)
    except Exception:
        return False


def _same(a: nn.Module, b: nn.Module, inputs: Sequence[Inputs]) -> bool:
    return all(relative_error(run(a, x), run(b, x)) <= _TOLERANCE for x in inputs)


def _changed(small: nn.Module, config: Any, changes: Mapping[Field, int], inputs: Sequence[Inputs]) -> bool:
    """Change a network's configuration, in place; leave it as it was if the network computes something else then."""
    before = copy.deepcopy(small)  # holds a configuration of its own
    old = {field: _get(config, field) for field in changes}
    alike = {id(c): c for m in small.modules() if type(c := vars(m).get("config")) is type(config)}
    held = [c for c in alike.values() if all(_get(c, field) == value for field, value in old.items())]
    for c in held:
        _set(c, changes)
    try:
        same = _same(before, small, inputs)
    except Exception:
        same = False
    for c in held if not same else ():
        _set(c, cast("dict[Field, int]", old))
    return same


def _get(config: Any, field: Field) -> Any:
    for step in field:
        try:
            config = config[step] if isinstance(step, int) else getattr(config, step, None)
        except Exception:  # one that differs from layer to layer, say, which is none of the whole
            return None
    return config
