"""The penalty as weight decay: parameter groups for optimizers that add ``weight_decay · θ`` to the gradient."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import nn

from .errors import PenaltyError
from .penalty import GroupWeights, Penalty, _appliers, _some


class PenaltyGroup(dict[str, Any]):
    """An optimizer's parameter group whose weight decay is the penalty; refuses decoupled decay."""

    how = "as weight decay of an optimizer built from dg.param_groups"
    active = True

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Take an optimizer's default, unless it decouples the decay."""
        if key == "decoupled_weight_decay" and default:
            raise PenaltyError(
                "the groups of dg.param_groups were given to an optimizer with decoupled weight decay (as AdamW has).",
                expected="an optimizer that adds weight_decay · θ to the gradient: SGD, Adam, RMSprop, Adagrad",
                mend="optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0); "
                "dg.Penalty(model, lam).attach(optimizer)",
            )
        return super().setdefault(key, default)


def param_groups(
    model: nn.Module, lam: float, *, weights: GroupWeights = "uniform", **defaults: Any
) -> list[dict[str, Any]]:
    """Return optimizer groups whose ``weight_decay = 2 λ w_g / D`` is the penalty: no extra work in a step.

    For optimizers with coupled decay (SGD, Adam, RMSprop, Adagrad), which add ``weight_decay · θ`` to the gradient.
    Never for decoupled decay (AdamW, Muon, Adafactor, Lion): that is another objective. Optimizers that flag it are
    refused.

    Args:
        model: A gated model.
        lam: λ, at least 0.
        weights: Weights of the groups, as in `Penalty`; must be constant within each parameter.
        defaults: Options of every group (``lr=...``); ``weight_decay`` is that of the ungated parameters only.

    Returns:
        Groups of the factors, one per distinct decay, and one of all other trainable parameters.

    Raises:
        NotGatedError: If the model holds no gates.
        PenaltyError: If λ is negative or not finite, or a parameter is gated in part or with unequal weights, which
            one weight decay per parameter cannot express.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3)), "filters", D=2)
        >>> groups = dg.param_groups(model, lam=1e-3, weight_decay=5e-4)
        >>> [g["weight_decay"] for g in groups]
        [0.001, 0.0005]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    penalty = Penalty(model, lam, weights=weights)
    penalty._refuse_twice()
    uneven = [penalty._names[id(p)] for p, c in penalty._factors if not isinstance(c, float)]
    if uneven:
        raise PenaltyError(
            f"{_some(uneven)}: some weights are ungated, or groups of one parameter have different weights.",
            expected="parameters that are gated as a whole and evenly, since an optimizer decays whole parameters",
            mend="dg.Penalty(model, lam).attach(optimizer)",
        )
    by_decay: dict[float, PenaltyGroup] = {}
    for p, c in penalty._factors:
        if p.requires_grad:
            decay = 2 * penalty.lam * cast(float, c)
            group = by_decay.setdefault(decay, PenaltyGroup({**defaults, "params": [], "weight_decay": decay}))
            group["params"].append(p)
            if any(p is g for g in penalty._gammas):
                _appliers[p] = weakref.ref(group)
    factors = {id(p) for p, _ in penalty._factors}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    return [*by_decay.values(), *([{**defaults, "params": rest}] if rest else [])]
