"""The maths of D-Gating on plain tensors: products of gates, group sums, the two penalties and their difference.

A group of weights is factored as ``w_g = ω_g · γ_{g,1} ··· γ_{g,D-1}``. Throughout, ``gamma`` has shape ``(G, D-1)``,
``index`` maps the elements of a parameter to groups ``0 .. G-1`` (or -1) and broadcasts to it, and ``omega_sq`` holds
``‖ω_g‖²`` with shape ``(G,)``.

Reference: Kolb, Frost, Bischl, Rügamer, "Differentiable Sparsity via D-Gating", arXiv 2509.23898.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_product(gamma: Tensor) -> Tensor:
    """Return ``γ_1 ··· γ_{D-1}`` per group, shape ``(G,)``."""
    return gate_column(gamma).squeeze(1)


def gate_column(gamma: Tensor) -> Tensor:
    """Return ``γ_1 ··· γ_{D-1}`` per group as a column, shape ``(G, 1)``; the gates themselves for D=2.

    A chain of products, not ``prod``: the backward of ``prod`` returns 0 where two factors are denormal. Columns, not
    ``unbind``: their backward is one ``cat`` without a ``stack``; and not ``Tensor.split``, which goes through Python.
    Each step of training pays for it.
    """
    if gamma.shape[1] == 1:
        return gamma
    product, *rest = gamma.split_with_sizes([1] * gamma.shape[1], 1)
    for factor in rest:
        product = product * factor
    return product


def sum_by_group(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Sum the elements of a parameter-shaped tensor by group, shape ``(G,)``; ungated elements are left out."""
    values = values.sum_to_size(index.shape) if values.shape != index.shape else values
    padded = values.new_zeros(num_groups + 1)
    padded.index_add_(0, index.flatten() % (num_groups + 1), values.flatten())
    return padded[:num_groups]


def spread(per_group: Tensor, index: Tensor, fill: float) -> Tensor:
    """Give every element its group's value and ungated elements ``fill``; shape of ``index``."""
    padded = torch.cat([per_group, per_group.new_full((1,), fill)])
    # index_select, not indexing: its backward is a plain index_add
    return padded.index_select(0, index.flatten() % padded.shape[0]).view(index.shape)


def group_norm(omega_sq: Tensor, gamma: Tensor) -> Tensor:
    """Return ``‖w_g‖ = ‖ω_g‖ · |γ_1 ··· γ_{D-1}|``, shape ``(G,)``."""
    return omega_sq.sqrt() * gate_product(gamma).abs()


def factor_penalty(omega_sq: Tensor, gamma: Tensor) -> Tensor:
    """Return ``(‖ω_g‖² + Σ_d γ_{g,d}²) / D``, the smooth penalty of each group, shape ``(G,)``."""
    return (omega_sq + gamma.square().sum(1)) / (gamma.shape[1] + 1)


def norm_penalty(omega_sq: Tensor, gamma: Tensor) -> Tensor:
    """Return ``‖w_g‖^{2/D}``, the non-smooth penalty of each group, shape ``(G,)``.

    Computed as the product of the factors' roots, so that a product which underflows does not lose the value.
    """
    D = gamma.shape[1] + 1
    return omega_sq.pow(1 / D) * gate_product(gamma.abs().pow(2 / D))


def imbalance(omega_sq: Tensor, gamma: Tensor) -> Tensor:
    """Return the largest difference between the squared norms of two factors of a group, shape ``(G,)``."""
    squares = torch.cat([omega_sq.unsqueeze(1), gamma.square()], 1)
    return squares.amax(1) - squares.amin(1)


def balanced_scales(omega_sq: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return what balances each group without changing ``ω_g · Π γ``: a scale for ω, shape ``(G,)``, and new gates.

    Every factor gets the norm ``‖w_g‖^{1/D}`` and keeps its sign. A group whose product is zero gets zero factors.
    """
    size = norm_penalty(omega_sq, gamma).sqrt()
    norm = omega_sq.sqrt()
    scale = torch.where(norm > 0, size / torch.where(norm > 0, norm, 1), 0)
    return scale, gamma.sign() * size.unsqueeze(1)
