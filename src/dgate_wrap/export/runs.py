"""Run a model to see what it does, and leave nothing of that behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing import Inputs
from ..tracing.inputs import without_cache
from ..tracing.settings import evaluating, same_random_numbers, unchanged, unfused
from .copies import SparingParameters


@contextlib.contextmanager
def trying(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Generator[Callable[[], Any]]:
    """Yield a function that calls a model on copies of inputs, as it was traced, unless its modules are told to train.

    Modes, attributes, buffers and random numbers are put back in the end, and nothing is written into a parameter.

    Args:
        model: The model.
        inputs: Its inputs.
        gradients: Whether operations are recorded for gradients.
    """
    undo, quiet = unchanged(model, buffers=True), warnings.catch_warnings()
    with evaluating(model), torch.set_grad_enabled(gradients), same_random_numbers(model), undo, unfused(), quiet:
        warnings.simplefilter("ignore")
        given = inputs.map(Tensor.clone)
        with without_cache(model, given) as extra, SparingParameters(model):
            yield lambda: model(*given.args, **given.kwargs, **extra)
