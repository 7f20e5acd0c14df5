"""The maths on plain tensors, against loops over single weights; gradients also where factors vanish."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import naive_gradients
from torch import nn

import dgate_wrap as dg
from dgate_wrap import factorization as fz

# exact zeros of both signs, the smallest denormal, denormals whose products vanish, and plain numbers
FACTORS = st.sampled_from([0.0, -0.0, 5e-324, 1e-310, -1e-160, 1e-30, -1.0, 0.5, 1.0, 1.7])


@st.composite
def gated_weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw labels of a 4 × 3 weight, and gates of up to four groups with D up to 5."""
    layout = draw(st.sampled_from(["rows", "columns", "one", "each", "irregular", "part"]))
    labels = {
        "rows": torch.arange(4).view(4, 1),
        "columns": torch.arange(3).view(1, 3),
        "one": torch.zeros(1, 1, dtype=torch.int64),
        "each": torch.arange(12).view(4, 3),
        "irregular": torch.tensor([[3, 0, 1], [1, 1, 2], [0, 3, 3], [2, 2, 2]]),
        "part": torch.tensor([[0], [-1], [1], [0]]),
    }[layout]
    D = draw(st.integers(2, 5))
    rows = [[draw(FACTORS) for _ in range(D - 1)] for _ in range(int(labels.max()) + 1)]
    return labels, torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=200)
@given(gated_weights())
@example((torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1e-200, 1e-200, 3.0]], dtype=torch.float64)))
@example((torch.arange(4).view(4, 1), torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [1.0, 2.0]]).double()))
def test_gradients_equal_the_elementwise_ones(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels, gamma = case
    model = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    dg.gate(model, {"weight": labels}, D=gamma.shape[1] + 1)
    omega, gates = model.parametrizations.weight.original, model.parametrizations.weight[0].gates
    with torch.no_grad():
        omega.copy_(torch.linspace(-1.3, 2.1, 12).view(4, 3))
        gates.gamma.copy_(gamma)
    upstream = torch.linspace(0.7, -1.9, 12, dtype=torch.float64).view(4, 3)
    effective = model.weight
    (effective * upstream).sum().backward()

    weight, d_omega, d_gamma, scale = naive_gradients(omega, labels, gamma, upstream)
    torch.testing.assert_close(effective.flatten().tolist(), weight, rtol=1e-12, atol=5e-323)
    torch.testing.assert_close(omega.grad.flatten().tolist(), d_omega, rtol=1e-12, atol=5e-323)
    # relative to the summands, since they cancel; and never looser than the rounding of denormals
    bound = 1e-12 * torch.tensor(scale, dtype=torch.float64) + 1e-321
    expected = torch.tensor(d_gamma, dtype=torch.float64)
    error = (gates.gamma.grad - expected).abs()
    assert bool((error <= bound).all()), (gates.gamma.grad, expected)


def test_the_chain_keeps_a_gradient_that_prod_loses() -> None:
    gamma = torch.tensor([[1e-20, 1e-30]], requires_grad=True)  # float32: the product underflows
    fz.gate_product(gamma).sum().backward()
    torch.testing.assert_close(gamma.grad, torch.tensor([[1e-30, 1e-20]]))


@given(st.integers(2, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_values_equal_loops(D: int, G: int, random: object) -> None:
    draw = lambda: random.choice([0.0, random.uniform(-2, 2), random.choice([-1e-9, 1e-9])])  # noqa: E731
    gamma = [[draw() for _ in range(D - 1)] for _ in range(G)]
    omega_sq = [draw() ** 2 for _ in range(G)]
    s, g = torch.tensor(omega_sq, dtype=torch.float64), torch.tensor(gamma, dtype=torch.float64)
    norm = [o**0.5 * abs(prod(row)) for o, row in zip(omega_sq, gamma, strict=True)]
    squares = [[o, *(x * x for x in row)] for o, row in zip(omega_sq, gamma, strict=True)]
    close = {"rel": 1e-10, "abs": 1e-300}
    assert fz.group_norm(s, g).tolist() == pytest.approx(norm, **close)
    assert fz.factor_penalty(s, g).tolist() == pytest.approx([sum(q) / D for q in squares], **close)
    assert fz.norm_penalty(s, g).tolist() == pytest.approx([n ** (2 / D) for n in norm], **close)
    assert fz.imbalance(s, g).tolist() == pytest.approx([max(q) - min(q) for q in squares], **close)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 1000))
def test_balancing_keeps_product_and_signs(D: int, G: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    omega_sq = torch.rand(G, generator=generator, dtype=torch.float64)
    gamma = torch.randn(G, D - 1, generator=generator, dtype=torch.float64)
    omega_sq[0] = 0.0 if seed % 2 else 1e-12
    scale, balanced = fz.balanced_scales(omega_sq, gamma)
    torch.testing.assert_close(scale * balanced.prod(1), gamma.prod(1) * (omega_sq > 0), rtol=1e-10, atol=0)
    new_sq = omega_sq * scale.square()
    assert fz.imbalance(new_sq, balanced).max() < 1e-12
    assert bool(((balanced.sign() == gamma.sign()) | (balanced == 0)).all())
    assert scale.isfinite().all()


def test_sum_and_spread_are_inverse_routes() -> None:
    index = torch.tensor([[0, -1, 2], [2, 2, 0]])
    values = torch.tensor([[1.0, 10.0, 100.0], [1000.0, 10000.0, 1e5]])
    assert fz.sum_by_group(values, index, 4).tolist() == [100001.0, 0.0, 11100.0, 0.0]
    assert fz.spread(torch.tensor([5.0, 6.0, 7.0]), index, 1.0).tolist() == [[5, 1, 7], [7, 7, 5]]
    # labels that broadcast: rows
    assert fz.sum_by_group(values, torch.tensor([[1], [-1]]), 2).tolist() == [0.0, 111.0]
