"""Write a part of a graph anew for smaller tensors: every size that is written in it becomes what is kept of its axis.

The part comes from the graph with open sizes, so that batch sizes and sequence lengths stay open; which indices of an
axis are kept comes from its twin with the sizes of the example. What is constant by now is not computed any more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from ..tracing.families import Attention, Contraction, Pointwise, Product
from ..tracing.lowering import CAST
from ..tracing.operations import op_name, shape_of
from ..tracing.origins import owner, owners, where
from ..tracing.symbolic import Symbolic, is_open
from .children import Child, Given
from .constants import held_once
from .plan import Permissions, folded_constant
from .scatter import places_of, read_of
from .sizes import Sizes
from .steps import RULES, UnwritableError, share_of, take
from .widths import Fold, Widths


@dataclass(frozen=True)
class Part:
    """A part of a graph, written anew.

    Args:
        graph: Placeholders are the part's inputs, in order; parameters and buffers are attributes by their names.
        constants: Tensors that are attributes of their own.
    """

    graph: Graph
    constants: dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A stock layer, and the names of its parameters and buffers in the graph."""

    module: nn.Module
    tensors: frozenset[str]


class Rewriter:
    """Writes parts of one graph.

    Args:
        symbolic: The graph with open sizes, and its twin.
        widths: What is kept of every axis of the twin.
        permissions: What may be changed.
        layers: Stock layers by name. Where a step is the forward of one, the part calls the layer.
        dropouts: How much each attention of the twin drops in training.
    """

    def __init__(
        self,
        symbolic: Symbolic,
        widths: Widths,
        permissions: Permissions,
        layers: Mapping[str, Layer],
        dropouts: Mapping[Node, float],
    ) -> None:
        self.symbolic, self.widths, self.dropouts = symbolic, widths, dropouts
        self.facts = widths.facts
        self.permissions, self.layers = permissions, layers
        self.spans: dict[str, list[Node]] = {}
        """Per call of a module, what its own forward does."""
        for node in symbolic.graph.nodes:
            for call in list(owners(node))[-1:] if node.op == "call_function" else ():
                self.spans.setdefault(call, []).append(node)

    def write(
        self,
        nodes: list[Node],
        inputs: list[list[Node]],
        outputs: list[Node],
        names: Mapping[str, str],
        numbers: Sequence[int] = (),
        children: Sequence[Child] = (),
    ) -> Part:
        """Write a part.

        Args:
            nodes: Its nodes in order, of the graph with open sizes.
            inputs: For each value that it is given, the nodes that have it.
            outputs: Nodes whose values it returns.
            names: Per parameter or buffer, its name as seen from the part's module.
            numbers: The whole numbers that it is given after those values, as they are in the example.
            children: The modules that it calls.

        Raises:
            UnwritableError: If a step cannot be written for the smaller tensors.
        """
        return Writing(self, nodes, inputs, outputs, names, numbers, children).part()

    @functools.cached_property
    def sizes(self) -> dict[Any, int]:
        """How large the open sizes are in the example."""
        found: dict[Any, int] = {}
        for node, twin in self.symbolic.twins.items():
            held, here = node.meta.get("val"), self.facts.values.get(twin)
            if isinstance(held, Tensor) and isinstance(here, Tensor):
                found |= {cast(Any, n).node.expr: m for n, m in zip(held.shape, here.shape, strict=True) if is_open(n)}
        return found

    def twin(self, node: Node) -> Node:
        """Return the node of the example's graph."""
        return self.symbolic.twins[node]

    def kept(self, node: Node, axis: int) -> Tensor:
        """Mark the indices along an axis that are kept."""
        return self.widths.keep[self.twin(node)][axis]


class Writing:
    """The writing of one part."""

    def __init__(
        self,
        rewriter: Rewriter,
        nodes: list[Node],
        inputs: list[list[Node]],
        outputs: list[Node],
        names: Mapping[str, str],
        numbers: Sequence[int],
        children: Sequence[Child],
    ) -> None:
        self.r, self.nodes, self.outputs, self.names = rewriter, set(nodes), outputs, names
        self.facts = rewriter.facts
        self.graph = Graph()
        self.made: dict[Node, Any] = {}
        self.given = [self.graph.placeholder(f"x{i}") for i in range(len(inputs))]
        for placeholder, same in zip(self.given, inputs, strict=True):
            self.made.update(dict.fromkeys(same, placeholder))
        self.sizes = Sizes(rewriter.symbolic, self.graph, self.made, rewriter.sizes, numbers)
        self.constants: dict[str, Tensor] = {}
        self._children = {n: child for child in children for n in child.results}
        self._called: dict[Child, Node] = {}
        self._known: dict[Node, Tensor | None] = {}
        self.order = [n for n in nodes if n.op == "call_function"]

    def part(self) -> Part:
        """Write it."""
        for node in self._wanted():
            self.made[node] = self._write(node)
        self.graph.output(tuple(self._get(n) for n in self.outputs))
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        self.graph.lint()
        return Part(self.graph, self.constants)

    def _wanted(self) -> list[Node]:
        """Return the nodes that the outputs are computed from, without what is constant by now."""
        wanted, front = set[Node](), [n for n in self.outputs if n not in self.made]
        while front:
            node = front.pop()
            if node in wanted or node in self.made or node not in self.nodes:
                continue
            wanted.add(node)
            front.extend(self._reads(node))
        return [n for n in self.order if n in wanted]

    def _reads(self, node: Node) -> list[Node]:
        if self._constant(node) is not None:
            return []
        if node in self._children:
            return self._children[node].given
        passed = self._passed(node)
        return [passed] if passed is not None else list(node.all_input_nodes)

    # values that are known by now

    def _constant(self, node: Node) -> Tensor | None:
        """Return the value of a node of which nothing is needed but constants, with size 1 along open axes."""
        if node not in self._known:
            self._known[node] = self._find_constant(node)
        return self._known[node]

    def _find_constant(self, node: Node) -> Tensor | None:
        twin = self.r.symbolic.twins.get(node)
        if twin is None or twin not in self.facts.varying or not isinstance(self.facts.values.get(twin), Tensor):
            return None
        value = self.facts.settled(twin)
        if value is None or not value.numel():
            return None
        shape = node.meta["val"].shape
        for axis, size in enumerate(shape):
            if is_open(size):
                once = held_once(value, axis)
                if once is None:
                    return None
                value = once
            else:
                value = value.index_select(axis, self.r.kept(node, axis).nonzero().flatten())
        return value

    def _passed(self, node: Node) -> Node | None:
        """Return the operand that a sum with zeros passes on."""
        twin = self.r.symbolic.twins.get(node)
        family = self.facts.families.get(twin) if twin is not None else None
        if (
            not isinstance(family, Pointwise)
            or op_name(node) not in ("add", "sub")
            or node.kwargs
            or len(node.args) != 2
        ):
            return None
        a, b = cast("tuple[Any, Any]", node.args)
        for x, other in ((a, b), (b, a)) if op_name(node) == "add" else ((a, b),):
            if not (isinstance(x, Node) and isinstance(other, Node)) or other not in self.r.symbolic.twins:
                continue
            zero = self.r.twin(other)
            if zero in self.facts.varying and isinstance(self.facts.values[zero], Tensor):
                nothing = bool(self.facts.zero(zero).all())
                if nothing and [str(n) for n in x.meta["val"].shape] == [str(n) for n in node.meta["val"].shape]:
                    return x
        return None

    def _promoted(self, x: Node, node: Node) -> Any:
        """Return an operand as a sum with zeros gives it, which may be of another precision than it is itself."""
        if x.meta["val"].dtype == node.meta["val"].dtype:
            return self._get(x)
        [zeros] = [n for n in node.all_input_nodes if n is not x]
        zero = self.hold(torch.zeros([1] * len(node.meta["val"].shape), dtype=zeros.meta["val"].dtype))
        return self.graph.call_function(torch.ops.aten.add.Tensor, (self._get(x), self.graph.get_attr(zero)))

    def _emit_constant(self, node: Node, value: Tensor) -> Any:
        shape, sizes = node.meta["val"].shape, list(value.shape)
        for axis in range(value.dim()):  # what is the same all along an axis is held once
            first = value.narrow(axis, 0, min(1, value.shape[axis]))
            value = first if bool((value == first).all()) else value
        held = self.graph.get_attr(self.hold(value))
        if not any(map(is_open, shape)) and sizes == list(value.shape):
            return held
        sizes = [self.sizes.told(n) if is_open(n) else sizes[a] for a, n in enumerate(shape)]
        return self.graph.call_function(torch.ops.aten.expand.default, (held, sizes))

    def trains(self, node: Node) -> Node:
        """Return whether the module trains whose code made a node."""
        name = self.names.get(owner(node) or "")
        return self.graph.get_attr(f"{name}.training" if name else "training")

    def hold(self, value: Tensor) -> str:
        """Hold a tensor as a constant, and return its name."""
        name = constant_name({*self.names.values(), *self.constants})  # a module that is written anew again holds some
        self.constants[name] = value.clone()
        return name

    def _cut(self, node: Node, value: Any) -> Any:
        """Return what stays of a tensor that the forward makes."""
        for axis in range(value.dim() if isinstance(value, Tensor) else 0):
            value = value.index_select(axis, self.r.kept(node, axis).nonzero().flatten())
        return value

    # operands

    def _get(self, node: Node) -> Any:
        if node in self.made:
            return self.made[node]
        if node.op == "placeholder":
            source = self.facts.trace.sources.get(self.r.twin(node))
            if source is None:
                raise UnwritableError(f"it reads {node.name}, which it is not given")
            if source.kind == "constant":
                name = self.hold(self._cut(node, source.value))
            elif source.name in self.names:
                name = self.names[source.name]
            else:
                raise UnwritableError(f"it reads {source.name}, which is not its own")
            self.made[node] = self.graph.get_attr(name)
            return self.made[node]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.made[node] = self.sizes.told(value)
            return self.made[node]
        constant = self._constant(node)
        if constant is not None:
            self.made[node] = self._emit_constant(node, constant)
            return self.made[node]
        twin = self.r.symbolic.twins.get(node)
        if node.op == "call_function" and twin is not None and twin not in self.facts.varying:
            self.made[node] = self._write(node)  # a mask, say, which follows from sizes and from what is its own
            return self.made[node]
        raise UnwritableError(f"it reads {node.name} of {where(node)}, which it is not given")

    # one node

    def _write(self, node: Node) -> Any:
        """Write a node, and the cast to the precision of what the part is given that code does of it."""
        made = self._written(node)
        if not node.meta.get(CAST) or node.meta["val"].dtype != torch.float64 or not isinstance(made, Node):
            return made
        own = self._here(torch.float64)
        return self.graph.call_function(torch.ops.aten.to.dtype, (made, own)) if isinstance(own, Node) else made

    def _written(self, node: Node) -> Any:
        constant = self._constant(node)
        if constant is not None:
            return self._emit_constant(node, constant)
        if node in self._children:
            return self._returned(self._children[node], node)
        passed = self._passed(node)
        if passed is not None:
            return self._promoted(passed, node)
        if isinstance(node.meta.get("val"), torch.SymInt):  # what it is computed from may lie outside
            with contextlib.suppress(UnwritableError):
                return self.sizes.told(node.meta["val"])
        layer = self._layer(node) if node in self.r.symbolic.twins else None
        if layer is not None:
            return layer
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self._taken(n, node))
        args = [self._here(a) for a in cast("tuple[Any, ...]", args)]
        kwargs = {k: self._here(v) for k, v in cast("dict[str, Any]", kwargs).items()}
        if node not in self.r.symbolic.twins:
            return self.graph.call_function(cast(Any, node.target), tuple(args), kwargs)
        rule = RULES.get(op_name(node))
        made = rule(self, node, args, kwargs) if rule is not None else None
        if made is None:
            made = self.graph.call_function(cast(Any, node.target), tuple(args), kwargs)
        return self._scattered(node, self._with_sum(node, self._with_bias(node, made)))

    def _returned(self, child: Child, node: Node) -> Node:
        """Call a module, once, and return what it gives for a node."""
        if child not in self._called:
            handed = pytree.tree_map_only(Given, lambda x: self.given[x.index], (child.args, child.kwargs))
            args, kwargs = torch.fx.map_arg(handed, lambda n: n if n in self.given else self._get(n))
            self._called[child] = self.graph.call_module(self.names[child.path], args, kwargs)
        made = self._called[child]
        for step in child.results[node]:
            made = self.graph.call_function(operator.getitem, (made, step))
        return made

    def _taken(self, n: Node, node: Node) -> Any:
        """Return an operand, or of one that is shared what an operation takes of it."""
        made = self._get(n)
        twins = self.r.symbolic.twins
        family = self.facts.families.get(twins[node]) if n in twins and node in twins else None
        if isinstance(family, Contraction) and twins[n] is family.x and twins[node] in self.r.widths.allowed.picking:
            read = read_of(self.r.widths, twins[node])
            places = self.graph.get_attr(self.hold(read.nonzero().flatten()))
            return self.graph.call_function(torch.ops.aten.index_select.default, (made, family.x_axis, places))
        if isinstance(family, Product):
            for axis, other, other_axis in family.summed(twins[n]):
                kept, takes = (self.r.widths.keep[t][a] for t, a in ((twins[n], axis), (other, other_axis)))
                if len(kept) == len(takes) and not bool((takes & ~kept).any() or kept.equal(takes)):
                    made = take(self, made, axis, kept, takes.nonzero().flatten())
        if isinstance(family, Pointwise) and twins[n] in family.operands:
            last = 0
        elif isinstance(family, Attention) and twins[n] not in (family.query, family.key, family.value):
            last = 1  # along the keys, and not the channels of the result
        else:
            return made
        out = self.facts.outputs(twins[node])[0]
        here, wanted = (self.r.widths.keep[t] for t in (twins[n], out))
        for axis in range(len(here) - last):
            kept, takes = here[axis], wanted[axis - len(here)]
            if len(kept) == len(takes) and not kept.equal(takes):
                made = self._part(n, made, axis, kept, takes)
        return made

    def _part(self, n: Node, made: Any, axis: int, kept: Tensor, takes: Tensor) -> Any:
        """Take part of an axis of an operand; of an open size (batch times heads), of every block the same."""
        if not is_open(n.meta["val"].shape[axis]):
            return take(self, made, axis, kept, takes.nonzero().flatten())
        size = next(p for p in range(1, len(kept) + 1) if _repeats(kept, p) and _repeats(takes, p))
        if size == len(kept):
            raise UnwritableError(f"{n.name} of {where(n)} is cut in a way that other sizes do not show")
        kept, takes = kept[:size], takes[:size]
        blocks = self.graph.call_function(torch.ops.aten.unflatten.int, (made, axis, [-1, int(kept.sum())]))
        part = take(self, blocks, axis + 1, kept, takes.nonzero().flatten())
        return self.graph.call_function(torch.ops.aten.flatten.using_ints, (part, axis, axis + 1))

    def _scattered(self, node: Node, made: Any) -> Any:
        """Spread what a contraction computes over all of its outputs."""
        twin = self.r.twin(node)
        if twin not in self.r.widths.allowed.scattered:
            return made
        kept, held = places_of(self.r.widths, twin)
        if kept.all():
            return made
        axis = cast(Contraction, self.facts.families[twin]).out_axis
        shape = [1 if is_open(n) else int(self.r.kept(node, a).sum()) for a, n in enumerate(node.meta["val"].shape)]
        full = self.facts.values[twin].new_zeros(shape)
        if held is not None:
            full = full + held.view([-1 if a == axis else 1 for a in range(full.dim())])
        places = self.graph.get_attr(self.hold(kept.nonzero().flatten()))
        return self.graph.call_function(
            torch.ops.aten.index_copy.default, (self._emit_constant(node, full), axis, places, made)
        )

    def _here(self, value: Any) -> Any:
        """Write a device, the precision of the analysis, and its extremes, as those of what the part is given."""
        if isinstance(value, torch.device):
            name = "device"
        elif isinstance(value, float | torch.dtype) and value in _OF_DOUBLE:
            name = _OF_DOUBLE[value]
        else:
            return value
        own = (n for n in self.r.symbolic.graph.nodes if n.op == "placeholder" and self._is_own(n))
        for tensor in [*self.made, *own]:
            held = tensor.meta.get("val")
            fits = isinstance(held, Tensor) and (name == "device" or held.dtype == torch.float64)
            if fits and isinstance(self.made.get(tensor, tensor), Node):
                return self.graph.call_function(getattr, (self._get(tensor), name))
        return value

    def _is_own(self, node: Node) -> bool:
        """Tell whether a placeholder stands for a tensor of the part's own."""
        source = self.facts.trace.sources.get(self.r.twin(node))  # none, of what a module is given that is traced alone
        return source is not None and source.name in self.names

    def _layer(self, node: Node) -> Any:
        """Call the layer whose forward a node is, so that it trains as before and may be replaced like any other."""
        path = owner(node) or ""
        layer = self.r.layers.get(path)
        if layer is None or path not in self.names or not self._is_whole(node, layer.module):
            return None
        if self._left_over(node) is not None:  # what it gives lacks constants
            return None
        given = [a for a in node.args if isinstance(a, Node) and self._source(a) not in layer.tensors]
        if isinstance(layer.module, nn.RNNBase):
            given = given[:1]
        elif op_name(given[0]) == "pad" and owner(given[0]) == path:
            given = [cast(Node, given[0].args[0])]
        called = self.graph.call_module(self.names[path], tuple(self._get(a) for a in given))
        if isinstance(layer.module, nn.RNNBase):
            return self._recurrent(node, called)
        return called if isinstance(node.meta["val"], Tensor) else (called,)

    def _source(self, node: Node) -> str | None:
        source = self.facts.trace.sources.get(self.r.twin(node)) if node.op == "placeholder" else None
        return None if source is None else source.name

    def _is_whole(self, node: Node, layer: nn.Module) -> bool:
        """Tell whether a node is all that a layer does, and the layer does the same with the smaller tensors."""
        name = op_name(node)
        if isinstance(layer, nn.modules.dropout._DropoutNd) or "batch_norm" in name:
            return True
        recurrent = isinstance(layer, nn.RNNBase)
        beside = ("zeros", "getitem") if recurrent else ("pad",) if isinstance(layer, nn.modules.conv._ConvNd) else ()
        call = next(reversed(owners(node)))
        if any(n is not node and op_name(n) not in beside for n in self.r.spans[call]):
            return False
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # its caller may have asked for another output size
            return len(node.args) < 6 or tuple(cast("list[int]", node.args[5])) == tuple(layer.output_padding)
        if isinstance(layer, nn.RMSNorm):
            return share_of(self, node) == 1 or self.r.permissions.can_rescale(self.r.twin(node))
        if recurrent:  # from zeros of its own
            states = cast("list[Node]", node.args[1] if name == "lstm" else [node.args[1]])
            return name in _RECURRENT and isinstance(node.args[2], list) and all(call in owners(s) for s in states)
        return True

    def _recurrent(self, node: Node, called: Node) -> tuple[Any, ...]:
        """Return what a recurrent layer gives in the order of its operation."""
        output, states = (self.graph.call_function(operator.getitem, (called, i)) for i in range(2))
        if op_name(node) != "lstm":
            return output, states
        return output, *(self.graph.call_function(operator.getitem, (states, i)) for i in range(2))

    def _fold(self, node: Node) -> Fold | None:
        """Return the constants that a contraction must be given beside its input, if no channel carries them."""
        fold = self.r.widths.folds.get(self.r.twin(node))
        ours = fold is not None and fold.carrier is None
        return fold if ours and isinstance(self.facts.families.get(self.r.twin(node)), Contraction) else None

    def _with_bias(self, node: Node, made: Any) -> Any:
        """Add a bias that was made for constants."""
        family = self.facts.families.get(self.r.twin(node))
        path = self.r.permissions.bias_owner(self.r.twin(node))
        if self._fold(node) is None or not isinstance(family, Contraction) or family.bias is not None or path is None:
            return self._with_constant(node, made)
        with self.graph.inserting_before(made):
            held = self.graph.get_attr(self.names[f"{path}.bias" if path else "bias"])
        if op_name(node) == "linear" or op_name(node).startswith("conv"):
            made.args = (*made.args[:2], held, *made.args[3:])
            return made
        return self._plus(node, made, family.out_axis, held)

    def _with_sum(self, node: Node, made: Any) -> Any:
        """Add the constants of terms that a sum lost."""
        twin = self.r.twin(node)
        more = self.r.widths.added.get(twin)
        if more is None:
            return made
        for axis, kept in enumerate(self.r.widths.keep[twin]):
            if more.shape[axis] > 1:
                more = more.index_select(axis, kept.nonzero().flatten())
        held = self.graph.get_attr(self.hold(more.to(self.facts.values[twin].dtype)))
        return self.graph.call_function(torch.ops.aten.add.Tensor, (made, held))

    def _left_over(self, node: Node) -> Fold | None:
        """Return the constants of a contraction for which no bias can be changed or made."""
        fold = self._fold(node)
        return None if fold is None or self.r.widths.allowed.can_bias(self.r.twin(node)) else fold

    def _with_constant(self, node: Node, made: Any) -> Any:
        """Add constants of a contraction whose bias may not be changed, and that no layer can be given."""
        twin, fold = self.r.twin(node), self._left_over(node)
        if fold is None:
            return made
        family = cast(Contraction, self.facts.families[twin])
        constant = folded_constant(family, self.facts.values[family.weight], self.facts.values[family.x], fold.values)
        kept = self.r.widths.keep[twin][family.out_axis]
        return self._plus(node, made, family.out_axis, self.graph.get_attr(self.hold(constant[kept])))

    def _plus(self, node: Node, made: Any, axis: int, held: Node) -> Node:
        """Add a vector along an axis."""
        shape = [1] * len(shape_of(self.r.twin(node)))
        shape[axis] = -1
        shaped = self.graph.call_function(torch.ops.aten.view.default, (held, shape[axis:]))
        return self.graph.call_function(torch.ops.aten.add.Tensor, (made, shaped))


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


_OF_DOUBLE: dict[Any, str] = {
    torch.float64: "dtype",
    torch.finfo(torch.float64).min: "lowest",
    torch.finfo(torch.float64).max: "highest",
}
"""What the precision of the analysis shows itself by, and what it is called."""


def constant_name(taken: Collection[str]) -> str:
    """Return a name for a constant that nothing has."""
    return next(n for i in itertools.count() if (n := f"_constant{i}") not in taken)


def _repeats(mask: Tensor, size: int) -> bool:
    """Tell whether a mask is made of equal blocks of a size."""
    return len(mask) % size == 0 and bool((mask.view(-1, size) == mask[:size]).all())
