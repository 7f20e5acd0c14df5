"""Where a node of a graph comes from: its operation, the modules that made it, and the line of source."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from .recorder import PREFIX, Spot, is_foreign, show


def operation(node: Node) -> str:
    """Return the name of a node's operation without its overload, such as ``aten.conv2d``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


def owners(node: Node) -> dict[str, str]:
    """Return the modules in whose forward a node was made, the outermost first: their paths, by call."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    inside = {call: path for call, (path, _) in stack.items() if f"{path}.".startswith(PREFIX)}
    return {call: path.removeprefix(PREFIX[:-1]).removeprefix(".") for call, path in inside.items()}


def owner(node: Node) -> str | None:
    """Return the path of the module whose own forward made a node, or ``None`` if that is not known."""
    return next(reversed(owners(node).values()), None)


def where(node: Node) -> str:
    """Return the source line that made a node, such as ``model.py:12 in forward``, or the node's name."""
    spot = spot_of(node)
    return f"node {node.name}" if spot is None else show(spot)


def spot_of(node: Node) -> Spot | None:
    """Return the innermost line of the user's code that made a node, else that of torch."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    spots: list[Spot] = [(path, int(line), function) for path, line, function in found]
    theirs = [s for s in spots if is_foreign(s[0])]
    return (theirs or spots or [None])[-1]


def place(path: str) -> str:
    """Return where in its layer a module, or a tensor, lies: its path without the numbers."""
    return re.sub(r"\d+", "#", path)
