"""The paper's theory, as statements about this library: optima of exact solvers, and the lemmas on balance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import all_gates, randomize_gates
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors

GROUPS, SIZE, ROWS = 40, 5, 1000


@dataclass(frozen=True)
class Regression:
    """``|Xw - y|² / 2n + λ Σ_g ‖w_g‖`` with 40 groups of 5 features, of which 7 inform; in terms of ``X'X/n``."""

    X: Tensor
    y: Tensor
    gram: Tensor
    target: Tensor
    lams: list[float]

    @staticmethod
    def draw() -> Regression:
        g = torch.Generator().manual_seed(0)
        X = torch.randn(ROWS, GROUPS * SIZE, generator=g, dtype=torch.float64)
        w = torch.zeros(GROUPS * SIZE, dtype=torch.float64)
        w[: 7 * SIZE] = torch.randn(7 * SIZE, generator=g, dtype=torch.float64)
        y = X @ w + torch.randn(ROWS, generator=g, dtype=torch.float64)
        target = X.T @ y / ROWS
        largest = float(target.view(GROUPS, SIZE).norm(dim=1).max())
        return Regression(X, y, X.T @ X / ROWS, target, [largest * 0.9 * 10 ** (-2 * i / 19) for i in range(20)])

    def smooth(self, w: Tensor) -> Tensor:
        return w @ self.gram @ w / 2 - self.target @ w + self.y @ self.y / (2 * ROWS)

    def objective(self, w: Tensor, lam: float) -> float:
        return float(self.smooth(w)) + lam * float(w.view(GROUPS, SIZE).norm(dim=1).sum())

    def violation(self, w: Tensor, lam: float) -> float:
        """How far w is from the conditions of optimality: gradient −λ w_g/‖w_g‖, or at most λ where w_g is zero."""
        gradient = (self.gram @ w - self.target).view(GROUPS, SIZE)
        norm = w.view(GROUPS, SIZE).norm(dim=1, keepdim=True)
        alive = (gradient + lam * w.view(GROUPS, SIZE) / norm).norm(dim=1)
        dead = (gradient.norm(dim=1) - lam).clamp_min(0)
        return float(torch.where(norm[:, 0] > 0, alive, dead).max())

    def solve(self, lam: float, w: Tensor) -> Tensor:
        """Solve exactly: accelerated proximal gradient steps with restarts, from w."""
        step = 1 / float(torch.linalg.eigvalsh(self.gram)[-1])
        ahead, t = w, 1.0
        for _ in range(20_000):
            v = (ahead - step * (self.gram @ ahead - self.target)).view(GROUPS, SIZE)
            shrunk = 1 - lam * step / v.norm(dim=1, keepdim=True).clamp_min(1e-300)
            new = (v * shrunk.clamp_min(0)).flatten()
            t = 1.0 if float((ahead - new) @ (new - w)) > 0 else t
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            ahead, change, w, t = new + (t - 1) / t_next * (new - w), float((new - w).abs().max()), new, t_next
            if change < 1e-15:
                break
        return w


@pytest.fixture(scope="module")
def regression() -> Regression:
    return Regression.draw()


@pytest.fixture(scope="module")
def optima(regression: Regression) -> list[Tensor]:
    found = [torch.zeros(GROUPS * SIZE, dtype=torch.float64)]
    for lam in regression.lams:
        found.append(regression.solve(lam, found[-1]))
    return found[1:]


def fit(model: nn.Module, lam: float, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Train a gated linear model from its initialization with the penalty attached to LBFGS; return its weight."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=3000,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )
    dg.Penalty(model, lam).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model.weight[0])
        value.backward()
        return value

    optimizer.step(closure)
    return model.weight[0].detach()


def linear(groups: object, D: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return dg.gate(nn.Linear(GROUPS * SIZE, 1, bias=False, dtype=torch.float64), groups, D=D)


BLOCKS = dg.Select("weight", axis=1, block=SIZE)


def test_the_exact_solver_is_exact(regression: Regression, optima: list[Tensor]) -> None:
    worst = max(regression.violation(w, lam) for w, lam in zip(optima, regression.lams, strict=True))
    assert worst < 1e-12
    alive = [int((w.view(GROUPS, SIZE).norm(dim=1) > 0).sum()) for w in optima]
    assert min(alive) < 7 < max(alive)  # the path crosses the truth


def test_d2_reaches_the_group_lasso(regression: Regression, optima: list[Tensor]) -> None:
    gaps, supports = [], []
    for lam, exact in zip(regression.lams, optima, strict=True):
        model = linear(BLOCKS)
        w = fit(model, lam, regression.smooth)
        best = regression.objective(exact, lam)
        gaps.append(abs(regression.objective(w, lam) - best) / best)
        supports.append(torch.equal(dg.groups(model).norm > 1e-4, exact.view(GROUPS, SIZE).norm(dim=1) > 1e-4))
    assert max(gaps) <= 1e-6
    assert supports == [True] * 20


@pytest.mark.parametrize("which", [5, 10])
def test_d2_reaches_the_group_lasso_by_ordinary_training(
    regression: Regression, optima: list[Tensor], which: int
) -> None:
    lam, exact = regression.lams[which], optima[which]
    model = linear(BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dg.Penalty(model, lam).attach(optimizer)
    for _ in range(3000):
        optimizer.zero_grad()
        regression.smooth(model.weight[0]).backward()
        optimizer.step()
    w = model.weight[0].detach()
    best = regression.objective(exact, lam)
    assert abs(regression.objective(w, lam) - best) / best <= 1e-6
    assert torch.equal(dg.groups(model).norm > 1e-4, exact.view(GROUPS, SIZE).norm(dim=1) > 1e-4)


def test_single_weights_reach_the_lasso(regression: Regression) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    largest = float(regression.target.abs().max())
    for lam in (largest * 0.5, largest * 0.2, largest * 0.05):
        lasso = linear_model.Lasso(alpha=lam, fit_intercept=False, tol=1e-13, max_iter=100_000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns that so small a tolerance may not be met
            exact = torch.tensor(lasso.fit(regression.X.numpy(), regression.y.numpy()).coef_)
        w = fit(linear("weights"), lam, regression.smooth)

        def objective(v: Tensor, lam: float = lam) -> float:
            return float(regression.smooth(v)) + lam * float(v.abs().sum())

        assert abs(objective(w) - objective(exact)) / objective(exact) <= 1e-6
        assert torch.equal(w.abs() > 1e-4, exact.abs() > 1e-4)
        torch.testing.assert_close(w, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("D", [2, 3, 4])
def test_minima_are_minima_of_the_group_penalty(regression: Regression, D: int) -> None:
    """At the end the gates are balanced, the two penalties agree, and live groups are stationary for ‖w_g‖^{2/D}."""
    lam = regression.lams[8]
    model = linear(BLOCKS, D)
    w = fit(model, lam, regression.smooth)
    assert dg.Penalty(model, lam).value() == pytest.approx(dg.group_penalty(model, lam), rel=1e-8)
    v = w.clone().requires_grad_()
    regression.smooth(v).backward()
    norm = w.view(GROUPS, SIZE).norm(dim=1, keepdim=True)
    live = norm[:, 0] > 1e-4
    assert 0 < int(live.sum()) < GROUPS
    slope = lam * 2 / D * norm ** (2 / D - 2) * w.view(GROUPS, SIZE)
    residual = (v.grad.view(GROUPS, SIZE) + slope)[live]
    assert float(residual.abs().max()) < 1e-5


# -- the lemmas, on a network ------------------------------------------------------------------------------------------

INPUT = torch.randn(32, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randn(32, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network(D: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return dg.gate(model, "neurons", D=D, **options)


def descend(model: nn.Module, lam: float, lr: float, steps: int, momentum: float = 0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    penalty = dg.Penalty(model, lam).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(INPUT) - TARGET).square().mean().backward()
        optimizer.step()
    penalty.detach()


@pytest.mark.parametrize("D", [2, 3, 4, 5])
def test_penalty_bounds_group_penalty_with_equality_when_balanced(D: int) -> None:
    model = randomize_gates(network(D))
    assert bool((dg.misalignment(model) > 1e-6).all())
    assert dg.Penalty(model, 1.0).value() > dg.group_penalty(model) + 1e-2
    dg.balance_(model)
    balanced = dg.Penalty(model, 1.0).value()
    assert balanced == pytest.approx(dg.group_penalty(model), rel=1e-12)
    # equality exactly when balanced: moving one group away from balance, its function unchanged, costs
    gates = all_gates(model)[0].gamma.data
    gates[0, 0] *= 1.1
    gated_tensors(model)[0].omega.data[0] /= 1.1
    assert dg.group_penalty(model) == pytest.approx(balanced, rel=1e-12)
    assert dg.Penalty(model, 1.0).value() > balanced * (1 + 1e-6)
    assert (dg.misalignment(model) > 1e-6).tolist() == [True] + [False] * 7


@pytest.mark.parametrize("D", [2, 3, 4])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_imbalance_decays_exponentially(D: int, lam: float) -> None:
    """Lemma 2: whatever the loss, by exp(−4λt/D) in time t = steps × step size."""
    model = randomize_gates(network(D))
    start = dg.imbalance(model)
    lr = 5e-4
    for steps in (500, 1000):
        descend(model, lam, lr, 500)
        expected = start * math.exp(-4 * lam * steps * lr / D)
        torch.testing.assert_close(dg.imbalance(model), expected, rtol=5e-3, atol=1e-5)


def test_without_penalty_imbalance_is_conserved() -> None:
    model = randomize_gates(network(3))
    start = dg.imbalance(model)
    descend(model, 0.0, 5e-4, 1000)
    torch.testing.assert_close(dg.imbalance(model), start, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("D", [3, 4, 5])
@pytest.mark.parametrize("init", ["ones", "balanced"])
def test_equal_gates_stay_equal(D: int, init: str) -> None:
    """Lemma 4 ii: gates of one group that start equal, and get equal gradients, never part, at any step size."""
    model = network(D, init=init)
    before = all_gates(model)[0].gamma.detach().clone()
    descend(model, 0.02, 0.1, 300, momentum=0.9)
    for gates in all_gates(model):
        gamma = gates.gamma.detach()
        torch.testing.assert_close(gamma, gamma[:, :1].expand_as(gamma), rtol=1e-9, atol=1e-12)
    assert float((before - all_gates(model)[0].gamma.detach()).abs().max()) > 0.05


@pytest.mark.parametrize("D", [2, 3, 4])
def test_balanced_zero_groups_never_reopen(D: int) -> None:
    """Lemma 4 iii: with every factor zero, so is every gradient."""
    model = network(D)
    tensor = gated_tensors(model)[0]
    with torch.no_grad():
        tensor.omega[[1, 4]] = 0
    dg.balance_(model)
    assert not tensor.gates.gamma[[1, 4]].any()
    descend(model, 1e-3, 0.1, 200, momentum=0.9)
    groups = dg.groups(model)
    assert [i for i, a in enumerate(groups.alive.tolist()) if not a] == [1, 4]
    assert not tensor.omega[[1, 4]].any()
    assert not tensor.gates.gamma[[1, 4]].any()


def test_an_unbalanced_zero_group_does_reopen() -> None:
    """What makes the test above a test: zero by ω alone is no end."""
    model = network(3)
    with torch.no_grad():
        gated_tensors(model)[0].omega[1] = 0
    assert not bool(dg.groups(model).alive[1])
    descend(model, 1e-3, 0.1, 5)
    assert bool(dg.groups(model).alive[1])
