"""The values of a trace that depend on no input: positions, masks, first states, and what parameters alone make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Trace


class FixedValues:
    """The values of nodes that depend on no input, each computed when it is first asked for, on the CPU.

    Args:
        trace: The traced model, on any device.
        varying: Its nodes that depend on inputs.
    """

    def __init__(self, trace: Trace, varying: Iterable[Node]) -> None:
        self._trace = trace
        self._values: dict[Node, Any] = dict.fromkeys(varying)

    def __call__(self, node: Node) -> Any:
        """Return the value of a node; ``None`` if it varies, or cannot be known (the meta device)."""
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: Node) -> Any:
        if node.op == "placeholder":
            value = self._trace.sources[node].value
        elif node.op == "get_attr":
            value = getattr(self._trace.graph_module, cast(str, node.target))
        else:
            given = {n: self(n) for n in node.all_input_nodes}
            if any(v is None for v in given.values()):
                return None
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), given.__getitem__)
            kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
            with torch.no_grad():
                value = cast(Any, node.target)(*args, **kwargs)
        if not isinstance(value, Tensor):
            return value
        return None if value.is_meta else value.detach().cpu()
