"""Channels that are dead in one branch of a sum: their layer does not compute them, and scatters the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import dgate_wrap as dg


class Residual(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1, bias=bias)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.conv2(self.conv1(x).relu()))
        return self.head(x.mean((2, 3)))


class Layers(nn.Module):
    """The hidden layer has its own code around it, and is called twice."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 300), nn.Linear(300, 16, bias=bias), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        x = x + self.down(self.up(x).relu())
        return self.head(F.layer_norm(x, (16,)))


class WrittenAnew(nn.Module):
    """Heads go only if the code of the attention is written anew, and its output layer is in it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 600), nn.Linear(200, 16, bias=bias), nn.Linear(16, 3)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 50)).transpose(1, 2) for t in self.qkv(x).split(200, dim=2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(x + self.out(self.attend(x)), (16,)))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CASES = {"conv": (Residual, "conv2", draw(2, 16, 5, 5)), "linear": (Layers, "down", draw(2, 3, 16))}


def partly_dead(make: Callable[[bool], nn.Module], layer: str, bias: bool) -> nn.Module:
    """Zero rows 1, 4, 7, ... 13 and 0 of a layer."""
    model = make(bias)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight = model.get_submodule(layer).weight
        weight[1::3] = 0
        weight[0] = 0
    return dg.gate(model, dg.Select(names=f"{layer}.weight", axis=0)).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_only_what_lives_and_scatters_it(case: str, bias: bool, tmp_path: Path) -> None:
    make, layer, x = CASES[case]
    exported = dg.export(partly_dead(make, layer, bias), x, latency=False)
    small = exported.model
    assert type(small) is make
    assert small.get_submodule(layer).weight.shape[0] == 10
    assert exported.report.removed == 6
    assert exported.report.certificate.max_error["float64"] < 1e-12
    expected = small(x)
    for copied in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        dg.load(dg.save(exported, tmp_path), make(bias)).eval(),
        torch.compile(small, backend="aot_eager", fullgraph=True),
    ):
        assert torch.equal(copied(x), expected)
    whole = dg.expand(exported, make(bias), x)
    assert whole.get_submodule(layer).weight.shape[0] == 16
    assert torch.allclose(whole(x), expected, atol=1e-5)
    assert torch.allclose(small.double()(x.double()).float(), expected, atol=1e-5)
    small.float().train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_rewritten_code_scatters_too() -> None:
    model = WrittenAnew(bias=True)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.out.weight[torch.arange(16) % 4 > 0] = 0
        model.out.weight[:, 50:100] = 0
    x = draw(2, 3, 16)
    exported = dg.export(dg.gate(model, "neurons", include="out.*").eval(), x, latency=False)
    assert exported.report.rewritten == [""]
    assert exported.model.out.weight.shape == (4, 150)
    longer = draw(3, 7, 16)
    assert torch.allclose(exported.model(longer), model(longer), atol=1e-5)


def test_scattering_that_takes_more_time_than_it_spares_is_not_done() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[::2] = 0
    exported = dg.export(dg.gate(model, "neurons", include="2.*"), draw(4, 8), latency=False)
    assert exported.model[0].weight.shape == (16, 8)


class ReadInPart(Layers):
    """What the second call of the hidden layer gives is read in part only."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x + self.down(self.up(x).relu()), (16,))
        return self.head(self.down(self.up(x).relu()))


def test_all_calls_of_a_layer_scatter_alike() -> None:
    model = ReadInPart(bias=True)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.down.weight[torch.arange(16) % 4 > 0] = 0
        model.down.bias[torch.arange(16) % 4 > 0] = 0
        model.head.weight[:, 4:] = 0
    x = draw(2, 3, 16)
    exported = dg.export(dg.gate(model, "neurons", include="down.*").eval(), x, latency=False)
    assert exported.model.down.weight.shape[0] == 4
    assert torch.allclose(exported.model(x), model(x), atol=1e-5)
