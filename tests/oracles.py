"""Dumb, slow and independent: what the library computes, written again as loops over single weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import dgate_wrap as dg


def product(factors: Sequence[float]) -> float:
    out = 1.0
    for f in factors:
        out *= f
    return out


def randomize_gates(model: nn.Module, low: float = 0.5, high: float = 1.5) -> nn.Module:
    """Give every gate a value of its own and a random sign."""
    with torch.no_grad():
        for gates in all_gates(model):
            sign = torch.randint(2, gates.gamma.shape) * 2 - 1
            gates.gamma.copy_(sign * torch.empty_like(gates.gamma).uniform_(low, high))
    return model


def all_gates(model: nn.Module) -> list[dg.Gates]:
    return [m for m in model.modules() if isinstance(m, dg.Gates)]


def kill_every_second(model: nn.Module) -> None:
    """Set every second group of each set of gates to zero."""
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[::2] = 0


def members(labels: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[int, list[tuple[str, int]]]:
    """List the weights of each label as (parameter, flat position), one by one."""
    out: dict[int, list[tuple[str, int]]] = {}
    for name, t in labels.items():
        for position, label in enumerate(t.broadcast_to(parameters[name].shape).flatten().tolist()):
            if label >= 0:
                out.setdefault(label, []).append((name, position))
    return dict(sorted(out.items()))


def group_values(
    labels: Mapping[str, Tensor], parameters: Mapping[str, Tensor], gammas: Mapping[int, Sequence[float]]
) -> dict[str, list[float]]:
    """Compute size, norm, smooth penalty, group penalty and imbalance of each group, in the order of labels."""
    flat = {n: p.detach().double().flatten().tolist() for n, p in parameters.items()}
    out: dict[str, list[float]] = {k: [] for k in ("size", "norm", "smooth", "group", "imbalance")}
    for label, where in members(labels, parameters).items():
        gamma = gammas[label]
        D = len(gamma) + 1
        omega_sq = math.fsum(flat[n][i] ** 2 for n, i in where)
        squares = [omega_sq, *(g * g for g in gamma)]
        norm = math.sqrt(omega_sq) * abs(product(gamma))
        out["size"].append(len(where))
        out["norm"].append(norm)
        out["smooth"].append(math.fsum(squares) / D)
        out["group"].append(norm ** (2 / D))
        out["imbalance"].append(max(abs(a - b) for a in squares for b in squares))
    return out


def naive_gradients(
    omega: Tensor, labels: Tensor, gamma: Tensor, upstream: Tensor
) -> tuple[list[float], list[float], list[list[float]], list[list[float]]]:
    """Return the effective weight, the gradients of ω and of the gates, and the size of the gates' summands.

    Element by element: ``w_i = ω_i Π_d γ_d``, ``∂ω_i = u_i Π_d γ_d``, ``∂γ_d = Σ_i u_i ω_i Π_{e≠d} γ_e``.
    """
    factors = gamma.tolist()
    weight, d_omega = [], []
    d_gamma = [[0.0] * len(row) for row in factors]
    scale = [[0.0] * len(row) for row in factors]
    which = labels.broadcast_to(omega.shape).flatten().tolist()
    for w, g, u in zip(omega.flatten().tolist(), which, upstream.flatten().tolist(), strict=True):
        p = product(factors[g]) if g >= 0 else 1.0
        weight.append(w * p)
        d_omega.append(u * p)
        for d in range(len(factors[g]) if g >= 0 else 0):
            part = u * w * product(factors[g][:d] + factors[g][d + 1 :])
            d_gamma[g][d] += part
            scale[g][d] += abs(part)
    return weight, d_omega, d_gamma, scale
