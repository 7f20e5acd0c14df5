"""What stays whole for the code of a module that fails: little at first, and more if it fails still."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from ..tracing.origins import owner, place
from .culprits import Call
from .facts import makes
from .subject import Subject
from .vectors import Frozen


def colder(subject: Subject, calls: list[Call], frozen: Frozen, path: str, filled: set[str]) -> Frozen | None:
    """Keep more of a module and those at its place in other layers, or of one around it; ``None`` if all is kept.

    Of modules in which something would be empty, a whole index of it first.
    """
    modules = dict(subject.model.named_modules())
    working = {owner(n) or "" for n in subject.facts.nodes if n.op == "call_function"}
    making = {owner(n) or "" for n in subject.facts.nodes if makes(n)}
    step: str | None = path
    while step is not None:
        alike = {p for p, m in modules.items() if type(m) is type(modules[step]) and place(p) == place(step)}
        shown = not step or any(f"{p}.".startswith(f"{step}.") for p in working)
        idle = set[Node]() if shown else subject.passed_to([c for c in calls if c.path == step])
        if not idle <= frozen.idle:
            return replace(frozen, idle=frozen.idle | idle)
        if step not in frozen.made | frozen.reshapes and step in making:
            return replace(frozen, made=frozen.made | alike)
        if step not in frozen.fills | frozen.reshapes and step in filled:
            return replace(frozen, fills=frozen.fills | alike)
        if step not in frozen.reshapes and alike & working:
            return replace(frozen, reshapes=frozen.reshapes | alike, made=frozen.made - alike)
        if step not in frozen.made | frozen.modules and step in making:
            return replace(frozen, made=frozen.made | alike)
        if step not in frozen.modules and alike & working:
            return replace(frozen, modules=frozen.modules | alike)
        given = subject.passed_to([c for c in calls if c.path == step]) if step in frozen.modules else set[Node]()
        if not given <= frozen.idle:  # of which it reads the shape
            return replace(frozen, idle=frozen.idle | given)
        step = step.rpartition(".")[0] if step else None
    return None
