"""Where a node of a graph comes from: its operation, the modules that made it, and the line of source."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.fx import Graph, Node

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


def name_owners(graph: Graph, model: nn.Module) -> None:
    """Call every module by its first name: of one that has several, a trace may take another, or ``layers[:2]``."""
    first = {module: name for name, module in model.named_modules()}
    known: dict[str, str] = {}
    for node in graph.nodes:
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        for path in {path for path, _ in stack.values()} - known.keys():
            module = _module_at(model, path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
            known[path] = path if module is None else PREFIX + first[module]
        node.meta["nn_module_stack"] = {call: (known[path], kind) for call, (path, kind) in stack.items()}


def recorded_owners(graph: Graph) -> None:
    """Give the nodes of a recording that was traced again the modules that made them, which the recording noted."""
    for node in graph.nodes:
        noted = re.findall(r'Module "([^"]*)", call (\d+)', node.meta.get("stack_trace") or "")
        if noted:
            node.meta["nn_module_stack"] = {f"{p}@{i}": (f"{PREFIX}{p}".rstrip("."), None) for p, i in noted}


def place_owners(graph: Graph, path: str) -> None:
    """Call the modules in the graph of a module as the model does that it is part of."""
    for node in graph.nodes:
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        inside = {call: (f"{at}.", kind) for call, (at, kind) in stack.items() if f"{at}.".startswith(PREFIX)}
        node.meta["nn_module_stack"] = {
            call: (f"{PREFIX}{path}.{at.removeprefix(PREFIX)}".rstrip("."), kind) for call, (at, kind) in inside.items()
        }


_SLICE = re.compile(r"(?:^|\.)slice\((-?\d+|None), (-?\d+|None), (-?\d+|None)\)\.")


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path that may lead through slices of lists, or ``None``."""
    listed, *more = _SLICE.split(path, maxsplit=1)
    try:
        module = model.get_submodule(listed)
        if not more:
            return module
        children = list(module.named_children())[slice(*(None if n == "None" else int(n) for n in more[:3]))]
        named = (
            dict(children) if isinstance(module, nn.Sequential) else {str(i): m for i, (_, m) in enumerate(children)}
        )
        name, _, rest = more[3].partition(".")
        return _module_at(named[name], rest)
    except (AttributeError, KeyError):
        return None


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
