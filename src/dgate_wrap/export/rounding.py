"""How far the outputs of a network move when its sums round otherwise: far, where it chooses between near ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_SUMS = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "convolution", "_trilinear"),
    *("sum", "mean", "var", "std", "cumsum", "logsumexp", "linalg_vector_norm", "_softmax", "_log_softmax"),
    *("native_layer_norm", "native_group_norm", "_embedding_bag", "_cdist_forward", "_fft_r2c", "_fft_c2c", "_fft_c2r"),
    *("mkldnn_rnn_layer", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
)
"""Operations of PyTorch that add up, so that a cut changes the order in which they do."""

_RUNS, _UNITS = 3, 8


class OtherRounding(TorchDispatchMode):
    """Move every element that a sum gives up or down by some units in the last place, at random.

    Whole numbers stay: small ones are exact, and what is compared with them would not be equal any more.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        out = func(*args, **(kwargs or {}))
        name: str = func.overloadpacket.__name__
        adds = name in _SUMS or "attention" in name
        return pytree.tree_map(self._moved, out) if adds and not func._schema.is_mutable else out

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self._seed)
        up = torch.randint(-_UNITS, _UNITS + 1, x.shape, generator=self._generators[x.device], device=x.device)
        return torch.where(x == x.round(), x, x * (1 + torch.finfo(x.dtype).eps * up.to(x.dtype)))


def moves(run: Callable[[], list[Any]], error: Callable[[list[Any]], float]) -> float:
    """Return how far other rounding moves what a function gives, by the largest of some errors.

    Args:
        run: Runs a network.
        error: Tells how far its outputs are from what they were.
    """
    worst = 0.0
    for seed in range(_RUNS):
        with OtherRounding(seed):
            worst = max(worst, error(run()))
    return worst
