"""Files: a round trip through plain data, and every way in which a folder can be wrong."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomize
from torch import Tensor, nn

import dgate_wrap as dg


def build() -> nn.Module:
    """A fresh model of the user's own class: grouped and depthwise convolutions, a made bias and BatchNorm."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3, bias=False),
    )
    randomize(model, torch.Generator().manual_seed(0))
    return model


X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exported() -> dg.Exported:
    model = dg.gate(build(), ["filters", "neurons"], exclude="8.*")
    dg.prune(model, ratio=0.4)
    return dg.export(model, X, latency=False)


@pytest.fixture
def folder(exported: dg.Exported, tmp_path: Path) -> Path:
    return dg.save(exported, tmp_path / "net")


def test_round_trip_is_bit_equal(exported: dg.Exported, folder: Path) -> None:
    fresh = nn.Sequential(*build())
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_()
    loaded = dg.load(folder, fresh)
    assert loaded is fresh
    assert torch.equal(loaded.eval()(X), exported.model.eval()(X))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in exported.model.named_parameters()
    }
    assert str(loaded) == str(exported.model)
    assert exported.plan.new_biases
    assert exported.plan.attributes


def test_trained_since_export(exported: dg.Exported, tmp_path: Path) -> None:
    with torch.no_grad():
        exported.model[0].weight.mul_(2)
    loaded = dg.load(dg.save(exported, tmp_path), build())
    assert torch.equal(loaded.eval()(X), exported.model.eval()(X))


def test_folder_holds_plain_data_only(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json", "weights.safetensors"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["format_version"] == 1
    assert plan["certificate"]["max_error"]["float64"] < 1e-10
    for p in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, IndexError, EOFError, UnicodeDecodeError)):
            pickle.loads(p.read_bytes())


def test_saving_again_replaces(exported: dg.Exported, folder: Path) -> None:
    with torch.no_grad():
        exported.model[0].weight.add_(1)
    dg.save(exported, folder)
    assert torch.equal(dg.load(folder, build())[0].weight, exported.model[0].weight)


def edit(change: Callable[[dict[str, Any]], None], *, rehash: bool = False) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from dgate_wrap.export.files import _digest

        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        if rehash:
            plan["plan_sha256"] = _digest(plan)
        (folder / "plan.json").write_text(json.dumps(plan))

    return apply


def truncate(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


BROKEN = {
    "truncated plan": (truncate("plan.json"), "not readable as JSON"),
    "truncated weights": (truncate("weights.safetensors"), "truncated, edited"),
    "edited weights": (flip_a_bit, "truncated, edited"),
    "edited plan": (edit(lambda p: p["cuts"].clear()), "checksum differs"),
    "newer format": (edit(lambda p: p.update(format_version=99)), "format version 99"),
    "no version": (edit(lambda p: p.pop("format_version")), "no format version"),
    "a list": (lambda f: (f / "plan.json").write_text("[]"), "no format version"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "does not exist"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "cannot be read"),
    "bias for a norm": (edit(lambda p: p["new_biases"].append("1"), rehash=True), "no linear layer"),
    "regrouped norm": (edit(lambda p: p["attributes"].update({"1": {"groups": 2}}), rehash=True), "no int here"),
    "cuts that do not fit": (edit(lambda p: p["cuts"].clear(), rehash=True), "do not fit the plan"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_and_the_model_left_alone(case: str, folder: Path) -> None:
    spoil, match = BROKEN[case]
    spoil(folder)
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(dg.FileFormatError, match=match) as e:
        dg.load(folder, model)
    assert e.value.mend
    assert str(model) == str(build())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_plan_of_another_model_is_refused(folder: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(dg.FileFormatError, match=r"of another model .*'0.weight' is \(4, 3\), was \(8, 2, 3, 3\)"):
        dg.load(folder, other)
    assert other[0].weight.shape == (4, 3)


def test_a_gated_model_is_refused(folder: Path) -> None:
    with pytest.raises(dg.FileFormatError, match=r"dg\.ungate"):
        dg.load(folder, dg.gate(build(), "filters"))


def test_spectrally_normalized_weights_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
        return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    x = torch.randn(3, 5)
    model = dg.gate(normed().eval(), "hidden", example_inputs=x)
    dg.prune(model, ratio=0.5)
    exported = dg.export(model, x, latency=False)
    dg.save(exported, tmp_path)
    fresh = normed().train()
    fresh[4].eval()
    loaded = dg.load(tmp_path, fresh)
    assert [m.training for m in loaded] == [True, True, True, True, False]
    assert torch.equal(loaded.eval()(x), exported.model.eval()(x))


class Growing(nn.Module):
    """Makes its table of positions anew for inputs that are longer than it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", self.make(4), persistent=False)
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

    @staticmethod
    def make(length: int) -> Tensor:
        return torch.arange(3 * length).view(length, 3).sin()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.table):
            self.table = self.make(x.shape[1])
        return self.down(self.up(x + self.table[: x.shape[1]]).sigmoid())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_saved_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 2, 1)
            self.mix = nn.Parameter(torch.randn(2, 2, 5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x).relu())
            spectrum = torch.einsum("bif,iof->bof", torch.fft.rfft(y.to(self.mix.real.dtype)), self.mix)
            return torch.fft.irfft(spectrum, n=x.shape[-1])

    model = dg.gate(Spectral(), "filters", include="up.*")
    with torch.no_grad():
        next(iter(dg.gates.gated_tensors(model))).gates.gamma[::2] = 0
    x = torch.randn(3, 2, 8)
    exported = dg.export(model, x, latency=False)
    loaded = dg.load(dg.save(exported, tmp_path), Spectral())
    assert loaded.mix.dtype == dtype
    assert loaded.up.weight.shape[0] == 3
    with torch.no_grad():
        assert torch.equal(loaded(x), exported.model(x))


def test_tables_that_grow_with_the_inputs_are_saved_and_expanded_as_they_are(tmp_path: Path) -> None:
    model, x = dg.gate(Growing(), "neurons", exclude="down.*").eval(), torch.randn(2, 4, 3)
    dg.prune(model, ratio=0.5)
    exported = dg.export(model, x, latency=False)
    assert len(exported.model.table) == len(model.table) == 4  # verification leaves no trace
    longer = torch.randn(2, 9, 3)
    expected = exported.model(longer)
    loaded = dg.load(dg.save(exported, tmp_path), Growing())
    assert len(loaded.table) == len(exported.model.table) == 9
    assert torch.equal(loaded(longer), expected)
    torch.testing.assert_close(dg.expand(exported, Growing())(longer), expected)


class ReadsSizes(nn.Module):
    """A residual attention whose code reads the width of heads off a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.start, self.end = 3, nn.Linear(4, 12), nn.Linear(12, 2)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        shape = *x.shape[:2], self.heads, self.q.out_features // self.heads
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.end(x + self.out(mixed.transpose(1, 2).flatten(2)))


def test_code_reads_the_sizes_of_layers_that_are_gone_after_loading_too(tmp_path: Path) -> None:
    model, x = ReadsSizes().eval(), torch.randn(2, 5, 4)
    dg.gate(model, "blocks", example_inputs=x)
    with torch.no_grad():
        next(iter(dg.gates.gated_tensors(model))).gates.gamma.zero_()
    exported = dg.export(model, x, latency=False)
    assert exported.report.gone == ["q", "k", "v", "out"]
    loaded = dg.load(dg.save(exported, tmp_path), ReadsSizes().eval())
    with torch.no_grad():
        assert torch.equal(loaded(x), exported.model(x))


class Listed(nn.Module):
    """Walks through its blocks by a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)]
        self.registered, self.stacks = nn.ModuleList(blocks), [blocks[:1], blocks[1:]]

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.stacks:
            for block in stack:
                x = x + block(x)
        return x


def test_blocks_that_code_reaches_by_a_list_are_gone_after_loading_too(tmp_path: Path) -> None:
    model, x = Listed().eval(), torch.randn(3, 4)
    dg.gate(model, "blocks", example_inputs=x)
    with torch.no_grad():
        for t in dg.gates.gated_tensors(model):
            if t.name.startswith("registered.1."):
                t.gates.gamma.zero_()
    exported = dg.export(model, x, latency=False)
    assert "registered.1" in exported.report.gone
    loaded = dg.load(dg.save(exported, tmp_path), Listed().eval())
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x))
        for copied in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(copied(x), exported.model(x))


def test_inputs_that_are_selected_along_two_axes_are_loaded(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
        randomize(model, torch.Generator().manual_seed(0))
        return model

    x = torch.randn(5, 4, 3)
    model = dg.gate(made(), "in_channels", exclude="3.*")
    dead = torch.zeros(4, 3, dtype=torch.bool)
    dead[0] = dead[:, 1] = True
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[dead.flatten()] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.inputs == {"input": {-2: [1, 2, 3], -1: [0, 2]}}
    assert torch.equal(dg.load(dg.save(exported, tmp_path), made()).eval()(x), exported.model(x))
