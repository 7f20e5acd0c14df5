"""Put an exported network back into the original shapes, with zeros where something was removed."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import ExportError
from ..tracing import Inputs, normalize_inputs
from ..tracing.capture import all_tensors
from ..tracing.settings import full_precision
from .api import Exported
from .copies import flatten_
from .cuts import Cut
from .facts import HOOK_BUFFERS
from .files import derived_buffers, misfits
from .masks import on_axis, project
from .plan import Plan
from .scatter import filled_name
from .selection import reduced
from .verify import OWN, relative_error, run


def expand(
    exported: Exported, model: nn.Module, example_inputs: object = None, example_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Put an exported network, as it is by now, into a model of the original class and shapes.

    The network computes the same. With ``kept`` the indices that stayed, ``W[kept_out, kept_in] = w``, and every other
    element of the original weight is zero, so that no reader sees what a removed channel does:

    - Constants of removed channels stay in the biases, or in the one channel, into which they were folded; biases and
      batch norms of removed channels are zero (running variances one), so that nothing is counted twice. A layer that
      was given a bias to hold constants keeps it: ``plan.new_biases`` names the state dict's new keys.
    - An RMSNorm over k of n features had its weight multiplied by ``√(n/k)``, for which the zeros make up again:
      it is divided by that, and has its own epsilon.
    - A layer that computes some of its outputs only has zero weights for the others, and what they hold as biases.
    - What is left of a normalized weight keeps its gain, since zeros add nothing to a norm; a direction of which
      nothing is left is made of ones, with a gain of zero.
    - Dead branches that were left out get the weights that they had when they were cut out, and so the constants that
      they gave.
    - Rewritten modules have the code of their class again. Inputs are not selected: what is not needed meets zeros.

    What was trained since the export is kept, with dtypes, devices, modes and ``requires_grad`` flags. The expanded
    network trains on like any other; its zeros then do not stay zeros by themselves.

    Args:
        exported: What `export` returned; its model may have been trained since.
        model: A freshly built model with the shapes that the original had before gating; changed in place.
        example_inputs: What the outputs of both are compared on, if not on what was exported on: a tensor, a tuple of
            positional inputs, or a dict of keyword inputs. Whole inputs, also if the exported network takes reduced
            ones.
        example_kwargs: Keyword inputs beside positional ones.

    Returns:
        The model.

    Raises:
        ExportError: If the model is not of the original's shapes, or the outputs on the example inputs differ: what a
            rewritten forward holds as constants, the code of its class may have no parameter for.

    Example:
        >>> import dgate_wrap as dg
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net, x = dg.gate(make(), "neurons", exclude="2.*"), torch.randn(3, 4)
        >>> _ = dg.prune(net, ratio=0.5)
        >>> exported = dg.export(net, x, latency=False)
        >>> whole = dg.expand(exported, make(), x)
        >>> whole[0], int((whole[0].weight.detach() == 0).all(1).sum())
        (Linear(in_features=4, out_features=8, bias=True), 4)
    """
    wrong = misfits(exported.signature, model)
    if wrong:
        raise ExportError(
            f"cannot expand into this {type(model).__name__}: {'; '.join(wrong)}.",
            expected="a freshly built model with the parameters that the original had before gating",
            mend="dg.expand(exported, MyModel(same_arguments)); dg.ungate a gated model first",
        )
    small, plan = exported.model, exported.plan
    with torch.no_grad():
        for path in plan.new_biases:
            layer = cast(Any, model.get_submodule(path))
            layer.bias = nn.Parameter(layer.weight.new_zeros(_outputs(layer)))
        held = dict(all_tensors(small))
        names: dict[int, list[str]] = {}
        directions = _directions(model)
        for name, tensor in all_tensors(model):
            names.setdefault(id(tensor), []).append(name)
        found, derived = dict(all_tensors(model)), derived_buffers(model)
        for first, *others in names.values():
            known = next((held[n] for n in (first, *others) if n in held), None)
            cut = plan.cuts.get(first)
            if cut is not None and first.rpartition(".")[2] in HOOK_BUFFERS:
                continue  # the places that a hook of the model itself names
            if known is not None and cut is not None and first in derived and known.shape != cut.kept_shape:
                continue  # the code has made another table since, for longer inputs
            value = (
                _restored(first, exported.dropped[first], plan, held)
                if known is None
                else _expanded(first, known, plan)
            )
            if first in directions:
                value = _with_directions(value, directions[first])
            home = known if known is not None else next(iter(held.values()), value)
            value = value.to(home) if value.is_floating_point() and home.is_floating_point() else value.to(home.device)
            _put(model, found[first], [first, *others], value)
            for name in (first, *others):
                _refill(name, value, plan, held)
            if isinstance(known, nn.Parameter):
                found[first].requires_grad_(known.requires_grad)
    small_modules = dict(small.named_modules())
    for path, module in model.named_modules():
        module.training = small_modules[path].training if path in small_modules else small.training
    flatten_(model)
    given = example_inputs is not None or example_kwargs is not None
    example = normalize_inputs(example_inputs, example_kwargs) if given else exported.example
    if example is not None:
        _compare(exported, model, example)
    return model


def _outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _restored(name: str, value: Tensor, plan: Plan, held: dict[str, Tensor]) -> Tensor:
    """Return a tensor that is gone: as it was, with zeros where the bias beside it holds the constants that it gave."""
    owner, _, leaf = name.rpartition(".")
    folded = leaf == "weight" and name in plan.cuts and (f"{owner}.bias" if owner else "bias") in held
    return value * plan.cuts[name].mask() if folded else value


def _expanded(name: str, value: Tensor, plan: Plan) -> Tensor:
    """Return a tensor in its shape before, with zeros where something was removed; of variances, with ones."""
    share = plan.rescaled.get(name)
    value = value.detach() if share is None else value.detach() * share**0.5
    cut = plan.cuts.get(name)
    if cut is None:
        return value.clone()
    return _scattered(cut, value, torch.ones if name.endswith("running_var") else torch.zeros)


def _directions(model: nn.Module) -> dict[str, int]:
    """Return the directions of normalized weights ``g v / ‖v‖``, with the axis along which each has its norm."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], _WeightNorm):
            found[f"{prefix}original1"] = cast(Any, module[0]).dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                found[f"{prefix}{hook.name}_v"] = hook.dim
    return {n: axis for n, axis in found.items() if axis >= 0}


def _with_directions(v: Tensor, axis: int) -> Tensor:
    """Give a direction of some length, with ones, to what has none left: ``0 / 0`` is not zero."""
    without = on_axis(~project(v != 0, axis), axis, v.dim())
    return torch.where(without, torch.ones_like(v), v)


def _scattered(cut: Cut, value: Tensor, fill: Any) -> Tensor:
    places = cut.apply(torch.arange(torch.Size(cut.shape).numel(), device=value.device).view(cut.shape))
    whole = fill(cut.shape, dtype=value.dtype, device=value.device)
    whole.view(-1)[places.flatten()] = value.flatten()
    return whole


def _refill(name: str, bias: Tensor, plan: Plan, held: dict[str, Tensor]) -> None:
    """Give the bias of a layer what it holds where it computes nothing, in place."""
    path, _, leaf = name.rpartition(".")
    scatter = plan.scatters.get(path) if leaf == "bias" else None
    if scatter is not None and scatter.filled:
        filled = held[filled_name(path)]
        left = [i for i in range(len(scatter.stays)) if i not in set(scatter.kept)]
        bias[[scatter.stays[i] for i in left]] = filled[left].to(bias)


def _put(model: nn.Module, old: Tensor, names: list[str], value: Tensor) -> None:
    """Give a parameter its new value, and a buffer, under all of its names, its new tensor."""
    if isinstance(old, nn.Parameter):
        old.data = value
        return
    for name in names:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = value


def _compare(exported: Exported, model: nn.Module, example: Inputs) -> None:
    held = itertools.chain(exported.model.parameters(), model.parameters())
    home = next((p for p in held if p.is_floating_point()), torch.empty(()))

    def there(x: Tensor) -> Tensor:
        return x.to(home) if x.is_floating_point() else x.to(home.device)

    inputs = example.map(there)
    taken = reduced(inputs, exported.model, exported.plan.taken)
    with full_precision():
        error = relative_error(run(exported.model, taken), run(model, inputs))
    width = min((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=4)
    rounding = exported.report.certificate.tolerance.get(OWN, 0.0)
    if error > max(rounding, {8: 1e-10, 4: 1e-5}.get(width, 5e-2)):
        raise ExportError(
            f"the expanded network differs from the exported one by {error:.2e} of the largest output.",
            expected="equal outputs on the example inputs",
            mend="dg.export(..., rewrite=False): a rewritten forward may hold constants for which the code of its "
            "class has no parameter",
        )
