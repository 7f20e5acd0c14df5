"""Find the modules whose code cannot follow the smaller tensors, and write their forwards anew."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..tracing import Inputs
from ..tracing.capture import all_tensors
from ..tracing.origins import owners
from ..tracing.symbolic import Symbolic, capture_part
from .children import Children
from .culprits import APART, Call, same_value
from .dead import Branch
from .plan import Draft, Permissions, Plan
from .recipes import (
    Recipe,
    Sized,
    UndescribableError,
    describe_graph,
    describe_tree,
    without_unread,
)
from .regraph import Layer, Part, Rewriter
from .rewritten import kind_of, plain_signature, unbind
from .silence import Seen, constants_alone, sizes_of
from .steps import UnwritableError
from .widths import Widths

_LAYERS = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.dropout._DropoutNd),
    *(nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
)
"""Layers that a rewritten forward calls, so that hooks, quantization, adapters and gates find them."""


class Parts:
    """The graphs of modules that are traced alone, where no graph of the whole model leaves its sizes open."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[str, int], Symbolic | None] = {}

    def of(self, path: str, call: Call, i: int, steps: list[Node]) -> Symbolic:
        """Return the graph of a module as it is called for the i-th time, which takes some steps of the model's trace.

        Raises:
            UnwritableError: If there is none.
        """
        if (path, i) not in self._known:
            inputs = Inputs(*unbind(plain_signature(self._model.get_submodule(path)), call.arguments))
            self._known[path, i] = capture_part(self._model, path, inputs, steps) if path else None
        found = self._known[path, i]
        if found is None:
            raise UnwritableError(f"{path or 'the model'} cannot be traced with open sizes, alone either")
        return found


def spans(graph: Graph) -> dict[str, dict[str, list[Node]]]:
    """Return, per module, the nodes of each of its calls."""
    found: dict[str, dict[str, list[Node]]] = {}
    for node in graph.nodes:
        for call, path in owners(node).items() if node.meta.get("val") is not None else ():
            found.setdefault(path, {}).setdefault(call, []).append(node)
    return found


class Grafts:
    """Writes the forwards of modules anew.

    Args:
        model: The model that was analysed.
        symbolic: Its graph with open sizes.
        widths: What is kept.
        plan: What is cut.
        permissions: What may be changed.
        calls: Every call of its modules on the inputs of the trace.
        spared: Modules whose own code stays.
        parts: Graphs of modules alone to write them from, in place of that of the whole model.
        dropouts: How much each attention of the trace drops in training.
        changing: Modules whose attributes change in a run.
        elsewhere: Per module, the sizes in its calls on other inputs, where the graph holds at the example's only.
    """

    def __init__(
        self,
        model: nn.Module,
        symbolic: Symbolic,
        widths: Widths,
        plan: Plan,
        permissions: Permissions,
        calls: list[Call],
        spared: Collection[str] = (),
        parts: Parts | None = None,
        dropouts: Mapping[Node, float] | None = None,
        changing: Collection[str] = (),
        elsewhere: Sequence[Mapping[str, list[Seen]]] = (),
    ) -> None:
        self.model, self.symbolic, self.calls, self.spared, self._parts = model, symbolic, calls, spared, parts
        self.facts, self._widths = widths.facts, widths
        self._modules = dict(model.named_modules())
        self._first = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self._layers = {n: self._layer(m) for n, m in self._modules.items() if _is_stock(m)}
        self._permissions, self._dropouts = permissions, dropouts or {}
        self._rewriter = self._writing_from(symbolic)
        self._new_biases = plan.new_biases
        self._spans = spans(symbolic.graph)
        self._called = {c.path for c in calls}
        self._children = Children(model, calls, self.facts, changing)
        self._elsewhere = elsewhere
        self._silent: set[str] = set()
        """Modules whose new forward does not give all that the old one gave."""

    def _layer(self, module: nn.Module) -> Layer:
        return Layer(module, frozenset(self._first[id(t)] for _, t in all_tensors(module)))

    def onto(self, draft: Draft, path: str) -> Draft | None:
        """Write the forward of a module anew, or else of the next one around it; ``None`` if none can be.

        None can of a module that the graph does not show: nobody needs what it gives. If it fails for want of what a
        forward that was written anew gives no more, as nobody needs that, the one around both leaves it out. Where the
        next one around is written anew already and calls it, it does what is in it by itself from then on.

        Modules of the same class that something is cut of are written anew with it.
        """
        beside = [p.rpartition(".")[0] for p in self._silent if draft.covers(p)]
        led = any(f"{path}.".startswith(f"{p}." if p else p) for p in beside)
        step: str | None = path if led or path in self._spans else None
        inlined: set[str] = set()
        while step is not None:
            if step in self._spans and (not draft.covers(step) or step in draft.plan.recipes):
                with contextlib.suppress(UnwritableError):
                    more = draft.inlining(inlined)
                    recipe, constants = self.write(step, more.inlined)
                    if recipe != draft.plan.recipes.get(step):
                        draft = more.grafted(step, recipe, constants)
                        break
            inlined.add(step)
            step = step.rpartition(".")[0] if step else None
        if step is None:
            return None
        for other, module in self._modules.items():
            alike = type(module) is type(self._modules[step]) and not draft.covers(other)
            if alike and any(not self._whole(n) for span in self._spans.get(other, {}).values() for n in span):
                with contextlib.suppress(UnwritableError):
                    draft = draft.grafted(other, *self.write(other, draft.inlined))
        return draft

    def without(self, draft: Draft, branches: Iterable[Branch]) -> Draft:
        """Leave dead branches out: of the module in which they meet something alive, or each for the constant it is.

        What follows a branch that stays, as its code does, stays too: nothing would train the branch without it.
        """
        branches = list(branches)
        staying = {p.rpartition(".")[0] for b in branches for p in b.paths if p in self.spared}
        for branch in branches:
            if branch.meets is not None and not draft.covers(branch.meets):
                try:
                    draft = draft.grafted(branch.meets, *self.write(branch.meets))
                    continue
                except UnwritableError:
                    pass
            for path in (p for p in branch.paths if not draft.covers(p) and p.rpartition(".")[0] not in staying):
                with contextlib.suppress(UnwritableError):
                    draft = draft.grafted(path, *(self._silence(path) if self._elsewhere else self.write(path)))
        return draft

    def _whole(self, node: Node) -> bool:
        """Tell whether nothing of a node is cut."""
        twin = self.symbolic.twins.get(node)
        return twin is None or all(self._widths.full(o) for o in self.facts.outputs(twin) if o in self._widths.keep)

    def write(self, path: str, inlined: Collection[str] = ()) -> tuple[Recipe, dict[str, Tensor]]:
        """Write the forward of a module anew; it calls those within it of which the graph shows all they take and give.

        Args:
            path: The module.
            inlined: Modules that it does not call.

        Returns:
            The recipe, and its constants.

        Raises:
            UnwritableError: If it cannot be written.
        """

        def write(i: int, call: Call, nodes: list[Node]) -> tuple[Recipe, dict[str, Tensor]]:
            return self._write(path, call, *self._graph(path, call, i, nodes), inlined)

        return self._for_all_calls(path, write)

    def _for_all_calls(
        self, path: str, write: Callable[[int, Call, list[Node]], tuple[Recipe, dict[str, Tensor]]]
    ) -> tuple[Recipe, dict[str, Tensor]]:
        """Write the one forward that all calls of a module are given."""
        if path in self.spared:
            raise UnwritableError(f"{path or 'the model'} is given a cache, which its new forward would not take")
        found = [c for c in self.calls if c.path == path]
        traced = list(self._spans.get(path, {}).values())
        if not found or len(found) != len(traced):
            raise UnwritableError(f"{path or 'the model'} is called {len(found)} times, and traced {len(traced)} times")
        try:
            written = [write(i, call, nodes) for i, (call, nodes) in enumerate(zip(found, traced, strict=True))]
        except UndescribableError as e:
            raise UnwritableError(f"{path or 'the model'} takes or returns {e}") from e
        recipe, constants = written[0]
        alike = (other == recipe and all(same_value(constants[n], held[n]) for n in held) for other, held in written)
        if not all(alike):
            raise UnwritableError(f"{path or 'the model'} is called several times, and not in the same way")
        return recipe, constants

    def _silence(self, path: str) -> tuple[Recipe, dict[str, Tensor]]:
        """Write the forward of a dead module as what it gives, whatever its graph is at other sizes.

        Raises:
            UnwritableError: If it gives anything but constants of sizes that it is given.
        """
        return self._for_all_calls(path, lambda i, call, nodes: self._constants(path, i, call, nodes))

    def _constants(self, path: str, i: int, call: Call, nodes: list[Node]) -> tuple[Recipe, dict[str, Tensor]]:
        given, _, takes, _ = _takes(call)
        here, there = sizes_of(call, call.sized), [seen[path][i] for seen in self._elsewhere if path in seen]
        if len(there) < len(self._elsewhere) or any(s.axes != here.axes for s in there):
            raise UnwritableError(f"{path} is called in another way at other sizes")
        nodes = [n for n in nodes if n.op == "call_function"]
        values = dict[int, Tensor]()
        places = itertools.count()

        def find(x: Any) -> Any:
            """Note the constant that a result is, or return ``None`` in place of one that no code reads."""
            if not isinstance(x, Tensor):
                return x
            at, told = next(places), self._told(x, nodes, set(nodes), self.symbolic.twins)
            if told:
                values[at] = self._constant(self.symbolic.twins[told[0]])
                return x
            if any(same_value(x, y) for y in given):
                raise UnwritableError(f"{path} gives what it is given")
            self._silent.add(path)
            return None

        gives = describe_tree(pytree.tree_map(find, call.result), [])
        part = constants_alone(values, here, there, self._names(path).values())
        return self._recipe(path, part, given, takes, gives)

    def _constant(self, node: Node) -> Tensor:
        """Return what stays of a node that is a constant, or that nobody needs."""
        value = self.facts.settled(node)
        if value is None:
            raise UnwritableError(f"{node.name} is no constant")
        for axis, kept in enumerate(self._widths.keep.get(node, ())):
            value = value.index_select(axis, kept.nonzero().flatten())
        return value

    def _graph(self, path: str, call: Call, i: int, nodes: list[Node]) -> tuple[Rewriter, list[Node]]:
        """Return what writes a call of a module, and its nodes."""
        if self._parts is None:
            return self._rewriter, nodes
        twins = self.symbolic.twins
        steps = [twins[n] for n in nodes if n.op == "call_function" and n in twins]
        alone = self._parts.of(path, call, i, steps)
        [nodes] = spans(alone.graph)[path].values()
        return self._writing_from(alone), nodes

    def _writing_from(self, symbolic: Symbolic) -> Rewriter:
        return Rewriter(symbolic, self._widths, self._permissions, self._layers, self._dropouts)

    def _write(
        self, path: str, call: Call, rewriter: Rewriter, nodes: list[Node], inlined: Collection[str]
    ) -> tuple[Recipe, dict[str, Tensor]]:
        twins, inside = rewriter.symbolic.twins, set(nodes)
        given, numbers, takes, names = _takes(call)
        read = {n for node in nodes for n in node.all_input_nodes if n not in inside}
        own = self._names(path)
        inputs = [self._given(x, read, own, twins) for x in given]
        if not path:  # of several that are alike
            exact = {
                s.name: n for n, t in twins.items() if (s := self.facts.trace.sources.get(t)) and s.kind == "input"
            }
            inputs = [[exact[names[i]]] if names.get(i) in exact else same for i, same in enumerate(inputs)]
        candidates = [*reversed(nodes), *(n for same in inputs for n in same)]
        self._require_certain(path, [s for s in inputs if len(s) > 1], "is given")
        results = [x for x in pytree.tree_leaves(call.result) if isinstance(x, Tensor)]
        told = (None if path else self._outputs(results, twins)) or [
            self._told(x, candidates, inside, twins) for x in results
        ]
        self._require_certain(path, [s for s in told if len(s) > 1], "gives")
        outputs, found = list[Node](), iter(told)

        def find(x: Any) -> Any:
            """Return a result, or ``None`` in place of one that no code of the model reads: its graph has none."""
            node = next(iter(next(found)), None) if isinstance(x, Tensor) else None
            if node is None and isinstance(x, Tensor):
                if not path:
                    raise UnwritableError("the model returns a tensor that it does not compute")
                self._silent.add(path)
                return None
            outputs.extend([] if node is None else [node])
            return x

        gives = describe_tree(pytree.tree_map(find, call.result), [])
        known = [n for same in inputs for n in same]
        children = self._children.of(call, nodes, twins, known, outputs, inlined)
        children = [c for c in children if c.path in own]
        write = functools.partial(rewriter.write, nodes, inputs, outputs, own, numbers)
        try:
            part = write(children)
        except UnwritableError:  # does it all by itself, then
            part = write()
        return self._recipe(path, part, given, takes, gives)

    def _recipe(
        self, path: str, part: Part, given: list[Tensor], takes: Any, gives: Any
    ) -> tuple[Recipe, dict[str, Tensor]]:
        placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
        takes = without_unread(takes, {i for i, n in enumerate(placeholders[: len(given)]) if n.users})
        shapes = {n: list(t.shape) for n, t in part.constants.items()}
        axes, kinds = [x.dim() for x in given], [kind_of(x) for x in given]
        drops = self._drops(path, part)
        return Recipe(describe_graph(part.graph), takes, gives, shapes, drops, axes, kinds), part.constants

    def _drops(self, path: str, part: Part) -> list[str]:
        """Return the tensors of a module that its code reads and its new forward does not.

        What a layer holds beside them, such as the number of batches seen, goes with the last one of them.
        """
        module = self._modules[path]
        used = {n.target for n in part.graph.nodes if n.op == "get_attr"}
        called = {str(n.target) for n in part.graph.nodes if n.op == "call_module"}
        read = {s.name for n, s in self.facts.trace.sources.items() if n.users and s.kind in ("parameter", "buffer")}
        stays = {n: n in used or any(n.startswith(f"{c}.") for c in called) for n, _ in all_tensors(module)}
        names = [n for n, t in all_tensors(module) if self._first[id(t)] in read or self._is_unread(path, n)]
        left = {n.rpartition(".")[0] for n in names if stays[n]}
        emptied = {n.rpartition(".")[0] for n in names} - left - {""}
        return [n for n in stays if not stays[n] and (n in names or n.rpartition(".")[0] in emptied)]

    def _require_certain(self, path: str, alike: list[list[Node]], what: str) -> None:
        """Require that no two tensors are alike in the example, which other inputs or training may tell apart."""
        if len({frozenset(nodes) for nodes in alike}) < len(alike):
            raise UnwritableError(f"{path or 'the model'} {what} several tensors that are alike in the example")

    def _is_unread(self, path: str, name: str) -> bool:
        """Tell whether a tensor is one of a module which is called, and of which nobody needs what it gives."""
        owner = f"{path}.{name}".removeprefix(".").rpartition(".")[0]
        return owner in self._called and owner not in self._spans

    def _given(self, x: Tensor, read: set[Node], own: Collection[str], twins: Mapping[Node, Node]) -> list[Node]:
        """Return the nodes that a module reads from outside and that have the value of an argument."""
        nodes = [n for n, twin in twins.items() if self._may_be_given(twin, own)]
        same = self._alike(x, nodes, twins)
        return [n for n in same if n in read] or same[:1]

    def _may_be_given(self, twin: Node, own: Collection[str]) -> bool:
        """Tell whether a node may be an argument of a module: not a constant, or a tensor of its own."""
        source = self.facts.trace.sources.get(twin)
        return source is None or source.kind == "input" or (source.kind != "constant" and source.name not in own)

    def _outputs(self, results: list[Tensor], twins: Mapping[Node, Node]) -> list[list[Node]] | None:
        """Return the nodes that the whole model's trace gives; ``None`` if they are not the tensors of its result."""
        nodes = {twin: n for n, twin in twins.items()}
        given = [nodes.get(twin) for twin in self.facts.trace.outputs]
        known = [n for n in given if n is not None]
        alike = len(known) == len(given) == len(results) and all(
            bool(self._alike(x, [n], twins)) for x, n in zip(results, known, strict=True)
        )
        return [[n] for n in known] if alike else None

    def _told(self, x: Tensor, candidates: list[Node], inside: set[Node], twins: Mapping[Node, Node]) -> list[Node]:
        """Return the nodes that a result may be: those that have its value, and of these the ones read elsewhere."""
        same = self._alike(x, [n for n in candidates if n in twins], twins)
        return [n for n in same if not inside.issuperset(n.users)] or same

    def _alike(self, x: Tensor, nodes: list[Node], twins: Mapping[Node, Node]) -> list[Node]:
        """Return the nodes that have the value of a tensor, or else those that come close."""

        def has(node: Node, apart: float) -> bool:
            value = self.facts.values.get(twins[node])
            return isinstance(value, Tensor) and same_value(value, x, apart)

        return [n for n in nodes if has(n, 0.0)] or [n for n in nodes if has(n, APART)]

    def _names(self, path: str) -> dict[str, str]:
        """Return the names of tensors and layers of the whole model as a module sees them."""
        module = self._modules[path]
        names = {self._first[id(t)]: n for n, t in reversed(list(all_tensors(module)))}
        held = {id(m): n for n, m in reversed(list(module.named_modules(remove_duplicate=False)))}
        names |= {n: held[id(m)] for n, m in self._modules.items() if id(m) in held}
        names |= {f"{p}.bias".lstrip("."): f"{names[p]}.bias".lstrip(".") for p in self._new_biases if p in names}
        return names


def _takes(call: Call) -> tuple[list[Tensor], list[int], Any, dict[int, str]]:
    """Return what a call is given: tensors, numbers that follow from sizes, their form, and the arguments' names.

    Raises:
        UnwritableError: If its result holds such a number.
        UndescribableError: If it is given anything else that a recipe cannot hold.
    """
    if call.gives_sizes:
        raise UnwritableError(f"{call.path or 'the model'} returns a number that follows from the sizes of its inputs")
    given: list[Tensor] = []
    leaves, form = pytree.tree_flatten(call.arguments)
    tensors, places = sum(isinstance(x, Tensor) for x in leaves), sorted(call.sized)
    numbers = [leaves[at] for at in places]
    for i, at in enumerate(places):
        leaves[at] = Sized(tensors + i)
    takes, names = {"dict": dict[str, Any]()}, dict[int, str]()
    for name, value in pytree.tree_unflatten(leaves, form).items():
        names[len(given)] = name if isinstance(value, Tensor) else ""
        takes["dict"][name] = describe_tree(value, given)
    return given, numbers, takes, names


def _is_stock(module: nn.Module) -> bool:
    """Tell whether a module is a layer of torch's, with torch's own forward and plain parameters."""
    own = (type(module).forward.__module__ or "").startswith("torch.nn.modules.") and "forward" not in vars(module)
    return isinstance(module, _LAYERS) and own and not torch.nn.utils.parametrize.is_parametrized(module)
