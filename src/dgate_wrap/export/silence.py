"""Write the forward of a dead module: the constants that it gives, of the sizes that what it is given has.

For where no graph holds at other sizes than the example's, as that of a loop over time steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .constants import held_once
from .culprits import Call, paired_calls
from .regraph import Part, constant_name
from .steps import UnwritableError


@dataclass(frozen=True)
class Seen:
    """The sizes in one call of a module.

    Args:
        given: Shapes of the tensors that it was given.
        numbers: The whole numbers that it was given and that follow from sizes.
        results: Shapes of the tensors that it gave.
    """

    given: list[list[int]]
    numbers: list[int]
    results: list[list[int]]

    @property
    def axes(self) -> tuple[list[int], int, list[int]]:
        """How many axes everything has."""
        return [len(s) for s in self.given], len(self.numbers), [len(s) for s in self.results]


def sizes_in(here: list[Call], there: list[Call]) -> dict[str, list[Seen]]:
    """Return the sizes in calls on other inputs, per module that is called as often as in those on the example."""
    found: dict[str, list[Seen]] = {}
    for i, call in paired_calls(here, there):
        found.setdefault(call.path, []).append(sizes_of(call, here[i].sized))
    return found


def sizes_of(call: Call, sized: Collection[int]) -> Seen:
    """Return the sizes in a call, with the numbers at some places of its arguments."""
    leaves = pytree.tree_leaves(call.arguments)
    given, results = ([x for x in held if isinstance(x, Tensor)] for held in (leaves, pytree.tree_leaves(call.result)))
    numbers = [leaves[at] for at in sorted(sized) if at < len(leaves)]
    return Seen([list(x.shape) for x in given], numbers, [list(x.shape) for x in results])


def constants_alone(
    values: Mapping[int, Tensor], here: Seen, elsewhere: Sequence[Seen], taken: Collection[str]
) -> Part:
    """Return the graph of a module that gives constants.

    Args:
        values: What it gives in the example that anybody reads, by its number among the tensors that it gives, and
            without what is cut of it.
        here: The sizes in the example.
        elsewhere: The sizes in calls on other inputs.
        taken: Names that no constant may have.

    Raises:
        UnwritableError: If a size that changes is none of what the module is given, or if what it gives changes along
            such an axis.
    """
    graph, constants = Graph(), dict[str, Tensor]()
    tensors = [graph.placeholder(f"x{i}") for i in range(len(here.given))]
    numbers = [graph.placeholder(f"n{i}") for i in range(len(here.numbers))]

    def told(i: int, axis: int) -> Node | None:
        """Return the size of a result along an axis; ``None`` if it is always the same."""
        sizes = [s.results[i][axis] for s in (here, *elsewhere)]
        if len(set(sizes)) == 1:
            return None
        for j, tensor in enumerate(tensors):
            for other in range(len(here.given[j])):
                if [s.given[j][other] for s in (here, *elsewhere)] == sizes:
                    return graph.call_function(torch.ops.aten.sym_size.int, (tensor, other))
        for j, number in enumerate(numbers):
            if [s.numbers[j] for s in (here, *elsewhere)] == sizes:
                return number
        raise UnwritableError("the sizes of what it gives are none of what it is given")

    outputs: list[Node] = []
    for i, value in values.items():
        held, sizes = value, [told(i, axis) for axis in range(value.dim())]
        for axis, size in enumerate(sizes):
            once = held_once(held, axis)
            if once is None and size is not None:
                raise UnwritableError("what it gives is not the same along an axis that may become longer")
            held = held if once is None else once
        shape = [n if size is None else size for n, size in zip(value.shape, sizes, strict=True)]
        constants[name := constant_name({*taken, *constants})] = held.clone()
        outputs.append(graph.call_function(torch.ops.aten.expand.default, (graph.get_attr(name), shape)))
    graph.output(tuple(outputs))
    graph.lint()
    return Part(graph, constants)
