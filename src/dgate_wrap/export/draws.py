"""Random inputs like the example: of other values, of other sizes, and of whole numbers that it does not hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tracing import Inputs

SEED = 20250923

_LONGER, _SHORT, _TWICE, _SMALL = 4, 128, 2, 2**14
"""How much longer sequences are tried, up to which length and in longer ones, and of which size at most.

Code may do other things with long ones, and what a short one is sampled down to may be a single element.
"""

_FEW = 3
"""How far whole numbers of the example may lie apart to be so few that others are tried too."""

BESIDE = ((0, _FEW), (0, 1), (0, 0), (1, 0))
"""Which others: from the first number to so many more than the largest, until a model takes them."""


def _places_by_size(example: Inputs) -> dict[int, list[tuple[int, int]]]:
    """Return where each size stands in the inputs: tensors by position, and their axes."""
    places: dict[int, list[tuple[int, int]]] = {}
    for at, n in example.sizes.items():
        places.setdefault(n, []).append(at)
    return places


def resizings(example: Inputs, dynamic: str = "all") -> Iterator[list[tuple[str, dict[tuple[int, int], int]]]]:
    """Yield, per size of the inputs and new size, the ways to change it: a name, and the new sizes by tensor and axis.

    A size is changed on all axes that have it. Where those lie at several positions (a batch as large as a width), it
    is changed at each position alone first; all together, which comes last, is for what needs that.

    Args:
        example: Example inputs.
        dynamic: Which sizes: ``"all"``, or that of the ``"batch"``, along the first axes.
    """
    places = _places_by_size(example)
    batch = next((x.shape[0] for x in example.leaves() if isinstance(x, Tensor) and x.dim()), None)
    if dynamic == "batch":
        places = {n: [at for at in found if at[1] == 0] for n, found in places.items() if n == batch}
    for size in sorted(places, key=lambda n: n != batch):  # the batch first
        more = size + 1 if size > 1 else _LONGER + 1  # what is broadcast may be 2 for each of two heads, by chance
        less = 1 if size == batch else max(min(size, 2), size // 2)
        for new in dict.fromkeys([more, less]):
            if new != size:
                yield _ways(places[size], size, new)
        later = [(i, axis) for i, axis in places[size] if axis > 0]
        if later and _are_sequences(example, later):
            yield _ways(later, size, (_LONGER if size <= _SHORT else _TWICE) * size + 1)


def _ways(places: list[tuple[int, int]], size: int, new: int) -> list[tuple[str, dict[tuple[int, int], int]]]:
    positions = sorted({axis for _, axis in places})
    ways = [[p for p in places if p[1] == axis] for axis in positions]
    ways += [places] * (len(ways) > 1)
    if new == 1:  # a batch of one; elsewhere, one would be broadcast in place of several
        ways = [w for w in ways if any(axis == 0 for _, axis in w) and len({i for i, _ in w}) == len(w)]
    return [(in_words(way, size, new), dict.fromkeys(way, new)) for way in ways]


def _are_sequences(example: Inputs, places: list[tuple[int, int]]) -> bool:
    """Tell whether much longer inputs are cheap: those of small tensors that are no images."""
    tensors = [x for x in example.leaves() if isinstance(x, Tensor)]
    return all(tensors[i].dim() <= 3 and tensors[i].numel() <= _SMALL for i, _ in places)


def in_words(way: list[tuple[int, int]], size: int, new: int) -> str:
    """Name a random input of another size."""
    axes = sorted({axis for _, axis in way})
    if axes == [0]:
        return f"random, batch {new}"
    return f"random, {new} in place of {size} along axis {' and '.join(map(str, axes))}"


class Draws:
    """Draws random inputs like the example.

    Floating-point inputs come from a normal distribution with the mean and deviation of the example; integers and
    booleans are picked from the values of the example. With ``beside``, a least value and how many more than the
    largest, those of which the example holds few are picked from all in between.
    """

    def __init__(self, example: Inputs) -> None:
        self._example = example
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(
        self,
        sizes: dict[tuple[int, int], int] | None = None,
        spread: float = 1.0,
        beside: tuple[int, int] | None = None,
    ) -> Inputs:
        """Draw one.

        Args:
            sizes: Other sizes, by tensor and axis.
            spread: How far floating-point inputs spread, in deviations of the example.
            beside: See above.
        """
        order = iter(range(len(self._example.leaves())))
        sizes = sizes or {}

        def draw(x: Tensor) -> Tensor:
            i = next(order)
            shape = [sizes.get((i, axis), n) for axis, n in enumerate(x.shape)]
            return self._draw(x if beside is None or not holds_few(x) else _around(x, *beside), shape, spread)

        return self._example.map(draw)

    def _draw(self, x: Tensor, shape: list[int], spread: float) -> Tensor:
        if x.layout != torch.strided:
            return x
        if x.is_floating_point():
            noise = torch.randn(shape, generator=self._generator, dtype=torch.float64)
            deviation = x.double().std().nan_to_num(1.0) if x.numel() > 1 else torch.ones(())
            return (noise.to(x.device) * deviation.clamp_min(1e-3) * spread + x.double().mean()).to(x.dtype)
        picks = torch.randint(max(1, x.numel()), shape, generator=self._generator).to(x.device)
        return x.flatten()[picks] if x.numel() else x


def holds_few(x: object) -> bool:
    """Tell whether whole numbers, or truth values, lie so close together that others may do other things."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_floating_point() or x.is_complex():
        return False
    if not x.numel():
        return False
    least, largest = _range(x)
    return largest - least <= _FEW


def _range(x: Tensor) -> tuple[int, int]:
    """Return the least and the largest of some whole numbers; unsigned ones know neither."""
    x = x.long()
    return int(x.min()), int(x.max())


def _around(x: Tensor, least: int, more: int) -> Tensor:
    """Return all whole numbers from a least one, or the least of some, to so many more than their largest."""
    if x.dtype == torch.bool:
        return torch.tensor([False, True], device=x.device)
    found, largest = _range(x)
    return torch.arange(min(least, found), largest + more + 1, device=x.device).to(x.dtype)
