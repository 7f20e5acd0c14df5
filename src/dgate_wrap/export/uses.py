"""What a model does that its trace does not show: with a key-value cache, and in training."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..tracing import Inputs
from ..tracing.settings import evaluating, same_random_numbers, unchanged
from .culprits import with_code
from .padding import padded
from .rewritten import plain_signature, says_no
from .runs import trying
from .verify import run

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
    with trying(model, inputs) as run_it:
        model.train()  # until every module is put back into its own mode
        return _fails_in(model, run_it)


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
