"""Groups, norms and balance, against loops over single weights, also where groups span parameters."""

from __future__ import annotations

import pytest
import torch
from oracles import group_values, product, randomize_gates
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap import gates as gates_of
from dgate_wrap.gates import gated_tensors

SHAPES = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "fc.weight": (3, 4)}

# rows that span parameters; with an ungated weight; over columns too; without any structure
LABELS: dict[str, dict[str, Tensor]] = {
    "coupled": {
        "conv.weight": torch.arange(4).view(4, 1, 1, 1),
        "conv.bias": torch.arange(4),
        "norm.weight": torch.arange(4),
    },
    "partial": {
        "conv.weight": torch.tensor([3, -1, 1, 3]).view(4, 1, 1, 1),
        "norm.weight": torch.tensor([1, -1, -1, 0]),
    },
    "chained": {"conv.bias": torch.arange(4), "fc.weight": torch.tensor([3, 4, 5, -1])},
    "scattered": {
        "conv.bias": torch.tensor([3, 3, 0, -1]),
        "fc.weight": torch.tensor([[0, 1, 2, 0], [1, 1, -1, 2], [2, 0, 0, 3]]),
    },
}


def make(labels: dict[str, Tensor], D: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, 3)}).double()
    return randomize_gates(dg.gate(model, labels, D=D))


@pytest.mark.parametrize("at_once", [1, 10**6])
@pytest.mark.parametrize("D", [2, 3, 4])
@pytest.mark.parametrize("name", LABELS)
def test_values_equal_loops(name: str, D: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates_of, "_AT_ONCE", at_once)
    labels = LABELS[name]
    model = make(labels, D)
    tensors = {t.name: t for t in gated_tensors(model)}
    assert list(tensors) == list(labels)
    # every set of labels here is connected: one tensor of gates, in the order of the labels
    [gates] = {id(t.gates): t.gates for t in tensors.values()}.values()
    used = sorted({g for t in labels.values() for g in t.flatten().tolist()} - {-1})
    gammas = dict(zip(used, gates.gamma.tolist(), strict=True))
    omegas = {n: t.omega for n, t in tensors.items()}
    assert {n: tuple(o.shape) for n, o in omegas.items()} == {n: SHAPES[n] for n in labels}
    oracle = group_values(labels, omegas, gammas)

    groups = dg.groups(model)
    assert groups.size.tolist() == oracle["size"]
    assert groups.norm.tolist() == pytest.approx(oracle["norm"], rel=1e-12)
    excess = [s - g for s, g in zip(oracle["smooth"], oracle["group"], strict=True)]
    assert dg.misalignment(model).tolist() == pytest.approx(excess, rel=1e-9, abs=1e-13)
    assert dg.imbalance(model).tolist() == pytest.approx(oracle["imbalance"], rel=1e-12)
    assert dg.group_penalty(model) == pytest.approx(sum(oracle["group"]), rel=1e-12)

    before = {n: getattr(*t.hosts[0]).detach().clone() for n, t in tensors.items()}
    signs = gates.gamma.sign()
    assert dg.balance_(model) is model
    for n, t in tensors.items():
        torch.testing.assert_close(getattr(*t.hosts[0]).detach(), before[n], rtol=1e-12, atol=0)
    assert torch.equal(gates.gamma.sign(), signs)
    root = [x ** (1 / D) for x in oracle["norm"]]
    assert gates.gamma.abs().tolist() == [pytest.approx([r] * (D - 1), rel=1e-12) for r in root]
    assert float(dg.imbalance(model).max()) < 1e-12


def test_groups_of_weights_have_the_weights_as_norms() -> None:
    model = dg.gate(nn.Linear(3, 2), "weights", D=4)
    randomize_gates(model)
    gamma = model.parametrizations.weight[0].gates.gamma.tolist()
    omega = model.parametrizations.weight.original.flatten().tolist()
    assert dg.groups(model).norm.tolist() == pytest.approx(
        [abs(o * product(g)) for o, g in zip(omega, gamma, strict=True)]
    )


NAMES = [
    (dg.Select("fc.weight", axis=0), ["fc.weight[0]", "fc.weight[1]", "fc.weight[2]"]),
    (dg.Select("fc.weight", axis=1, block=2), ["fc.weight[:, 0:2]", "fc.weight[:, 2:4]"]),
    (dg.Select("fc.weight", axis=(0, 1)), [f"fc.weight[{i}, {j}]" for i in range(3) for j in range(4)]),
    (dg.Select("fc.*"), ["fc.weight", "fc.bias"]),
    (dg.Select("conv.weight", axis=1), ["conv.weight[:, 0]", "conv.weight[:, 1]"]),
    (dg.Select("conv.weight", axis=0, at=2), ["conv.weight[2]"]),
    (
        LABELS["chained"],
        ["conv.bias[0]", "conv.bias[1]", "conv.bias[2]", "conv.bias[3]", "fc.weight[:, 1]", "fc.weight[:, 2]"],
    ),
]


@pytest.mark.parametrize(("groups", "names"), NAMES)
def test_names_are_places(groups: object, names: list[str]) -> None:
    assert [g.name for g in dg.groups(make(groups, 2))] == names
    assert dg.groups(make(groups, 2)).names == names


def test_zero_groups_are_dead() -> None:
    model = make(LABELS["coupled"], 3)
    tensors = gated_tensors(model)
    with torch.no_grad():
        tensors[0].gates.gamma[1, 0] = 0  # by a gate
        for t in tensors:
            t.omega[3] = 0  # by its weights, wherever it stands
        tensors[0].omega[2] = 0  # in one parameter only: alive
    groups = dg.groups(model)
    assert groups.alive.tolist() == [g.alive for g in groups] == [True, False, True, False]
    assert [g.norm == 0 for g in groups] == [False, True, False, True]
    text = str(groups)
    assert "2 of 4 groups alive, 40 of 80 gated weights" in text
    assert "conv.weight +2" in text
    dg.balance_(model)
    assert dg.groups(model).alive.tolist() == [True, False, True, False]
    assert dg.imbalance(model).tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert not tensors[0].gates.gamma[[1, 3]].any()


def test_tables() -> None:
    pandas = pytest.importorskip("pandas")
    model = make(LABELS["scattered"], 3)
    groups = dg.groups(model)
    columns = groups.to_dict()
    assert list(columns) == ["name", "kind", "D", "size", "norm", "alive"]
    assert columns["size"] == groups.size.tolist()
    frame = groups.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (len(groups), 6)
    assert frame["norm"].tolist() == groups.norm.tolist()
    assert set(frame["D"]) == {3}


def test_it_is_a_snapshot() -> None:
    model = make(LABELS["coupled"], 2)
    groups = dg.groups(model)
    before = groups.norm.clone()
    gated_tensors(model)[0].gates.gamma.data.mul_(2)
    assert torch.equal(groups.norm, before)
    torch.testing.assert_close(dg.groups(model).norm, before * 2)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    dg.gate(model, "neurons", D=2)
    assert dg.groups(model).size.tolist() == [4] * 5
    assert dg.Penalty(model, 1.0).value() == pytest.approx(
        (model[0].parametrizations.weight.original.square().sum().item() + 5) / 2
    )


@pytest.mark.parametrize("call", [dg.groups, dg.misalignment, dg.imbalance, dg.balance_, dg.group_penalty, dg.ungate])
def test_ungated_models_are_refused(call: object) -> None:
    with pytest.raises(dg.NotGatedError, match=r"the model holds no gates.*(?s:.*)dg\.gate\("):
        call(nn.Linear(2, 2))
