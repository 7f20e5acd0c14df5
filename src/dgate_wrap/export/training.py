"""What training loses where a forward is written anew: it is the eval mode's, with its dropouts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..tracing import Inputs
from ..tracing.settings import attributes_written
from .culprits import with_code
from .cuts import Cut
from .plan import covers
from .recipes import Recipe
from .runs import trying
from .verify import parts_of, relative_error

_ROUNDING = 1e-4
"""How far what a module gives may lie apart in two runs, relative to the largest."""


def lost_in_training(model: nn.Module, recipes: Mapping[str, Recipe], inputs: Inputs) -> list[str]:
    """Return the modules whose own code does something in training that a forward which is written anew does not.

    That forward is the eval mode's, with its dropouts and the modules that it calls. The dense model is run in eval
    mode, and again with that code alone told that it trains, without dropout: it does more if it gives something else,
    writes something else into buffers, or fails; or if it tells others whether they train.

    Args:
        model: The dense model.
        recipes: The forwards that are written anew, per module.
        inputs: What it is run on.
    """
    own = {
        path: [m for p, m in model.named_modules() if with_code(model, p) == p and covers(path, recipe, p)]
        for path, recipe in recipes.items()
    }
    usual = _given_by(model, own, [], inputs, drops=True)
    lost = [p for p in own if usual.get(p, [0])[-1]]
    for drops in (False, True):  # the dropouts of forwards that have some are those of the code
        here = [p for p, recipe in recipes.items() if _has_dropouts(recipe) != drops]
        there = _given_by(model, own, here, inputs, drops=drops) if here else {}
        suspects = [p for p in here if p not in lost and not _same(usual.get(p), there.get(p))]
        lost += [p for p in suspects if not _same(usual.get(p), _given_by(model, own, [p], inputs, drops=drops).get(p))]
    return lost


def _has_dropouts(recipe: Recipe) -> bool:
    reads = (target for _, op, target, *_ in recipe.steps if op == "get_attr")
    return any(target.rpartition(".")[2] == "training" for target in reads)


def _given_by(
    model: nn.Module, own: Mapping[str, list[nn.Module]], training: list[str], inputs: Inputs, *, drops: bool
) -> dict[str, list[Any]]:
    """Return what modules give, with the buffers that their code holds, while some of them are told that they train.

    The last of each is how often modules within it were told whether they train.

    Args:
        model: The model.
        own: Per module, those whose code is its own.
        training: The modules that are told so.
        inputs: What the model is run on.
        drops: Whether what the code drops by itself is dropped.
    """
    found: dict[str, list[Any]] = {}

    def note(path: str, _: nn.Module, args: object, result: Any) -> None:
        leaves = [part for leaf in pytree.tree_leaves(result) for part in parts_of(leaf)]
        found.setdefault(path, []).extend(x.clone() if isinstance(x, Tensor) else x for x in leaves)

    handles = [model.get_submodule(p).register_forward_hook(functools.partial(note, p)) for p in own]
    dropping = contextlib.nullcontext() if drops else _WithoutDropout()
    try:
        with trying(model, inputs) as run_it, dropping:
            for module in (m for p in training for m in own[p]):
                module.training = True
            with attributes_written() as written:
                run_it()
            told = [m for m, name in written if name == "training"]
            for path, modules in own.items():
                found.setdefault(path, []).extend(b.clone() for m in modules for b in m.buffers(recurse=False))
                found[path].append(sum(m in {*model.get_submodule(path).modules()} for m in told))
    except Exception:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(usual: list[Any] | None, other: list[Any] | None) -> bool:
    return usual is None or (other is not None and relative_error(usual, other) < _ROUNDING)


class _WithoutDropout(TorchFunctionMode):
    """Takes what code of its own drops for dropouts of none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            return args[0]
        if func in _ATTENTION:
            args, kwargs = (
                args[:4],
                {**dict(zip(("is_causal",), args[5:], strict=False)), **(kwargs or {}), "dropout_p": 0.0},
            )
        return func(*args, **(kwargs or {}))


_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout),
    *(torch.ops.aten.dropout.default, torch.ops.aten.alpha_dropout.default, torch.ops.aten.feature_dropout.default),
}
_ATTENTION = {F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}


def gradient_error(
    models: tuple[nn.Module, nn.Module],
    given: tuple[Inputs, Inputs],
    cuts: Mapping[str, Cut],
    *,
    training: bool,
) -> float | None:
    """Return how far gradients at the inputs lie apart, relative to the largest; ``None`` if not known, or random.

    Of inputs that are whole numbers, those at the tables in which they are looked up. At other parameters they may lie
    apart rightly: what is folded does not follow any more the parameters that it was made of.

    Args:
        models: The dense model, and the smaller one.
        given: What the one and the other are run on.
        cuts: What stays of the parameters.
        training: Whether modules with code of their own are told that they train, without dropout.
    """
    dense, small = (_gradients(m, x, training=training) for m, x in zip(models, given, strict=True))
    if training and _apart(dense, _gradients(models[0], given[0], training=True, draws=1)):
        return None
    dense = {n: cuts[n].apply(g) if n in cuts else g for n, g in dense.items()}
    return _apart(dense, small)


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    """Return how far tensors of the same names and shapes lie apart, relative to the largest of all."""
    pairs = [(a[n], b[n]) for n in a if n in b and a[n].shape == b[n].shape]
    largest = max((float(x.abs().max()) for pair in pairs for x in pair if x.numel()), default=0.0)
    far = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
    return far / max(largest, 1e-30) if pairs else None


def _gradients(model: nn.Module, inputs: Inputs, *, training: bool, draws: int = 0) -> dict[str, Tensor]:
    """Return the gradients of a sum over the outputs, each element with a weight of its own; none if it fails.

    Before it, some random numbers are drawn.
    """
    asked = [(p, p.requires_grad) for p in model.parameters()]
    leaves: dict[str, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.is_floating_point():
            leaves[f"input {len(leaves)}"] = x.requires_grad_()
        return x

    given = inputs.map(leaf)
    try:
        for p, _ in asked:
            p.requires_grad_(False)
        if not leaves:  # whole numbers: the tables in which they are looked up
            tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            leaves = {n: p.requires_grad_() for n, p in model.named_parameters() if id(p) in tables}
        with trying(model, given, gradients=True) as run_it, _WithoutDropout():
            torch.rand(draws)
            for module in model.modules():
                module.training = training and not type(module).__module__.startswith("torch.nn.")
            result = pytree.tree_leaves(run_it())
            outputs = [part for x in result for part in parts_of(x)]
            outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()]
            if not outputs:
                return {n: torch.zeros_like(x) for n, x in leaves.items()}
            weights = [torch.linspace(0.5, 1.5, x.numel()).to(x).view(x.shape) for x in outputs]
            found = torch.autograd.grad(outputs, [*leaves.values()], weights, allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))
    except Exception:
        return {}
    finally:
        for p, wants in asked:
            p.requires_grad_(wants)
