"""Export where a model lies: on the CPU, and on a GPU if there is one."""

from __future__ import annotations

from pathlib import Path

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
        with torch.no_grad():
            for gates in dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)):
                gates.gamma[1:] *= torch.arange(1, len(gates.gamma)).remainder(2).view(-1, 1)
        exported = dg.export(model, x, latency=False)
    finally:
        torch.set_default_dtype(before)
    assert exported.report.removed
    assert {p.dtype for p in exported.model.parameters()} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x), rtol=0.05, atol=0.05)


def test_what_the_reference_on_the_cpu_refuses_is_run_nowhere_else() -> None:
    class Refuses(Positions):
        def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
            raise IndexError("index out of range")

    tokens, kinds = torch.randint(20, (2, 8)), torch.randint(2, (2, 8))
    verifier = Verifier(Positions(), None, normalize_inputs((tokens, kinds)), "its own", on_cpu=Refuses())
    assert len(verifier.inputs) == 1
    assert len(verifier.skipped) > 3
