"""Find the modules that a forward written anew calls as they are: their own code can stay, with all that it does."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..tracing import Inputs
from ..tracing.inputs import PLAIN
from ..tracing.origins import owners
from ..tracing.settings import attributes_written, is_plain
from .culprits import APART, Begun, Call, same_value, with_code
from .facts import Facts
from .rewritten import plain_signature, unbind
from .runs import trying

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Given:
    """Stands for a tensor that a forward is given, and hands on."""

    index: int


@dataclass(frozen=True, eq=False)
class Child:
    """A call of a module within another one.

    Args:
        path: The module.
        args: Its arguments, with nodes in place of tensors, or what says which of those that the other one is given.
        kwargs: Those that have names.
        results: Per node that others read, by which indices its value is found in what the module returns.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: dict[Node, tuple[int | str, ...]]

    @property
    def given(self) -> list[Node]:
        """The nodes among its arguments."""
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Node)]


class Children:
    """Finds the calls that forwards make of modules with code of their own.

    Args:
        model: The model.
        calls: Every call of its modules.
        facts: What is known of its trace.
        changing: Modules whose attributes change in a run: code around them may reset these.
    """

    def __init__(self, model: nn.Module, calls: list[Call], facts: Facts, changing: Collection[str]) -> None:
        self._model, self._calls, self._facts = model, calls, facts
        self._callable = {n for n, _ in model.named_modules() if with_code(model, n) == n and n not in changing}

    def of(
        self,
        call: Call,
        nodes: list[Node],
        twins: Mapping[Node, Node],
        given: Collection[Node],
        outputs: Collection[Node],
        inlined: Collection[str],
    ) -> list[Child]:
        """Return the outermost calls that a forward can make without knowing what is in them.

        Args:
            call: The call of the module whose forward is written.
            nodes: What it does, in order.
            twins: For its nodes, those of the trace.
            given: The nodes that have the values of its arguments.
            outputs: Those that it returns.
            inlined: Modules that it does not call.
        """
        made: dict[str, list[Call]] = {}
        for c in self._calls:
            if any(begun is call.chain[-1] for begun in c.chain[:-1]):
                made.setdefault(c.path, []).append(c)
        spans, depths, paths = dict[str, list[Node]](), dict[str, int](), dict[str, str]()
        for node in nodes:
            for depth, (name, path) in enumerate(owners(node).items()):
                if path not in made or path in inlined or path not in self._callable:
                    continue
                paths[name], depths[name] = path, depth
                spans.setdefault(name, []).append(node)
        traced = Counter(paths.values())
        found: list[Child] = []
        part, inside, opaque = {*nodes}, set[Node](), set[str]()
        for name in sorted(spans, key=depths.__getitem__):
            path = paths[name]
            spare, traced[path] = len(made[path]) - traced[path], traced[path] - 1
            if spare >= 0 and inside.isdisjoint(spans[name]):
                before = [n for n in given if n not in spans[name]]
                before += nodes[: nodes.index(spans[name][0])]
                for _ in range(spare + 1):  # what nobody reads is not traced
                    c = made[path].pop(0)
                    handed = _handed_on(call.chain[-1], c.chain[-1])
                    child = self._child(c, spans[name], twins, before, part, outputs, handed)
                    if child is not None:
                        found.append(child)
                        inside.update(spans[name])
                        break
                else:
                    opaque.add(path)
            elif spare >= 0:
                made[path].pop(0)
        if not opaque.isdisjoint(c.path for c in found):  # a module is called each time, or not at all
            return self.of(call, nodes, twins, given, outputs, {*inlined, *opaque})
        return found

    def _child(
        self,
        call: Call,
        span: list[Node],
        twins: Mapping[Node, Node],
        before: list[Node],
        part: set[Node],
        outputs: Collection[Node],
        handed: Mapping[int, Given],
    ) -> Child | None:
        """Return what a call takes and gives; ``None`` if the graph does not show all of it."""
        if call.sized or not _is_plain(call.arguments):
            return None
        leaves, form = pytree.tree_flatten(call.arguments)
        inside = set(span)
        read = [n for n in dict.fromkeys(m for n in span for m in n.all_input_nodes) if n not in inside]
        asked = [n for n in span if n in outputs or any(u in part and u not in inside for u in n.users)]
        takes = self._taken(read, before, leaves, twins, handed)
        results = dict(_tensors(call.result))
        values = [x for x, _ in results.values()]
        gives = self._matched([n for n in asked if self._varies(n, twins)], values, twins)
        if takes is None or gives is None:
            return None
        fixed = [n for n in asked if n in twins and not self._varies(n, twins)]  # of parameters alone, say
        gives |= self._matched(fixed, [x for x in values if id(x) not in gives], twins) or {}
        arguments = pytree.tree_unflatten([takes[id(x)] if isinstance(x, Tensor) else x for x in leaves], form)
        module = self._model.get_submodule(call.path)
        places = {node: results[x][1] for x, node in gives.items()}
        return Child(call.path, *unbind(plain_signature(module), arguments), places)

    def _taken(
        self,
        read: list[Node],
        before: list[Node],
        leaves: list[Any],
        twins: Mapping[Node, Node],
        handed: Mapping[int, Given],
    ) -> dict[int, Node | Given] | None:
        """Return what each tensor is that a call is given; ``None`` if that is not certain, or it reads others too."""
        tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
        alike = {n: [i for i, x in tensors.items() if self._is(n, x, twins)] for n in read if n in twins}
        if not all(alike[n] for n in alike if not self._is_held(n, twins)):
            return None
        found: dict[int, Node | Given] = {i: handed[i] for i in tensors if i in handed}
        for i in (i for i in tensors if i not in found):
            nodes = [n for n, same in alike.items() if i in same]
            if not nodes:  # training alone may read it
                nodes = [n for n in dict.fromkeys(before) if n in twins and self._is(n, tensors[i], twins)]
            if len(nodes) != 1 or len(alike.get(nodes[0], [])) > 1:
                return None
            found[i] = nodes[0]
        return found

    def _matched(self, nodes: list[Node], values: list[Tensor], twins: Mapping[Node, Node]) -> dict[int, Node] | None:
        """Return, by ``id``, which node each tensor is; ``None`` if a node is none of them, or may be several."""
        found: dict[int, Node] = {}
        for node in nodes:
            same = [id(x) for x in values if self._is(node, x, twins)]
            if len(same) != 1 or same[0] in found:
                return None
            found[same[0]] = node
        return found

    def _is(self, node: Node, x: Tensor, twins: Mapping[Node, Node]) -> bool:
        value = self._facts.values.get(twins[node])
        return isinstance(value, Tensor) and same_value(value, x, APART)

    def _varies(self, node: Node, twins: Mapping[Node, Node]) -> bool:
        """Tell whether a node must be read off the result, and is not a size, or follows from sizes alone."""
        return node in twins and twins[node] in self._facts.varying

    def _is_held(self, node: Node, twins: Mapping[Node, Node]) -> bool:
        """Tell whether a module has a node by itself: what it holds, and sizes of what it is given."""
        source = self._facts.trace.sources.get(twins[node]) if node in twins else None
        return node not in twins or (source is not None and source.kind != "input")


def changing(model: nn.Module, inputs: Inputs) -> frozenset[str]:
    """Return the modules that, or modules in which, anything but the values of parameters changes in a run."""
    found: set[str] = set()
    inside = {path: [*module.modules()] for path, module in model.named_modules()}

    def look(path: str, *_: object) -> None:
        if path not in found and any(not _same_state(before[id(m)], _state(m)) for m in inside[path]):
            found.add(path)

    handles = [m.register_forward_pre_hook(functools.partial(look, p)) for p, m in model.named_modules()]
    handles += [m.register_forward_hook(functools.partial(look, p)) for p, m in model.named_modules()]
    before = {id(m): _state(m) for m in model.modules()}
    try:
        with trying(model, inputs) as run_it, attributes_written() as told:
            run_it()
    finally:
        for handle in handles:
            handle.remove()
    new = {m for m, _ in told}  # what is set to what it is may be something else in a model that is made anew
    return frozenset(found | {p for p, modules in inside.items() if not new.isdisjoint(modules)})


def _state(module: nn.Module) -> list[Any]:
    """Return what a module remembers: its attributes, what is in those that hold others, and versions of tensors."""
    held: list[Any] = []
    for value in (x for name, x in vars(module).items() if not name.startswith("_forward")):
        held.append(value)
        if isinstance(value, dict):
            held += value.values()
        elif isinstance(value, list | tuple | set | deque):
            held += value
        elif is_plain(value):
            held += vars(value).values()
    return [*held, *(x._version for x in held if isinstance(x, Tensor))]


def _same_state(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y or (isinstance(x, PLAIN) and type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True)
    )


def _handed_on(outer: Begun, inner: Begun) -> dict[int, Given]:
    """Return which arguments of a call, by ``id``, are the very ones that the call around it was given."""
    pairs = [(at, x) for at, x in zip(outer.objects, pytree.tree_leaves(outer.arguments), strict=True)]
    held = {at: (Given(i), x) for i, (at, x) in enumerate(p for p in pairs if isinstance(p[1], Tensor))}
    found: dict[int, Given] = {}
    for at, x in zip(inner.objects, pytree.tree_leaves(inner.arguments), strict=True):
        if isinstance(x, Tensor) and at in held and same_value(held[at][1], x):  # it may have been written to
            found[id(x)] = held[at][0]
    return found


def _is_plain(tree: Any) -> bool:
    """Tell whether arguments are made of what the steps of a recipe hold."""
    if type(tree) in (list, tuple, dict):
        return all(map(_is_plain, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, Tensor) or type(tree) in _PLAIN


def _tensors(tree: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[int, tuple[Tensor, tuple[int | str, ...]]]]:
    """Yield the tensors of a result that indices lead to, by ``id``, with these."""
    if isinstance(tree, Tensor):
        yield id(tree), (tree, path)
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, tuple | list) else ()
    for step, part in steps:
        if isinstance(step, int | str):
            yield from _tensors(part, (*path, step))
