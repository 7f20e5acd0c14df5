"""Set groups to exact zero: those below a norm, or the smallest ones until a share of the model is gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .diagnostics import groups as list_groups
from .errors import PruneError
from .flops import count_flops
from .gates import GatedTensor, by_gates, require_gated
from .penalty import group_sizes
from .tracing import Inputs, normalize_inputs

Scope = Literal["groups", "parameters", "flops"]

DEFAULT_TOL = 1e-6
"""Norm at or below which a group counts as dead by default.

In networks with BatchNorm, whose live norms may be as small as 1e-4, it was seen to move outputs by less than 1e-4 of
their size; the gap that `PruneReport` shows tells whether more is safe.
"""


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Args:
        names: Parameters of each set of coupled groups, and how many groups were zeroed of how many.
        pruned: How many groups are zero now that were alive before.
        dead: How many groups are zero now.
        total: How many groups there are.
        tol: The norm at or below which groups were zeroed.
        largest_dead: Largest norm among the zeroed groups, before; 0 if none.
        smallest_alive: Smallest norm among the others; infinite if none.
        shares: Share of groups, gated parameters and (if asked for) gated FLOPs that is zero now.
    """

    names: dict[str, tuple[int, int]]
    pruned: int
    dead: int
    total: int
    tol: float
    largest_dead: float
    smallest_alive: float
    shares: dict[str, float]

    def __str__(self) -> str:
        gap = (
            f"largest dead norm {self.largest_dead:.3g}, smallest live norm {self.smallest_alive:.3g}"
            if 0 < self.dead < self.total
            else ("every group is dead" if self.dead else f"no group is dead; smallest norm {self.smallest_alive:.3g}")
        )
        shares = ", ".join(f"{v:.1%} of {k}" for k, v in self.shares.items())
        rows = [f"  {name}: {dead} of {total} groups dead" for name, (dead, total) in self.names.items()]
        return "\n".join([f"{self.dead} of {self.total} groups dead ({self.pruned} new; {shares}); {gap}", *rows])


def prune(
    model: nn.Module,
    *,
    tol: float | None = None,
    ratio: float | None = None,
    scope: Scope = "groups",
    example_inputs: object = None,
    example_kwargs: dict[str, Any] | None = None,
    optimizer: Optimizer | None = None,
) -> PruneReport:
    """Set groups of a gated model to exact zero, in place, and return what was done.

    By ``tol``: groups with ``‖w_g‖ ≤ tol``. By ``ratio``: the groups of smallest norm, until their share of ``scope``
    is as close to ``ratio`` as whole groups allow; of ``"groups"`` it is exact (``round(ratio · G)``). ω and gates of
    a zeroed group are all zero, so that it stays zero under any gradient (balanced zero groups never reopen).

    Args:
        model: A gated model.
        tol: Norm at or below which a group is zeroed; ``1e-6`` if neither ``tol`` nor ``ratio`` is given.
        ratio: Share in [0, 1] instead of a tolerance.
        scope: What the ratio is a share of: ``"groups"``, ``"parameters"`` (gated weights) or ``"flops"`` (of gated
            layers; a group has its share of the weights' FLOPs).
        example_inputs: Inputs on which FLOPs are counted; for ``scope="flops"`` only.
        example_kwargs: Keyword inputs beside positional ones.
        optimizer: The optimizer, whose momentum and other state of zeroed weights is set to zero with them. Without
            it, momentum may push a zeroed group off zero once more.

    Returns:
        `PruneReport`, with the gap between the largest dead and the smallest live norm.

    Raises:
        NotGatedError: If the model holds no gates.
        PruneError: If tol or ratio is out of range, both are given, or the scope is unknown. Nothing is pruned.
        TraceError: If FLOPs are asked for and the inputs are missing or do not fit.

    Example:
        >>> import dgate_wrap as dg
        >>> model = dg.gate(torch.nn.Sequential(torch.nn.Linear(4, 10)), "neurons", D=2)
        >>> report = dg.prune(model, ratio=0.3)
        >>> report.dead, int(dg.groups(model).alive.sum())
        (3, 7)
    """
    _check(tol, ratio, scope)
    tensors = require_gated(model, "cannot prune")
    norm = list_groups(model).norm
    costs = {"groups": torch.ones_like(norm), "parameters": _sizes(tensors)}
    if scope == "flops":
        costs["flops"] = _flops(model, tensors, normalize_inputs(example_inputs, example_kwargs))
    if ratio is not None:
        doomed = _smallest(norm, costs[scope], ratio)
        tol = float(norm[doomed].max()) if doomed.any() else 0.0
    else:
        tol = DEFAULT_TOL if tol is None else float(tol)
        doomed = norm <= tol
    names: dict[str, tuple[int, int]] = {}
    parts = doomed.split([gates.num_groups for gates, _ in by_gates(tensors)])
    for (gates, members), part in zip(by_gates(tensors), parts, strict=True):
        _zero(members, part.to(gates.gamma.device), optimizer)
        names[", ".join(t.name for t in members)] = (int(part.sum()), part.numel())
    return PruneReport(
        names=names,
        pruned=int((doomed & (norm > 0)).sum()),
        dead=int(doomed.sum()),
        total=doomed.numel(),
        tol=tol,
        largest_dead=float(norm[doomed].max()) if doomed.any() else 0.0,
        smallest_alive=float(norm[~doomed].min()) if not doomed.all() else math.inf,
        shares={k: float(c[doomed].sum() / c.sum()) for k, c in costs.items()},
    )


def _check(tol: object, ratio: object, scope: object) -> None:
    def number(v: object) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

    problem = None
    if tol is not None and ratio is not None:
        problem = f"tol={tol!r} and ratio={ratio!r} are both given", "one of them", "dg.prune(model, ratio=0.5)"
    elif tol is not None and not (number(tol) and cast(float, tol) >= 0):
        problem = f"tol={tol!r}", "a finite norm of at least 0", "dg.prune(model, tol=1e-6)"
    elif ratio is not None and not (number(ratio) and 0 <= cast(float, ratio) <= 1):
        problem = f"ratio={ratio!r}", "a share in [0, 1]", "dg.prune(model, ratio=0.5)"
    elif scope not in ("groups", "parameters", "flops"):
        problem = (
            f"scope={scope!r}",
            "'groups', 'parameters' or 'flops'",
            'dg.prune(model, ratio=0.5, scope="parameters")',
        )
    if problem:
        found, expected, mend = problem
        raise PruneError(f"cannot prune: {found}.", expected=expected, mend=mend)


def _sizes(tensors: Sequence[GatedTensor]) -> Tensor:
    return torch.cat([group_sizes(m).double().cpu() for _, m in by_gates(tensors)])


def _smallest(norm: Tensor, cost: Tensor, ratio: float) -> Tensor:
    """Mark the groups of smallest norm whose summed cost is closest to a share of the whole."""
    order = norm.argsort(stable=True)
    reached = torch.cat([cost.new_zeros(1), cost[order].cumsum(0)])
    count = int((reached - ratio * cost.sum()).abs().argmin())
    doomed = torch.zeros_like(norm, dtype=torch.bool)
    doomed[order[:count]] = True
    return doomed


def _flops(model: nn.Module, tensors: Sequence[GatedTensor], inputs: Inputs) -> Tensor:
    """Return the FLOPs of every group: its share, by weights, of the FLOPs of the layers that hold it."""
    by_module = count_flops(model, inputs)
    prefix = {id(m): n for n, m in model.named_modules()}
    out: list[Tensor] = []
    for gates, members in by_gates(tensors):
        total = torch.zeros(gates.num_groups, dtype=torch.float64)
        for t in members:
            host, _ = t.hosts[0]
            share = group_sizes([t]).double().cpu() / t.omega.numel()
            total += share * by_module.get(prefix[id(host)], 0)
        out.append(total)
    return torch.cat(out)


@torch.no_grad()
def _zero(members: Sequence[GatedTensor], doomed: Tensor, optimizer: Optimizer | None) -> None:
    """Set ω, gates and optimizer state of the marked groups to zero."""
    gamma = members[0].gates.gamma
    places: list[tuple[Tensor, Tensor]] = [(gamma, doomed.unsqueeze(1))]
    places += [(t.omega, t.mask(doomed)) for t in members]
    for tensor, mask in places:
        tensor.masked_fill_(mask, 0)
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                value.masked_fill_(mask, 0)
