"""`explain`: models whose verdicts are known by hand, and the laws that tie it to `gate` and `export`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO, Entry, named

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


def verdicts(found: dg.Explanation) -> dict[str, str]:
    return {r.name: r.verdict for r in found if r.groups}


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if text in line)


class Transformer(nn.Module):
    """One block with a residual stream under a norm of either kind, written by hand."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm1, self.norm2, self.norm3 = norm(8), norm(8), norm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


TOKENS = torch.arange(10).view(2, 5)
STREAM = ("embedding", "o", "down", "norm1", "norm2", "norm3")


def of_stream(name: str) -> bool:
    return name.partition(".")[0] in STREAM


class Sorted(nn.Module):
    """Half of the hidden units are sorted, which no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.left(x).sort(-1).values
        return self.out(torch.cat([a, self.right(x).relu()], -1))


class OnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(x + self.a(x)))


class TwoSided(nn.Module):
    """Two layers make one channel, and a third reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x) + self.b(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def test_mlp() -> None:
    found = dg.explain(mlp(), "channels", torch.randn(3, 4))
    assert verdicts(found) == dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], "exactly")
    assert found["0.weight"].partners == ("0.bias",)
    assert found["4.weight"].verdict == "no"
    assert found["4.weight"].reason == found["4.bias"].reason == "it is an output of the model"
    [kind] = found.kinds
    assert (kind.kind, kind.groups, kind.exactly, kind.compensated, kind.kept) == ("channels", 14, 14, 0, 0)
    assert (found.saved, found.parameters) == (4 * 8 + 8 + 8 * 6 + 6 + 6 * 2, 108)


def test_upper_bound_counts_what_reads_the_groups() -> None:
    found = dg.explain(mlp(), "channels", torch.randn(3, 4), include="0.*")
    assert found.saved == 8 * (4 + 1 + 6)
    assert found["2.weight"].reason == "left out by include or exclude"


def test_upper_bound_counts_what_is_read_by_the_groups_alone() -> None:
    found = dg.explain(mlp(), {"2.weight": torch.zeros(1, 1, dtype=torch.int64)}, torch.randn(3, 4))
    assert verdicts(found) == {"2.weight": "exactly"}
    assert (
        found.saved == (4 * 8 + 8) + (6 * 8 + 6) + 6 * 2
    )  # the 8 units before, the layer, and what reads its 6 constants


def test_residual_block_with_batch_norm() -> None:
    [entry] = named("residual")
    found = dg.explain(entry.make(), "channels", entry.make_inputs())
    assert set(verdicts(found).values()) == {"exactly"}
    assert set(found["stem.weight"].partners) == {"bn1.weight", "bn1.bias", "conv2.weight", "conv2.bias"}
    assert found["head.weight"].groups == 0
    alone = dg.explain(entry.make(), "filters", entry.make_inputs())
    assert verdicts(alone) == {"stem.weight": "no", "conv1.weight": "with compensation", "conv2.weight": "no"}
    assert alone["stem.weight"].reason == "'conv2.weight' makes the same channel and is in no group with it"


class Centered(nn.Module):
    """A layer norm, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        centered = x.to(torch.float32) - x.to(torch.float32).mean(-1, keepdim=True)
        return self.weight * (centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Spread(Centered):
    """Divides by a deviation, from a mean that is not subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.std(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("norm", [Centered, Spread])
def test_norms_written_by_hand_that_have_a_mean_hold_the_stream(norm: type[Centered]) -> None:
    found = dg.explain(Transformer(norm), "channels", TOKENS)
    assert {verdict for name, verdict in verdicts(found).items() if of_stream(name)} == {"no"}
    with pytest.raises(dg.GroupingError, match="embedding dimension"):
        dg.gate(Transformer(norm), "embedding_dims", example_inputs=TOKENS)


def test_layer_norm_subtracts_a_mean() -> None:
    found = dg.explain(Transformer(nn.LayerNorm), "channels", TOKENS)
    for name, verdict in verdicts(found).items():
        if of_stream(name):
            assert verdict == "no", name
            assert "the mean over the channels depends on their number (aten.layer_norm, " in found[name].reason
    assert found["up.weight"].verdict == "exactly"


@pytest.mark.parametrize("groups", ["channels", "embedding_dims"])
def test_rms_norm_can_be_corrected(groups: str) -> None:
    found = dg.explain(Transformer(nn.RMSNorm), groups, TOKENS)
    stream = {name: v for name, v in verdicts(found).items() if of_stream(name)}
    assert len(stream) == 6
    assert set(stream.values()) == {"with compensation"}
    assert found["o.weight"].reason.endswith("its weight and eps have to be corrected")


def test_heads_go_whole_and_not_by_halves() -> None:
    found = dg.explain(Transformer(nn.RMSNorm), ["heads", "hidden"], TOKENS)
    assert verdicts(found) == {"v.weight": "exactly", "up.weight": "exactly"}
    assert (found["v.weight"].groups, found["v.weight"].kinds) == (2, ("heads",))
    # the heads leave no reader of queries and keys; all but the embedding, the norms and the last layer goes
    assert found.saved == 4 * 64 + 2 * 8 * 12
    single = dg.explain(Transformer(nn.RMSNorm), "channels", TOKENS)["v.weight"]
    assert single.verdict == "with compensation"
    assert "heads stay of equal width" in single.reason


def test_a_residual_branch_goes_with_all_that_it_reads() -> None:
    found = dg.explain(Transformer(nn.LayerNorm), "blocks", TOKENS)
    assert verdicts(found) == {"o.weight": "exactly", "down.weight": "exactly"}
    assert found.saved == 4 * 64 + 2 * 8 * 12


def test_barrier_says_where_it_is() -> None:
    found = dg.explain(Sorted(), "channels", torch.randn(3, 4))
    assert verdicts(found) == {"right.weight": "exactly", "right.bias": "exactly"}
    place = f"test_explain.py:{line_of(Sorted.forward, 'sort')} in forward"
    assert place in found["left.weight"].reason
    assert [place in reason for reason in found.barriers] == [True]
    assert list(found.barriers.values()) == [6]
    assert "barrier: " in str(found)


def test_tied_embedding_is_one_parameter() -> None:
    [entry] = named("tied")
    found = dg.explain(entry.make(), "channels", entry.make_inputs())
    assert [r.name for r in found] == ["embedding.weight", "hidden.weight", "hidden.bias"]
    rows = dg.explain(entry.make(), {"embedding.weight": torch.arange(7).view(-1, 1)}, entry.make_inputs())
    assert (rows["embedding.weight"].verdict, rows["embedding.weight"].reason) == ("no", "it is an output of the model")


def test_meta_device_says_the_same() -> None:
    plain = dg.explain(Transformer(nn.LayerNorm), ["channels", "heads"], TOKENS)
    with torch.device("meta"):
        model = Transformer(nn.LayerNorm)
    assert dg.explain(model, ["channels", "heads"], TOKENS).to_dict() == plain.to_dict()


def test_grouped_convolution_keeps_its_groups_equal() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1))
    found = dg.explain(model, "channels", torch.randn(1, 2, 4, 4))
    assert set(verdicts(found).values()) == {"with compensation"}
    assert "its groups must stay of equal size (aten.conv2d, " in found["0.weight"].reason


def test_stacked_recurrent_layers_have_equal_widths() -> None:
    [one, two] = named("gru", "lstm")
    assert set(verdicts(dg.explain(one.make(), "rnn", one.make_inputs())).values()) == {"exactly"}
    found = dg.explain(two.make(), "rnn", two.make_inputs())
    assert set(verdicts(found).values()) == {"with compensation"}
    assert "layers stacked in one module" in found["rnn.weight_ih_l0"].reason


def test_what_is_added_to_the_input_stays() -> None:
    found = dg.explain(OnInput(), ["channels", "blocks"], torch.randn(3, 4))
    [channels, blocks] = found.kinds
    assert "it is added to the model's input" in channels.refused
    assert (blocks.groups, blocks.exactly) == (1, 1)
    rows = dg.explain(OnInput(), "neurons", torch.randn(3, 4))["a.weight"]
    assert rows.verdict == "no"
    assert rows.reason.startswith("it is added to the model's input")


def test_columns_go_if_nothing_else_reads() -> None:
    found = dg.explain(mlp(), "in_channels", torch.randn(3, 4))
    assert set(verdicts(found).values()) == {"exactly"}  # features of the input are selected by the exported network
    [entry] = named("residual")
    held = dg.explain(entry.make(), {"conv1.weight": torch.arange(4).view(1, -1, 1, 1)}, entry.make_inputs())
    assert held["conv1.weight"].verdict == "no"
    assert held["conv1.weight"].reason.endswith("reads the same channel and is in no group with it")


@pytest.mark.parametrize("groups", ["weights", "kernels"])
def test_parts_of_channels_stay(groups: str) -> None:
    [entry] = named("cnn")
    found = dg.explain(entry.make(), groups, entry.make_inputs(), exclude="0.*")
    assert found["4.weight"].reason == "its group holds only a part of a channel"
    assert found.saved == 0


def test_a_constant_goes_into_no_bias_through_zero_padding() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 2)]
    assert dg.explain(nn.Sequential(*layers), "filters", torch.randn(1, 1, 6, 6))["0.weight"].verdict == "exactly"
    [entry] = named("cnn")
    found = dg.explain(entry.make(), "filters", entry.make_inputs())["0.weight"]
    assert found.verdict == "with compensation"
    assert "its constant goes into no bias, since zeros are padded" in found.reason
    assert dg.explain(entry.make(), "channels", entry.make_inputs())["0.weight"].verdict == "exactly"


class Scaled(nn.Module):
    """A filter with a bias whose channel is multiplied by something live."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.gate, self.out = nn.Linear(4, 6, bias=bias), nn.Linear(4, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) * x.sum(-1, keepdim=True).sigmoid())


def test_a_bias_that_stays_keeps_what_is_scaled() -> None:
    x = torch.randn(3, 4)
    assert dg.explain(Scaled(bias=False), "neurons", x)["a.weight"].verdict == "exactly"
    kept = dg.explain(Scaled(bias=True), "neurons", x)["a.weight"]
    assert kept.verdict == "no"
    assert "while biases or norm parameters stay" in kept.reason
    assert dg.explain(Scaled(bias=True), "channels", x)["a.weight"].verdict == "exactly"
    assert dg.explain(Scaled(bias=True), "channels", x)["gate.weight"].reason == "the traced forward does not use it"


def test_a_norm_that_stays_keeps_what_it_normalizes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2))
    assert dg.explain(model, "channels", torch.randn(3, 4))["0.weight"].verdict == "with compensation"
    assert dg.explain(model, "neurons", torch.randn(3, 4))["0.weight"].verdict == "no"


def test_groups_of_which_a_part_goes() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return h[:, :2], self.b(h[:, 2:].relu())

    row = dg.explain(Split(), "neurons", torch.randn(3, 4))["a.weight"]
    assert (row.verdict, row.exactly, row.compensated, row.kept) == ("in part", 4, 0, 2)
    assert row.reason == "2 of 6: it is an output of the model"


def test_without_an_example_nothing_is_known_of_removal() -> None:
    found = dg.explain(mlp(), "neurons")
    assert set(verdicts(found).values()) == {"unknown"}
    assert found.saved is None
    assert found.share is None
    assert "example_inputs=" in str(found)
    assert found["0.bias"].reason == "not reached by 'neurons'"


def test_groupings_that_find_nothing_are_reported() -> None:
    found = dg.explain(mlp(), ["neurons", ["filters", "heads"]], torch.randn(3, 4))
    assert [k.kind for k in found.kinds if k.refused] == ["filters", "heads"]
    assert "heads: no groups: " in str(found)
    assert dg.explain(mlp(), "filters").kinds[0].refused


def test_overlaps_are_noted() -> None:
    found = dg.explain(mlp(), ["channels", "neurons"], torch.randn(3, 4))
    assert any("'channels' and 'neurons' both hold weights of" in n for n in found.notes)
    assert found["0.weight"].groups == 16


def test_branches_on_values_are_noted() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.relu() if h.sum() > -1e9 else h)

    found = dg.explain(Branching(), "channels", torch.randn(3, 4))
    assert found["a.weight"].verdict == "exactly"
    assert found.notes


def test_wrong_arguments_raise() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(dg.UnknownGroupingError):
        dg.explain(mlp(), ["neurons", "chanels"], x)
    with pytest.raises(dg.GroupingError, match="selects no weight"):
        dg.explain(mlp(), dg.Select("nowhere.*"), x)
    with pytest.raises(dg.GroupingError, match="matches no parameter"):
        dg.explain(mlp(), "neurons", x, exclude="nowhere.*")
    with pytest.raises(dg.GroupingError, match="empty"):
        dg.explain(mlp(), [], x)
    with pytest.raises(dg.TraceError):
        dg.explain(mlp(), "channels")
    with pytest.raises(dg.GateError, match="gated already"):
        dg.explain(dg.gate(mlp(), "neurons"), "neurons")
    with pytest.raises(dg.GateError, match="lazy"):
        dg.explain(nn.LazyLinear(3), "weights")
    with pytest.raises(dg.GateError, match="int"):
        dg.explain(3, "neurons")  # pyright: ignore[reportArgumentType]


def test_table_converts() -> None:
    found = dg.explain(mlp(), "channels", torch.randn(3, 4))
    frame = found.to_pandas()
    assert list(frame["name"]) == [r.name for r in found] == found.to_dict()["name"]
    assert len(frame) == len(found) == 6
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["parameter", *found.to_dict()["name"]]
    assert repr(found) == str(found)
    assert lines[-1] == "at most 106 of 108 parameters can go (98.1%)"


# laws

KINDS = ("channels", "hidden", "heads", "blocks", "neurons", "filters", "in_channels", "kernels", "weights")


def gated(entry: Entry, kind: str) -> nn.Module | None:
    x = entry.make_inputs() if dg.groupings()[kind].needs_trace else None
    try:
        return dg.gate(entry.make(), kind, D=2, example_inputs=x)
    except dg.GroupingError:
        return None


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_every_parameter_once_and_the_groups_of_gate(entry: Entry) -> None:
    model = entry.make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for kind in KINDS:
        found = dg.explain(model, kind, entry.make_inputs())
        assert [r.name for r in found] == [n for n, _ in model.named_parameters()]
        assert all(r.exactly + r.compensated + r.kept == r.groups for r in found)
        assert all(r.reason for r in found if r.verdict != "exactly")
        other = gated(entry, kind)
        [total] = found.kinds
        assert total.groups == (0 if other is None else len(dg.groups(other)))
        assert total.exactly + total.compensated + total.kept == total.groups
        assert bool(total.refused) == (other is None)
        on = {} if other is None else {t.name: t.gate.index for t in gated_tensors(other)}
        assert {r.name: r.groups for r in found if r.groups} == {n: int((t.unique() >= 0).sum()) for n, t in on.items()}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["channels", "neurons", "filters", "in_channels"])
@pytest.mark.parametrize("entry", list(named("mlp", "cnn", "residual", "raw_parameters")), ids=lambda e: e.name)
def test_what_goes_exactly_is_exported(entry: Entry, kind: str) -> None:
    model = gated(entry, kind)
    if model is None:
        return
    found = dg.explain(entry.make(), kind, entry.make_inputs())
    for t in gated_tensors(model):
        row = found[t.name]
        if row.verdict != "exactly" or row.groups == 1:  # without its only group the network is constant
            continue
        one = gated(entry, kind)
        assert one is not None
        [gates] = {x.gates for x in gated_tensors(one) if x.name == t.name}
        with torch.no_grad():
            gates.gamma[1] = 0
        assert dg.export(one, entry.make_inputs(), latency=False).report.removed == 1, row.name
