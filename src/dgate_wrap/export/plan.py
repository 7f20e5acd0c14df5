"""A plan says which indices of which parameters and buffers stay; `apply` carries it out on the user's own modules."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing.families import Contraction, Mixing, NormedWeight, Product, Recurrence
from ..tracing.operations import shape_of
from ..tracing.origins import owner
from .cuts import Cut, by_group, cut_axes, indices
from .demands import norms
from .facts import Facts
from .recipes import Recipe
from .rewritten import Rewritten, rewritten
from .scatter import Picked, Scatter, filled_name, find_picks, find_scatters, is_hooked, name_sizes
from .selection import SelectInputs
from .vectors import Columns
from .widths import Fold, Widths


@dataclass(frozen=True)
class Plan:
    """Everything that has to be known to make the smaller network from a fresh model of the same class.

    Args:
        cuts: Per parameter or buffer (first name), what stays of it; those that stay as they are, are left out.
        attributes: Per module, the numbers it remembers that become others: groups, channels, heads, epsilons.
        new_biases: Linear layers and convolutions that get a bias, to hold folded constants.
        recipes: Per module whose forward is written anew, how.
        inputs: Per argument of the forward that loses some: per axis, counted from the last one (-1), its kept indices.
        select_inputs: Whether the model still takes whole arguments and selects those indices itself.
        scatters: Per layer that computes only some of its outputs, where they belong.
        picks: Per layer that reads only some of its inputs, which.
        rescaled: Per weight of a normalization that counts fewer features: which share of them stays. The weight was
            divided by its root.
    """

    cuts: dict[str, Cut]
    attributes: dict[str, dict[str, int | float]]
    new_biases: list[str]
    recipes: dict[str, Recipe] = field(default_factory=dict[str, Recipe])
    inputs: dict[str, dict[int, list[int]]] = field(default_factory=dict[str, dict[int, list[int]]])
    select_inputs: bool = True
    scatters: dict[str, Scatter] = field(default_factory=dict[str, Scatter])
    picks: dict[str, Picked] = field(default_factory=dict[str, Picked])
    rescaled: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def taken(self) -> dict[str, dict[int, list[int]]]:
        """What the model takes of its arguments, if it does not take them whole."""
        return {} if self.select_inputs else self.inputs

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Put the tensors of the smaller network into a model of the original shapes, and set its modules' sizes.

        Args:
            model: The model; changed in place, but for the memory of its parameters, which a copy may share.
            tensors: Per changed parameter or buffer, its new value; also the constants of the recipes.

        Returns:
            The model; another object only if its own forward is written anew.
        """
        constants = {f"{p}.{c}" if p else c for p, recipe in self.recipes.items() for c in recipe.constants}
        constants |= {filled_name(p) for p, scatter in self.scatters.items() if scatter.filled}
        for name in self.new_biases:
            layer = cast(Any, model.get_submodule(name))
            layer.bias = nn.Parameter(tensors[f"{name}.bias" if name else "bias"], layer.weight.requires_grad)
        for name, value in tensors.items():
            if name not in constants:
                _replace(model, name, value)
        for name, values in self.attributes.items():
            for attribute, value in values.items():
                _set(model.get_submodule(name), attribute, value)
        for module in model.modules():
            resize_attributes(module)
        for path, recipe in self.recipes.items():
            prefix = f"{path}." if path else ""
            module = model.get_submodule(path)
            graft = rewritten(module, recipe, {c: tensors[prefix + c] for c in recipe.constants})
            places = [(m, leaf) for m in model.modules() for leaf, child in m._modules.items() if child is module]
            for parent, leaf in places:  # under all of its names
                parent._modules[leaf] = graft
            module.__dict__["forward"] = graft.forward  # where code reaches it by a list of its own, say
            model = model if path else graft
        _leave_fused(model)
        modules = dict(model.named_modules())
        layers = {p: m for p, m in modules.items() if getattr(m, "weight", None) is not None}
        for path in self.scatters.keys() & layers.keys():
            self.scatters[path].attach(layers[path], tensors.get(filled_name(path)))
        for path in self.picks.keys() & layers.keys():
            self.picks[path].attach(layers[path])
        if self.inputs and self.select_inputs:
            SelectInputs(self.inputs).attach(model)
        return model


@dataclass(frozen=True)
class Draft:
    """A plan with its tensors, on the way to one that runs.

    Args:
        plan: The plan.
        tensors: Per changed parameter or buffer, its new value; also the constants of the recipes.
        inlined: Modules that no forward written anew calls: it does by itself what is in them.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    inlined: frozenset[str] = frozenset()

    def patched(self, patch: Mapping[str, Mapping[str, int]]) -> Draft:
        """Return a draft in which modules remember other integers: per attribute, per module."""
        attributes = {p: dict(values) for p, values in self.plan.attributes.items()}
        for name, by_module in patch.items():
            for path, value in by_module.items():
                attributes.setdefault(path, {})[name] = value
        return replace(self, plan=replace(self.plan, attributes=attributes))

    def inlining(self, paths: Iterable[str]) -> Draft:
        """Return a draft in which forwards that are written anew from now on do not call some modules."""
        return replace(self, inlined=self.inlined.union(paths))

    def covers(self, path: str) -> bool:
        """Tell whether the forward of a module, or of one around it which does not call it, is written anew already."""
        return any(covers(p, recipe, path) for p, recipe in self.plan.recipes.items())

    def grafted(self, path: str, recipe: Recipe, constants: Mapping[str, Tensor]) -> Draft:
        """Return a draft in which the forward of a module is written anew, and no forward that it has no use for."""
        prefix = f"{path}." if path else ""
        inside = {p: r for p, r in self.plan.recipes.items() if covers(path, recipe, p)}
        gone = {f"{p}.{c}" for p, r in inside.items() for c in r.constants}
        kept = {p: r for p, r in self.plan.recipes.items() if p not in inside}
        tensors = {n: t for n, t in self.tensors.items() if n not in gone}
        tensors |= {prefix + n: t for n, t in constants.items()}
        dropped = {prefix + n for n in recipe.drops}
        read = {prefix + target for _, op, target, *_ in recipe.steps if op == "get_attr"}
        layers = {*self.plan.scatters, *self.plan.picks, *self.plan.new_biases}
        lost = {p for p in layers if f"{p}.weight".lstrip(".") in dropped and f"{p}.bias".lstrip(".") not in read}
        biases = {f"{p}.bias".lstrip(".") for p in lost.intersection(self.plan.new_biases)}
        gone = {filled_name(p) for p in lost} | biases
        plan = replace(
            self.plan,
            recipes={**kept, path: recipe},
            new_biases=[p for p in self.plan.new_biases if p not in lost],
            scatters={p: s for p, s in self.plan.scatters.items() if p not in lost},
            picks={p: s for p, s in self.plan.picks.items() if p not in lost},
        )
        return replace(self, plan=plan, tensors={n: t for n, t in tensors.items() if n not in gone})


def covers(path: str, recipe: Recipe, other: str) -> bool:
    """Tell whether a forward that is written anew does what is in a module, or one around it, without calling it."""
    if path and not f"{other}.".startswith(f"{path}."):
        return False
    inner = f"{other.removeprefix(path).removeprefix('.')}."
    return not any(op == "call_module" and inner.startswith(f"{target}.") for _, op, target, *_ in recipe.steps)


@contextlib.contextmanager
def remembering(model: nn.Module, patch: Mapping[str, Mapping[str, int]]) -> Generator[None]:
    """Let modules remember other integers for a while: per attribute, per module."""
    modules, earlier = dict(model.named_modules()), list[tuple[nn.Module, str, Any]]()
    try:
        for attribute, by_module in patch.items():
            held = attribute.partition(".")[0]
            for path, value in by_module.items():
                module = modules.get(path)
                if module is not None and held in vars(module):  # the forward of one that is not is written anew
                    earlier.append((module, held, vars(module)[held]))
                    _set(module, attribute, value)
        yield
    finally:
        for module, held, value in reversed(earlier):
            setattr(module, held, value)


def _set(holder: Any, attribute: str, value: float) -> None:
    """Set an attribute; ``config.heads`` on a copy of the object, which others may hold too."""
    *path, leaf = attribute.split(".")
    for step in path:
        part = copy.copy(getattr(holder, step))
        setattr(holder, step, part)
        holder = part
    setattr(holder, leaf, value)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer under every name that it has; what it held before is left as it is."""
    parent, _, leaf = name.rpartition(".")
    old = getattr(model.get_submodule(parent), leaf)
    value = value.to(old.dtype)
    if old.shape == value.shape:
        old.data = value if isinstance(old, nn.Parameter) else value.clone()
        return
    new: Any = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value.clone()
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, held in store.items():
                if held is old:
                    store[key] = new


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def _leave_fused(model: nn.Module) -> None:
    """Let nn.TransformerEncoder call what is written anew in it: in eval mode it would read the weights by itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(getattr(module, "self_attn", None), Rewritten):
            module.self_attn._qkv_same_embed_dim = False
        elif isinstance(module, nn.TransformerEncoder) and any(isinstance(m, Rewritten) for m in module.modules()):
            module.use_nested_tensor = False


def resize_attributes(module: nn.Module) -> None:
    """Set the sizes that a stock module remembers to those of its tensors, or of what its hooks make of them."""
    m = cast(Any, module)
    if isinstance(module, Rewritten):
        return
    if isinstance(module, nn.Linear):
        m.out_features, m.in_features = m.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        m.in_channels, m.out_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        m.out_channels, m.in_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = m.weight if m.affine else m.running_mean
        m.num_features = m.num_features if held is None else held.shape[0]
    elif isinstance(module, nn.Embedding):
        m.num_embeddings, m.embedding_dim = m.weight.shape
    elif isinstance(module, nn.PReLU):
        m.num_parameters = m.weight.shape[0]
    elif isinstance(module, nn.GroupNorm) and m.affine:
        m.num_channels = m.weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.elementwise_affine:
        m.normalized_shape = tuple(m.weight.shape)
    elif isinstance(module, nn.Bilinear):
        m.out_features, m.in1_features, m.in2_features = m.weight.shape
    elif isinstance(module, nn.RNNBase):
        m.input_size = m.weight_ih_l0.shape[1]
        m.hidden_size = m.weight_ih_l0.shape[0] // _GATES[m.mode]
        m.proj_size = m.weight_hh_l0.shape[1] if m.proj_size else 0
        m._flat_weights = [getattr(m, n) for n in m._flat_weights_names]
    elif type(module).__name__ == "Conv1D" and all(type(getattr(m, n, None)) is int for n in ("nx", "nf")):
        m.nx, m.nf = m.weight.shape  # of Hugging Face: a linear layer with the weight transposed
    elif isinstance(module, nn.RNNCellBase):
        m.input_size, m.hidden_size = m.weight_ih.shape[1], m.weight_hh.shape[1]
    name_sizes(module)


_SIZED = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm)


class Permissions:
    """What the user's own modules allow: which weights and biases may be changed, and which groups renumbered.

    A tensor that is read in several places is left as it is, since what is folded at one place would be wrong at
    the others; of a layer that is called several times, unless the same is folded everywhere.
    """

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        self._model = model
        self._facts = facts
        self._sources = facts.trace.sources
        self._families: Mapping[Node, Any] = facts.families
        self._modules = dict(model.named_modules())
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for prefix, module in model.named_modules():
            for p in module.parameters(recurse=False):
                self.owners.setdefault(id(p), []).append((prefix, module))

    def _free_parameter(self, node: Node | None) -> bool:
        """Tell whether a node is a parameter that one operation alone reads, or one layer."""
        source = self._sources.get(node) if node is not None else None
        return source is not None and node is not None and source.kind == "parameter" and self._of_one_layer(node)

    def _of_one_layer(self, node: Node) -> bool:
        """Tell whether a parameter is read once, or by contractions with the same weight and bias."""
        families = [self._families.get(u) for u in node.users]
        if len(families) == 1:
            return True
        calls = [f for f in families if isinstance(f, Contraction)]
        held = {(f.weight, f.bias) for f in calls}
        return len(calls) == len(families) and len(held) == 1 and node in next(iter(held))

    def _owner(self, node: Node) -> tuple[str, nn.Module] | None:
        """Return the one stock layer whose ``weight`` a node is."""
        source = self._sources.get(node)
        if source is None or source.kind != "parameter":
            return None
        parameter = self._model.get_parameter(source.name)
        owners = self.owners[id(parameter)]
        stock = len(owners) == 1 and isinstance(owners[0][1], nn.Linear | nn.modules.conv._ConvNd | nn.GroupNorm)
        return owners[0] if stock and cast(Any, owners[0][1]).weight is parameter else None

    def bias_owner(self, node: Node) -> str | None:
        """Return the layer that can be given a bias for a contraction, or ``None``."""
        family = self._families[node]
        if not isinstance(family, Contraction):
            return None
        held = self._owner(family.weight)
        missing = held is not None and cast(Any, held[1]).bias is None
        return held[0] if held is not None and missing and self._of_one_layer(family.weight) else None

    def can_bias(self, node: Node) -> bool:
        """Tell whether the biases of what reads an activation may be changed, or made."""
        biases = [m.bias for m in cast("Contraction | Recurrence", self._families[node]).maps]
        return all(self._free_parameter(b) if b is not None else self.bias_owner(node) is not None for b in biases)

    def can_carry(self, node: Node) -> bool:
        """Tell whether the weights of what reads an activation may be changed."""
        family = self._families[node]
        if isinstance(family, Mixing):
            found = self._facts.addend(node)
            return found is not None and self._free_parameter(found[0])
        if isinstance(family, Product):
            a, b = (dict(zip(x, shape_of(n), strict=True)) for n, x in family.operands)
            equal = all(a[c] == b[c] for c in a.keys() & b.keys())
            return equal and any(self._free_parameter(n) and family.weighs(n) for n, _ in family.operands)
        return all(self._free_parameter(m.weight) for m in cast("Contraction | Recurrence", family).maps)

    @functools.cached_property
    def scattering(self) -> dict[Node, str]:
        """Return the stock layer behind each contraction that may compute or read some channels only from now on."""
        found: dict[Node, str] = {}
        for node, family in self._families.items():
            held = self._owner(family.weight) if isinstance(family, Contraction) and family.groups == 1 else None
            if held is not None and all(owner(u) == held[0] for u in family.weight.users) and not is_hooked(held[1]):
                found[node] = held[0]
        return found

    def can_rescale(self, node: Node) -> bool:
        """Tell whether what a normalization multiplies by may be changed: that of a layer or a weight used once."""
        family, path = self._families[node], owner(node)
        if isinstance(family, NormedWeight):
            return family.axis >= 0 and self._free_parameter(family.g) and self._free_parameter(family.v)
        stock = path is not None and type(self._modules.get(path)) is nn.RMSNorm
        return stock and isinstance(family, Mixing) and any(self._free_parameter(n) for n, _, _ in family.parameters)

    def stock_owner(self, node: Node) -> str | None:
        """Return the stock layer whose forward made a node, or ``None``."""
        path = owner(node)
        return path if path is not None and isinstance(self._modules.get(path), _SIZED) else None

    def epsilon(self, path: str) -> float:
        """Return the epsilon of a normalization."""
        return cast(Any, self._modules[path]).eps

    def remembers(self, path: str) -> frozenset[str]:
        """Return the names under which a stock layer remembers sizes that the shapes of its tensors may not tell."""
        module = self._modules[path]
        if isinstance(module, nn.modules.conv._ConvNd):
            return frozenset({"groups"}) if module.groups > 1 else frozenset()
        return frozenset({"num_groups", "num_channels"} if isinstance(module, nn.GroupNorm) else {"num_features"})

    def can_regroup(self, node: Node) -> bool:
        """Tell whether an operation's number of groups may be changed."""
        return self.stock_owner(node) is not None


def make_plan(
    widths: Widths, permissions: Permissions, *, select_inputs: bool = True
) -> tuple[Plan, dict[str, Tensor]]:
    """Turn kept indices into a plan, and compute the tensors of the smaller network in the precision of the analysis.

    Returns:
        The plan, and the new value of every parameter and buffer that changes.
    """
    facts = widths.facts
    state: dict[str, Tensor] = {
        s.name: s.value for s in facts.trace.sources.values() if s.kind in ("parameter", "buffer")
    }
    changed, new_biases = _fold(widths, permissions, state)
    changed |= _renormalize(widths, state)
    cuts = _find_cuts(widths)
    for node, family in facts.families.items():
        if isinstance(family, Contraction) and family.bias is None:
            path, kept = permissions.bias_owner(node), widths.rows(node)
            if path in new_biases and not kept.all():
                name = f"{path}.bias" if path else "bias"
                cuts[name] = Cut((kept.numel(),), {0: indices(kept)})
    inputs: dict[str, dict[int, list[int]]] = {}
    for node, source in facts.trace.sources.items():
        axes = cut_axes(widths.keep.get(node, [])) if source.kind == "input" else {}
        if axes:  # counted from the last one: code for vectors takes any axes before them
            inputs[source.name] = {axis - len(widths.keep[node]): kept for axis, kept in axes.items()}
    tensors = {n: cuts[n].apply(t) if n in cuts else t for n, t in state.items() if n in cuts or n in changed}
    attributes = _find_attributes(widths, permissions)
    rescaled, epsilons = _rescale(widths, permissions, tensors)
    for path, epsilon in epsilons.items():
        attributes.setdefault(path, {})["eps"] = epsilon
    scatters, constants = find_scatters(widths, permissions.scattering)
    tensors |= {filled_name(path): held for path, held in constants.items()}
    plan = Plan(
        cuts,
        attributes,
        new_biases,
        inputs=inputs,
        select_inputs=select_inputs,
        scatters=scatters,
        picks=find_picks(widths, permissions.scattering),
        rescaled=rescaled,
    )
    return plan, tensors


def _find_attributes(widths: Widths, permissions: Permissions) -> dict[str, dict[str, int | float]]:
    """Return the sizes that stock layers remember, where no tensor of theirs tells them."""
    found: dict[str, dict[str, int | float]] = {}
    for node, family in widths.facts.families.items():
        if not isinstance(family, Contraction | Mixing) or (path := permissions.stock_owner(node)) is None:
            continue
        x = node if isinstance(family, Contraction) else family.x
        axis = family.out_axis if isinstance(family, Contraction) else 1
        kept = widths.keep[x][axis] if x in widths.keep and len(widths.keep[x]) > axis else None
        if kept is None or kept.all():
            continue
        used = int(kept.view(family.groups, -1).any(1).sum())
        names = permissions.remembers(path)
        values = {"groups": used, "num_groups": used, "num_features": int(kept.sum()), "num_channels": int(kept.sum())}
        if any(n in names for n in values):
            found[path] = {n: v for n, v in values.items() if n in names}
    return found


def _renormalize(widths: Widths, state: dict[str, Tensor]) -> set[str]:
    """Let the gains of normalized weights make up for a shorter ``v``: ``g ‖v_kept‖ / ‖v‖``; return which changed."""
    changed: set[str] = set()
    for family in (f for f in widths.facts.families.values() if isinstance(f, NormedWeight)):
        before, after = norms(widths, family)
        if torch.equal(before, after):
            continue
        g = widths.facts.trace.sources[family.g].name
        share = torch.where(before > 0, after / before.clamp_min(torch.finfo(before.dtype).tiny), 1.0)
        state[g] = state[g] * share.to(state[g].dtype).view(state[g].shape)
        changed.add(g)
    return changed


def _rescale(
    widths: Widths, permissions: Permissions, tensors: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Multiply the weights of normalizations by what makes up for zeros that are not counted any more, in place.

    The mean of squares of k elements is n / k times that of those and n - k zeros. With n / k times the epsilon, the
    normalized value is therefore √(k / n) times what it was.

    Returns:
        Per weight, k / n; and per layer, its new epsilon.
    """
    rescaled: dict[str, float] = {}
    epsilons: dict[str, float] = {}
    for node, family in widths.facts.families.items():
        if not isinstance(family, Mixing) or not (family.averages and permissions.can_rescale(node)):
            continue
        share = widths.share(family.x, family.mixed)
        if share == 1:
            continue
        path = cast(str, owner(node))
        weight = widths.facts.trace.sources[family.parameters[0][0]].name
        tensors[weight] = tensors[weight] * share**-0.5
        rescaled[weight] = share
        epsilons[path] = permissions.epsilon(path) / share
    return rescaled, epsilons


def _fold(widths: Widths, permissions: Permissions, state: dict[str, Tensor]) -> tuple[set[str], list[str]]:
    """Add the constants of removed channels to biases and weights, in place; return which changed, and new biases."""
    facts = widths.facts
    changed: set[str] = set()
    new_biases: list[str] = []
    done: set[Node] = set()
    for weight, more in widths.merged.values():
        name = facts.trace.sources[weight].name
        state[name] = state[name] + more.to(state[name].dtype)
        changed.add(name)
    for node, fold, family in ((n, f, m) for n, f in widths.folds.items() for m in widths.maps(n)):
        if family.weight in done:  # of a layer that is called several times
            continue
        done.add(family.weight)
        if fold.carrier is not None:
            weight = facts.trace.sources[family.weight].name
            state[weight] = _carried(family, state[weight], fold, facts.values[family.x])
            changed.add(weight)
            continue
        if not widths.allowed.can_bias(node):  # left to the forward around it, which is written anew
            continue
        bias = facts.trace.sources[family.bias].name if family.bias is not None else None
        if bias is None:
            path = cast(str, permissions.bias_owner(node))
            bias = f"{path}.bias" if path else "bias"
            new_biases.append(path)
        constant = folded_constant(family, facts.values[family.weight], facts.values[family.x], fold.values)
        state[bias] = state[bias] + constant if bias in state else constant
        changed.add(bias)
    return changed, new_biases


def _find_cuts(widths: Widths) -> dict[str, Cut]:
    """Return what stays of every parameter and buffer that loses some."""
    families = widths.facts.families.values()
    grouped = {f.weight: f.groups for f in families if isinstance(f, Contraction) and f.groups > 1}
    cuts: dict[str, Cut] = {}
    for node, source in widths.facts.trace.sources.items():
        if source.kind not in ("parameter", "buffer") or node not in widths.keep:
            continue
        shape, axes = tuple(source.value.shape), cut_axes(widths.keep[node])
        columns = widths.keep.get(Columns(node))
        if columns is not None and not columns[0].all():
            cuts[source.name] = Cut(shape, axes, [by_group(columns[0], grouped[node])])
        elif axes:
            cuts[source.name] = Cut(shape, axes)
    return cuts


def folded_constant(family: Contraction, weight: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Return what constant input channels add to every output channel of an unpadded contraction."""
    weight = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    if family.groups == 1:
        return (weight.movedim(family.w_out, 0) @ values).to(x.dtype)
    blocks = weight.view(family.groups, -1, weight.shape[1])
    return torch.einsum("goi,gi->go", blocks, values.view(family.groups, -1)).flatten().to(x.dtype)


def _carried(family: Contraction, weight: Tensor, fold: Fold, x: Tensor) -> Tensor:
    """Add the weights of constant channels, in proportion, to those of the channel that carries them."""
    value = x.double().movedim(family.x_axis, 0)[fold.carrier].flatten()[fold.at]
    columns = weight.double().movedim(family.w_in, 0).clone()
    share = (fold.values / value).view(-1, *[1] * (columns.dim() - 1))
    columns[fold.carrier] += (columns * share).sum(0)
    return columns.movedim(0, family.w_in).to(weight.dtype)
