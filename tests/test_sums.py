"""Sums of products in one parameter: whole experts go, and constants of what is dead are merged into one term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import randomize
from test_corpus_export import kill
from torch import Tensor, nn

import dgate_wrap as dg


class Mixture(nn.Module):
    """Stacked experts and a router whose softmax works over all of them; the last sum is one einsum, or two."""

    def __init__(self, split: bool = False, act: Any = torch.relu) -> None:
        super().__init__()
        self.split, self.act = split, act
        self.up, self.down = nn.Parameter(torch.randn(5, 6, 8)), nn.Parameter(torch.randn(5, 8, 6))
        self.router, self.head = nn.Linear(6, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        h = self.act(torch.einsum("bd,edh->beh", x, self.up))
        if self.split:
            return self.head(torch.einsum("be,bed->bd", weights, torch.einsum("beh,ehd->bed", h, self.down)))
        return self.head(torch.einsum("beh,ehd,be->bd", h, self.down, weights))


class Additive(nn.Module):
    """Shape functions, or learned activations, in one parameter."""

    def __init__(self, basis: bool) -> None:
        super().__init__()
        self.basis = basis
        self.first, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
        self.second, self.last = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(2, 3))
        self.register_buffer("grid", torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.basis:
            y = torch.exp(-((x @ self.first @ self.bias.mT)[..., None] - self.grid).square())
        else:
            y = (x[..., None] * self.first + self.bias).sigmoid()
        return torch.einsum("bo,co->bc", torch.einsum("bfk,ofk->bo", y, self.second).tanh(), self.last)


def gated(model: nn.Module, groups: object, x: Tensor) -> nn.Module:
    randomize(model.double().eval(), torch.Generator().manual_seed(1))
    return dg.gate(model, groups, example_inputs=x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def require_equal(exported: dg.Exported, model: nn.Module, *shape: int) -> None:
    x = draw(7, *shape, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("split", [False, True])
def test_dead_experts_go_though_the_softmax_of_the_router_works_over_all(split: bool) -> None:
    x = draw(4, 6)
    model = gated(Mixture(split), "experts", x)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[1, 3, 4]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert exported.report.rewritten == [""]
    shapes = {n: tuple(p.shape) for n, p in exported.model.named_parameters()}
    assert shapes["up"] == (2, 6, 8)
    assert shapes["down"] == (2, 8, 6)
    assert shapes["router.weight"] == (5, 6)
    require_equal(exported, model, 6)
    own = dg.export(model, x, latency=False, rewrite=False)
    assert own.report.removed == 0
    assert {k.reason.split(" (")[0] for k in own.report.kept} == {"it meets an operand of which others need more"}


@pytest.mark.parametrize("basis", [False, True], ids=["shape functions", "learned activations"])
def test_constants_of_dead_functions_are_merged_into_one(basis: bool) -> None:
    x = draw(4, 6)
    model = gated(
        Additive(basis), {"first": torch.arange(6).view(6, 1)} if not basis else {"bias": torch.arange(6).view(6, 1)}, x
    )
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[0, 2, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 2
    [kept] = exported.report.kept
    assert "carries the constants" in kept.reason
    assert exported.model.get_parameter("second").shape == (3, 4, 4)
    require_equal(exported, model, 6)
    whole = dg.expand(exported, Additive(basis).double(), x)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_each_expert_merges_its_own_constants(share: float) -> None:
    x = draw(4, 6)
    said = dg.explain(Mixture(act=torch.sigmoid).double(), "hidden", x)["up"]
    assert said.verdict == "with compensation"
    assert "into no bias, since the sum has none" in said.reason
    model = gated(Mixture(act=torch.sigmoid), "hidden", x)
    kill(model, share, 2)
    exported = dg.export(model, x, latency=False)
    dead = (model.get_submodule("parametrizations.up")() == 0).all(1)
    most = int((~dead).sum(1).max())
    assert exported.model.get_parameter("up").shape[2] == min(8, most + 1)  # one carries those of all that are dead
    assert exported.report.folded == ["einsum_default: one term"] * (most < 7)
    require_equal(exported, model, 6)


def test_what_two_sums_read_is_not_merged() -> None:
    class Twice(Additive):
        def forward(self, x: Tensor) -> Tensor:
            y = (x[..., None] * self.first + self.bias).sigmoid()
            return torch.einsum("bfk,ofk->bo", y, self.second) * torch.einsum("bfk,ofk->bo", y.square(), self.second)

    x = draw(4, 6)
    model = gated(Twice(False), {"first": torch.arange(6).view(6, 1)}, x)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[0, 2, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 0
    assert {k.reason.split(" (")[0] for k in exported.report.kept} == {"it adds a constant to a sum"}
    require_equal(exported, model, 6)
