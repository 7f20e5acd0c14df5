"""Channels that are dead in one branch of a sum: their layer does not compute them, and scatters the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import randomize
from oracles import kill_every_second
from torch import Tensor, nn
from torch.nn import functional as F

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


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


class Heads(nn.Module):
    """Attention with its sizes in its code, which may be given a cache, and whose layers may be called by keyword."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.keyword = keyword

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(batch, length, 32)
        return self.out(input=y) if self.keyword else self.out(y), (k, v)


class Reader(nn.Module):
    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.attention, self.head = Heads(keyword), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x)[0])


def reader_with_dead_heads(keyword: bool = False) -> tuple[Reader, dg.Exported, Tensor]:
    model, x = Reader(keyword), draw(2, 5, 32)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=x)
    kill_every_second(model)
    return model, dg.export(model.eval(), x, rewrite=False, latency=False), x


@pytest.mark.parametrize("keyword", [False, True])
def test_layers_within_code_that_keeps_its_sizes_compute_and_read_only_what_lives(
    keyword: bool, tmp_path: Path
) -> None:
    model, exported, x = reader_with_dead_heads(keyword)
    small = exported.model
    assert type(small.attention) is Heads
    assert exported.report.frozen == ["attention"]
    assert exported.report.kept == []
    shapes = {n: tuple(p.shape) for n, p in small.attention.named_parameters() if n.endswith("weight")}
    assert shapes == {"q.weight": (16, 32), "k.weight": (16, 32), "v.weight": (16, 32), "out.weight": (32, 16)}
    expected = small(x)
    assert torch.allclose(expected, model(x), atol=1e-5)
    for copied in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        dg.load(dg.save(exported, tmp_path), Reader(keyword)).eval(),
        torch.compile(small, backend="aot_eager", fullgraph=True),
        torch.export.export(small, (x,)).module(),
    ):
        assert torch.equal(copied(x), expected)
    whole = dg.expand(exported, Reader(keyword), x)
    assert whole.attention.out.weight.shape == (32, 32)
    assert torch.allclose(whole(x), expected, atol=1e-5)
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_such_code_still_takes_its_cache() -> None:
    model, exported, x = reader_with_dead_heads()
    with torch.no_grad():
        for net in (model, exported.model):
            first, past = net.attention(x[:, :3])
            rest = net.attention(x[:, 3:], past)[0]
            net.given = torch.cat([first, rest], 1)
    assert torch.allclose(exported.model.given, model.given, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_layers_that_scatter_and_pick_are_quantized_and_exported_again() -> None:
    model, exported, x = reader_with_dead_heads()
    kinds = {nn.Linear}
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(exported.model), kinds, torch.qint8)
    dense = torch.ao.quantization.quantize_dynamic(dg.ungate(copy.deepcopy(model)), kinds, torch.qint8)
    allowed = (dense(x) - model(x)).abs().max()
    assert (small(x) - model(x)).abs().max() < 2 * allowed
    again = dg.gate(exported.model, "neurons", include="head.*")
    assert torch.allclose(dg.export(again, x, latency=False).model(x), model(x), atol=1e-5)


def test_layers_that_scatter_and_pick_come_back_from_the_meta_device() -> None:
    _, exported, x = reader_with_dead_heads()
    empty = copy.deepcopy(exported.model).to("meta")
    empty.load_state_dict(exported.model.state_dict(), assign=True)
    assert torch.equal(empty(x), exported.model(x))


@pytest.mark.parametrize("dead", [[0], [1]])
def test_what_dies_later_in_layers_that_scatter_and_pick_goes_too(dead: list[int], tmp_path: Path) -> None:
    _, first, x = reader_with_dead_heads()
    saved, copied = dg.save(first, tmp_path / "first"), copy.deepcopy(first.model)
    again = dg.gate(first.model, "heads", example_inputs=x)
    assert len(dg.groups(again)) == 2
    with torch.no_grad():
        gated_tensors(again)[0].gates.gamma[dead] = 0
    second = dg.export(again, x, rewrite=False, latency=False)
    small = second.model
    assert second.report.removed == 1
    shapes = {n: tuple(p.shape) for n, p in small.attention.named_parameters() if n.endswith("weight")}
    assert shapes == {"q.weight": (8, 32), "k.weight": (8, 32), "v.weight": (8, 32), "out.weight": (32, 8)}
    expected = again(x)
    assert torch.allclose(small(x), expected, atol=1e-5)
    loaded = dg.load(dg.save(second, tmp_path / "second"), dg.load(saved, Reader()))
    empty = copy.deepcopy(small).to("meta")
    empty.load_state_dict(small.state_dict(), assign=True)
    for other in (pickle.loads(pickle.dumps(small)), loaded.eval(), empty, dg.expand(second, copied, x)):
        assert torch.allclose(other(x), expected, atol=1e-5)
    third = dg.export(dg.gate(small, "neurons", include="head.*"), x, latency=False).model
    assert torch.allclose(third(x), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_constants_of_what_dies_later_stay_what_they_were(seed: int) -> None:
    _, layer, x = CASES["conv"]
    first = dg.export(partly_dead(Residual, layer, bias=True), x, latency=False)
    copied = copy.deepcopy(first.model)
    again = dg.gate(first.model, "filters", example_inputs=x)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gates in {id(t.gates): t.gates for t in gated_tensors(again)}.values():
            gates.gamma[torch.rand(gates.num_groups, generator=generator) < 0.4] = 0
    second = dg.export(again, x, latency=False)
    for net in (second.model, dg.expand(second, copied, x)):
        assert torch.allclose(net(x), again(x), atol=1e-5)


class Adapted(nn.Module):
    """An adapter of a layer, of the sizes that the layer names."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_layers_that_scatter_and_pick_name_the_sizes_of_what_they_give_and_take(tmp_path: Path) -> None:
    model, exported, x = reader_with_dead_heads()
    again = dg.export(dg.gate(copy.deepcopy(exported.model), "neurons", include="head.*"), x, latency=False).model
    for small in (exported.model, again, dg.load(dg.save(exported, tmp_path), Reader())):
        for name in ("q", "out"):
            layer = small.attention.get_submodule(name)
            assert (layer.in_features, layer.out_features) == (32, 32)
            setattr(small.attention, name, Adapted(layer))
        assert small(x).shape == model(x).shape


class Slopes(nn.Module):
    """A bias of slopes, counted in the code, times positions of the data; both layers have the same dead heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sloped(), Sloped()])

    def forward(self, x: Tensor) -> Tensor:
        bias = (0.5 ** torch.arange(1, 5))[:, None, None] * (x[..., 0] > 0).cumsum(-1)[:, None, None]
        for layer in self.layers:
            x = x + layer(x, bias)
        return x


class Sloped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) / 8**0.5 + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rewrite", [True, False])
def test_heads_with_slopes_that_the_code_counts_go(rewrite: bool) -> None:
    model, x = Slopes(), draw(2, 5, 32)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=x)
    for gates in {t.gates for t in gated_tensors(model)}:
        gates.gamma.data[::3] = 0
    exported = dg.export(model.eval(), x, rewrite=rewrite, latency=False)
    assert exported.report.removed == 4
    assert all(layer.out.weight.shape == (32, 16) for layer in exported.model.layers)
    longer = draw(3, 7, 32)
    assert torch.allclose(exported.model(longer), model(longer), atol=1e-5)


def test_what_can_be_written_anew_is_cut_and_neither_scatters_nor_picks() -> None:
    model, x = Reader(), draw(2, 5, 32)
    dg.gate(model, "heads", example_inputs=x)
    kill_every_second(model)
    small = dg.export(model.eval(), x, latency=False).model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


class Skipping(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x)[0])


def test_a_layer_without_live_outputs_keeps_one() -> None:
    model, x = Skipping(), draw(2, 5, 32)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        for tensor in gated_tensors(model):
            tensor.gates.gamma.zero_()
    exported = dg.export(model.eval(), x, rewrite=False, latency=False)
    shapes = {n: tuple(p.shape) for n, p in exported.model.attention.named_parameters() if n.endswith("weight")}
    assert shapes == {"q.weight": (1, 32), "k.weight": (1, 32), "v.weight": (1, 1), "out.weight": (32, 1)}
    assert torch.allclose(exported.model(x), model(x), atol=1e-5)
