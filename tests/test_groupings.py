"""The registry, and the built-in groupings against loops over the meaning of each weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO

import dgate_wrap as dg
from dgate_wrap.groupings import resolve

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def channels(layer: Any, place: tuple[int, ...]) -> tuple[int, int]:
    """Say which output and which input channel of the layer one weight joins."""
    if isinstance(layer, TRANSPOSED):
        i, o = place[:2]  # (in, out / groups, ...): rows of one group produce its outputs
        return o + (i // (layer.in_channels // layer.groups)) * layer.weight.shape[1], i
    if isinstance(layer, CONVS):
        o, i = place[:2]  # (out, in / groups, ...)
        return o, i + (o // (layer.out_channels // layer.groups)) * layer.weight.shape[1]
    return place[0], place[1]


# the key of the group of the weight at a place, or None where the grouping leaves the layer alone
ORACLES: dict[str, Callable[[Any, tuple[int, ...]], Hashable]] = {
    "weights": lambda layer, place: place,
    "neurons": lambda layer, place: channels(layer, place)[0] if isinstance(layer, nn.Linear) else None,
    "filters": lambda layer, place: channels(layer, place)[0] if isinstance(layer, CONVS + TRANSPOSED) else None,
    "kernels": lambda layer, place: channels(layer, place) if isinstance(layer, CONVS + TRANSPOSED) else None,
    "in_channels": lambda layer, place: channels(layer, place)[1],
}


def partition(labels: Tensor, shape: torch.Size) -> set[frozenset[tuple[int, ...]]]:
    groups: dict[int, set[tuple[int, ...]]] = {}
    for place in itertools.product(*map(range, shape)):
        groups.setdefault(int(labels.broadcast_to(shape)[place]), set()).add(place)
    assert -1 not in groups
    return {frozenset(g) for g in groups.values()}


def layers() -> Iterator[Any]:
    yield from (nn.Linear(3, 4), nn.Linear(5, 1, bias=False))
    for n in (1, 2, 3):
        conv, transposed = CONVS[n - 1], TRANSPOSED[n - 1]
        yield from (
            conv(3, 4, 2),
            conv(4, 6, 2, groups=2),
            conv(4, 4, 3, groups=4),
            conv(4, 8, 2, groups=4, bias=False),
        )
        yield from (transposed(3, 4, 2), transposed(4, 6, 2, groups=2), transposed(4, 4, 2, groups=4, stride=2))
        yield transposed(4, 8, 2, groups=4)


@pytest.mark.parametrize("layer", list(layers()), ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_groups_are_what_the_layer_means(name: str, layer: Any) -> None:
    model = nn.Sequential(layer)
    places = list(itertools.product(*map(range, layer.weight.shape)))
    keys = {p: ORACLES[name](layer, p) for p in places}
    if None in keys.values():
        with pytest.raises(dg.GroupingError, match="selects no weight"):
            resolve(name, model)
        return
    [(kind, labels)] = resolve(name, model)
    assert (kind, list(labels)) == (name, ["0.weight"])
    expected = {frozenset(p for p in places if keys[p] == key) for key in keys.values()}
    assert partition(labels["0.weight"], layer.weight.shape) == expected


@pytest.mark.parametrize("layer", [x for x in layers() if not isinstance(x, nn.Linear)], ids=str)
def test_a_dead_filter_is_a_dead_channel(layer: Any) -> None:
    """By watching the layer at work: zeroing one group of filters silences exactly one output channel."""
    layer.bias = None
    x = torch.randn(2, layer.in_channels, *[5] * (layer.weight.dim() - 2))
    for read, name in ((lambda y: y, "filters"), (None, "in_channels")):
        [(_, labels)] = resolve(name, nn.Sequential(layer))
        groups = labels["0.weight"].broadcast_to(layer.weight.shape)
        silenced = []
        for g in groups.unique().tolist():
            weight = layer.weight.detach().clone()
            layer.weight.data[groups == g] = 0
            if read:
                silenced.append([c for c in range(layer.out_channels) if not layer(x)[:, c].any()])
            else:  # deaf: no output depends on the channel
                gradient = torch.autograd.functional.jacobian(lambda v: layer(v).sum((0, 2)).flatten(), x)
                silenced.append([c for c in range(layer.in_channels) if not gradient[:, :, c].any()])
            layer.weight.data.copy_(weight)
        assert silenced == [[c] for c in range(layer.out_channels if read else layer.in_channels)]


def test_weights_are_all_parameters_with_two_dimensions() -> None:
    for entry in ZOO:
        model = entry.make()
        [(_, labels)] = resolve("weights", model)
        assert set(labels) == {n for n, p in model.named_parameters() if p.dim() >= 2}
        flat = torch.cat([t.flatten() for t in labels.values()])
        assert flat.unique().numel() == flat.numel() == sum(model.get_parameter(n).numel() for n in labels)


def test_groups_of_several_layers_are_different() -> None:
    for entry in ZOO:
        for name in ("neurons", "filters", "kernels", "in_channels"):
            model = entry.make()
            try:
                [(_, labels)] = resolve(name, model)
            except dg.GroupingError:
                continue
            sets = [set(t.unique().tolist()) for t in labels.values()]
            assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.fixture
def triples() -> Iterator[str]:
    @dg.register_grouping("triples")
    def triples(model: nn.Module, trace: Any) -> dict[str, Tensor]:
        """Three neighbouring rows of every linear layer."""
        return dg.disjoint({n: dg.along(p, 0, block=3) for n, p in model.named_parameters() if p.dim() == 2})

    yield "triples"
    if "triples" in dg.groupings():
        dg.unregister_grouping("triples")


def test_a_grouping_of_the_users_own(triples: str) -> None:
    assert dg.groupings()["triples"].doc == "Three neighbouring rows of every linear layer."
    model = dg.gate(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), triples)
    assert [(g.name, g.kind, g.size) for g in dg.groups(model)] == [
        ("0.weight[0:3]", "triples", 12),
        ("0.weight[3:6]", "triples", 12),
        ("1.weight", "triples", 18),
    ]
    assert len(dg.groups(dg.gate(nn.Linear(4, 6), dg.Select("triples")))) == 2


def test_names_are_given_once(triples: str) -> None:
    before = dg.groupings()[triples]
    with pytest.raises(
        dg.GroupingError, match=r"'triples' is registered already.*(?s:.*)unregister_grouping\('triples'\)"
    ):
        dg.register_grouping("triples")(lambda model, trace: {})
    assert dg.groupings()[triples] is before
    dg.unregister_grouping(triples)
    assert triples not in dg.groupings()
    with pytest.raises(dg.UnknownGroupingError, match="triples"):
        dg.unregister_grouping(triples)


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_are_texts(name: Any) -> None:
    with pytest.raises(dg.GroupingError, match="non-empty string"):
        dg.register_grouping(name)


def test_the_list_is_a_copy() -> None:
    listed = dg.groupings()
    assert set(ORACLES) <= set(listed)
    assert list(listed) == sorted(listed)
    assert all(g.doc and g.name == n for n, g in listed.items())
    listed.clear()
    assert "filters" in dg.groupings()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("filter", "filters"),
        ("Neurons", "neurons"),
        ("weight", "weights"),
        ("in_channel", "in_channels"),
        ("zzzz", None),
    ],
)
def test_unknown_names_get_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(dg.UnknownGroupingError) as e:
        dg.gate(nn.Linear(3, 2), name)
    assert all(known in e.value.expected for known in dg.groupings())
    assert isinstance(e.value, LookupError)
    assert (f"dg.gate(model, {near!r})" if near else "register_grouping") in e.value.mend


def test_callables_and_lists() -> None:
    def rows(model: nn.Module, trace: Any) -> dg.Select:
        assert trace is None
        return dg.Select("0.weight", axis=0)

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    found = resolve([rows, ["neurons", {"1.bias": torch.arange(3)}]], model)
    assert [(kind, sorted(labels)) for kind, labels in found] == [
        ("rows", ["0.weight"]),
        ("neurons", ["0.weight", "1.weight"]),
        ("labels", ["1.bias"]),
    ]


def test_labels_may_name_a_tied_weight_by_any_of_its_names() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 3), nn.Linear(3, 3)
    model.b.weight = model.a.weight
    rows = torch.arange(3).view(3, 1)
    for labels in ({"b.weight": rows}, {"a.weight": rows, "b.weight": rows}):
        [(_, found)] = resolve(labels, model)
        assert list(found) == ["a.weight"]
    with pytest.raises(dg.GroupingError, match=r"'b\.weight' and 'a\.weight' are the same tied parameter"):
        resolve({"a.weight": rows, "b.weight": rows.T}, model)


COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "picked": lambda x: torch.stack([x[:, i] for i in range(4)], 1),
    "sliced": lambda x: torch.cat([x[:, i : i + 1] for i in range(4)], 1),
    "each mapped": lambda x: torch.cat([x[:, i : i + 1].sin() for i in range(4)], 1),
}


class ByColumn(nn.Module):
    """A table whose columns are taken one by one and put together again, and a layer with a norm that reads them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.join, self.up, self.norm, self.down = COLUMNS[how], nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.join(x))).relu())


@pytest.mark.parametrize("how", COLUMNS)
def test_columns_that_are_taken_one_by_one_stay_columns(how: str) -> None:
    model, x = ByColumn(how).eval(), torch.randn(5, 4)
    assert len(dg.groups(dg.gate(model, "hidden", example_inputs=x))) == 6
    assert len(dg.groups(dg.gate(ByColumn(how).eval(), "input_features", example_inputs=x))) == 4


class Computed(nn.Module):
    """Layers whose weights, with the units along the last axis, are computed from parameters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(5, 16)), nn.Linear(16, 3)
        self.mask, self.how = nn.Buffer((torch.rand(5, 16) > 0.2).float()), how

    def forward(self, x: Tensor) -> Tensor:
        w = self.first
        weight = {
            "scaled": w * 0.5,
            "divided": w / 2,
            "negated": -w,
            "masked": w * self.mask,
            "thresholded": w * (w.detach().abs() > 0.1),
            "turned": (w.T * 0.5).T,
        }[self.how]
        return self.last(F.silu(torch.einsum("bi,io->bo", x, weight) if self.how == "divided" else x @ weight))


@pytest.mark.parametrize("how", ["scaled", "divided", "negated", "masked", "thresholded", "turned"])
def test_units_of_weights_that_are_computed_are_found_and_go(how: str) -> None:
    torch.manual_seed(0)
    model, x = Computed(how), torch.randn(4, 5)
    gated = dg.gate(model, "hidden", example_inputs=x)
    assert [t.name for t in dg.gates.gated_tensors(gated)] == ["first"]
    with torch.no_grad():
        dg.gates.gated_tensors(gated)[0].gates.gamma[:7] = 0
    exported = dg.export(gated.eval(), x, latency=False)
    assert exported.report.removed == 7
    assert exported.model.first.shape == (5, 9)


class StateSpace(nn.Module):
    """One step of a selective scan, as in Mamba: the channels meet element by element, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(2, 12)
        self.rank, self.write, self.read = nn.Linear(12, 2), nn.Linear(12, 4), nn.Linear(12, 4)
        self.decay = nn.Parameter(torch.randn(12, 4))

    def forward(self, u: Tensor) -> Tensor:
        x = self.first(u).relu()
        step = F.softplus(self.step(self.rank(x)))[..., None]
        state = (step * -self.decay.exp()).exp() * (step * self.write(x)[:, None] * x[..., None])
        return self.last((state * self.read(x)[:, None]).sum(-1))


def test_channels_of_a_state_space_are_hidden_units_with_their_decays() -> None:
    torch.manual_seed(0)
    model, x = StateSpace(), torch.randn(3, 8)
    gated = dg.gate(model, "hidden", example_inputs=x)
    by_name = {t.name: t for t in dg.gates.gated_tensors(gated)}
    assert by_name["decay"].gates is by_name["first.weight"].gates
    with torch.no_grad():
        by_name["decay"].gates.gamma[:5] = 0
    exported = dg.export(gated.eval(), x, latency=False)
    assert exported.model.decay.shape == (7, 4)
    assert exported.model.first.weight.shape == (7, 8)


class Features(nn.Module):
    """Linear attention with fixed random features, cast as the activation is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.fixed = nn.Buffer(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = ((t @ self.fixed.type_as(t)).relu() + 1e-3 for t in (q, k))
        y = q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])
        return self.out(y.transpose(1, 2).flatten(2))


def test_heads_are_found_beside_constants_that_are_cast_as_activations_are() -> None:
    torch.manual_seed(0)
    gated = dg.gate(Features(), "heads", example_inputs=torch.randn(2, 5, 16))
    assert len(dg.groups(gated)) == 4
