"""Units of experts and heads that are dead at other places in each: they are sorted, so that as many go from each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import Experts
from hypothesis import given
from hypothesis import strategies as st
from networks import randomize
from oracles import all_gates
from test_corpus_export import kill
from torch import Tensor, nn
from torch.nn import functional as F

import dgate_wrap as dg
from dgate_wrap.export.cuts import Cut, Gather


class Heads(nn.Module):
    """Attention whose key and value heads serve two query heads each; the width of a value is no number in the code."""

    def __init__(self, rotary: bool = False) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(10, 4 * 6), nn.Linear(4 * 6, 10)
        self.key, self.value, self.head = nn.Linear(10, 2 * 6), nn.Linear(10, 2 * 6), nn.Linear(10, 3)
        self.register_buffer("table", torch.linspace(0.5, 2, 6) if rotary else torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (4, -1)).transpose(1, 2) * self.table
        k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for t in (self.key(x), self.value(x)))
        out = (q @ k.mT).softmax(-1) @ v
        return self.head(F.layer_norm(x + self.out(out.transpose(1, 2).flatten(2)), (10,)))


class Halves(nn.Module):
    """Stacked gated experts: both halves of a unit are rows of one weight, interleaved or one after the other."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in ((3, 6, 20), (3, 10, 6)))
        self.interleaved, self.router, self.head = interleaved, nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.einsum("bd,edh->ebh", x, self.up)
        a, b = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        mixed = torch.bmm(F.silu(a) * b, self.down)
        return self.head(torch.einsum("be,ebd->bd", self.router(x).softmax(-1), mixed))


class Prefixes(nn.Module):
    """Attention to the first elements: with a single one, all queries are alike, and so are all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(9, 9, bias=False) for _ in range(4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 3)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = torch.arange(x.shape[1]) <= lengths[:, None]
        weights = (q @ k.mT).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Ramp(nn.Module):
    """Stacked experts whose units differ by their places: they cannot be sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in ((3, 6, 8), (3, 8, 4)))
        self.register_buffer("ramp", torch.linspace(1, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        units = torch.einsum("bd,edh->beh", x, self.up).tanh() * self.ramp
        return torch.einsum("beh,ehd->bd", units, self.down)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gated(
    make: Callable[[], nn.Module], groups: object, x: Tensor, share: float = 0.5, seed: int = 1, **options: Any
) -> nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    dg.gate(model, groups, example_inputs=x, **options)
    kill(model, share, seed)
    return model


def units(dead: Tensor, shape: tuple[int, ...]) -> int:
    """Return how many units the fullest block has alive."""
    return int((~dead).view(shape).sum(-1).max())


def dead_units(model: nn.Module, name: str, axes: tuple[int, ...]) -> Tensor:
    """Mark the units of a gated parameter that are dead, by looking at its weights."""
    return (weight(model, name) == 0).all(axes)


def weight(model: nn.Module, name: str) -> Tensor:
    *path, leaf = name.split(".")
    return getattr(model.get_submodule(".".join(path)), leaf).detach()


def check(model: nn.Module, x: Tensor, shapes: dict[str, tuple[int, ...]], **options: Any) -> dg.Exported:
    """Export; require that the network is equal and that parameters have these shapes."""
    exported = dg.export(model, x, latency=False, **options)
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x), rtol=1e-4, atol=1e-5)
    found = {n: tuple(exported.model.get_parameter(n).shape) for n in shapes}
    assert found == shapes
    return exported


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_units_go_from_every_stacked_expert(share: float, seed: int, tmp_path: Path) -> None:
    x = draw(5, 6)
    model = gated(Experts, "hidden", x, share, seed, exclude="down")
    dead = [dead_units(model, n, (1,)) for n in ("up", "mid")]
    idle = dead[0].all(1) | dead[1].all(1)  # an expert without units in one layer has none in the other
    first, second = (units(d | idle[:, None], tuple(d.shape)) for d in dead)
    shapes = {"up": (4, 6, first), "bias": (4, first), "mid": (4, first, second), "down": (4, second, 6)}
    exported = check(model, x, shapes)
    assert not exported.report.rewritten
    kept = {g for k in exported.report.kept for g in k.groups}
    alive = torch.as_tensor(dg.groups(model).alive)
    assert exported.report.removed + len(kept) == int((~alive).sum())
    if not idle.any():
        assert len(kept) == 4 * (first + second) - int(alive.sum())
    dg.save(exported, tmp_path)
    fresh = dg.load(tmp_path, Experts())
    assert torch.equal(fresh(x), exported.model(x))
    whole = dg.expand(exported, Experts(), x)
    for name in ("up", "bias", "mid", "down"):  # where they were; columns that read dead units are zero now
        same = whole.get_parameter(name) == weight(model, name)
        assert bool((same | (whole.get_parameter(name) == 0)).all())
    if not idle.any():
        assert torch.equal(whole.get_parameter("up"), weight(model, "up"))


@pytest.mark.parametrize("seed", range(3))
def test_as_many_value_channels_go_from_every_head(seed: int) -> None:
    x = draw(2, 5, 10)
    labels = {"value.weight": torch.arange(12).view(-1, 1), "value.bias": torch.arange(12)}
    model = gated(Heads, labels, x, 0.5, seed)
    kept = units(dead_units(model, "value.weight", (1,)), (2, 6))
    assert kept < 6
    check(model, x, {"value.weight": (2 * kept, 10), "out.weight": (10, 4 * kept), "key.weight": (12, 10)})


@pytest.mark.parametrize("rotary", [False, True])
def test_queries_and_keys_are_sorted_together_unless_places_count(rotary: bool) -> None:
    x = draw(2, 5, 10)
    labels = torch.arange(12).view(-1, 1)
    model = gated(lambda: Heads(rotary), {"key.weight": labels, "key.bias": labels.flatten()}, x, 0.6)
    dead = dead_units(model, "key.weight", (1,)).view(2, 6)
    kept = int((~dead.all(0)).sum()) if rotary else int((~dead).sum(1).max())
    assert int((~dead).sum(1).max()) < int((~dead.all(0)).sum())
    check(model, x, {"query.weight": (4 * kept, 10), "key.weight": (2 * kept, 10), "value.weight": (12, 10)})


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_halves_of_a_gated_unit_move_together(interleaved: bool) -> None:
    x = draw(5, 6)
    model = gated(lambda: Halves(interleaved), "hidden", x)
    dead = dead_units(model, "up", (1,))
    dead = dead[:, ::2] if interleaved else dead[:, :10]
    kept = units(dead, (3, 10))
    assert kept < int((~dead.all(0)).sum())
    check(model, x, {"up": (3, 6, 2 * kept), "down": (3, kept, 6)})


class Fused(nn.Module):
    """One weight makes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(x + self.attention(x, x, x, need_weights=False)[0], (12,)))


@pytest.mark.parametrize("seed", range(3))
def test_queries_keys_and_values_of_one_weight_are_sorted_within_their_heads(seed: int) -> None:
    x = draw(2, 5, 12)
    model = gated(Fused, "channels", x, 0.6, seed)
    dead = (weight(model, "attention.in_proj_weight") == 0).all(1).view(3, 2, 6)
    assert torch.equal(dead[0], dead[1])
    kept = max(int((~dead[i]).sum(1).max()) for i in (0, 2))
    assert 0 < kept < 6
    exported = check(
        model, x, {"attention.in_proj_weight": (6 * kept, 12), "attention.out_proj.weight": (12, 2 * kept)}
    )
    assert exported.report.rewritten == ["attention"]


def test_units_that_differ_by_their_places_stay_where_they_are() -> None:
    x = draw(5, 6)
    model = gated(Ramp, "hidden", x)
    dead = dead_units(model, "up", (1,))
    kept = int((~dead.all(0)).sum())
    assert units(dead, (3, 8)) < kept
    exported = check(model, x, {"up": (3, 6, kept), "down": (3, kept, 4)})
    alive = (~dead.all(0)).nonzero().flatten()
    assert torch.equal(exported.model.up, weight(model, "up")[..., alive])


@pytest.mark.parametrize("length", [5, 1])
def test_channels_stay_in_their_heads_where_the_example_is_too_poor_to_tell(length: int) -> None:
    torch.manual_seed(0)
    model = dg.gate(Prefixes().eval(), {"out.weight": torch.arange(9)})
    with torch.no_grad():
        all_gates(model)[0].gamma[5:8] = 0
    x, lengths = draw(2, length, 9), torch.zeros(2, dtype=torch.long)
    small = dg.export(model, (x, lengths), latency=False).model
    x, lengths = draw(2, 6, 9), torch.tensor([3, 4])
    with torch.no_grad():
        torch.testing.assert_close(small(x, lengths), model(x, lengths))


@pytest.mark.parametrize("size", [300, 500])
def test_channels_stay_in_their_heads_where_a_long_input_is_sampled_down_to_one_element(size: int) -> None:
    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.attention = nn.Conv1d(1, 9, 250, stride=250), Prefixes()

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x).transpose(1, 2)
            return self.attention(x, torch.full((x.shape[0],), x.shape[1]))

    torch.manual_seed(0)
    model = dg.gate(Sampled().eval(), {"attention.out.weight": torch.arange(9)})
    with torch.no_grad():
        all_gates(model)[0].gamma[5:8] = 0
    exported = dg.export(model, draw(2, 1, size), latency=False)
    assert [2, 1, 2 * size + 1] in [p.shapes[0] for p in exported.report.certificate.probes]
    x = draw(2, 1, 1100)
    with torch.no_grad():
        torch.testing.assert_close(exported.model(x), model(x))


def test_a_single_example_of_a_single_step_tells_of_longer_ones_too() -> None:
    class Skips(nn.Module):
        """A recurrence over every second step, of which short sequences show nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.states, self.head = nn.Linear(3, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            before = [torch.zeros(x.shape[0], 8)] * 2
            for step in x.unbind(1):
                before.append((self.inputs(step) + self.states(before[-2])).tanh())
            return self.head(before[-1])

    torch.manual_seed(0)
    model = dg.gate(Skips().eval(), "neurons", exclude="head.*")
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[:3] = 0
    small = dg.export(model, draw(1, 1, 3), latency=False).model
    for length in (1, 2, 3, 6):
        x = draw(2, length, 3)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x))


def test_orders_that_gain_nothing_are_left() -> None:
    x = draw(5, 6)
    same = torch.zeros(4, 1, 12, dtype=torch.int64) + torch.arange(12)
    model = gated(Experts, {"up": same, "bias": same[:, 0]}, x)
    exported = dg.export(model, x, latency=False)
    assert exported.plan.cuts["up"].gathers == []
    assert exported.model.up.shape == (4, 6, 6)


@st.composite
def order_and_cut(draw_from: st.DrawFn) -> tuple[Cut, Cut]:
    """An order of a tensor of four axes, and what is cut of it then."""
    shape = tuple(draw_from(st.lists(st.integers(1, 4), min_size=4, max_size=4)))

    def rows(axis: int, along: list[int], size: int | None) -> Gather:
        count = torch.Size(shape[a] for a in along).numel()
        places = st.permutations(range(shape[axis])).map(lambda p: p[: size or shape[axis]])
        return Gather(axis, along, [list(draw_from(places)) for _ in range(count)])

    ordered = draw_from(st.sets(st.integers(0, 3)))
    axes = {a: list(draw_from(st.permutations(range(shape[a])))) for a in ordered if a > 0}
    gathers = [rows(0, [1, 3], None)] if 0 in ordered else []
    cut_axes = draw_from(st.sets(st.integers(0, 3)))
    ragged = draw_from(st.sampled_from([None, *({0, 1, 2} - cut_axes)]))
    cut_gathers = [] if ragged is None else [rows(ragged, [3], draw_from(st.integers(1, shape[ragged])))]
    counts = {a: draw_from(st.integers(1, shape[a])) for a in cut_axes}
    kept = {a: list(draw_from(st.permutations(range(shape[a])))[:n]) for a, n in counts.items()}
    return Cut(shape, axes, gathers), Cut(shape, kept, cut_gathers)


@given(order_and_cut())
def test_an_order_and_a_cut_are_one_cut(both: tuple[Cut, Cut]) -> None:
    order, cut = both
    x = torch.arange(torch.Size(order.shape).numel()).view(order.shape)
    assert torch.equal(order.then(cut).apply(x), cut.apply(order.apply(x)))
    assert int(order.then(cut).mask().sum()) == order.then(cut).apply(x).unique().numel()


class LastStates(nn.Module):
    """Reads the last states of all layers and directions, or those of the last layer."""

    def __init__(self, kind: type[nn.RNNBase], every: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 8, batch_first=True, **options)
        self.every = every
        count = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        self.out = nn.Linear(8 * count if every else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.out(torch.cat([*state], -1) if self.every else state[-1])


@pytest.mark.parametrize("every", [False, True], ids=["last", "all"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"num_layers": 2}), (nn.GRU, {"bidirectional": True}), (nn.RNN, {"num_layers": 3})],
    ids=["lstm", "gru", "rnn"],
)
def test_layers_whose_last_states_are_read_lose_other_units_each(
    kind: type[nn.RNNBase], options: dict[str, Any], every: bool
) -> None:
    torch.manual_seed(0)
    x, build = torch.randn(3, 5, 4), lambda: LastStates(kind, every, **options)
    model = build().eval()
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "rnn", example_inputs=x)
    gates = list(dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)))
    with torch.no_grad():
        for i, g in enumerate(gates):
            g.gamma[[i, i + 2, 7 - i]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.rnn.hidden_size == 5
    y = torch.randn(2, 7, 4)
    torch.testing.assert_close(exported.model(y), model(y))
    torch.testing.assert_close(dg.expand(exported, build())(y), model(y))


class Normed(Heads):
    """Attention whose values are normalized by batch statistics, as in convolutional transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(10, 2 * 6, bias=False), nn.BatchNorm1d(12))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (4, -1)).transpose(1, 2)
        values = self.value(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for t in (self.key(x), values))
        out = (q @ k.mT).softmax(-1) @ v
        return self.head(F.layer_norm(x + self.out(out.transpose(1, 2).flatten(2)), (10,)))


@pytest.mark.parametrize("seed", range(3))
def test_running_statistics_follow_the_channels_of_heads(seed: int, tmp_path: Path) -> None:
    x = draw(2, 5, 10)
    labels = {"value.0.weight": torch.arange(12).view(-1, 1)}
    labels |= {f"value.1.{leaf}": torch.arange(12) for leaf in ("weight", "bias")}
    model = gated(Normed, labels, x, 0.5, seed)
    with torch.no_grad():
        norm = model.get_submodule("value.1")
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    kept = units(weight(model, "value.1.weight") == 0, (2, 6))
    assert kept < 6
    exported = check(model, x, {"value.0.weight": (2 * kept, 10), "out.weight": (10, 4 * kept)})
    assert exported.model.get_buffer("value.1.running_var").shape == (2 * kept,)
    dg.save(exported, tmp_path)
    assert torch.equal(dg.load(tmp_path, Normed()).eval()(x), exported.model(x))
    whole = dg.expand(exported, Normed(), x).get_submodule("value.1")
    alive = norm.weight != 0
    assert torch.equal(whole.running_mean[alive], norm.running_mean[alive])
