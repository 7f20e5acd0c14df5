"""The language of labels, against loops over single weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dgate_wrap as dg
from dgate_wrap import labels as lb

SHAPES = {"a": (3, 4), "b": (3,), "c": (2, 2, 2), "d": (4, 3)}


@st.composite
def labellings(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw labels of some parameters: broadcast or full, with gaps, shared numbers and ungated weights."""
    out = {}
    for name in draw(st.lists(st.sampled_from(list(SHAPES)), unique=True)):
        shape = [n if draw(st.booleans()) else 1 for n in SHAPES[name]]
        size = int(torch.Size(shape).numel())
        values = draw(st.lists(st.integers(-1, 9), min_size=size, max_size=size))
        out[name] = torch.tensor(values, dtype=torch.int64).view(shape)
    return out


def weights_of(labels: dict[str, Tensor]) -> dict[tuple[str, int], int]:
    """Give the label of every single weight, one by one; ungated ones left out."""
    return {
        (n, i): g
        for n, t in labels.items()
        for i, g in enumerate(t.broadcast_to(SHAPES[n]).flatten().tolist())
        if g >= 0
    }


def partition(of: dict[tuple[str, int], int]) -> set[frozenset[tuple[str, int]]]:
    """Forget the numbers, keep the groups."""
    return {frozenset(w for w, g in of.items() if g == label) for label in of.values()}


@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 4, 3), (2, 1, 2, 6)])
@pytest.mark.parametrize("block", [1, 2])
def test_along_one_axis(shape: tuple[int, ...], block: int) -> None:
    for axis in range(-len(shape), len(shape)):
        if shape[axis] % block:
            with pytest.raises(dg.GroupingError, match=f"block={block} does not divide"):
                lb.along(shape, axis, block=block)
            continue
        found = lb.along(torch.zeros(shape), axis, block=block).broadcast_to(shape)
        for place in itertools.product(*map(range, shape)):
            assert int(found[place]) == place[axis] // block


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2), (0, 1, 2), (-1, 0), (), (1,)])
def test_along_several_axes(axes: tuple[int, ...]) -> None:
    shape = (2, 3, 4)
    found = lb.along(shape, axes)
    kept = sorted(a % 3 for a in axes)
    assert found.shape == torch.Size([n if a in kept else 1 for a, n in enumerate(shape)])
    numbers: dict[tuple[int, ...], int] = {}
    for place in itertools.product(*map(range, shape)):
        expected = numbers.setdefault(tuple(place[a] for a in kept), len(numbers))
        assert int(found.broadcast_to(shape)[place]) == expected
    assert lb.along(shape).tolist() == [[[0]]]


@pytest.mark.parametrize(
    ("axis", "block", "match"),
    [
        (2, 1, "no axis 2"),
        (-3, 1, "no axis -3"),
        ((0, 5), 1, "no axis 5"),
        (0, 0, "block=0"),
        (0, -2, "block=-2"),
        (0, 4, "block=4 does not divide"),
        ((0, 1), 2, "block=2"),
        (None, 2, "block=2"),
    ],
)
def test_along_refuses(axis: object, block: int, match: str) -> None:
    with pytest.raises(dg.GroupingError, match=match):
        lb.along((6, 4), axis, block=block)


@given(labellings())
def test_disjoint_keeps_groups_within_parameters_and_shares_none(labels: dict[str, Tensor]) -> None:
    found = lb.disjoint(labels)
    before = weights_of(labels)
    expected = {p for n in labels for p in partition({w: g for w, g in before.items() if w[0] == n})}
    assert partition(weights_of(found)) == expected


@given(labellings(), labellings())
def test_union_touching_and_drop(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    of_a, of_b = weights_of(a), weights_of(b)
    shared = of_a.keys() & of_b.keys()
    assert set(lb.overlap(a, b)) == {n for n, _ in shared}
    doomed = lb.touching(a, b)
    assert set(doomed.tolist()) == {of_a[w] for w in shared}
    rest = lb.drop_groups(a, doomed)
    assert weights_of(rest) == {w: g for w, g in of_a.items() if g not in set(doomed.tolist())}
    assert lb.overlap(rest, b) == {}
    joined = weights_of(lb.union(rest, b))
    assert partition(joined) == partition(weights_of(rest)) | partition(of_b)


@given(labellings())
def test_components_are_the_connected_parts(labels: dict[str, Tensor]) -> None:
    parts = lb.components(labels)
    of = weights_of(labels)
    # every group appears once, whole, under numbers 0 .. G-1
    rebuilt: set[frozenset[tuple[str, int]]] = set()
    for part in parts:
        numbered = weights_of(part.index)
        assert set(numbered.values()) == set(range(part.num_groups))
        assert {n for n, _ in numbered} == set(part.names)
        assert not rebuilt & partition(numbered)
        rebuilt |= partition(numbered)
    assert rebuilt == partition(of)
    # two parameters are in one part exactly if a chain of shared labels joins them: watched by flooding
    for name in {n for n, _ in of}:
        reached, grown = {name}, set()
        while reached != grown:
            grown = set(reached)
            touched = {g for (n, _), g in of.items() if n in reached}
            reached |= {n for (n, _), g in of.items() if g in touched}
        assert [set(p.names) for p in parts if name in p.names] == [reached]


def test_numbers_keep_their_order() -> None:
    [part] = lb.components({"a": torch.tensor([[9], [2], [5]])})
    assert part.index["a"].flatten().tolist() == [2, 0, 1]


def test_check_lists_every_fault() -> None:
    shapes = {n: torch.Size(s) for n, s in SHAPES.items()}
    good = {"a": torch.zeros(3, 1, dtype=torch.int64), "b": torch.tensor(-1), "c": torch.zeros(2, 2, dtype=torch.int64)}
    lb.check(good, shapes, source="here")
    bad = {
        "x": torch.zeros(1, dtype=torch.int64),
        "a": torch.zeros(3, dtype=torch.int64),
        "b": torch.zeros(3),
        "c": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        "d": torch.full((4, 1), -2),
    }
    with pytest.raises(dg.GroupingError) as e:
        lb.check(bad, shapes, source="grouping 'g'")
    assert e.value.found.startswith("grouping 'g': ")
    assert [f"'{n}'" in e.value.found for n in bad] == [True] * 5
