"""Find modules that compute constants only, or what nobody reads: the dead branches of a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from ..tracing.operations import op_name
from ..tracing.origins import owner, owners
from .facts import Facts


@dataclass(frozen=True)
class Branch:
    """A dead branch.

    Args:
        paths: Its modules, the outermost ones; none if it is made of parameters of the module in which it lies.
        meets: The innermost module around them in which their results meet something alive, such as the block of a
            residual sum; ``None`` if that is the whole model, or holds more layers that live.
    """

    paths: tuple[str, ...]
    meets: str | None


def find_dead(facts: Facts) -> list[Branch]:
    """Return the dead branches of a traced model.

    A module is dead if it computes with the inputs, has parameters, and each of its results is a known constant, or not
    needed for any output of the model.
    """
    spans = _spans(facts)
    layers = _layers(facts)
    dead = [p for p, span in spans.items() if p and _is_dead(facts, span) and any(_within(n, p) for n in layers)]
    outermost = [p for p in dead if not any(_within(p, other) and p != other for other in dead)]
    found: dict[str | None, list[str]] = {p: [] for p in _with_idle_parameters(facts, outermost)}
    for path in outermost:
        meets = _meeting(facts, path, spans[path])
        inside = [n for n in layers if _within(n, meets)]
        idle = [n for n in inside if any(_within(n, d) for d in outermost)]
        found.setdefault(meets if meets and 2 * len(idle) >= len(inside) else None, []).append(path)
    alone = [Branch((p,), None) for p in found.pop(None, [])]
    return [*(Branch(tuple(paths), meets) for meets, paths in found.items()), *alone]


def _spans(facts: Facts) -> dict[str, set[Node]]:
    """Return the operations of every module, with those of the modules in it."""
    spans: dict[str, set[Node]] = {}
    for node in facts.nodes:
        for path in owners(node).values() if node.op == "call_function" else ():
            spans.setdefault(path, set()).add(node)
    return spans


def beside_others(facts: Facts) -> frozenset[Node]:
    """Return the nodes of dead modules all of whose results lie beside others only: they need give nothing at all."""
    spans, found = _spans(facts), set[Node]()
    for span in (spans.get(p, set[Node]()) for branch in find_dead(facts) for p in branch.paths):
        users = {u for n in span for u in n.users if u not in span}
        if users and all(op_name(u) == "cat" for u in users):
            found |= span
    return frozenset(found)


def _with_idle_parameters(facts: Facts, dead: list[str]) -> set[str]:
    """Return living modules, without the model itself, whose own code reads parameters for nothing that is needed."""
    paths: set[str] = set()
    for node, source in facts.trace.sources.items():
        readers = _readers(facts, node) if source.kind == "parameter" else set()
        if readers and all(_idle(facts, n) and not _only_looks_up(facts, {n}) for n in readers):
            paths |= {owner(n) or "" for n in readers}
    return {p for p in paths if p and not any(_within(p, d) for d in dead)}


def _readers(facts: Facts, node: Node) -> set[Node]:
    """Return what computes with the inputs and reads a parameter, or what is made of it alone."""
    found = set(node.users)
    while fixed := {n for n in found if n not in facts.varying}:
        found = (found - fixed) | {u for n in fixed for u in n.users}
    return found


def _within(path: str, around: str) -> bool:
    return not around or f"{path}.".startswith(f"{around}.")


def _layers(facts: Facts) -> set[str]:
    """Return the modules that own a parameter which the forward reads."""
    sources = facts.trace.sources.items()
    return {s.name.rpartition(".")[0] for n, s in sources if s.kind == "parameter" and n.users}


def _is_dead(facts: Facts, span: set[Node]) -> bool:
    results = [n for n in span if any(u not in span for u in n.users)]
    if _only_looks_up(facts, span):
        return False
    return any(n in facts.varying for n in results) and all(_idle(facts, n) for n in results)


def _only_looks_up(facts: Facts, span: set[Node]) -> bool:
    """Tell whether nodes are given indices only: rows of a table that the example happens to ask for."""
    given = {n for node in span for n in node.all_input_nodes if n in facts.varying} - span
    return bool(given) and all(_fixed_index(facts, n) for n in given)


def _fixed_index(facts: Facts, node: Node) -> bool:
    """Tell whether a node is a constant that no dead weight can have made one: integers."""
    value = facts.values.get(node)
    return isinstance(value, Tensor) and not value.is_floating_point() and not bool(facts.unknown[node].any())


def _idle(facts: Facts, node: Node) -> bool:
    """Tell whether nothing of a node is needed."""
    if node not in facts.varying:
        return False
    return all(not bool(facts.needed(o).any()) for o in facts.outputs(node) if isinstance(facts.values.get(o), Tensor))


def _meeting(facts: Facts, path: str, span: set[Node]) -> str:
    """Return the innermost module around a dead one that has everything its results reach before something lives."""
    seen, front = set(span), list(span)
    places = [path.split(".")]
    while front:
        for user in front.pop().users:
            if user in seen:
                continue
            seen.add(user)
            place = next(reversed(owners(user).values()), "")
            if user.op == "output":
                return ""
            places.append(place.split(".") if place else [])
            if _idle(facts, user):
                front.append(user)
    common = places[0][:-1]
    for place in places[1:]:
        same = [a == b for a, b in zip(common, place, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common)
