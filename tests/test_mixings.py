"""What mixes along some axes leaves the others, and what is zero along those that it mixes, to the rules of export."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgate_wrap as dg


class Spectral(nn.Module):
    """Filters every channel along time in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.register_buffer("filter", torch.randn(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft(self.up(x), dim=1) * self.filter
        return self.down(torch.fft.irfft(frequencies, n=x.shape[1], dim=1))


class Spectral2d(nn.Module):
    """Mixes both axes of a picture, and none of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(5, 8, 1, bias=False), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.fft.ifft2(torch.fft.fft2(self.up(x.unsqueeze(-1)))).real)


class Normalized(nn.Module):
    """Divides by the length of the features, which features of zero do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.normalize(self.up(x), dim=-1))


class Standardized(nn.Module):
    """Filters whose weights have no mean and a variance of one (BiT); a gain per filter makes them small."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(5, 8, 1), nn.Conv1d(8, 3, 1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.up.weight, dim=[1, 2], keepdim=True, unbiased=False)
        weight = (self.up.weight - mean) / torch.sqrt(var + 1e-6) * self.gain
        return self.down(F.conv1d(x, weight, self.up.bias).relu())


class Lower(nn.Module):
    """Sees what came before, by the lower triangle of its products of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu().transpose(1, 2)
        return self.down((y.unsqueeze(-1) * y.unsqueeze(-2)).tril().sum(-1).transpose(1, 2))


class Subsampled(nn.Module):
    """Leaves every other position out by a pooling that pools nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(5, 8, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.avg_pool1d(self.up(x).sigmoid(), 1, 2))


class Compared(nn.Module):
    """Compares features with prototypes in ways that are made of other operations."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(6, 8, bias=False), nn.Linear(8, 3), how
        self.prototypes = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x), self.up(self.prototypes)
        y = self.down(a)
        if self.how == "cosine":
            return torch.cat([F.cosine_similarity(a.unsqueeze(1), b, dim=-1), y], 1)
        if self.how == "inner":
            return torch.cat([torch.inner(a, b), y], 1)
        if self.how == "outer":
            return y + torch.outer(a.square().sum(1), self.down.bias)
        if self.how == "kron":
            return y @ torch.kron(torch.eye(3), self.down.bias[:1].unsqueeze(0))
        return y + F.pairwise_distance(a, b[:1], eps=0.0).unsqueeze(1)


CASES = {
    **{how: (functools.partial(Compared, how), (4, 6), ["up.weight"]) for how in ("cosine", "inner", "outer", "kron")},
    "distance": (functools.partial(Compared, "distance"), (4, 6), ["up.weight"]),
    "lower": (Lower, (2, 5, 6), ["up.weight", "up.bias"]),
    "spectral": (Spectral, (2, 6, 6), ["up.weight"]),
    "spectral in two dimensions": (Spectral2d, (2, 5, 4), ["up.weight"]),
    "normalized": (Normalized, (4, 6), ["up.weight"]),
    "subsampled": (Subsampled, (2, 5, 6), ["up.weight", "up.bias"]),
    "standardized": (Standardized, (2, 5, 4), ["gain", "up.bias"]),
}


@pytest.mark.parametrize("name", CASES)
def test_dead_channels_go_through_what_mixes_other_axes(name: str) -> None:
    torch.manual_seed(0)
    kind, shape, parameters = CASES[name]
    model, x = kind().eval(), torch.randn(*shape)
    gated = {n: model.get_parameter(n) for n in parameters}
    dg.gate(model, {n: torch.arange(8).view(-1, *[1] * (p.dim() - 1)) for n, p in gated.items()})
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[[1, 4, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert not exported.report.kept
    assert exported.model.down.weight.shape[1] == 5
    assert exported.model.up.weight.shape[0] == 5
    for size in (x.shape[0], 5):
        probe = torch.randn(size, *shape[1:])
        with torch.no_grad():
            assert torch.allclose(model(probe), exported.model(probe), rtol=1e-4, atol=1e-5)


def test_a_length_over_features_counts_their_constants() -> None:
    """A feature that is dead but for its bias is part of the length."""
    torch.manual_seed(0)
    model, x = Normalized(), torch.randn(4, 6)
    model.up = nn.Linear(6, 8)
    dg.gate(model.eval(), dg.Select(names="up.weight", axis=0))
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[[1, 4]] = 0
        model.up.bias[4] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.up.out_features == 7
    assert [(k.groups, "adds a constant" in k.reason) for k in exported.report.kept] == [([1], True)]


class Crosswise(nn.Module):
    """Its tensors do not lie row by row in memory: a table that is cut to the tokens that there are, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(8, 9).t())
        self.up.weight = nn.Parameter(torch.randn(6, 8).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.table[: x.shape[1]])


def test_tensors_that_lie_crosswise_in_memory_are_cut() -> None:
    torch.manual_seed(0)
    model, x = Crosswise().eval(), torch.randn(2, 5, 6)
    dg.gate(model, dg.Select(names="up.weight", axis=0))
    dg.prune(model, ratio=0.5)
    small = dg.export(model, x, latency=False).model
    assert small.up.out_features == 4
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), rtol=1e-5, atol=1e-6)


def test_transposed_convolutions_under_weight_norm_lose_what_they_read() -> None:
    """A filter without a direction keeps one element to point somewhere, whichever axis its gain belongs to."""
    torch.manual_seed(0)
    up, down = nn.Conv1d(4, 6, 1, bias=False), nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(6, 3, 2), dim=1)
    model, x = nn.Sequential(up, down).eval(), torch.randn(2, 4, 5)
    with torch.no_grad():
        down.parametrizations.weight.original1[1:, 1] = 0  # only what is dead gives this filter its direction
    dg.gate(model, dg.Select(names="0.weight", axis=0))
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[[0, 3]] = 0
    small = dg.export(model, x, latency=False).model
    assert small[0].out_channels <= 5
    with torch.no_grad():
        assert torch.allclose(model(x), small(x), rtol=1e-5, atol=1e-6)
