"""What optimizers hold: the one that really steps inside a trainer's, and parameters that it has to take on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that really steps: trainers wrap it and keep it as ``optimizer``."""
    inner = getattr(optimizer, "optimizer", None)
    wraps = isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" not in vars(optimizer)
    return innermost(inner) if wraps and isinstance(inner, Optimizer) else optimizer


def adopt_factors(first: Optimizer, optimizers: Iterable[Optimizer], factors: list[nn.Parameter]) -> None:
    """Add missing factors to an optimizer, and take decayed ones out of weight decay, keeping their other settings."""
    wanted = {id(p): p for p in factors}
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            held = [p for p in group["params"] if id(p) in wanted]
            for p in held:
                del wanted[id(p)]
            if held and group.get("weight_decay"):
                group["params"] = [p for p in group["params"] if all(p is not h for h in held)]
                optimizer.add_param_group({**group, "params": held, "weight_decay": 0.0})
    if wanted and isinstance(first, torch.optim.LBFGS):  # it has one parameter group, of which it remembers the size
        first.param_groups[0]["params"].extend(wanted.values())
        first._numel_cache = None  # pyright: ignore[reportAttributeAccessIssue]
        first.state.clear()
    elif wanted:
        extra: dict[str, Any] = {"params": list(wanted.values())}
        if "weight_decay" in first.defaults:
            extra["weight_decay"] = 0.0
        first.add_param_group(extra)
