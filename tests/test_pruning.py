"""Pruning: which groups go to zero, exactly, and stay there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dgate_wrap as dg


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return dg.gate(nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 7)), "neurons", D=3)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.5, 0.99, 1.0])
def test_ratio_of_groups_is_exact_and_takes_the_smallest(ratio: float) -> None:
    model = mlp()
    norm = dg.groups(model).norm
    report = dg.prune(model, ratio=ratio)
    count = round(ratio * 17)
    alive = dg.groups(model).alive
    assert report.dead == int((~alive).sum()) == count
    assert set((~alive).nonzero().flatten().tolist()) == set(norm.argsort()[:count].tolist())
    assert report.shares["groups"] == pytest.approx(count / 17)


def test_ratio_of_parameters_is_as_close_as_whole_groups_allow() -> None:
    model = mlp()
    groups = dg.groups(model)
    report = dg.prune(model, ratio=0.4, scope="parameters")
    order = groups.norm.argsort()
    reached = torch.cat([torch.zeros(1), groups.size[order].cumsum(0)]) / groups.size.sum()
    assert report.shares["parameters"] == pytest.approx(float(reached[(reached - 0.4).abs().argmin()]))


def test_ratio_of_flops_weighs_groups_by_the_work_of_their_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1))
    model = dg.gate(net, "filters")
    x = torch.randn(1, 1, 8, 8)
    report = dg.prune(model, ratio=0.5, scope="flops", example_inputs=x)
    alive = dg.groups(model).alive
    cost = torch.tensor([2 * 9 * 64.0] * 4 + [2 * 9 * 4 * 4.0] * 4)
    assert report.shares["flops"] == pytest.approx(float(cost[~alive].sum() / cost.sum()))
    assert abs(report.shares["flops"] - 0.5) <= float(cost.max() / cost.sum())


def test_tol_is_inclusive_and_the_gap_is_reported() -> None:
    model = mlp()
    norm = dg.groups(model).norm.sort().values
    report = dg.prune(model, tol=float(norm[4]))
    assert report.dead == report.pruned == 5
    assert report.largest_dead == pytest.approx(float(norm[4]))
    assert report.smallest_alive == pytest.approx(float(norm[5]))
    assert "largest dead norm" in str(report)


def test_default_tol_leaves_a_fresh_model_alone() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = dg.prune(model)
    assert report.dead == 0
    assert math.isfinite(report.smallest_alive)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_pruned_groups_are_exact_zeros_and_never_reopen() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    dg.prune(model, ratio=0.5, optimizer=optimizer)
    dead = ~dg.groups(model).alive
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).sub(1).square().mean().backward()
        optimizer.step()
    assert int(dead.sum()) == 8
    assert torch.equal(~dg.groups(model).alive, dead)
    assert (model[0].weight.abs().sum(1) == 0).sum() + (model[2].weight.abs().sum(1) == 0).sum() == 8


def test_without_the_optimizer_momentum_reopens() -> None:
    """What `optimizer=` is for: the test above must be able to fail."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    dg.prune(model, ratio=0.5)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    assert bool(dg.groups(model).alive.all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tol": -1e-9}, "tol=-1e-09"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"ratio": 1.01}, "ratio=1.01"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": 0.5, "tol": 0.1}, "both given"),
        ({"ratio": 0.5, "scope": "layers"}, "scope='layers'"),
    ],
)
def test_wrong_arguments_prune_nothing(options: dict[str, float | str], match: str) -> None:
    model = mlp()
    with pytest.raises(dg.PruneError, match=match):
        dg.prune(model, **options)
    assert bool(dg.groups(model).alive.all())


def test_flops_need_inputs() -> None:
    with pytest.raises(dg.TraceError, match="example inputs are needed"):
        dg.prune(mlp(), ratio=0.5, scope="flops")


def test_ungated_model() -> None:
    with pytest.raises(dg.NotGatedError):
        dg.prune(nn.Linear(2, 2))
