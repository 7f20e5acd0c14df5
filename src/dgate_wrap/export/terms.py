"""Constant terms in a sum of products of an activation and a weight, as of stacked experts or shape functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..tracing.families import Product
from .constants import Constants, rounding
from .masks import any_of, largest


@dataclass(frozen=True)
class Terms:
    """The constants of an activation in a sum of its products with a weight.

    Tensors have one axis per letter that both operands have: what the activation has alone (batch, positions) is gone.

    Args:
        x: The activation.
        weight: The weight.
        letters: Letters that both have, in the order of the activation.
        weight_letters: Those of the weight.
        summed: Those over which is summed, with their axes of the activation.
        values: Its constants, float64.
        constant: Where it holds a constant, not zero, at any batch or position.
        steady: Where it holds the same constant at all of them.
    """

    x: Node
    weight: Node
    letters: str
    weight_letters: str
    summed: dict[str, int]
    values: Tensor
    constant: Tensor
    steady: Tensor

    @classmethod
    def of(cls, facts: Constants, family: Product) -> Terms:
        """Read them off what is known of a graph."""
        (x, own), (weight, others) = sorted(family.operands, key=lambda o: o[0] not in facts.varying)
        alone = [i for i, c in enumerate(own) if c not in others]
        constant = facts.nonzero_constant(x)
        given = facts.values[x]
        values = (given.abs() if given.is_complex() else given).double().masked_fill(~constant, 0)
        low, high = (values.amin(alone), values.amax(alone)) if alone else (values, values)
        steady = ~any_of(facts.unknown[x], alone)
        steady = steady & (high - low <= rounding(given) * torch.maximum(high.abs(), low.abs()))
        if facts.values[weight].is_complex() or given.is_complex():
            steady = steady & (high == 0)
        letters = "".join(c for c in own if c in others)
        summed = {c: i for i, c in enumerate(own) if c not in family.out_axes}
        return cls(x, weight, letters, others, summed, (low + high) / 2, any_of(constant, alone), steady)

    @property
    def left(self) -> str:
        """Letters of the weight that the result has."""
        return "".join(c for c in self.weight_letters if c not in self.summed)

    def total(self, weight: Tensor, lost: Tensor, kept: list[Tensor]) -> Tensor:
        """Return what some terms add to the kept results, with an axis per letter of `left`."""
        total = torch.einsum(f"{self.letters},{self.weight_letters}->{self.left}", self.values * lost, weight)
        for axis, k in enumerate(kept):
            total = total * k.view([-1 if a == axis else 1 for a in range(total.dim())])
        return total

    def strength(self, terms: Tensor) -> Tensor:
        """Return how large the constants of some terms are, at the least along axes that are not summed over."""
        beside = [i for i, c in enumerate(self.letters) if c not in self.summed]
        sizes = self.values.abs() * terms
        return sizes.amin(beside, keepdim=True) if beside else sizes

    def at(self, strength: Tensor) -> Tensor:
        """Mark the strongest terms: at one index of each axis that is summed over."""
        return largest(strength).expand(self.values.shape)

    def carried(self, total: Tensor, terms: Tensor) -> Tensor:
        """Return what has to be added to the weight so that some terms add a total, in the shape of the weight."""
        shares = torch.where(terms, 1 / self.values.masked_fill(~terms, 1), 0)
        return torch.einsum(f"{self.letters},{self.left}->{self.weight_letters}", shares, total)
