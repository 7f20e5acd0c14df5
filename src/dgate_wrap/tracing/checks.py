"""Pass checks of values by, such as ``assert torch.isfinite(h).all()``: they only decide whether a forward fails.

A trace knows no values, so that any branch on them ends it. Of a check it is known which way the forward goes on.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ASKS = {Tensor.__bool__, torch.is_nonzero, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose}
"""What gives a truth value."""

_SAYS = {"print", "warn", "warning", "error", "info", "debug"}
"""Functions that tell of something, and change nothing."""


class PassChecks(TorchFunctionMode):
    """Takes the values that are checked for ones that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passed, self.off = False, False
        """Whether there was any check, and whether checks are made after all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._assert and isinstance(args[0], Tensor) and not self.off:
            self.passed = True
            return None
        if func in _ASKS and not self.off and (value := _passing(sys._getframe(1))) is not None:
            self.passed = True
            return value
        return func(*args, **(kwargs or {}))


def _passing(frame: FrameType | None) -> bool | None:
    """Return the truth value with which a line that asks for one goes on; ``None`` if that line is no check."""
    if frame is None or frame.f_code.co_name.startswith("<"):
        return None
    return _checks(frame.f_code.co_filename).get(frame.f_lineno)


@functools.cache
def _checks(path: str) -> dict[int, bool]:
    """Return the lines of a file that are part of a check, with the truth value that its tensors have to have."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return {}
    found: dict[int, bool] = {}
    for step in ast.walk(tree):
        if isinstance(step, ast.Assert):
            wanted = _wanted(step.test, True)
        elif isinstance(step, ast.If) and not step.orelse and all(map(_only_tells, step.body)):
            wanted = _wanted(step.test, False)
        else:
            continue
        if len(wanted) == 1:
            lines = range(step.lineno, (step.test.end_lineno or step.lineno) + 1)
            found |= dict.fromkeys(lines, wanted.pop())
    return found


def _wanted(test: ast.expr, value: bool) -> set[bool]:
    """Return the truth values that the parts of a test have to have, so that it has one."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _wanted(test.operand, not value)
    if isinstance(test, ast.BoolOp):
        return set[bool]().union(*(_wanted(part, value) for part in test.values))
    return {value}


def _only_tells(step: ast.stmt) -> bool:
    """Tell whether a step raises an error, or tells of something."""
    if isinstance(step, ast.Expr) and isinstance(step.value, ast.Call):
        name = step.value.func
        return (name.id if isinstance(name, ast.Name) else getattr(name, "attr", "")) in _SAYS
    return isinstance(step, ast.Raise)
