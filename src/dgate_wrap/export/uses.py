"""What a model does that its trace does not show: with a key-value cache, and in training."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..tracing import Inputs
from ..tracing.inputs import without_cache
from ..tracing.settings import evaluating, same_random_numbers, unchanged, unfused
from .copies import SparingParameters
from .culprits import with_code
from .cuts import Cut
from .padding import padded
from .plan import covers
from .recipes import Recipe, plain_signature, says_no
from .verify import parts_of, relative_error, run

_ROUNDING = 1e-4
"""How far what a module gives may lie apart in two runs, relative to the largest."""

MASK = "mask"
"""What a model can do that can be given a mask."""


def cached_uses(model: nn.Module, inputs: Inputs) -> dict[str, str | None]:
    """See what a model can do that has a key-value cache, turned on as users have it: be called, and generate.

    And whether it can be given an attention mask, where the inputs have none.

    Returns:
        Per use, the module in which it fails; ``None`` if it does not.
    """
    given = inputs.map(Tensor.clone)
    uses: dict[str, Any] = {
        "call": lambda: inputs.call(model),
        "generate": lambda: cast(Any, model).generate(
            *given.args[:1], **given.kwargs, max_new_tokens=2, do_sample=False
        ),
    }
    if (masked := padded(model, inputs)) is not None:
        uses[MASK] = lambda: masked.call(model)
    found: dict[str, str | None] = {}
    undo, quiet = unchanged(model, buffers=True), warnings.catch_warnings()
    with evaluating(model), torch.no_grad(), same_random_numbers(model), undo, quiet:
        warnings.simplefilter("ignore")
        for name, use in uses.items():
            found[name] = _fails_in(model, use)
    return found


def training_fails(model: nn.Module, inputs: Inputs) -> str | None:
    """Return the module in which a forward in train mode fails; ``None`` if it does not."""
    given = inputs.map(Tensor.clone)
    undo, quiet = unchanged(model, buffers=True), warnings.catch_warnings()
    with evaluating(model), torch.no_grad(), same_random_numbers(model), undo, quiet:
        warnings.simplefilter("ignore")
        with without_cache(model, given) as extra, SparingParameters(model):
            model.train()  # until every module is put back into its own mode
            return _fails_in(model, lambda: given.call(model, **extra))


def lost_in_training(model: nn.Module, recipes: Mapping[str, Recipe], inputs: Inputs) -> list[str]:
    """Return the modules whose own code does something in training that a forward which is written anew does not.

    That forward is the eval mode's, with its dropouts and the modules that it calls. The dense model is run in eval
    mode, and again with that code alone told that it trains, without dropout: it does more if it gives something else,
    writes something else into buffers, or fails.

    Args:
        model: The dense model.
        recipes: The forwards that are written anew, per module.
        inputs: What it is run on.
    """
    own = {
        path: [m for p, m in model.named_modules() if with_code(model, p) == p and covers(path, recipe, p)]
        for path, recipe in recipes.items()
    }
    usual, lost = _given_by(model, own, [], inputs, drops=True), list[str]()
    for drops in (False, True):  # the dropouts of forwards that have some are those of the code
        here = [
            p for p, recipe in recipes.items() if any(s[1:3] == ["get_attr", "training"] for s in recipe.steps) != drops
        ]
        there = _given_by(model, own, here, inputs, drops=drops) if here else {}
        suspects = [p for p in here if not _same(usual.get(p), there.get(p))]
        lost += [p for p in suspects if not _same(usual.get(p), _given_by(model, own, [p], inputs, drops=drops).get(p))]
    return lost


def _given_by(
    model: nn.Module, own: Mapping[str, list[nn.Module]], training: list[str], inputs: Inputs, *, drops: bool
) -> dict[str, list[Any]]:
    """Return what modules give, with the buffers that their code holds, while some of them are told that they train.

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
    given, undo, quiet = inputs.map(Tensor.clone), unchanged(model, buffers=True), warnings.catch_warnings()
    dropping = contextlib.nullcontext() if drops else _WithoutDropout()
    try:
        with evaluating(model), torch.no_grad(), same_random_numbers(model), undo, unfused(), quiet:
            warnings.simplefilter("ignore")
            with without_cache(model, given) as extra, SparingParameters(model), dropping:
                for module in (m for p in training for m in own[p]):
                    module.training = True
                model(*given.args, **given.kwargs, **extra)
                for path, modules in own.items():
                    found.setdefault(path, []).extend(b.clone() for m in modules for b in m.buffers(recurse=False))
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
        if func is F.scaled_dot_product_attention:
            args, kwargs = (
                args[:4],
                {**dict(zip(("is_causal",), args[5:], strict=False)), **(kwargs or {}), "dropout_p": 0.0},
            )
        return func(*args, **(kwargs or {}))


_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout),
}


def gradient_error(
    dense: nn.Module, small: nn.Module, given: tuple[Inputs, Inputs], cuts: Mapping[str, Cut]
) -> float | None:
    """Return how far gradients at the inputs lie apart in eval mode, relative to the largest; ``None`` if not known.

    Of inputs that are whole numbers, those at the tables in which they are looked up.

    Args:
        dense: The dense model.
        small: The smaller one.
        given: What the one and the other are run on.
        cuts: What stays of the parameters.
    """
    grads = [_gradients(m, x) for m, x in zip((dense, small), given, strict=True)]
    grads[0] = {n: cuts[n].apply(g) if n in cuts else g for n, g in grads[0].items()}
    names = [n for n in grads[0] if n in grads[1] and grads[0][n].shape == grads[1][n].shape]
    a, b = ([g[n] for n in names] for g in grads)
    return min(relative_error(a, b), relative_error(b, a)) if names else None


def _gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return the gradients of a sum over the outputs, each element with a weight of its own."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    leaves: dict[str, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.is_floating_point():
            leaves[str(len(leaves))] = x.requires_grad_()
        return x

    given, undo, quiet = inputs.map(leaf), unchanged(model, buffers=True), warnings.catch_warnings()
    try:
        for p in frozen:
            p.requires_grad_(False)
        if not leaves:
            embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            tables = {n: p for n, p in model.named_parameters() if id(p) in embeddings}
            leaves = {n: w.requires_grad_() for n, w in tables.items()}
        with evaluating(model), torch.enable_grad(), same_random_numbers(model), undo, quiet:
            warnings.simplefilter("ignore")
            with without_cache(model, given) as extra, SparingParameters(model):
                leaves_of = pytree.tree_leaves(given.call(model, **extra))
            outputs = [part for leaf in leaves_of for part in parts_of(leaf)]
            outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()]
            weights = [
                torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outputs
            ]
            found = [*leaves.values()]
            if outputs:
                found = torch.autograd.grad(outputs, found, weights, allow_unused=True, materialize_grads=True)
            else:
                found = [torch.zeros_like(x) for x in found]
        return dict(zip(leaves, found, strict=True))
    except Exception:
        return {}
    finally:
        for p in model.parameters():
            p.requires_grad_(False)
        for p in frozen:
            p.requires_grad_()


def _fails_in(model: nn.Module, use: Callable[[], Any]) -> str | None:
    """Return the innermost module that was running when something failed; ``None`` if it did not."""
    running: list[str] = []

    def begin(path: str, *_: object) -> None:
        running.append(path)

    def end(*_: object) -> None:
        running.pop()

    handles = [m.register_forward_pre_hook(functools.partial(begin, path)) for path, m in model.named_modules()]
    handles += [m.register_forward_hook(end) for m in model.modules()]
    try:
        use()
    except Exception:
        return with_code(model, running[-1]) if running else ""
    finally:
        for handle in handles:
            handle.remove()
    return None


def given_caches(model: nn.Module, inputs: Inputs) -> frozenset[str]:
    """Return the modules that are given more in such use than without a cache, and those around them."""
    with _arguments(model) as plain:
        run(model, inputs)
    with _arguments(model) as cached:
        cached_uses(model, inputs)
    given = [path.split(".") for path, names in cached.items() if not names <= plain.get(path, set())]
    return frozenset(".".join(path[:n]) for path in given for n in range(len(path) + 1))


@contextlib.contextmanager
def _arguments(model: nn.Module) -> Generator[dict[str, set[int | str]]]:
    """Note which arguments every module is given, those that are ``None`` or what they are by default left out."""
    found: dict[str, set[int | str]] = {}

    def watch(path: str, module: nn.Module) -> Any:
        defaults: dict[int | str, Any] = {name: default for name, _, default in plain_signature(module)}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip([*defaults, *range(len(args))], args, strict=False)) | kwargs
            more = {n for n, x in given.items() if not (x is None or x is defaults.get(n) or says_no(n, x))}
            found.setdefault(path, set()).update(more)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [watch(path, module) for path, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
