"""What an export analyses: a copy of the dense model, its inputs and its graph."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..tracing import Inputs
from ..tracing.symbolic import Symbolic, capture_symbolic
from .culprits import APART, Call, calls_in_training, same_value
from .facts import Facts
from .verify import to_double


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Args:
        model: A copy of the dense model, in the precision of the analysis.
        inputs: Example inputs, in that precision.
        facts: Constants and liveness of its graph.
        symbolic: Its graph with open sizes, if it was asked for and there is one.
    """

    model: nn.Module
    inputs: Inputs
    facts: Facts
    symbolic: Symbolic | None = None

    def opened(self, dynamic: str) -> Subject:
        """Trace the model with open sizes too, which takes longer, and analyse that trace."""
        try:
            trace, symbolic = capture_symbolic(self.model, self.inputs.args, self.inputs.kwargs, dynamic)
        except TraceError:  # a forward that changes the model may be traced once only
            return self
        return self if symbolic is None else Subject(self.model, trace.inputs, Facts(trace), symbolic)

    def in_precision(self, inputs: Inputs) -> Inputs:
        """Return inputs as the analysis takes them."""
        held = [*self.inputs.leaves(), *self.model.parameters()]
        double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in held)
        return inputs.map(Tensor.cpu).map(to_double) if double else inputs.map(Tensor.cpu)

    @property
    def given(self) -> list[Node]:
        """The tensors among the inputs of the graph with open sizes, in their order; none without such a graph."""
        if self.symbolic is None:
            return []
        twins, sources = self.symbolic.twins, self.facts.trace.sources
        inputs = [n for n in self.symbolic.graph.nodes if n.op == "placeholder" and sources[twins[n]].kind == "input"]
        return [n for n in inputs if isinstance(n.meta["val"], Tensor)]

    @functools.cached_property
    def training_calls(self) -> list[Call]:
        """Calls that the model makes in training only, and that the graph does not show therefore."""
        sources = self.facts.trace.sources
        if all(n.users for n, s in sources.items() if s.kind == "parameter"):
            return []
        with contextlib.suppress(Exception):
            return calls_in_training(self.model, self.inputs)
        return []

    def passed_to(self, calls: list[Call]) -> set[Node]:
        """Return the nodes that have the value of an argument of some calls."""
        leaves = [x for c in calls for x in pytree.tree_leaves(c.arguments)]
        given = [x for x in leaves if isinstance(x, Tensor)]
        made = self.facts.varying | self.facts.families.keys()
        values = {n: v for n in made if isinstance(v := self.facts.values.get(n), Tensor)}
        return {n for n, v in values.items() if any(same_value(v, x, APART) for x in given)}
