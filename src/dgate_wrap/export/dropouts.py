"""Find what attention drops in training: in eval mode, in which models are traced, its dropout is written as none."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from ..tracing import Inputs
from ..tracing.operations import op_name
from ..tracing.origins import owner
from .facts import Facts
from .runs import trying

_OPERATION = "scaled_dot_product_attention"


def attention_dropouts(model: nn.Module, inputs: Inputs, facts: Facts) -> dict[Node, float]:
    """Return how much each attention of a trace drops in training.

    Args:
        model: The model.
        inputs: What it was traced on.
        facts: What is known of the trace.
    """
    traced: dict[str, list[Node]] = {}
    for node in facts.nodes:
        if op_name(node) == _OPERATION:
            traced.setdefault(owner(node) or "", []).append(node)
    seen = _Dropouts(model)
    if traced:
        with trying(model, inputs) as run_it, seen, contextlib.suppress(Exception):
            model.train()
            run_it()
    alike = {p: nodes for p, nodes in traced.items() if len(nodes) == len(seen.found.get(p, []))}
    pairs = [pair for p, nodes in alike.items() for pair in zip(nodes, seen.found[p], strict=True)]
    return {node: p for node, p in pairs if p > 0}


class _Dropouts(TorchFunctionMode):
    """Notes, per module, the dropout of each attention that its code computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}
        self._paths = {id(m): p for p, m in model.named_modules()}
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        begun = nn.modules.module.register_module_forward_pre_hook(self._begin)
        ended = nn.modules.module.register_module_forward_hook(self._end, always_call=True)
        self._handles = [begun, ended]
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(self._paths.get(id(module), ""))

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            p = args[4] if len(args) > 4 else (kwargs or {}).get("dropout_p", 0.0)
            self.found.setdefault(self._running[-1] if self._running else "", []).append(float(p))
        return func(*args, **(kwargs or {}))
