"""Whole branches that died are gone; what normalized over dead features makes up for them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import randomize
from oracles import all_gates, kill_every_second
from torch import Tensor, nn
from torch.nn import functional as F

import dgate_wrap as dg


class Residual(nn.Module):
    def __init__(self, channels: int, down: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if down else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(Residual(6), Residual(6, down=True))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


class Positions(nn.Module):
    """Convolutions over neighbours, one per part of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1, groups=3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(y) for part, y in zip(self.parts, x.chunk(2, 1), strict=True)], 1)


class Positioned(nn.Module):
    """Weighs what it computes by positions, for which several blocks share a module."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.inner, self.positions, self.out = nn.Conv1d(6, 6, 1), positions, nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) * self.positions(x).sigmoid())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions, self.head = nn.Conv1d(2, 6, 3), Positions(), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(Positioned(self.positions) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(-1))


@pytest.mark.parametrize("norm_first", [False, True])
def test_all_heads_of_an_encoder_layer_go(norm_first: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)
        return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).eval()

    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 7, 5)
    randomize(model, torch.Generator().manual_seed(0))
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma.zero_()
    exported = dg.export(model, x, latency=False)
    assert not exported.report.kept
    assert not any("in_proj" in n for n, _ in exported.model.named_parameters())
    loaded = dg.load(dg.save(exported, tmp_path), build())
    for small in (exported.model, loaded, copy.deepcopy(exported.model)):
        assert torch.allclose(small(2 * x), model(2 * x), atol=1e-5)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, outputs))


class Modalities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.head = mlp(6, 4), mlp(7, 4), nn.Linear(8, 3)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.text(text)], 1))


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shapes = nn.ModuleList(mlp(1, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(f(x[:, i : i + 1]) for i, f in enumerate(self.shapes))


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


def adapted() -> nn.Sequential:
    return nn.Sequential(LowRank(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))


class OwnNorm(nn.Module):
    """RMSNorm as many write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class FeedForward(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(12), nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Language(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers, self.norm = nn.Sequential(FeedForward(norm), FeedForward(norm)), norm(12)
        self.out = nn.Linear(12, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.layers(self.embed(tokens))))


class Scaled(nn.Module):
    """A branch that a factor switches off: its layers live, and nobody needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.branch, self.head = nn.Linear(4, 6), mlp(6, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.head(x + self.scale * self.branch(x))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def export_with_zeros(model: nn.Module, inputs: object, *zeros: str) -> dg.Exported:
    """Gate the rows of every weight, set some weights to zero, and export."""
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in zeros:
            model.get_parameter(name).zero_()
    return dg.export(dg.gate(model, dg.Select(names="*weight", axis=0)).eval(), inputs, latency=False)


IMAGES, TABLE = draw(2, 3, 8, 8), draw(5, 4)
PAIR = (draw(3, 6), draw(3, 7))


@pytest.mark.parametrize(
    ("model", "inputs", "zeros", "gone"),
    [
        (ResNet, IMAGES, ["blocks.0.conv2.weight", "blocks.0.bn2.weight"], ["blocks.0"]),
        (ResNet, IMAGES, ["blocks.0.conv1.weight", "blocks.0.bn1.weight", "blocks.0.bn1.bias"], ["blocks.0"]),
        (
            ResNet, IMAGES, ["blocks.1.conv2.weight", "blocks.1.bn2.weight"],
            [f"blocks.1.{n}" for n in ("conv1", "bn1", "conv2", "bn2")],
        ),
        (Modalities, PAIR, ["text.3.weight"], ["text"]),
        (Modalities, PAIR, ["image.0.weight"], ["image"]),
        (Additive, TABLE, ["shapes.1.3.weight", "shapes.2.0.weight"], ["shapes.1", "shapes.2"]),
        (Scaled, TABLE, ["scale"], ["branch"]),
        (adapted, TABLE, ["0.b.weight"], ["0.a", "0.b"]),
    ],
)  # fmt: skip
def test_a_dead_branch_is_gone_whole(
    model: Callable[[], nn.Module], inputs: object, zeros: list[str], gone: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    exported = export_with_zeros(model(), inputs, *zeros)
    assert exported.report.gone == gone
    assert not [n for n in exported.model.state_dict() if any(n.startswith(f"{path}.") for path in gone)]
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    expected = exported.model(*given)
    for copied in (
        copy.deepcopy(exported.model),
        pickle.loads(pickle.dumps(exported.model)),
        dg.load(dg.save(exported, tmp_path), model()).eval(),
    ):
        assert torch.equal(copied(*given), expected)


def test_only_the_block_of_a_dead_branch_is_written_anew() -> None:
    exported = export_with_zeros(ResNet(), IMAGES, "blocks.0.conv2.weight", "blocks.0.bn2.weight")
    assert exported.report.rewritten == ["blocks.0"]
    assert exported.report.after.flops == exported.report.before.flops - 2 * 2 * 2 * 6 * 6 * 9 * 64
    assert [type(m) for m in exported.model.blocks][1] is Residual


def test_with_rewriting_forbidden_a_dead_branch_keeps_one_channel() -> None:
    model = ResNet()
    randomize(model, torch.Generator().manual_seed(1))
    nn.init.zeros_(model.blocks[0].conv2.weight)
    dg.gate(model, dg.Select(names="*weight", axis=0))
    exported = dg.export(model.eval(), IMAGES, latency=False, rewrite=False)
    assert exported.report.gone == []
    assert exported.report.rewritten == []
    assert exported.model.blocks[0].conv1.out_channels == 1


def test_a_branch_that_reads_no_input_is_left_alone() -> None:
    """A table of positions is constant, and trained; so is what adds it."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 6)

        def forward(self) -> Tensor:
            return self.table(torch.arange(4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.layer, self.head = Positions(), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.layer(x) + self.positions()).relu())

    exported = export_with_zeros(Net(), draw(2, 4, 6), "head.bias")
    assert exported.report.gone == []
    assert exported.model.positions.table.weight.shape == (4, 6)


@pytest.mark.parametrize("norm", [nn.RMSNorm, lambda n: nn.RMSNorm(n, eps=0.1), OwnNorm], ids=["torch", "eps", "own"])
def test_dead_embedding_dimensions_go_and_the_norm_makes_up_for_them(norm: Callable[[int], nn.Module]) -> None:
    model = Language(norm)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in (model.embed.weight.T, *(layer.down.weight for layer in model.layers)):
            p[::3] = 0
    tokens = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(2))
    exported = dg.export(dg.gate(model, "neurons", include="out.*").eval(), tokens, latency=False)
    shapes = {n: tuple(p.shape) for n, p in exported.model.named_parameters()}
    assert shapes["embed.weight"] == (20, 8)
    assert shapes["out.weight"] == (20, 8)
    assert shapes["norm.weight"] == (8,)
    assert shapes["layers.1.down.weight"] == (8, 16)
    assert exported.report.certificate.max_error["float64"] < 1e-12
    assert (exported.report.rewritten != []) == (norm is OwnNorm)


def test_a_norm_called_twice_is_not_rescaled_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(4, 8), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.norm(self.first(x)) + 1.0))

    model = Twice()
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.first.weight[::2] = 0
        model.first.bias[::2] = 0
    exported = dg.export(dg.gate(model, "neurons", include="second.*").eval(), TABLE, latency=False)
    assert exported.report.certificate.max_error["float64"] < 1e-12


def test_channels_that_are_averaged_go_if_the_average_still_counts_them() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 8, bias=False), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1, keepdim=True))

    model = Mean()
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.layer.weight[:5] = 0
    exported = dg.export(dg.gate(model, "neurons", include="head.*").eval(), TABLE, latency=False)
    assert exported.model.layer.weight.shape == (3, 4)
    assert exported.report.certificate.max_error["float64"] < 1e-12


class Adapted(nn.Module):
    """A layer whose low-rank update is made of parameters of its own, not of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.down.T @ self.up.T)


def test_a_dead_branch_of_plain_parameters_is_gone_too() -> None:
    model = nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(6, 2))
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[0].down.zero_()
    exported = dg.export(dg.gate(model, "neurons", include="2.*").eval(), TABLE, latency=False)
    assert sorted(n for n, _ in exported.model[0].named_parameters()) == ["base.bias", "base.weight"]
    assert exported.report.rewritten == ["0"]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_of_a_bag_of_embeddings_go(mode: str) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, 6, mode=mode), nn.Linear(6, 2)

        def forward(self, words: Tensor, x: Tensor) -> Tensor:
            return self.head(self.bag(words)) + x

    model, inputs = Bag(), (torch.randint(9, (3, 4)), torch.randn(3, 2))
    randomize(model, torch.Generator().manual_seed(1))
    gated = dg.gate(model, "embedding_dims", example_inputs=inputs).eval()
    with torch.no_grad():
        for gates in all_gates(gated):
            gates.gamma[:4] = 0
    assert dg.export(gated, inputs, latency=False).model.bag.weight.shape == (9, 2)
    with torch.no_grad():
        for gates in all_gates(gated):
            gates.gamma[:] = 0
    small = dg.export(gated, inputs, latency=False).model
    assert not list(small.bag.parameters())


def test_inputs_of_a_normalized_weight_go_and_its_gain_makes_up_for_them(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        second = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), second, nn.ReLU(), nn.Linear(5, 2))

    model = fresh()
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0  # what only these reach is dead too
        model[2].parametrizations.weight.original1[1, 5:] = 0
    gated = dg.gate(model, "neurons", include="4.*").eval()
    exported = dg.export(gated, TABLE, latency=False)
    assert exported.model[2].weight.shape == (4, 3)
    assert exported.report.certificate.max_error["float64"] < 1e-12
    dg.save(exported, tmp_path)
    loaded, whole = dg.load(tmp_path, fresh()).eval(), dg.expand(exported, fresh(), TABLE).eval()
    with torch.no_grad():
        assert torch.equal(loaded(TABLE), exported.model(TABLE))
        assert torch.allclose(whole(TABLE), gated(TABLE), atol=1e-6)
    assert whole[2].weight.shape == (5, 8)


def assert_equal(gated: nn.Module, small: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Run both networks on inputs of shapes that export was not given."""
    with torch.no_grad():
        for x in map(torch.randn, shapes):
            assert torch.allclose(gated(x), small(x), atol=1e-6)


class Pooled(nn.Module):
    """Attends to a pooled picture, of which it is told height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.out = nn.Conv2d(4, 4, 2, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        keys = self.pool(x.transpose(1, 2).reshape(len(x), -1, height, width)).flatten(2)
        return self.out((x @ keys).softmax(-1) @ keys.transpose(1, 2))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, 4, 2, 2), Pooled(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        flat = x.flatten(2).transpose(1, 2)
        return self.head((flat + self.mix(flat, x.shape[2], x.shape[3])).mean(1))


def test_a_dead_branch_may_be_told_sizes() -> None:
    model, x = Pictures(), torch.randn(2, 3, 8, 8)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.mix.out.weight.zero_()
    gated = dg.gate(model, "neurons", include="head.*").eval()
    exported = dg.export(gated, x, latency=False)
    assert not list(exported.model.mix.parameters())
    assert_equal(gated, exported.model, (1, 3, 8, 8), (1, 3, 4, 12))


def test_a_dead_branch_that_strides_gives_its_constant_in_every_size() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.pool, self.head = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 4, 3, stride=2, padding=1),
                nn.MaxPool2d(3, 2, 1),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head((self.conv(x) + self.pool(x)).mean((2, 3)))

    model, x = Strided(), torch.randn(2, 3, 9, 9)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.conv.weight.zero_()
    gated = dg.gate(model, "neurons", include="head.*").eval()
    exported = dg.export(gated, x, latency=False)
    assert not list(exported.model.conv.parameters())
    assert_equal(gated, exported.model, (1, 3, 9, 9), (1, 3, 8, 13))


def test_a_dead_branch_takes_anything_in_place_of_what_it_does_not_read() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            return self.out(x if mask is None else x * mask)

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = Masked(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], 1) if x.shape[1] > 4 else None
            return self.head((x + self.mix(x, mask)).mean(1))

    model, x = Masks(), torch.randn(2, 7, 4)
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.mix.out.weight.zero_()
    gated = dg.gate(model, "neurons", include="head.*").eval()
    small = dg.export(gated, x, latency=False).model
    assert not list(small.mix.parameters())
    assert_equal(gated, small, (1, 3, 4), (1, 9, 4))


@pytest.mark.parametrize("dead", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_dead_blocks_leave_what_they_share_to_the_others(dead: tuple[int, ...]) -> None:
    model, x = Shared(), torch.randn(2, 2, 9)
    randomize(model, torch.Generator().manual_seed(1))
    gated = dg.gate(model, "blocks", example_inputs=x).eval()
    with torch.no_grad():
        for t in dg.gates.gated_tensors(gated):
            if t.name.split(".")[1] in map(str, dead):
                t.gates.gamma[:] = 0
    exported = dg.export(gated, x, latency=False)
    assert exported.report.removed == len(dead)
    assert not exported.report.kept
    alive = 3 - len(dead)
    sizes = {"stem": 42, "head": 28, "block": 84, "positions": 24}
    own = sizes["stem"] + sizes["head"] + alive * sizes["block"] + (sizes["positions"] if alive else 0)
    assert sum(p.numel() for p in exported.model.parameters()) == own
    assert {p for p in exported.report.rewritten if p.startswith("blocks.")} <= {f"blocks.{i}" for i in dead}
    with torch.no_grad():
        assert torch.allclose(gated(x), exported.model(x), rtol=1e-5, atol=1e-6)


class Unread(nn.Module):
    """The last residual is computed and not read, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 8, 1), nn.Conv1d(6, 3, 1)
        self.filters, self.skips, self.residuals = (
            nn.ModuleList(nn.Conv1d(8, out, 1) for _ in range(2)) for out in (8, 6, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.first(x), torch.zeros(())
        for mix, to_skip, residual in zip(self.filters, self.skips, self.residuals, strict=True):
            h = mix(x).tanh()
            skip = to_skip(h) + skip
            x = residual(h) + x
        return self.last(skip.relu())


def test_channels_go_beside_a_result_that_nobody_reads() -> None:
    torch.manual_seed(0)
    net, x = Unread().double(), torch.randn(2, 4, 13, dtype=torch.double)
    dg.gate(net, "channels", example_inputs=x)
    kill_every_second(net)
    out = dg.export(net, x, latency=False)
    assert out.report.removed == out.report.pruning.dead
    assert "residuals.1" in out.report.gone


class Scan(nn.Module):
    """Goes through the time step by step, with a state of a size that is written in it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        inputs, states = self.into(x), []
        state = torch.zeros(len(x), 8, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = torch.tanh(state + inputs[:, t])
            states.append(state)
        return self.out(torch.stack(states, 1))


class Unrolled(Scan):
    """Is given the first state, and how many of them are wanted."""

    def forward(self, x: Tensor, steps: int = 0) -> Tensor:  # type: ignore[override]
        states = [x]
        for _ in range(steps):
            states.append(torch.tanh(self.into(states[-1]) + torch.ones(len(x), 8, dtype=x.dtype)))
        return self.out(torch.stack(states[1:], 1))


class Scans(nn.Module):
    def __init__(self, kind: type[Scan]) -> None:
        super().__init__()
        self.scans = nn.ModuleList([kind(), kind()])
        self.norms = nn.ModuleList([nn.RMSNorm(8), nn.RMSNorm(8)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for norm, scan in zip(self.norms, self.scans, strict=True):
            x = x + (scan(norm(x)[:, 0], x.shape[1]) if isinstance(scan, Unrolled) else scan(norm(x)))
        return self.head(x)


class Block(nn.Module):
    """Adds up in float32, as Mamba does, whatever its layers compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scan = nn.RMSNorm(8), Scan()

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) + self.scan(self.norm(x.to(self.norm.weight.dtype)))


LOOPS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "scans": (lambda: Scans(Scan), ["norms.1", "scans.1"]),
    "unrolled": (lambda: Scans(Unrolled), ["norms.1", "scans.1"]),
    "blocks": (lambda: nn.Sequential(Block(), Block(), nn.Linear(8, 2)), ["1"]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_dead_branch_that_loops_over_time_is_gone_at_any_length(name: str, tmp_path: Path) -> None:
    build, gone = LOOPS[name]
    torch.manual_seed(0)
    net, x = build(), torch.randn(2, 4, 8)
    randomize(net, torch.Generator().manual_seed(0))
    dg.gate(net, "blocks", example_inputs=x)
    with torch.no_grad():
        dg.gates.gated_tensors(net)[-1].gates.gamma.zero_()
    exported = dg.export(net, x, latency=False)
    assert exported.report.removed == exported.report.pruning.dead == 1
    assert sorted(exported.report.gone) == gone
    dg.save(exported, tmp_path)
    again = dg.load(tmp_path, build())
    for new in (torch.randn(3, 7, 8), torch.randn(1, 1, 8)):
        for small in (exported.model, again):
            torch.testing.assert_close(small.eval()(new), net.eval()(new))
    dg.gate(again, "blocks", example_inputs=x)
    assert dg.export(again, x, latency=False).report.kept == []


class Summed(nn.Module):
    """A shape function per feature, the last layer of which has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 6), nn.Sigmoid(), nn.Linear(6, 1, bias=False)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.cat([shape(x[:, i : i + 1]) for i, shape in enumerate(self.shapes)], -1)
        return parts.sum(-1), parts


@pytest.mark.parametrize("groups", ["shape_functions", "input_features"])
def test_a_branch_that_is_gone_leaves_no_bias_that_was_made_for_it(groups: str) -> None:
    model, x = Summed(), torch.randn(5, 3)
    randomize(model, torch.Generator().manual_seed(0))
    dg.gate(model, groups, example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[0] = 0
    exported = dg.export(model.eval(), x, latency=False)
    left = dict(exported.model.shapes.named_modules()).get("0", nn.Identity())
    assert not list(left.children())
    assert not list(left.parameters())


class Fusion(nn.Module):
    """Towers of three modalities, whose features lie side by side before a common layer."""

    def __init__(self) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 8))
        table = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8))
        self.towers = nn.ModuleDict({"image": pooled, "text": nn.EmbeddingBag(20, 8), "table": table})
        self.head = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> Tensor:
        given = {"image": image, "text": text, "table": table}
        return self.head(torch.cat([tower(given[name]) for name, tower in self.towers.items()], 1))


def modalities_of(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.randint(0, 20, (batch, 6)), torch.randn(batch, 5)


@pytest.mark.parametrize("dead", [("image",), ("text",), ("table",), ("image", "text")])
def test_a_dead_modality_leaves_nothing_behind(dead: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Fusion(), modalities_of(2)
    dg.gate(model, "modalities", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[[i for i, name in enumerate(model.towers) if name in dead]] = 0
    exported = dg.export(model.eval(), x, latency=False)
    small = exported.model
    assert exported.report.removed == len(dead)
    assert exported.report.kept == []
    assert exported.report.gone == [f"towers.{name}" for name in dead]
    assert small.head[0].weight.shape == (10, 24 - 8 * len(dead))
    more = modalities_of(5)
    expected = model(*more)
    assert torch.allclose(small(*more), expected, atol=1e-5)
    for copied in (
        dg.load(dg.save(exported, tmp_path), Fusion()).eval(),
        dg.expand(exported, Fusion(), x),
        torch.compile(small, backend="aot_eager", fullgraph=True),
    ):
        assert torch.allclose(copied(*more), expected, atol=1e-5)


class Stacked(nn.Module):
    """Shape functions of all features in one tensor each, with a bias per function that is added before the sum."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.w1, self.b1, self.w2 = (nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (6, 5), (6, 5, 3)))
        self.b2 = nn.Parameter(torch.randn(6, 3) if each else torch.randn(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = (x.unsqueeze(-1) * self.w1 + self.b1).relu()
        return (torch.einsum("bfh,fho->bfo", h, self.w2) + self.b2).sum(1)


@pytest.mark.parametrize("each", [True, False])
def test_constants_of_a_sum_go_into_what_is_added_before_it(each: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stacked(each), torch.randn(4, 6)
    dg.gate(model, "shape_functions", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[[0, 2, 3]] = 0
    exported = dg.export(model.eval(), x, latency=False)
    assert exported.report.removed == (3 if each else 0)  # one number per function cannot hold several
    assert exported.model.w2.shape == ((3, 5, 3) if each else (6, 5, 3))
    assert exported.report.rewritten == []
    more = torch.randn(7, 6)
    for net in (
        exported.model,
        dg.load(dg.save(exported, tmp_path), Stacked(each)),
        dg.expand(exported, Stacked(each), x),
    ):
        assert torch.allclose(net(more), model(more), atol=1e-5)


class Edges(nn.Module):
    """A layer of a Kolmogorov-Arnold network: a function per edge, summed over the edges that end at a node."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.coef = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(inputs, outputs, 4))
        self.grid = nn.Buffer(torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-((x[..., None] - self.grid) ** 2))
        y = torch.einsum("bik,iok->bio", bumps, self.coef)
        return (self.base[None] * F.silu(x)[:, :, None] + y).sum(1)


def test_nodes_of_a_kolmogorov_arnold_network_go() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Edges(4, 5), Edges(5, 2)), torch.randn(3, 4)
    dg.gate(model, "hidden", example_inputs=x)
    assert len(dg.groups(model)) == 5
    with torch.no_grad():
        all_gates(model)[0].gamma[[0, 2]] = 0
    exported = dg.export(model.eval(), x, latency=False)
    assert exported.report.removed == 2
    shapes = {n: tuple(p.shape) for n, p in exported.model.named_parameters()}
    assert shapes == {"0.base": (4, 3), "0.coef": (4, 3, 4), "1.base": (3, 2), "1.coef": (3, 2, 4)}
    more = torch.randn(7, 4)
    assert torch.allclose(exported.model(more), model(more), atol=1e-5)
    kept = dg.export(model, x, rewrite=False, latency=False)
    assert kept.report.removed == 0  # the code of the second layer has no parameter for their constants
