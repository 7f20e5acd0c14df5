"""A plan says which indices of which parameters and buffers stay; `apply` carries it out on the user's own modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tracing import Trace
from ..tracing.families import Contraction, Mixing
from .widths import Columns, Widths


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter or buffer.

    Args:
        shape: Its shape before.
        axes: Kept indices of every axis that loses some.
        groups: Of a grouped convolution's weight: the number of groups before.
        columns: Of such a weight: the kept channels that lie along axis 1, numbered over all groups.
    """

    shape: tuple[int, ...]
    axes: dict[int, list[int]] = field(default_factory=dict)
    groups: int = 1
    columns: list[int] | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor of the shape before."""
        if self.columns is not None:
            tensor = self._cut_columns(tensor)
        for axis, kept in self.axes.items():
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
        return tensor.contiguous()

    def _cut_columns(self, tensor: Tensor) -> Tensor:
        """Cut axis 1, whose kept indices differ between the groups of rows; rows of removed groups get any."""
        width = tensor.shape[1]
        per_group: list[list[int]] = [[] for _ in range(self.groups)]
        for c in cast("list[int]", self.columns):
            per_group[c // width].append(c % width)
        count = max(map(len, per_group))
        index = torch.tensor([g if len(g) == count else list(range(count)) for g in per_group], device=tensor.device)
        rows = index.repeat_interleave(tensor.shape[0] // self.groups, 0)
        rows = rows.view(*rows.shape, *[1] * (tensor.dim() - 2))
        return tensor.gather(1, rows.expand(*rows.shape[:2], *tensor.shape[2:]))

    def mask(self) -> Tensor:
        """Mark the elements that stay, in the shape before."""
        numbers = torch.arange(torch.Size(self.shape).numel()).view(self.shape)
        out = torch.zeros(numbers.numel(), dtype=torch.bool)
        out[self.apply(numbers).flatten()] = True
        return out.view(self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything that has to be known to make the smaller network from a fresh model of the same class.

    Args:
        cuts: Per parameter or buffer (first name), what stays of it; those that stay whole are left out.
        groups: Per convolution that loses groups, its new number of groups.
        new_biases: Linear layers and convolutions that get a bias, to hold folded constants.
    """

    cuts: dict[str, Cut]
    groups: dict[str, int]
    new_biases: list[str]

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors of the smaller network into a model of the original shapes, and set its modules' sizes.

        Args:
            model: The model; changed in place.
            tensors: Per changed parameter or buffer, its new value.
        """
        for name in self.new_biases:
            cast(Any, model.get_submodule(name)).bias = nn.Parameter(tensors[f"{name}.bias"].clone())
        for name, value in tensors.items():
            _replace(model, name, value)
        for name, groups in self.groups.items():
            module = cast(Any, model.get_submodule(name))
            if isinstance(module, nn.GroupNorm):
                module.num_groups = groups
            else:
                module.groups = groups
        for module in model.modules():
            resize_attributes(module)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer under every name that it has."""
    owner, _, leaf = name.rpartition(".")
    old = getattr(model.get_submodule(owner), leaf)
    if old.shape == value.shape:
        with torch.no_grad():
            old.copy_(value)
        return
    new: Any = (
        nn.Parameter(value.clone(), requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value.clone()
    )
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, held in store.items():
                if held is old:
                    store[key] = new


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def resize_attributes(module: nn.Module) -> None:
    """Set the sizes that a stock module remembers to those of its tensors."""
    m = cast(Any, module)
    if isinstance(module, nn.Linear):
        m.out_features, m.in_features = m.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        m.in_channels, m.out_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        m.out_channels, m.in_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = m.weight if m.weight is not None else m.running_mean
        m.num_features = m.num_features if held is None else held.shape[0]
    elif isinstance(module, nn.Embedding):
        m.num_embeddings, m.embedding_dim = m.weight.shape
    elif isinstance(module, nn.PReLU):
        m.num_parameters = m.weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        m.num_channels = m.num_channels if m.weight is None else m.weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and m.weight is not None:
        m.normalized_shape = tuple(cast(Any, module).weight.shape)
    elif isinstance(module, nn.Bilinear):
        m.out_features, m.in1_features, m.in2_features = m.weight.shape
    elif isinstance(module, nn.RNNBase):
        m.input_size = m.weight_ih_l0.shape[1]
        m.hidden_size = m.weight_ih_l0.shape[0] // _GATES[m.mode]
        m.proj_size = m.weight_hh_l0.shape[1] if m.proj_size else 0
        m._flat_weights = [getattr(m, n) for n in m._flat_weights_names]
    elif isinstance(module, nn.RNNCellBase):
        m.input_size, m.hidden_size = m.weight_ih.shape[1], m.weight_hh.shape[1]


class Permissions:
    """What the user's own modules allow: which weights and biases may be changed, and which groups renumbered.

    A tensor that is read in several places is left as it is, since what is folded at one place would be wrong at
    the others.
    """

    def __init__(self, model: nn.Module, trace: Trace, families: Mapping[Node, Any]) -> None:
        self._model = model
        self._sources = trace.sources
        self._families = families
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for prefix, module in model.named_modules():
            for p in module.parameters(recurse=False):
                self.owners.setdefault(id(p), []).append((prefix, module))

    def _free_parameter(self, node: Node | None) -> bool:
        """Tell whether a node is a parameter that one operation alone reads."""
        source = self._sources.get(node) if node is not None else None
        return source is not None and node is not None and source.kind == "parameter" and len(node.users) == 1

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
        family = cast(Contraction, self._families[node])
        owner = self._owner(family.weight)
        missing = owner is not None and cast(Any, owner[1]).bias is None
        return owner[0] if owner is not None and missing and len(family.weight.users) == 1 else None

    def can_bias(self, node: Node) -> bool:
        """Tell whether the bias of a contraction may be changed, or made."""
        family = cast(Contraction, self._families[node])
        return self._free_parameter(family.bias) if family.bias is not None else self.bias_owner(node) is not None

    def can_carry(self, node: Node) -> bool:
        """Tell whether the weight of a contraction may be changed."""
        return self._free_parameter(cast(Contraction, self._families[node]).weight)

    def groups_owner(self, node: Node) -> str | None:
        """Return the convolution or group norm whose number of groups an operation uses, or ``None``."""
        family = self._families[node]
        if isinstance(family, Mixing):
            weight = family.parameters[0][0] if family.parameters else None
        else:
            weight = cast(Contraction, family).weight
        owner = self._owner(weight) if weight is not None else None
        regrouped = nn.modules.conv._ConvNd | nn.GroupNorm
        return owner[0] if owner is not None and isinstance(owner[1], regrouped) else None

    def can_regroup(self, node: Node) -> bool:
        """Tell whether an operation's number of groups may be changed."""
        return self.groups_owner(node) is not None


def make_plan(widths: Widths, permissions: Permissions) -> tuple[Plan, dict[str, Tensor]]:
    """Turn kept indices into a plan, and compute the tensors of the smaller network in the precision of the analysis.

    Returns:
        The plan, and the new value of every parameter and buffer that changes.
    """
    facts = widths.facts
    grouped = {f.weight: f for f in facts.families.values() if isinstance(f, Contraction) and f.groups > 1}
    state: dict[str, Tensor] = {
        s.name: s.value for s in facts.trace.sources.values() if s.kind in ("parameter", "buffer")
    }
    changed: set[str] = set()
    new_biases: list[str] = []
    groups: dict[str, int] = {}
    for node, fold in widths.folds.items():
        family = cast(Contraction, facts.families[node])
        weight = facts.trace.sources.get(family.weight)
        if fold.carrier is not None:
            assert weight is not None
            state[weight.name] = _carried(family, state[weight.name], fold.values, fold.carrier, facts.values[family.x])
            changed.add(weight.name)
        else:
            bias = facts.trace.sources[family.bias].name if family.bias is not None else None
            if bias is None:
                owner = cast(str, permissions.bias_owner(node))
                bias = f"{owner}.bias" if owner else "bias"
                new_biases.append(owner)
            constant = _constant(family, facts.values[family.weight], facts.values[family.x], fold.values)
            state[bias] = state[bias] + constant if bias in state else constant
            changed.add(bias)

    cuts: dict[str, Cut] = {}
    for node, source in facts.trace.sources.items():
        if source.kind not in ("parameter", "buffer") or node not in widths.keep:
            continue
        axes = {a: k.nonzero().flatten().tolist() for a, k in enumerate(widths.keep[node]) if not k.all()}
        columns = widths.keep.get(Columns(node))
        if columns is not None and not columns[0].all():
            cut = Cut(tuple(source.value.shape), axes, grouped[node].groups, columns[0].nonzero().flatten().tolist())
        else:
            cut = Cut(tuple(source.value.shape), axes)
        if axes or cut.columns is not None:
            cuts[source.name] = cut
    for node, family in facts.families.items():
        if isinstance(family, Contraction) and family.bias is None:
            owner, kept = permissions.bias_owner(node), widths.keep[node][family.out_axis]
            if owner in new_biases and not kept.all():
                name = f"{owner}.bias" if owner else "bias"
                cuts[name] = Cut((kept.numel(),), {0: kept.nonzero().flatten().tolist()})
        if isinstance(family, Contraction | Mixing) and family.groups > 1:
            channels = widths.keep[node][family.out_axis if isinstance(family, Contraction) else 1]
            used = channels.view(family.groups, -1).any(1)
            if not used.all():
                groups[cast(str, permissions.groups_owner(node))] = int(used.sum())
    tensors = {n: cuts[n].apply(t) if n in cuts else t for n, t in state.items() if n in cuts or n in changed}
    return Plan(cuts, groups, new_biases), tensors


def _constant(family: Contraction, weight: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Return what constant input channels add to every output channel of an unpadded contraction."""
    weight = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    if family.groups == 1:
        return (weight.movedim(family.w_out, 0) @ values).to(x.dtype)
    blocks = weight.view(family.groups, -1, weight.shape[1])
    return torch.einsum("goi,gi->go", blocks, values.view(family.groups, -1)).flatten().to(x.dtype)


def _carried(family: Contraction, weight: Tensor, values: Tensor, carrier: int, x: Tensor) -> Tensor:
    """Add the weights of constant channels, in proportion, to those of the channel that carries them."""
    value = x.double().movedim(family.x_axis, 0)[carrier].flatten()[0]
    columns = weight.double().movedim(family.w_in, 0).clone()
    share = (values / value).view(-1, *[1] * (columns.dim() - 1))
    columns[carrier] += (columns * share).sum(0)
    return columns.movedim(0, family.w_in).to(weight.dtype)
