"""`Select`: rules, shapes of groups, union and difference, as tables of what must be selected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dgate_wrap as dg
from dgate_wrap.groupings import resolve


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"conv": nn.Conv2d(2, 4, 3), "norm": nn.BatchNorm2d(4), "fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 2)}
    )


ALL = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]

RULES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ALL),
    ({"source": "fc1.*"}, ["fc1.weight", "fc1.bias"]),
    ({"names": "fc?.weight"}, ["fc1.weight", "fc2.weight"]),
    ({"names": ["conv.*", "fc2.b*"]}, ["conv.weight", "conv.bias", "fc2.bias"]),
    ({"source": "norm.*", "names": "fc2.*"}, ["norm.weight", "norm.bias", "fc2.weight", "fc2.bias"]),
    ({"regex": r"fc[12]\.weight"}, ["fc1.weight", "fc2.weight"]),
    ({"regex": "fc"}, []),
    ({"types": nn.Linear}, ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
    ({"types": (nn.Conv2d, nn.BatchNorm2d), "names": "*.bias"}, ["conv.bias", "norm.bias"]),
    ({"where": lambda name, p: p.dim() == 2 and "2" in name}, ["fc2.weight"]),
    ({"source": "neurons", "names": "fc2.*"}, ["fc2.weight"]),
    ({"source": "filters", "types": nn.Conv2d}, ["conv.weight"]),
]


@pytest.mark.parametrize(("options", "names"), RULES)
def test_rules(options: dict[str, Any], names: list[str]) -> None:
    assert list(dg.Select(**options).labels(model(), None)) == names
    if not names:
        with pytest.raises(dg.GroupingError, match="selects no weight"):
            dg.gate(model(), dg.Select(**options))


SHAPES: list[tuple[dict[str, Any], list[int]]] = [
    # the labels of fc1.weight, 6 × 4, written out
    ({}, [0] * 24),
    ({"axis": 0}, [i for i in range(6) for _ in range(4)]),
    ({"axis": -1}, [j for _ in range(6) for j in range(4)]),
    ({"axis": (0, 1)}, list(range(24))),
    ({"axis": 0, "block": 2}, [i // 2 for i in range(6) for _ in range(4)]),
    ({"axis": 1, "block": 4}, [0] * 24),
    ({"axis": 0, "at": 1}, [i if i == 1 else -1 for i in range(6) for _ in range(4)]),
    ({"axis": 0, "at": -1}, [i if i == 5 else -1 for i in range(6) for _ in range(4)]),
    ({"axis": 1, "at": slice(1, 3)}, [j if j in (1, 2) else -1 for _ in range(6) for j in range(4)]),
    ({"axis": 0, "at": [0, 4], "block": 2}, [i // 2 if i in (0, 4) else -1 for i in range(6) for _ in range(4)]),
    ({"label": lambda name, p: torch.arange(24).view(6, 4) % 5}, [i % 5 for i in range(24)]),
]


@pytest.mark.parametrize(("options", "expected"), SHAPES)
def test_shapes_of_groups(options: dict[str, Any], expected: list[int]) -> None:
    found = dg.Select("fc1.weight", **options).labels(model(), None)["fc1.weight"]
    assert found.broadcast_to(6, 4).flatten().tolist() == expected


def test_groups_are_of_one_parameter_unless_shared() -> None:
    apart = dg.gate(model(), dg.Select(["conv.weight", "norm.*"][1], axis=0))
    assert [g.size for g in dg.groups(apart)] == [1] * 8
    shared = dg.gate(model(), dg.Select(names=["conv.*", "norm.*"], axis=0, share=True))
    assert [(g.name, g.size) for g in dg.groups(shared)] == [(f"conv.weight[{i}]", 18 + 1 + 1 + 1) for i in range(4)]


ALGEBRA: list[tuple[Any, dict[str, int]]] = [
    # how many groups each parameter has in the end
    (dg.Select("neurons") | "conv.bias", {"fc1.weight": 6, "fc2.weight": 2, "conv.bias": 1}),
    (dg.Select("neurons") + dg.Select("conv.weight", axis=0), {"fc1.weight": 6, "fc2.weight": 2, "conv.weight": 4}),
    (dg.Select("neurons") | "filters", {"fc1.weight": 6, "fc2.weight": 2, "conv.weight": 4}),
    (dg.Select("neurons") - "fc1.*", {"fc2.weight": 2}),
    (dg.Select("neurons") - dg.Select("fc1.weight", axis=0, at=slice(2, 6)), {"fc1.weight": 2, "fc2.weight": 2}),
    (
        dg.Select("neurons") - {"fc1.weight": torch.tensor([[0], [-1], [-1], [-1], [-1], [-1]])},
        {"fc1.weight": 5, "fc2.weight": 2},
    ),
    ((dg.Select("*.weight", axis=0) - "norm.*") - "fc?.weight", {"conv.weight": 4}),
    (
        dg.Select("fc1.weight", axis=0, at=0) | (dg.Select("neurons") - dg.Select("fc1.weight", axis=0, at=0)),
        {"fc1.weight": 6, "fc2.weight": 2},
    ),
    (dg.Select("neurons") - (lambda model, trace: dg.Select("fc2.weight")), {"fc1.weight": 6}),
]


@pytest.mark.parametrize(("selection", "counts"), ALGEBRA)
def test_union_and_difference(selection: Any, counts: dict[str, int]) -> None:
    [(_, labels)] = resolve(selection, model())
    found = {n: t[t >= 0].unique() for n, t in labels.items()}
    assert {n: t.numel() for n, t in found.items()} == counts
    assert torch.cat(list(found.values())).unique().numel() == sum(counts.values())


def test_difference_drops_groups_whole() -> None:
    """A group that touches the right side goes, on every parameter on which it stands."""
    rows = torch.arange(4)
    labels = {"conv.weight": rows.view(4, 1, 1, 1), "conv.bias": rows, "norm.weight": rows}
    kept = dg.Select(label=lambda n, p: labels[n], where=lambda n, p: n in labels, share=True) - dg.Select(
        "norm.weight", axis=0, at=[1, 2]
    )
    [(_, found)] = resolve(kept, model())
    assert {n: t.flatten().tolist() for n, t in found.items()} == {n: [0, -1, -1, 3] for n in labels}


def test_kinds_name_where_groups_come_from() -> None:
    kinds = {
        "neurons": dg.Select("neurons", names="fc1.*"),
        "select": dg.Select("fc1.*"),
        "filters": dg.Select("filters") - dg.Select("conv.weight", axis=0, at=0),
    }
    for kind, selection in kinds.items():
        assert {g.kind for g in dg.groups(dg.gate(model(), selection))} == {kind}


WRONG: list[tuple[Any, str]] = [
    (lambda: dg.Select("neurons", axis=0), "'neurons' is a grouping"),
    (lambda: dg.Select("neurons", share=True), "'neurons' is a grouping"),
    (lambda: dg.Select("fc1.*", axis=0, label=lambda n, p: None), "label=... and axis="),
    (lambda: dg.Select("fc1.*", at=0), "at=0 needs a single axis"),
    (lambda: dg.Select("fc1.*", axis=(0, 1), at=0), "needs a single axis"),
    (lambda: dg.gate(model(), dg.Select("*", axis=1)), r"'conv\.bias': .* no axis 1"),
    (lambda: dg.gate(model(), dg.Select("fc*.weight", axis=0, block=4)), r"'fc1\.weight': block=4 does not divide"),
    (lambda: dg.gate(model(), dg.Select("fc1.weight", axis=0, at=6)), r"'fc1\.weight' has 6 indices on axis 0"),
    (lambda: dg.gate(model(), dg.Select("fc1.weight", axis=0, at=[0, 9])), "has 6 indices"),
    (lambda: dg.gate(model(), dg.Select("fc1.weight", axis=0, at=slice(6, 9))), "selects no weight"),
    (
        lambda: dg.gate(model(), dg.Select("fc1.weight", label=lambda n, p: p)),
        "'fc1.weight' are a tensor of torch.float32",
    ),
    (lambda: dg.gate(model(), dg.Select("fc1.weight", label=lambda n, p: torch.arange(9))), r"shape \(9,\)"),
    (lambda: dg.gate(model(), dg.Select("neurons") | "fc1.*"), r"both sides of a union .*'fc1\.weight'"),
    (lambda: dg.gate(model(), dg.Select("neurons") - "fc9.*"), "right side of a difference"),
    (lambda: dg.gate(model(), dg.Select("neurons") - "fc*"), "selects no weight"),
]


@pytest.mark.parametrize(("call", "match"), WRONG)
def test_wrong_selections_say_what_is_wrong(call: Any, match: str) -> None:
    with pytest.raises(dg.GroupingError, match=match) as e:
        call()
    assert e.value.expected
    assert e.value.mend
