"""Export where a model lies: on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import all_gates
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.export import api
from dgate_wrap.export.verify import Verifier
from dgate_wrap.tracing import normalize_inputs

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Positions(nn.Module):
    """Has as many positions as the example is long, and two kinds of tokens: other inputs are out of bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.kinds = (nn.Embedding(n, 16) for n in (20, 8, 2))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places) + self.kinds(kinds)
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("large", [False, True])
def test_indices_out_of_bounds_are_refused_and_not_more(
    device: str, large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if large:
        monkeypatch.setattr(api, "_LARGE", 0)
    torch.manual_seed(0)
    model = dg.gate(Positions().to(device), "neurons", include="up.*")
    with torch.no_grad():
        all_gates(model)[0].gamma[::2] = 0
    tokens, kinds = torch.randint(20, (2, 8), device=device), torch.zeros(2, 8, dtype=torch.long, device=device)
    exported = dg.export(model, (tokens, kinds), latency=False)
    small = exported.model
    assert {p.device.type for p in small.parameters()} == {device}
    assert small.get_parameter("up.weight").shape == (16, 16)
    kinds[0] = 1
    with torch.no_grad():
        torch.testing.assert_close(small(tokens, kinds), model(tokens, kinds))
    certificate = exported.report.certificate
    assert {"float64", "own precision"} == certificate.max_error.keys()
    assert all("index out of range" in p.skipped for p in certificate.skipped)
    assert [p.name for p in certificate.skipped] == [f"random, {n} in place of 8 along axis 1" for n in (9, 33)]
    dg.save(exported, tmp_path)
    loaded = dg.load(tmp_path, Positions().to(device))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens, kinds), model(tokens, kinds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["filters", "channels", "input_features"])
def test_any_default_dtype_will_do(dtype: torch.dtype, grouping: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 3))
        x = torch.randn(2, 3, 8, 8)
        model = dg.gate(model, grouping, example_inputs=x).eval()
        kill(model)
        exported = dg.export(model, x, latency=False)
    finally:
        torch.set_default_dtype(before)
    assert exported.report.removed
    assert {p.dtype for p in exported.model.parameters()} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x), rtol=0.05, atol=0.05)


class Series(nn.Module):
    """Reads series of several lengths, packed, beside positions in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)
        self.register_buffer("order", torch.arange(4).flip(0))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x[:, self.order + torch.zeros(4, dtype=torch.long, device=x.device)]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=4)
        return self.head(y)


@torch.no_grad()
def kill(model: nn.Module) -> None:
    """Let every second group die."""
    for gates in dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)):
        gates.gamma[1:] *= torch.arange(1, len(gates.gamma), device=gates.gamma.device).remainder(2).view(-1, 1)


@pytest.mark.filterwarnings("ignore:Series was traced", "ignore:RNN module weights are not part")
@pytest.mark.parametrize("device", DEVICES)
def test_packed_series_and_buffers_of_positions_are_followed_on_their_device(device: str, tmp_path: Path) -> None:
    model = Series().to(device).eval()
    inputs = torch.randn(3, 4, 5, device=device), torch.tensor([2, 4, 3], device=device)
    dg.gate(model, "rnn", example_inputs=inputs)
    kill(model)
    exported = dg.export(model, inputs, latency=False)
    assert exported.report.removed
    dg.save(exported, tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        expected = model(*inputs)
        warnings.simplefilter("error")  # of weights that are not in one piece
        torch.testing.assert_close(exported.model(*inputs), expected)
        torch.testing.assert_close(dg.load(tmp_path, Series().to(device).eval())(*inputs), expected)


def settings() -> tuple[Any, ...]:
    matmul: Any = torch.backends.cuda.matmul
    return torch.get_float32_matmul_precision(), matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_networks_are_compared_in_full_precision_whatever_the_process_allows(device: str, precision: str) -> None:
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    before = settings()
    try:
        x = torch.randn(4, 3, 10, 10, device=device)
        convolutions = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU(), nn.Conv2d(64, 8, 1)
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 36, 64)).to(device).eval()
        dg.gate(model, "channels", example_inputs=x)
        kill(model)
        exported = dg.export(model, x, latency=False)
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(asked)
    assert exported.report.certificate.max_error["own precision"] < 2e-6


def test_what_the_reference_on_the_cpu_refuses_is_run_nowhere_else() -> None:
    class Refuses(Positions):
        def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
            raise IndexError("index out of range")

    tokens, kinds = torch.randint(20, (2, 8)), torch.randint(2, (2, 8))
    verifier = Verifier(Positions(), None, normalize_inputs((tokens, kinds)), "its own", on_cpu=Refuses())
    assert len(verifier.inputs) == 1
    assert len(verifier.skipped) > 3
