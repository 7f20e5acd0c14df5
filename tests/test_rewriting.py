"""Where a module's code cannot follow a cut: other integers, a forward written anew, or axes that stay whole."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from networks import randomize
from oracles import all_gates, kill_every_second
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dgate_wrap as dg
from dgate_wrap.export.recipes import build_graph, build_tree, describe_graph, describe_tree, match_tree
from dgate_wrap.tracing import normalize_inputs
from dgate_wrap.tracing.capture import export_open
from dgate_wrap.tracing.symbolic import capture_symbolic


def halved(net: nn.Module, groups: str, given: Any) -> dg.Exported:
    """Gate a network, let every second group die, and export it."""
    dg.gate(net, groups, example_inputs=given)
    kill_every_second(net)
    return dg.export(net, given, latency=False)


class Attention(nn.Module):
    """As many write it: the head size is computed from the width of the input."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, tokens, width)))


class RemembersHeads(Attention):
    """The same, with sizes that it remembers, and one that only looks like the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size, self.unrelated = 4, 3

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=causal)
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_size)))


class Block(nn.Module):
    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(12), attention(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(self.norm(x)))


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def without(model: nn.Module, grouping: str, dead: list[int], **options: Any) -> tuple[nn.Module, dg.Exported]:
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, grouping, example_inputs=X)
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[dead] = 0
    return model.eval(), dg.export(model, X, latency=False, **options)


def without_a_head(attention: type[Attention], **options: Any) -> tuple[nn.Module, dg.Exported]:
    return without(Block(attention), "heads", [1], **options)


def assert_equal(model: nn.Module, small: nn.Module) -> None:
    for batch, tokens in ((2, 5), (3, 9), (1, 1)):
        x = torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert torch.allclose(model(x), small(x), rtol=1e-5, atol=1e-6)


def test_only_the_module_that_cannot_follow_is_written_anew() -> None:
    model, exported = without_a_head(Attention)
    small = exported.model
    assert exported.report.rewritten == ["attention"]
    assert isinstance(small, Block)
    assert "stands for Attention" in repr(small.attention)
    assert small.attention.qkv.weight.shape == (24, 12)
    assert small.attention.out.weight.shape == (12, 8)
    assert list(small.state_dict()) == list(Block().state_dict())
    assert_equal(model, small)


def test_a_rewritten_model_is_copied_pickled_compiled_and_traced() -> None:
    model, exported = without_a_head(Attention)
    for small in (
        copy.deepcopy(exported.model),
        pickle.loads(pickle.dumps(exported.model)),
        torch.export.export(exported.model, (X,)).module(),
        torch.compile(exported.model, backend="eager", fullgraph=True),
    ):
        with torch.no_grad():
            assert torch.allclose(model(X), small(X), rtol=1e-5, atol=1e-6)


def test_a_trace_with_open_sizes_that_fails_leaves_nothing_on_the_inputs() -> None:
    """Torch notes on the tensors that it traces which sizes are open, and a later trace would read that."""

    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not with me")

    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="not with me"), export_open(Refuses(), normalize_inputs(x, None)):
        pass
    assert vars(x) == {}


def test_a_rewritten_model_trains_with_its_dropout() -> None:
    _, exported = without_a_head(Attention)
    small = exported.model.train()
    assert not torch.equal(small(X), small(X))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(X).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    optimizer.step()
    small.eval()
    assert torch.equal(small(X), small(X))


def test_a_rewritten_model_is_saved_and_loaded_without_code(tmp_path: Path) -> None:
    _, exported = without_a_head(Attention)
    dg.save(exported, tmp_path)
    small = dg.load(tmp_path, Block()).eval()
    assert torch.equal(small(X), exported.model(X))
    with pytest.raises(dg.FileFormatError, match="does not have"):
        build_graph([["x", "call_function", "aten::system.default", [], {"dict": {}}]])


def test_a_rewritten_forward_refuses_arguments_that_it_was_not_exported_with() -> None:
    _, exported = without_a_head(Attention)
    with pytest.raises(dg.ExportError, match="causal=False"):
        exported.model.attention(X, causal=False)


class GivesMask(nn.Module):
    """Attention under a mask that only code of its own would make of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = UnderMask()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, mask)


class UnderMask(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        mask = mask if mask.dtype == torch.bool else mask.bool()
        q, k, v = (t.view(*t.shape[:2], self.heads, 4).transpose(1, 2) for t in self.qkv(x).split(12, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).reshape(x.shape))


def test_a_rewritten_forward_refuses_tensors_of_another_kind_in_words() -> None:
    model, mask = GivesMask(), torch.ones(2, 5, dtype=torch.bool)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=(X, mask))
    with torch.no_grad():
        all_gates(model)[0].gamma[1] = 0
    small = dg.export(model, (X, mask), latency=False).model
    assert small.attention.qkv.weight.shape == (24, 12)
    mask[0, 3:] = False
    torch.testing.assert_close(small(X, mask), model(X, mask))
    for other in (mask.long(), mask.float()):
        with pytest.raises(dg.ExportError, match=rf"mask of the form .*truth values, not {other.dtype}"):
            small(X, other)


class SharedBiases(nn.Module):
    """Layers that add two biases of all of them to their scores (LayoutLM), the last one with values for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(12, 3), nn.Linear(12, 3)
        self.layers = nn.ModuleList(BiasedAttention() for _ in range(2))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        near, far = (f(x[:, :, None] - x[:, None]).permute(0, 3, 1, 2) for f in (self.near, self.far))
        aside = x
        for layer in self.layers:
            y, aside = layer(x, aside, near, far)
            x = x + y
        return self.head(x)


class BiasedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scored = Scored()
        self.out, self.aside = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, aside: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        y, other = self.scored(x, aside, near, far)
        return self.out(y), self.aside(other)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.other = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor, aside: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        layers = ((self.q, x), (self.k, x), (self.v, x), (self.other, aside))
        q, k, v, other = (f(t).view(*t.shape[:2], 3, 4).transpose(1, 2) for f, t in layers)
        weights = (q @ k.mT / 2 + (near + far) / 3).softmax(-1)
        y, other = ((weights @ t).transpose(1, 2).flatten(2) for t in (v, other))
        return y, other


def test_heads_go_beside_two_biases_that_layers_share_and_values_that_lead_nowhere() -> None:
    model = SharedBiases()
    randomize(model, torch.Generator().manual_seed(1))
    heads = {f"layers.{i}.scored.v.{kind}": dg.along(p, 0).div(4, rounding_mode="floor") + 3 * i
             for i, layer in enumerate(model.layers) for kind, p in layer.scored.v.named_parameters()}  # fmt: skip
    dg.gate(model, heads).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[0] = 0
        all_gates(model)[1].gamma[1] = 0
    result = dg.export(model, X, latency=False)
    assert [layer.scored.v.weight.shape[0] for layer in result.model.layers] == [8, 8]
    assert result.model.layers[1].scored.q.weight.shape[0] == 8
    assert_equal(model, result.model)


class BesideLSTM(Block):
    """An operation that fixes the number of tokens in a trace of the whole model."""

    def __init__(self, attention: type[Attention]) -> None:
        super().__init__(attention)
        self.lstm = nn.LSTM(12, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lstm(x)[0])


class BesideLoop(Block):
    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), list[Tensor]()
        for t in range(x.shape[1]):
            state = torch.tanh(state + x[:, t])
            states.append(state)
        return super().forward(torch.stack(states, 1))


class BesideSearch(Block):
    """An operation whose result has a size that depends on values, so that the model is recorded, not traced."""

    def forward(self, x: Tensor) -> Tensor:
        at, kept = torch.where(x[..., 0] > 0), torch.zeros_like(x)
        kept[at] = x[at]
        return super().forward(x + kept)


class MakesMask(Attention):
    """Makes its mask itself, of the dtype of what it is given."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if causal else None)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("attention", [Attention, MakesMask])
@pytest.mark.parametrize("block", [BesideLSTM, BesideLoop, BesideSearch])
@pytest.mark.filterwarnings("ignore::dgate_wrap.errors.TraceWarning")
def test_a_module_is_written_anew_alone_where_sizes_stay_open_in_it_only(
    block: type[Block], attention: type[Attention]
) -> None:
    model, exported = without(block(attention), "heads", [1])
    assert exported.report.removed == 1
    assert exported.report.rewritten == ["attention"]
    assert_equal(model, exported.model)


class Assembled(RemembersHeads):
    """Writes its queries part by part into a tensor that holds nothing before, as some attentions with latents do."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4).unbind(0)
        queries = x.new_empty(batch, self.heads, tokens, self.head_size)
        queries[..., :2] = q[..., :2]
        queries[..., 2:] = q[..., 2:] * 0.5
        y = F.scaled_dot_product_attention(queries, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_size))


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_heads_go_whose_queries_are_written_into_an_empty_tensor(dead: int) -> None:
    model, exported = without(Block(Assembled), "heads", [dead])
    assert exported.report.removed == 1
    assert exported.plan.attributes == {"attention": {"heads": 2}}
    assert_equal(model, exported.model)


class Cell(nn.Module):
    """A recurrent cell as it is often written, with the number of its units as an attribute."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.units, self.gates = units, nn.Linear(features + units, 4 * units)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.gates(torch.cat([x, h], 1)).split(self.units, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Recurrent(nn.Module):
    """Begins with zeros of a size that it reads off its cell, and goes on as long as its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Cell(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = (torch.zeros(len(x), self.cell.units), x.new_zeros(len(x), self.cell.units))
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


def test_units_of_a_cell_go_with_the_number_that_it_remembers_and_with_the_zeros_that_others_make_of_it() -> None:
    model, exported = without(Recurrent(), "rnn", [0, 2, 4])
    assert exported.report.removed == 3
    assert exported.report.rewritten == []
    assert exported.plan.attributes == {"cell": {"units": 3}}
    assert_equal(model, exported.model)


class Turning(Attention):
    """Does something else where there are many tokens, as windows that are shifted only where there are several."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        return super().forward(x.roll(1, 1) if x.shape[1] > 8 else x, causal=causal)


def test_code_that_does_other_things_at_other_sizes_is_written_anew_for_those_of_the_example_only_if_asked() -> None:
    model, exported = without_a_head(Turning)
    assert exported.report.rewritten == []
    assert exported.report.frozen == ["attention"]
    assert exported.report.removed == 1  # by layers that compute less than the code around them takes
    assert_equal(model, exported.model)
    model, exported = without_a_head(Turning, dynamic="batch")
    assert exported.report.removed == 1
    assert exported.report.rewritten == ["attention"]
    assert exported.report.certificate.dynamic == "batch"
    assert {tuple(s[1:]) for p in exported.report.certificate.probes for s in p.shapes} == {X.shape[1:]}
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(batch))
        assert torch.allclose(model(x), exported.model(x), rtol=1e-5, atol=1e-6)


def test_which_sizes_vary_is_one_of_two() -> None:
    with pytest.raises(dg.ExportError, match="dynamic is 'sequence'") as refused:
        without_a_head(Attention, dynamic="sequence")
    assert '"batch"' in str(refused.value)


def test_code_that_remembers_its_sizes_gets_other_integers() -> None:
    model, exported = without_a_head(RemembersHeads)
    small = exported.model.attention
    assert type(small) is RemembersHeads
    assert (small.heads, small.head_size, small.unrelated) == (2, 4, 3)
    assert exported.plan.attributes == {"attention": {"heads": 2}}
    assert exported.report.rewritten == exported.report.frozen == []
    assert_equal(model, exported.model)


def test_without_rewriting_what_the_code_cannot_follow_keeps_its_sizes_and_is_named() -> None:
    model, exported = without_a_head(Attention, rewrite=False)
    assert type(exported.model.attention) is Attention
    assert exported.report.frozen == ["attention"]
    assert exported.report.kept == []  # its layers compute less than its code takes
    assert_equal(model, exported.model)


@pytest.mark.parametrize("select", [True, False])
def test_dead_features_are_selected_inside_or_not_taken(select: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    x = torch.randn(3, 6)
    model = dg.gate(build(), "input_features", example_inputs=x)
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[[0, 4]] = 0
    exported = dg.export(model, x, select_inputs=select, latency=False)
    assert exported.report.inputs == {"input": {-1: [1, 2, 3, 5]}}
    assert exported.model[0].weight.shape == (4, 4)
    given = x if select else x[:, [1, 2, 3, 5]]
    assert torch.allclose(exported.model(given), model(x), atol=1e-6)
    assert torch.equal(dg.load(dg.save(exported, tmp_path), build())(given), exported.model(given))


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
def test_features_are_selected_along_the_last_axis_whatever_is_before_it(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = dg.gate(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), "input_features", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[[0, 3]] = 0
    small = dg.export(model, x, latency=False).model
    assert small[0].in_features == 3
    for other in ((5,), (7, 5), (2, 3, 5), (2, 3, 4, 5)):
        new = torch.randn(other)
        assert torch.allclose(small(new), model(new), atol=1e-6)


def test_an_input_that_is_selected_of_need_not_be_given() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, xs: list[Tensor], extra: Tensor | None = None) -> Tensor:
            hidden = self.first(xs[0]) + (self.second(xs[1]) if len(xs) > 1 else 0.0)
            return self.last((hidden if extra is None else hidden + self.second(extra)).relu())

    torch.manual_seed(0)
    x, y = torch.randn(3, 5), torch.randn(3, 4)
    example = ([x, y], y.clone())
    model = dg.gate(Sums(), "input_features", example_inputs=example)
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[[0, 2]] = 0
    small = dg.export(model, example, latency=False).model
    assert small.first.in_features < 5
    for given in (example, ([x], None), ([x, y], None), ([x],)):
        assert torch.allclose(small(*given), model(*given), atol=1e-6)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Mixed(nn.Module):
    """Puts features together that it is given apart, within containers of a kind."""

    def __init__(self, take: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.first, self.last, self.take = nn.Linear(7, 8), nn.Linear(8, 2), take

    def forward(self, data: Any, *more: Any) -> Tensor:
        return self.last(self.first(torch.cat(self.take(data, *more), -1)).relu())


CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[str]]] = {
    "arguments": (lambda x, y: (x, y), lambda x, y: (x, y), ["data", "args_1"]),
    "dict": (lambda x, y: ({"a.b": x, "y": y},), lambda d: (d["a.b"], d["y"]), ["data['a.b']", "data['y']"]),
    "list": (lambda x, y: ([x, y],), lambda d: (d[0], d[1]), ["data[0]", "data[1]"]),
    "tuple": (lambda x, y: ((x, y),), lambda d: d, ["data[0]", "data[1]"]),
    "nested": (lambda x, y: ({"k": [x, {"y": y}]},), lambda d: (d["k"][0], d["k"][1]["y"]), []),
    "named tuple": (lambda x, y: (Pair(x, y),), lambda d: (d.x, d.y), []),
}


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_dead_features_of_inputs_in_containers_are_selected(kind: str, select: bool, tmp_path: Path) -> None:
    make, take, names = CONTAINERS[kind]
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    model = dg.gate(Mixed(take), "input_features", example_inputs=make(x, y)).eval()
    dead = [0, 2, 5]
    for gates in all_gates(model):
        assert gates.num_groups == 7
        with torch.no_grad():
            gates.gamma[dead] = 0
    exported = dg.export(model, make(x, y), select_inputs=select, latency=False)
    assert exported.model.first.weight.shape == (8, 4)
    assert not names or list(exported.report.inputs) == names
    new, other = torch.randn(5, 4), torch.randn(5, 3)
    given = make(new, other) if select else make(new[:, [1, 3]], other[:, [0, 2]])
    kept = copy.deepcopy(given)
    assert torch.allclose(exported.model(*given), model(*make(new, other)), atol=1e-6)
    for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(kept), strict=True):
        assert torch.equal(a, b)
    loaded = dg.load(dg.save(exported, tmp_path), Mixed(take))
    assert torch.equal(loaded(*given), exported.model(*given))
    assert torch.equal(copy.deepcopy(exported.model)(*given), exported.model(*given))
    compiled = torch.compile(exported.model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*given), exported.model(*given), atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_units_go_from_every_layer_and_direction(kind: Any, both: bool, layers: int) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 8, num_layers=layers, bidirectional=both, batch_first=True)
            self.head = nn.Linear(16 if both else 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(1))

    x = torch.randn(3, 4, 5)
    model = dg.gate(Reader(), "rnn", example_inputs=x)
    for i, gates in enumerate({t.gates: None for t in dg.gates.gated_tensors(model)}):
        with torch.no_grad():
            gates.gamma[[(i + j) % 8 for j in range(4)]] = 0
    small = dg.export(model, x, latency=False).model
    assert small.rnn.hidden_size == 4
    new = torch.randn(2, 6, 5)
    assert torch.allclose(small(new), model(new), atol=1e-6)


class ByHand(nn.Module):
    """A recurrent cell of two linear layers, which starts from zeros."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
        self.kind, self.width = kind, 8
        self.inputs, self.states, self.head = nn.Linear(5, 8 * gates), nn.Linear(8, 8 * gates), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.width, device=x.device)
        for step in x.unbind(1):
            a, b = self.inputs(step), self.states(h)
            if self.kind == "rnn":
                h = (a + b).tanh()
            elif self.kind == "lstm":
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r, z, new), (s, y, old) = a.chunk(3, -1), b.chunk(3, -1)
                z = (z + y).sigmoid()
                h = (1 - z) * (new + (r + s).sigmoid() * old).tanh() + z * h
        return self.head(h)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_units_of_a_cell_that_is_written_by_hand_go(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    model = dg.gate(ByHand(kind).eval(), "hidden", example_inputs=x)
    [gates] = all_gates(model)
    assert gates.num_groups == 8
    with torch.no_grad():
        gates.gamma[[0, 3, 4, 6]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.states.weight.shape == (4 * model.states.out_features // 8, 4)
    for new in (x, torch.randn(2, 4, 5)):
        assert torch.allclose(exported.model(new), model(new), atol=1e-6)
    loaded = dg.load(dg.save(exported, tmp_path), ByHand(kind))
    assert torch.equal(loaded(x), exported.model(x))


def test_units_that_learned_queries_alone_reach_go_and_constants_stay_trainable() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 6))
            self.up, self.down, self.keys, self.head = (nn.Linear(*n) for n in ((6, 10), (10, 6), (5, 6), (6, 2)))

        def forward(self, x: Tensor) -> Tensor:
            queries, keys = self.down(self.up(self.queries).sigmoid()), self.keys(x)
            return self.head((queries @ keys.mT).softmax(-1) @ keys)

    torch.manual_seed(0)
    x = torch.randn(3, 7, 5)
    model = dg.gate(Reads().eval(), {"down.weight": torch.arange(10), "keys.bias": torch.full((6,), -1)})
    with torch.no_grad():
        all_gates(model)[0].gamma[[1, 2, 8]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.up.weight.shape == (7, 6)
    assert torch.allclose(exported.model(x), model(x), atol=1e-6)
    exported.model(x).sum().backward()
    assert all(p.grad is not None for p in exported.model.parameters())


class Widening(nn.Module):
    """Scales in float32, and casts back to what it was given: in float64 there is nothing to cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left, self.right = nn.Linear(6, 16), nn.Linear(8, 3), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        scaled = (self.scale * b.to(torch.float32).tanh()).to(x.dtype)
        return self.left(a.relu()) + self.right(scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rewritten_forwards_cast_back_to_the_precision_that_they_are_moved_to(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Widening().eval(), torch.randn(4, 6)
    nn.init.zeros_(model.up.bias)
    dg.gate(model, "neurons", include="up.*")
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[0, 1, 9]] = 0
    exported = dg.export(model, x, latency=False)
    assert (exported.report.removed, exported.report.rewritten) == (3, [""])
    found = exported.model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), model(x), rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


class Detector(nn.Module):
    """Learned places attend to what is nothing yet at each of them, and then, with what that gives, to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.values, self.query, self.reads = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = self.queries.expand(len(x), -1, -1)
        content = F.scaled_dot_product_attention(places, places, self.values(torch.zeros_like(places)))
        found = F.scaled_dot_product_attention(self.query(content + places), *self.reads(x).chunk(2, -1))
        return self.down(self.up(found).relu())


class PlusOne(nn.Module):
    """A norm with a gain of one plus its weight, which no weight can make up for, in float32 (Gemma, Qwen 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1 + self.weight.float())).type_as(x)


class Wave(nn.Module):
    """A residual branch that is computed in float32 and makes more of its rounding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = PlusOne(width), nn.Linear(width, 48, False), nn.Linear(48, width, False)

    def forward(self, x: Tensor) -> Tensor:
        waves = (6 * F.linear(self.norm(x).float(), self.up.weight.float())).sin()
        return x + self.down(waves.type_as(x))


def test_norms_are_written_anew_behind_code_that_rounds_to_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), Wave(32), Wave(32), PlusOne(32), nn.Linear(32, 50, False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tokens = torch.randint(50, (2, 7))
    gated = dg.gate(model, "embedding_dims", example_inputs=tokens)
    with torch.no_grad():
        for gates in dict.fromkeys(t.gates for t in dg.gates.gated_tensors(gated)):
            gates.gamma[::3] = 0
    exported = dg.export(gated, tokens, latency=False)
    assert exported.report.removed == exported.report.pruning.dead == 11
    assert exported.report.rewritten == ["1.norm", "2.norm", "3"]
    with torch.no_grad():
        torch.testing.assert_close(exported.model(tokens.flip(1)), gated(tokens.flip(1)), rtol=0, atol=1e-3)


def test_queries_beside_attention_to_nothing_stay_trainable() -> None:
    torch.manual_seed(0)
    model, x = Detector().double().eval(), torch.randn(2, 5, 8).double()
    dg.gate(model, "neurons", include="up.*")
    kill_every_second(model)
    exported = dg.export(model, x, latency=False)
    assert not exported.report.gone
    for net in (model, exported.model):
        net(x).square().sum().backward()
    for name in ("queries", "values.bias", "query.weight"):
        found, expected = (net.get_parameter(name).grad for net in (exported.model, model))
        torch.testing.assert_close(found, expected)


def test_columns_of_a_table_go_with_what_reads_them() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    tokens = torch.randint(0, 11, (2, 5))
    dg.gate(model, "embedding_dims", example_inputs=tokens)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[1, 4, 5]] = 0
    small = dg.export(model, tokens, latency=False).model
    assert small[0].weight.shape == (11, 5)
    assert small[1].weight.shape == (6, 5)
    assert torch.allclose(small(tokens), model(tokens), atol=1e-6)


def test_batch_and_heads_in_one_axis_stay_open() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 3
            self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, width = x.shape

            def split(t: Tensor) -> Tensor:
                heads = t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
                return heads.reshape(batch * self.heads, tokens, width // self.heads)

            scores = torch.bmm(split(self.q(x)), split(self.k(x)).transpose(1, 2)).softmax(-1)
            y = torch.bmm(scores, split(self.v(x))).view(batch, self.heads, tokens, -1)
            return self.out(y.transpose(1, 2).reshape(batch, tokens, width))

    model = dg.gate(Merged(), "heads", example_inputs=X)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[1] = 0
    small = dg.export(model, X, latency=False).model
    assert small.out.weight.shape == (12, 8)
    assert_equal(model, small)


def test_a_head_with_a_constant_value_goes_and_leaves_its_constant() -> None:
    model = Block(RemembersHeads)
    randomize(model, torch.Generator().manual_seed(3))
    labels = torch.full((36, 1), -1)
    labels[28:32] = 0  # the value rows of one head; its value bias stays
    dg.gate(model, {"attention.qkv.weight": labels})
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[0] = 0
    exported = dg.export(model.eval(), X, latency=False)
    assert exported.model.attention.heads == 2
    assert exported.report.folded == ["attention.out.weight: bias"] or exported.report.folded
    assert_equal(model, exported.model)


class Splitting(nn.Module):
    """Remembers two sizes, which are the same at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = 4, 4
        self.both, self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).split([self.first, self.second], dim=-1)
        return x + self.left(a.tanh()) * self.right(b.tanh())


def test_layers_of_a_class_get_integers_that_do_not_fit_the_others() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Splitting(), Splitting()).double().eval(), torch.randn(3, 6).double()
    for layer in model:
        nn.init.zeros_(layer.both.bias)
    dg.gate(model, "neurons", include="*both*")
    with torch.no_grad():
        for gate, dead in zip(dg.gates.gated_tensors(model), ([4, 6], [0, 1, 4, 5]), strict=True):
            gate.gates.gamma[dead] = 0
    exported = dg.export(model, x, latency=False)
    assert [(layer.first, layer.second) for layer in exported.model] == [(4, 2), (2, 2)]
    assert (exported.report.removed, exported.report.rewritten) == (6, [])


class Stateful(nn.Module):
    """Adds a state whose size is written in its code, unless its cache is turned off."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, *, use_cache: bool) -> Tensor:
        h = self.up(x).sigmoid()
        return self.down(h + x.new_zeros(len(x), 8) if use_cache else h)


class Caching(nn.Module):
    """Has a cache in one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stateful, self.wide, self.down = Stateful(), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, use_cache: bool = True) -> Tensor:
        return self.down(self.wide(self.stateful(x, use_cache=use_cache)).sigmoid())


def test_what_a_cache_asks_for_stays_unless_the_inputs_turn_it_off() -> None:
    torch.manual_seed(0)
    model, x = Caching().double().eval(), torch.randn(3, 4).double()
    dg.gate(model, "neurons", include=["stateful.up.*", "wide.*"])
    with torch.no_grad():
        for gate in dg.gates.gated_tensors(model):
            gate.gates.gamma[[1, 4]] = 0
    exported = dg.export(model, x, latency=False)
    assert (exported.report.removed, exported.report.frozen) == (2, ["stateful"])
    torch.testing.assert_close(exported.model(x), model(x))
    assert dg.export(model, {"x": x, "use_cache": False}, latency=False).report.removed == 4


class Reading(nn.Module):
    """Reads numbers off its inputs, or off what it has computed, beside two parts of a layer that are cut unequally."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.left, self.right = how, nn.Linear(3, 16), nn.Linear(8, 2), nn.Linear(8, 2)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        if self.how == "divisor":
            x = x / n.max().item()
        if self.how == "length":
            x = x[:, : int(n.max())]
        if self.how == "places":
            x = x[:, n > 2]
        if self.how == "bound":
            x = x * (torch.arange(x.shape[1]) < n.max().item()).unsqueeze(-1)
        if self.how == "several":
            x = x / n[0].item() + x * n[1].item()
        a, b = self.up(x).chunk(2, -1)
        a = a.relu()
        if self.how == "computed":
            a = a[:, a.sum((0, 2)).argmax()].unsqueeze(1)
        if self.how == "rows":
            a = a[:, torch.nonzero(n > 2)[:, 0]]
        return self.left(a.mean(1)) + self.right(b.tanh().mean(1))


@pytest.mark.filterwarnings("ignore::dgate_wrap.errors.TraceWarning")
@pytest.mark.parametrize("how", ["divisor", "length", "places", "bound", "several", "computed", "rows"])
def test_numbers_are_read_off_tensors_in_rewritten_forwards_too(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, n = Reading(how).double().eval(), torch.randn(3, 5, 3).double(), torch.tensor([5, 3, 4, 1, 3])
    dg.gate(model, {"up.weight": torch.arange(16).unsqueeze(1)})
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[0, 1, 2, 9]] = 0
    exported = dg.export(model, (x, n), latency=False)
    assert (exported.report.removed, exported.report.rewritten) == (4, [""])
    dg.save(exported, tmp_path / "small.safetensors")
    loaded = dg.load(tmp_path / "small.safetensors", Reading(how).double().eval())
    for length, lengths in ((5, [1, 2, 3, 4, 4]), (7, [3, 1, 7, 2, 2, 3, 1]), (3, [3, 1, 2])):
        other = torch.randn(2, length, 3).double(), torch.tensor(lengths)
        torch.testing.assert_close(exported.model(*other), model(*other))
        torch.testing.assert_close(loaded(*other), model(*other))


def test_heads_go_whose_values_hardly_differ_from_token_to_token() -> None:
    class Sizeless(Attention):
        """Runs on the rows of two of its heads too, as three smaller ones."""

        def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Sizeless().double(), torch.randn(2, 5, 12).double()
    with torch.no_grad():
        model.qkv.weight[24:] *= 1e-7
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[2] = 0
    exported = dg.export(model.eval(), x, latency=False)
    assert exported.model.heads == 2
    assert exported.report.removed == 1
    torch.testing.assert_close(exported.model(x), model(x), rtol=1e-10, atol=1e-10)


def test_trees_of_values_keep_their_form() -> None:
    tensors: list[Tensor] = []
    value = {"a": (X, [None, True, 2.5]), "b": "text"}
    tree = json.loads(json.dumps(describe_tree(value, tensors)))
    found: dict[int, Tensor] = {}
    assert match_tree(tree, value, found)
    assert found[0] is X
    assert build_tree(tree, tensors) == value or build_tree(tree, tensors)["a"][0] is X
    assert not match_tree(tree, {**value, "b": "other"}, {})


def test_graphs_survive_being_written_down() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.full.default, ([2, 3], float("-inf")), {"dtype": torch.float64})
    z = graph.call_function(torch.ops.aten.mul.Scalar, (y, 0.6 - 0.8j))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, z)),))
    again = build_graph(json.loads(json.dumps(describe_graph(graph))))
    assert str(again) == str(graph)


def test_tables_and_masks_stay_longer_than_the_example() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Parameter(torch.randn(16, 12)), nn.LayerNorm(12)
            self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 2)
            self.register_buffer("mask", torch.randn(16, 16).tril())

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            x = self.mask[:n, :n] @ (x + self.norm(self.table)[:n])
            return self.down(torch.relu(self.up(x)))

    model = dg.gate(Positions(), "hidden", example_inputs=X)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[1, 4]] = 0
    small = dg.export(model, X, latency=False).model
    assert small.up.weight.shape == (6, 12)
    assert small.table.shape == (16, 12)
    assert small.mask.shape == (16, 16)
    assert_equal(model, small)


class MaskedAttention(Attention):
    """Scores with a mask of every head, made of two; a rotation of none of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size = 4

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        v = torch.cat([v, v[..., self.head_size :]], -1)
        finite = x[:, None, None, :, 0] == x[:, None, None, :, 0]
        mask = (finite & torch.ones(tokens, tokens, dtype=torch.bool).tril()).expand(-1, self.heads, -1, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e4).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))


def test_a_mask_that_is_expanded_to_heads_follows_them() -> None:
    model, exported = without_a_head(MaskedAttention)
    assert type(exported.model.attention) is MaskedAttention
    assert exported.plan.attributes == {"attention": {"heads": 2}}
    assert exported.report.removed == 1
    assert_equal(model, exported.model)


class Sizes:
    """What modules of one model share."""

    def __init__(self) -> None:
        self.heads, self.unread = 3, 3


class ReadsShared(Attention):
    """Reads its number of heads off what it shares; another number of them runs, and gives another shape."""

    def __init__(self) -> None:
        super().__init__()
        del self.heads
        self.sizes, self.inner = Sizes(), Merge()

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch = x.shape[0]
        qkv = self.qkv(x).view(batch, -1, 3, self.sizes.heads, 4).permute(2, 0, 3, 1, 4)
        return self.out(self.inner(F.scaled_dot_product_attention(*qkv.unbind(0))))


class Merge(nn.Module):
    """Merges heads, as many as it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.width)


def test_sizes_that_are_shared_change_for_the_module_that_reads_them() -> None:
    model, exported = without_a_head(ReadsShared)
    small = exported.model.attention
    assert type(small) is ReadsShared
    assert (small.sizes.heads, small.sizes.unread, small.inner.width) == (2, 3, 8)
    assert exported.plan.attributes == {"attention": {"sizes.heads": 2}, "attention.inner": {"width": 8}}
    assert exported.report.rewritten == exported.report.frozen == []
    assert_equal(model, exported.model)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_row_that_is_always_looked_up_is_no_dead_branch(gathered: bool) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(3, 12), nn.Linear(12, 8), nn.Linear(8, 2)
            self.register_buffer("kinds", torch.zeros(2, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            kinds = torch.zeros_like(x[..., 0], dtype=torch.long)
            if gathered:
                kinds = self.kinds.gather(0, (x[..., 0] > 0).long().flatten()).view(kinds.shape)
            return self.down(torch.relu(self.up(x + self.table(kinds))))

    model = dg.gate(Typed(), "hidden", example_inputs=X)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[[1, 4]] = 0
    exported = dg.export(model, X, latency=False)
    assert exported.report.rewritten == []
    assert exported.model.table.weight.shape == (3, 12)
    assert exported.model.up.weight.shape == (6, 12)


class Patched(nn.Module):
    """Counts its examples by ``len``; how many tokens there are is computed before its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.token = nn.Conv2d(3, 12, 2, 2), nn.Parameter(torch.zeros(1, 1, 12))
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return x + self.attention(x)


def test_lengths_stay_open_and_sizes_computed_outside_of_a_module_are_read_off_its_inputs() -> None:
    model, x = Patched().eval(), torch.randn(2, 3, 8, 8)
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[1] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == ["attention"]
    assert exported.model.attention.qkv.weight.shape == (24, 12)
    other = torch.randn(5, 3, 4, 10)
    torch.testing.assert_close(exported.model(other), model(other))
    assert "len" not in globals()


class Encoded(nn.Module):
    """Attention of torch's own, which takes a faster way in eval mode, and gives weights that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = (nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x, x, x, need_weights=False)[0]
        return self.out(x + self.cross(x, x.flip(1), x)[0])


def test_attention_of_torch_is_written_anew_behind_its_own_faster_way() -> None:
    model = Encoded().eval()
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model, "heads", example_inputs=X, include="cross.*")
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[1] = 0
    exported = dg.export(model, X, latency=False)
    assert exported.report.rewritten == ["cross"]
    assert exported.model.cross.out_proj.weight.shape == (12, 8)
    assert exported.model.cross(X, X, X)[1] is None
    assert_equal(model, exported.model)


class Sorted(Attention):
    """Attends to its tokens in the order of one feature, and brings them back by the inverse of that order."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        tokens = x.flatten(0, 1)
        order = tokens[:, 0].argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(tokens.shape[0])
        return super().forward(tokens[order].view(x.shape), causal=causal).flatten(0, 1)[back].view(x.shape)


def test_integers_without_a_value_yet_are_made_in_rewritten_forwards() -> None:
    model, exported = without_a_head(Sorted)
    assert exported.report.rewritten == ["attention"]
    assert exported.model.attention.qkv.weight.shape == (24, 12)
    assert_equal(model, exported.model)


class Sloped(Attention):
    """Scores fall with the distance, at a slope of its own in each head, which the forward makes (ALiBi)."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(tokens)
        slopes = torch.tensor([2.0**-i for i in range(self.heads)], dtype=x.dtype).view(-1, 1, 1)
        scores = q @ k.transpose(-2, -1) - slopes * (at.view(-1, 1) - at).abs()
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


def test_what_the_forward_makes_for_each_head_goes_with_the_head() -> None:
    model, exported = without_a_head(Sloped)
    assert exported.report.rewritten == ["attention"]
    assert exported.model.attention.out.in_features == 8
    assert_equal(model, exported.model)
    model, own = without_a_head(Sloped, rewrite=False)
    assert type(own.model.attention) is Sloped
    assert own.plan.picks["attention.out"].read == [0, 1, 2, 3, 8, 9, 10, 11]
    assert_equal(model, own.model)


class Generator(nn.Module):
    """A flat code becomes an image of channels whose number is written down; an activation writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8 * 4)
        self.rest = nn.Sequential(
            nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.start(x).view(-1, 8, 2, 2))


def test_what_an_activation_writes_in_place_does_not_stop_a_rewriting() -> None:
    model, x = Generator().eval(), torch.randn(3, 6)
    randomize(model, torch.Generator().manual_seed(0))
    gated = dg.gate(model, "channels", example_inputs=x)
    with torch.no_grad():
        for gates in all_gates(gated):
            gates.gamma[::2] = 0
    exported = dg.export(gated, x, latency=False)
    assert exported.report.rewritten == [""]
    assert exported.model.start.weight.shape == (16, 6)
    assert torch.allclose(exported.model(x), gated(x), atol=1e-6)


class Biased(Attention):
    """Scores are given a bias for each head."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias) + (q @ k.transpose(-2, -1) + bias) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class SharesTable(nn.Module):
    """Two layers share one table of distances, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3)
        self.layers = nn.ModuleList([Biased(), Biased()])
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = self.table((at.view(-1, 1) - at).clamp(-4, 4) + 4).permute(2, 0, 1)
        for layer in self.layers:
            x = x + layer(x, bias)
        return self.head(x)


def test_heads_that_share_a_table_go_from_each_layer_by_themselves() -> None:
    torch.manual_seed(0)
    model = dg.gate(SharesTable(), "heads", example_inputs=torch.randn(2, 5, 12)).eval()
    gates = all_gates(model)
    with torch.no_grad():
        gates[0].gamma[:2] = 0  # two heads of the first layer, another one of the second
        gates[1].gamma[2] = 0
    exported = dg.export(model, torch.randn(2, 5, 12), latency=False)
    assert [m.out.in_features for m in exported.model.layers] == [4, 8]
    assert exported.model.table.weight.shape == (9, 3)
    assert_equal(model, exported.model)


class Masked(nn.Transformer):
    """As most call it: torch looks whether the mask is causal."""

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:  # type: ignore[override]
        mask = self.generate_square_subsequent_mask(tgt.shape[1], dtype=tgt.dtype)
        return super().forward(src, tgt, tgt_mask=mask)


@pytest.mark.parametrize("kind", [nn.Transformer, Masked])
def test_an_encoder_layer_calls_its_rewritten_attention(kind: type[nn.Transformer]) -> None:
    """In eval mode nn.TransformerEncoderLayer would read the tensors of its attention itself."""
    torch.manual_seed(0)
    model = kind(8, 2, 1, 1, 8, batch_first=True).eval()
    x = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    model = dg.gate(model, "heads", example_inputs=x)
    kill_every_second(model)
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert not exported.report.kept
    assert {"encoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"} <= set(exported.report.rewritten)
    with torch.no_grad():
        assert torch.allclose(model(*x), exported.model(*x), atol=1e-5)
        longer = torch.randn(3, 7, 8), torch.randn(3, 6, 8)
        assert torch.allclose(model(*longer), exported.model(*longer), atol=1e-5)


class Padded(nn.Module):
    """Sentences of unequal length, which nn.TransformerEncoder packs in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        y = self.encoder(self.words(x), src_key_padding_mask=padding)
        real = (~padding).unsqueeze(-1)
        return self.head((y * real).sum(1) / real.sum(1))


def test_heads_go_where_sentences_are_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(1, 9, (3, 7))
    x[1, 4:], x[2, 2:] = 0, 0
    model = dg.gate(Padded().eval(), "heads", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[1].gamma[:3] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert exported.report.rewritten == ["encoder.layers.1.self_attn"]
    dg.save(exported, tmp_path)
    for small in (exported.model, dg.load(tmp_path, Padded()).eval()):
        for y in (x, x[:, :5]):
            torch.testing.assert_close(small(y), model(y))
            with torch.no_grad():
                torch.testing.assert_close(small(y), model(y))


class Spline(nn.Module):
    """A layer of a Kolmogorov-Arnold network: what is zero still lies between knots, and no layer has a bias."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.fan_out = fan_out
        self.register_buffer("knots", torch.linspace(-1, 1, 4))
        self.base = nn.Parameter(torch.randn(fan_out, fan_in) / 3)
        self.spline = nn.Parameter(torch.randn(fan_out, fan_in, 4) / 3)
        self.scale = nn.Parameter(torch.ones(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        bases = (1 - (x.unsqueeze(-1) - self.knots).abs()).relu()
        spline = (self.spline * self.scale.unsqueeze(-1)).view(self.fan_out, -1)
        return F.linear(F.silu(x), self.base) + F.linear(bases.view(x.shape[0], -1), spline)


def test_a_forward_written_anew_adds_the_constants_of_layers_without_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)

    def fresh() -> nn.Sequential:
        return nn.Sequential(Spline(5, 8), Spline(8, 3)).eval()

    model = dg.gate(fresh(), "hidden", example_inputs=x)
    with torch.no_grad():
        all_gates(model)[0].gamma[[1, 4, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert not exported.report.kept
    assert exported.report.rewritten == ["0", "1"]
    assert exported.model[1].spline.shape == (3, 5, 4)
    dg.save(exported, tmp_path)
    loaded, probe = dg.load(tmp_path, fresh()).eval(), torch.randn(7, 5)
    for small in (exported.model, loaded):
        torch.testing.assert_close(small(probe), model(probe))


class ReadTwice(nn.Module):
    """One layer reads two activations whose dead units leave other constants, so that its bias fits neither."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y.square()) + self.down(y.sigmoid()).square()


def test_a_layer_that_is_called_twice_gets_other_constants_each_time() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = dg.gate(ReadTwice().eval(), dg.Select(names="up.weight", axis=0))
    with torch.no_grad():
        all_gates(model)[0].gamma[[1, 4, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert exported.model.down.in_features == 5
    probe = torch.randn(7, 4)
    torch.testing.assert_close(exported.model(probe), model(probe))


class Repeated(nn.Module):
    """One block runs several times, as in ALBERT and RAFT; its dead units leave the same constants each time."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).sigmoid())

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = self.Block(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


def test_a_block_that_runs_several_times_takes_the_constants_that_it_meets_each_time_into_its_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = dg.gate(Repeated().eval(), dg.Select(names="block.up.weight", axis=0))
    with torch.no_grad():
        all_gates(model)[0].gamma[[1, 4, 5]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == []
    assert exported.model.block.down.in_features == 5
    probe = torch.randn(7, 4)
    torch.testing.assert_close(exported.model(probe), model(probe))


class RepeatedAttention(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.attention(self.norm(x))
        return self.head(x)


def test_a_block_that_runs_several_times_is_written_anew_once(tmp_path: Path) -> None:
    model, exported = without(RepeatedAttention(), "heads", [1])
    assert exported.report.rewritten == ["attention"]
    dg.save(exported, tmp_path)
    for small in (exported.model, dg.load(tmp_path, RepeatedAttention()).eval()):
        assert_equal(model, small)


class WithIdleHead(nn.Module):
    """A second head runs always; only a loss reads what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
        self.idle = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.up(x).relu()
        aside = self.idle(y)
        out = self.head(self.middle(y).relu())
        return out if target is None else F.mse_loss(out, target) + aside.square().mean()


def test_what_code_reads_that_the_graph_does_not_show_keeps_its_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = dg.gate(WithIdleHead().eval(), ["filters"], include=["up.*", "middle.*"])
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[[1, 4]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.middle.out_channels == 6
    assert exported.model.idle[0].in_channels == 8
    assert len(exported.plan.scatters["up"].stays) == 8
    assert exported.report.kept == []
    torch.testing.assert_close(exported.model(x), model(x))
    target = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(exported.model(x, target), model(x, target))


class Permuted(nn.Module):
    """Channels are put into another order, which a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("order", torch.tensor([3, 0, 7, 1, 2, -2, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[:, self.order].relu())


def test_a_vector_of_indices_is_renumbered() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = dg.gate(Permuted(), "hidden", example_inputs=x).eval()
    [gates] = all_gates(model)
    with torch.no_grad():
        gates.gamma[[0, 2, 3, 6]] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.first.weight.shape == (4, 4)
    assert exported.model.second.weight.shape == (2, 4)
    with torch.no_grad():
        assert torch.allclose(model(x), exported.model(x), atol=1e-6)
        kept = dg.export(model, x, latency=False, rewrite=False)
        assert len(kept.plan.scatters["first"].stays) == 8
        assert torch.allclose(model(x), kept.model(x), atol=1e-6)


class PooledAttention(nn.Module):
    """Attends to a pooled picture, of which it is told height and width; the head size follows from the width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.kv, self.pool, self.out = nn.Linear(12, 12), nn.Linear(12, 24), nn.AvgPool2d(2), nn.Linear(12, 12)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, tokens, channels = x.shape
        size = channels // self.heads
        q = self.q(x).reshape(batch, tokens, self.heads, size).transpose(1, 2)
        pooled = self.pool(x.transpose(1, 2).reshape(batch, channels, height, width)).flatten(2).transpose(1, 2)
        k, v = self.kv(pooled).reshape(batch, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * size**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, channels))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, 12, 2, 2), PooledAttention(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        height, width = x.shape[2:]
        flat = x.flatten(2).transpose(1, 2)
        return self.head((flat + self.mix(flat, height, width)).mean(1))


def test_sizes_that_a_module_is_told_stay_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = dg.gate(Pictures(), "heads", example_inputs=x).eval()
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.model.mix.out.in_features == 8
    dg.save(exported, tmp_path)
    loaded = dg.load(tmp_path, Pictures()).eval()
    with torch.no_grad():
        for size in ((16, 16), (8, 20), (12, 4)):
            x = torch.randn(1, 3, *size)
            assert torch.allclose(model(x), exported.model(x), atol=1e-6)
            assert torch.equal(loaded(x), exported.model(x))
    assert torch.allclose(torch.compile(exported.model, fullgraph=True, backend="eager")(x), exported.model(x))


def test_code_that_asks_for_whole_inputs_gets_them_and_reads_what_lives() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 4:
                raise ValueError("four features, please")
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = dg.gate(Checks(), "input_features", example_inputs=x).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1:3] = 0
    assert dg.export(model, x, latency=False).model.first.in_features == 2
    exported = dg.export(model, x, latency=False, rewrite=False)
    assert exported.plan.inputs == {}
    assert exported.plan.picks["first"].read == [0, 3]
    assert torch.allclose(exported.model(x), model(x), atol=1e-6)


class Cached(Attention):
    """Attention that takes the keys and values of earlier calls."""

    def forward(self, x: Tensor, past: Any = None) -> Any:  # type: ignore[override]
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width)), (k, v)


class Generates(nn.Module):
    """What is encoded is seen whole, and decoded step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.attention, self.head = Cached(), Cached(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.encoder(x)[0]
        return self.head(x + self.attention(x)[0])


class WithGenerate(Generates):
    def generate(self, x: Tensor, max_new_tokens: int, do_sample: bool) -> None:
        x = x + self.encoder(x)[0]
        _, past = self.attention(x)
        for _ in range(max_new_tokens - 1):
            _, past = self.attention(x[:, -1:], past)


@pytest.mark.parametrize("kind", [Generates, WithGenerate])
def test_what_generates_with_a_cache_still_does(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    model = dg.gate(kind(), "heads", example_inputs=x).eval()
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    assert set(exported.report.rewritten) == ({"encoder", "attention"} if kind is Generates else {"encoder"})
    if kind is WithGenerate:
        exported.model.generate(x, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("peeks", [False, True], ids=["exported", "recorded"])
def test_inputs_into_which_a_model_writes_stay_as_they_are(peeks: bool) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2).add_(1)
            if peeks and float(x.sum()) > 1e9:
                return x
            return self.second(self.first(x).relu())

        def generate(self, x: Tensor, max_new_tokens: int, do_sample: bool) -> Tensor:
            return x.zero_()

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    given = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks at values
        model = dg.gate(Writes(), "hidden", example_inputs=given).eval()
        with torch.no_grad():
            all_gates(model)[0].gamma[1:3] = 0
        dg.prune(model, ratio=0.3, scope="flops", example_inputs=given)
        exported = dg.export(model, given)
    assert torch.equal(given, x)
    assert exported.model.first.out_features == 6
    torch.testing.assert_close(exported.model(x.clone()), model(x.clone()))


class Windowed(nn.Module):
    """Attention within windows of an image whose height and width stay open, all in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.qkv, self.out = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 36), nn.Linear(12, 12)
        self.heads, self.side = 3, 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.side
        y = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, s * s, c)
        y = self.out(y).view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return (x + y).mean((1, 2))


def test_sizes_told_by_the_number_of_elements_are_written_anew() -> None:
    torch.manual_seed(0)
    model = dg.gate(Windowed(), "heads", example_inputs=torch.randn(2, 3, 16, 16)).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1] = 0
    exported = dg.export(model, torch.randn(2, 3, 16, 16), latency=False)
    assert exported.model.qkv.out_features == 24
    x = torch.randn(3, 3, 8, 24)
    torch.testing.assert_close(exported.model(x), model(x))


class Counted(Windowed):
    """Windows of images of one size, counted by ``int`` of a quotient; the attention is a module of its own."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(12, 36), nn.Linear(12, 12), 3

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.resolution = self.Attention(), (8, 8)

    def forward(self, x: Tensor) -> Tensor:
        (h, w), s = self.resolution, self.side
        x = self.start(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        assert n == h * w
        assert isinstance(n, int | torch.SymInt)
        y = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        y = self.attention(y)
        b = int(y.shape[0] / (h * w / s / s))
        y = y.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h * w, -1)
        return (x + y).mean(int("1"))


def test_a_batch_counted_by_a_quotient_stays_open() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = dg.gate(Counted(), dg.Select("heads"), example_inputs=x).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == ["attention"]
    assert exported.model.attention.qkv.out_features == 24
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported.model(x), model(x))


def test_integers_as_types_of_tensors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typed_network.py").write_text(
        """
import torch
from torch import nn


class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        ones = torch.ones(x.shape[0], 1, dtype=INTEGER)
        return self.down(self.up(x).relu().view(-1, 8)) * ones + int(2.5)
""".replace("INTEGER", "int")  # not in this file, which would be such a one
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("typed_network")
    x = torch.randn(3, 4)
    _, opened = capture_symbolic(module.Typed(), x)
    assert opened is not None
    assert "int" not in vars(module)


def test_a_trace_with_open_sizes_that_takes_too_long_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = dg.gate(Windowed(), "heads", example_inputs=x).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1] = 0
    monkeypatch.setattr(sys.modules[export_open.__module__], "PATIENCE", (0.0, 0.0))
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == []
    assert exported.report.frozen
    assert exported.plan.picks
    torch.testing.assert_close(exported.model(x), model(x))


@dataclass
class Outputs:
    """What a module returns as an object that torch looks into."""

    hidden: Tensor
    extra: Tensor | None = None


pytree.register_dataclass(Outputs)


class Stacked(nn.Module):
    """Layers whose dead branch can only be left out where an object is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(x + self.down(self.up(x).relu()))


class Framed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.head = Stacked(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x).hidden)


def test_modules_that_return_objects_are_written_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = dg.gate(Framed(), "blocks", example_inputs=x).eval()
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[:] = 0
        model.stack.down.bias.zero_()
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == ["stack"]
    assert list(exported.model.stack.parameters()) == []
    assert type(exported.model.stack(x)) is Outputs
    torch.testing.assert_close(exported.model(x), model(x))
    dg.save(exported, tmp_path)
    torch.testing.assert_close(dg.load(tmp_path, Framed())(x), model(x))
    plan = tmp_path / "plan.json"
    assert "Outputs" in plan.read_text()


def test_a_forward_written_anew_refuses_tensors_of_other_axes_in_words() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = dg.gate(Framed(), "blocks", example_inputs=x).eval()
    with torch.no_grad():
        for gates in all_gates(model):
            gates.gamma[:] = 0
    small = dg.export(model, x, latency=False).model
    for shape in ((6,), (2, 3, 6)):
        with pytest.raises(dg.ExportError, match="2 axes"):
            small(torch.randn(shape))


class Decoded(NamedTuple):
    image: Tensor
    code: Tensor


class Decoding(nn.Module):
    """A size that is written in the code, and outputs of several kinds."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind, self.up, self.conv = kind, nn.Linear(6, 32), nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.conv(self.up(x).view(-1, 8, 2, 2)), x)


@pytest.mark.parametrize(
    "kind", [Decoded, lambda image, code: OrderedDict(image=image, code=code)], ids=["pair", "dict"]
)
def test_modules_that_return_named_tuples_and_ordered_dicts_are_written_anew(
    kind: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = dg.gate(Decoding(kind), "channels", example_inputs=x).eval()
    kill_every_second(model)
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == [""]
    assert exported.model.up.out_features == 16
    dg.save(exported, tmp_path)
    y = torch.randn(5, 6)
    for small in (exported.model, dg.load(tmp_path, Decoding(kind))):
        assert type(small(y)) is type(model(y))
        torch.testing.assert_close(small(y), model(y))


def test_a_plan_that_names_a_class_that_is_not_there_is_refused() -> None:
    tree = {"record": ["os:system", {"dict": {}}]}
    with pytest.raises(dg.FileFormatError, match="no dataclass"):
        build_tree(tree, [])


class Masked(Attention):
    """Attention that hides later tokens behind the lowest number of its precision."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lowest_number_of_a_precision_follows_the_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=dtype)
    model = dg.gate(Masked().to(dtype), "heads", example_inputs=x).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == [""]
    longer = torch.randn(3, 7, 12, dtype=dtype)
    torch.testing.assert_close(exported.model(longer), model(longer))


class TakesMask(Attention):
    """Attention that is given a mask, or none where it masks nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **flags: Any) -> Tensor:  # type: ignore[override]
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class SkipsMask(nn.Module):
    """It makes a mask that masks nothing only where it cannot look at it, which is while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = TakesMask(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1], device=x.device) >= 0
        mask = mask[None, None, None].expand(x.shape[0], 1, x.shape[1], -1) if torch.compiler.is_compiling() else None
        return self.head(x + self.attention(x, mask, output_attentions=False))


def test_what_follows_from_sizes_alone_is_computed_where_it_is_read() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    model = dg.gate(SkipsMask(), "heads", example_inputs=x).eval()
    with torch.no_grad():
        all_gates(model)[0].gamma[1] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == ["attention"]
    other = torch.randn(3, 7, 12)
    torch.testing.assert_close(exported.model(other), model(other))
    y = torch.randn(2, 4, 12)
    for flag in (None, False):  # as others may call it
        torch.testing.assert_close(
            exported.model.attention(y, output_attentions=flag, use_cache=False), model.attention(y)
        )
    with pytest.raises(dg.ExportError, match="flags="):
        exported.model.attention(y, output_attentions=True)


class Depthwise(nn.Module):
    """Filters every channel alone, and norms them two by two, in as many groups as it is told or counts itself."""

    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        self.up, self.down, self.groups = nn.Conv1d(4, 8, 1, bias=False), nn.Conv1d(8, 3, 1), groups
        self.filter = nn.Parameter(torch.randn(8, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = F.conv1d(x, self.filter, groups=self.groups or x.shape[1])
        return self.down(F.group_norm(x, (self.groups or x.shape[1]) // 2))


class WrittenGroups(Depthwise):
    """The same, with numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.group_norm(F.conv1d(self.up(x), self.filter, groups=8), 4))


def test_groups_that_are_written_in_the_code_stay_or_are_written_anew() -> None:
    torch.manual_seed(0)
    model, x = WrittenGroups().eval(), torch.randn(2, 4, 9)
    dg.gate(model, dg.Select(names="up.weight", axis=0))
    [gates] = {t.gates for t in dg.gates.gated_tensors(model)}
    with torch.no_grad():
        gates.gamma[[0, 1, 4, 5]] = 0
    kept = dg.export(model, x, latency=False, rewrite=False)
    assert kept.model.filter.shape == (8, 1, 3)
    assert all("written in the code" in k.reason for k in kept.report.kept)
    exported = dg.export(model, x, latency=False)
    assert exported.report.rewritten == [""]
    assert exported.model.filter.shape == (4, 1, 3)
    for small in (kept.model, exported.model):
        with torch.no_grad():
            assert torch.allclose(model(x), small(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [None, 8])
def test_code_that_counts_its_groups_follows_and_other_code_keeps_them(groups: int | None) -> None:
    torch.manual_seed(0)
    model, x = Depthwise(groups).eval(), torch.randn(2, 4, 9)
    dg.gate(model, dg.Select(names="up.weight", axis=0) | dg.Select(names="filter", axis=0))
    for gates in {t.gates for t in dg.gates.gated_tensors(model)}:
        with torch.no_grad():
            gates.gamma[[0, 1, 4, 5]] = 0
    exported = dg.export(model, x, latency=False, rewrite=False)
    small = exported.model
    assert type(small) is Depthwise
    if groups is None:
        assert small.filter.shape == (4, 1, 3)
        assert small.down.in_channels == 4
    else:  # as a size that it remembers
        assert exported.plan.attributes == {"": {"groups": 4}}
    for size in (2, 5):
        probe = torch.randn(size, 4, 11)
        with torch.no_grad():
            assert torch.allclose(model(probe), small(probe), rtol=1e-5, atol=1e-6)


class Steep(nn.Module):
    """A residual block that does something else in training, in its own code and in a module without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.jump = nn.Conv2d(8, 8, 3, padding=1), Jump()

    def forward(self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        y = F.relu(self.conv(x)) * scale
        y = y if extra is None else y + extra["x"]
        return {"out": x + self.jump(y * 2 if self.training else y)}


class Jump(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1, 1, 1) if self.training else x


class Literal(nn.Module):
    """A classifier with a size in its code, and more methods than its forward."""

    p = 0.0

    def __init__(self, last: type[nn.Module] = Steep) -> None:
        super().__init__()
        self.stem, self.first, self.last = nn.Conv2d(1, 8, 3), Steep(), last()
        self.norm, self.head = nn.BatchNorm1d(288), nn.Linear(288, 3)

    def train(self, mode: bool = True) -> Literal:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.stem(x)), 2.0)["out"]
        x = self.last(x, extra={"x": x})["out"]
        return self.head(F.dropout(self.norm(x.view(-1, 288)), self.p, self.training))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


class TwiceLiteral(Steep):
    """A block with a size in its code too."""

    def forward(self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return super().forward(x.view(-1, 8, 6, 6), scale, extra=extra)


def literal(last: type[nn.Module] = Steep, p: float = 0.0) -> tuple[nn.Module, dg.Exported, Tensor]:
    torch.manual_seed(0)
    net, x = Literal(last).double(), torch.randn(4, 1, 8, 8, dtype=torch.double)
    net.p = p
    dg.gate(net, "channels", example_inputs=x)
    kill_every_second(net)
    return net, dg.export(net, x, latency=False), x


def test_a_forward_written_anew_calls_the_modules_in_it_which_keep_their_code(tmp_path: Path) -> None:
    net, out, x = literal()
    assert out.report.rewritten == [""]
    assert out.report.removed == out.report.pruning.dead
    loaded = dg.load(dg.save(out, tmp_path / "small"), Literal().double())
    for small in (out.model, loaded, pickle.loads(pickle.dumps(out.model)), copy.deepcopy(out.model)):
        assert type(small.first) is Steep
        outputs: list[Tensor] = []
        for mode, model in ((m, n) for m in (False, True) for n in (net, small)):
            torch.manual_seed(1)
            outputs.append(model.train(mode)(x))
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(outputs[3], outputs[2])
        assert not torch.allclose(outputs[2], outputs[0])


def test_a_forward_written_anew_keeps_the_class_its_methods_and_its_signature() -> None:
    net, out, x = literal()
    small: Any = out.model.eval()
    assert isinstance(small, Literal)
    assert "stands for Literal" in repr(small)
    assert torch.equal(small.predict(x), cast(Any, net.eval()).predict(x))
    assert not small.train().norm.training
    assert small.training
    assert [*inspect.signature(small.forward).parameters] == ["x"]


class Busy(Literal):
    """A classifier whose methods and attributes have the names that a module with a graph may want for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe, self._kind, self.stands_for, self.steps = "soup", "hot", "me", 3

    def _run(self, x: Tensor) -> Tensor:
        return self(x)

    def _compile(self) -> int:
        return self.steps

    def predict(self, x: Tensor) -> Tensor:
        return self._run(x).argmax(self._compile() - 2)


def test_a_forward_written_anew_hides_no_name_of_the_users() -> None:
    torch.manual_seed(0)
    net, x = Busy().double(), torch.randn(4, 1, 8, 8, dtype=torch.double)
    out = halved(net, "channels", x)
    assert out.report.rewritten == [""]
    for small in (out.model, pickle.loads(pickle.dumps(out.model)), copy.deepcopy(out.model)):
        busy = cast(Busy, small.eval())
        assert (busy.recipe, busy._kind, busy.stands_for) == ("soup", "hot", "me")
        assert torch.equal(busy.predict(x), cast(Busy, net.eval()).predict(x))


def test_dropout_that_a_forward_does_by_itself_follows_its_mode_when_written_anew() -> None:
    _, out, x = literal(p=0.5)
    small = out.model.eval()
    assert torch.equal(small(x), small(x))
    small.training = True
    assert not torch.equal(small(x), small(x))


def test_a_module_in_a_forward_written_anew_is_written_anew_too_where_it_cannot_follow(tmp_path: Path) -> None:
    _net, out, x = literal(TwiceLiteral)
    assert out.report.rewritten == ["", "last"]
    assert out.report.removed == out.report.pruning.dead
    assert type(out.model.get_submodule("first")) is Steep
    assert isinstance(out.model.get_submodule("last"), TwiceLiteral)
    loaded = dg.load(dg.save(out, tmp_path / "small"), Literal(TwiceLiteral).double())
    assert torch.equal(loaded.eval()(x[:2]), out.model.eval()(x[:2]))


class OtherTimes(TwiceLiteral):
    """A block that cannot be written anew by itself: it is called in two ways."""


class CallsTwice(Literal):
    def __init__(self) -> None:
        super().__init__(OtherTimes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.stem(x)))["out"]
        x = self.last(self.last(x, 0.5)["out"], extra={"x": x})["out"]
        return self.head(x.view(-1, 288))


def test_what_cannot_be_written_anew_by_itself_is_done_by_the_forward_around_it() -> None:
    torch.manual_seed(0)
    net, x = CallsTwice().double(), torch.randn(4, 1, 8, 8, dtype=torch.double)
    out = halved(net, "channels", x)
    assert out.report.rewritten == [""]
    assert out.report.removed == out.report.pruning.dead
    assert type(out.model.get_submodule("first")) is Steep


class DropsPath(Attention):
    """Stochastic depth beside an attention that cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.jump = Sometimes()

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        return x + self.jump(super().forward(x, causal=causal))


class Sometimes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1, 1) if self.training else x


def test_modules_that_do_nothing_in_eval_mode_stay_in_a_forward_written_anew() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(DropsPath(), nn.Linear(12, 2)), torch.randn(2, 5, 12)
    dg.gate(net, "heads", example_inputs=x)
    all_gates(net)[0].gamma.data[0] = 0
    out = dg.export(net, x, latency=False)
    assert out.report.rewritten == ["0"]
    for module in (net.train(), out.model.train()):
        cast(Any, module[0]).dropout.p = 0.0
    torch.manual_seed(1)
    expected = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out.model(x), expected)
    assert not torch.equal(out.model(x), expected)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Unlike(nn.Module):
    """A classifier with a size in its code, that does something else in training, or going back."""

    def __init__(self, how: str, *, embeds: bool) -> None:
        super().__init__()
        self.how, self.embeds = how, embeds
        self.table, self.mean = nn.Embedding(9, 8), nn.Buffer(torch.zeros(6))
        self.first, self.last = nn.Linear(8, 6), nn.Linear(12, 3)
        self.late = nn.Sequential(nn.Linear(3, 3), Rough(how))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.table(x) if self.embeds else x).relu()
        if self.how == "scale" and self.training:
            x = x * 2
        if self.how == "fails" and self.training:
            raise RuntimeError("no targets")
        if self.how == "counts" and self.training:
            self.mean += x.mean((0, 1))
        if self.how == "turns":
            x = Backward.apply(x)
        if self.how == "stops":
            with torch.no_grad():
                x = x * 1
        if self.how == "drops":
            x = F.dropout(x, 0.5, self.training)
        return self.late(self.last(x.reshape(-1, 12)))


class Rough(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.how == "inside" and self.training else x


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize(
    ("how", "untrained", "apart"),
    [
        *(("", [], False), ("inside", [], False), ("drops", [], False)),
        *(("scale", [""], False), ("fails", [""], False), ("counts", [""], False)),
        *(("turns", [], True), ("stops", [], True)),
    ],
)
def test_what_a_forward_written_anew_loses_of_training_is_told(
    how: str, untrained: list[str], apart: bool, embeds: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Unlike(how, embeds=embeds)
    x = torch.randint(9, (4, 2)) if embeds else torch.randn(4, 2, 8)
    dg.gate(net, "neurons", include="first.*")
    all_gates(net)[0].gamma.data[::2] = 0
    before = {n: t.clone() for n, t in net.state_dict().items()}
    asked = [p.requires_grad for p in net.parameters()]
    out = dg.export(net, x, latency=False)
    certificate = out.report.certificate
    assert out.report.rewritten == [""]
    assert certificate.untrained == untrained
    assert (certificate.gradient_error or 0.0) > 1e-3 if apart else certificate.gradient_error == pytest.approx(0)
    assert ("gradients differ" in str(out.report)) == apart
    assert ("in training than in eval mode" in str(out.report)) == bool(untrained)
    assert [p.requires_grad for p in net.parameters()] == asked
    assert all(p.requires_grad for p in out.model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    written = json.loads((Path(dg.save(out, tmp_path / "small")) / "plan.json").read_text())
    assert written["certificate"]["untrained"] == untrained


class DropsScores(nn.Module):
    """Attention that drops scores in training, as torch's operation does it, behind a table."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.table = heads, nn.Embedding(9, 12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), dropout_p=0.5 if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("groups", ["heads", "embedding_dims"])
def test_attention_written_anew_drops_in_training_what_it_dropped(groups: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(DropsScores(), nn.Linear(12, 3)), torch.randint(9, (2, 5))
    dg.gate(net, groups, example_inputs=x)
    all_gates(net)[0].gamma.data[0] = 0
    out = dg.export(net, x, latency=False)
    assert out.report.rewritten == ["0"]
    assert out.report.removed
    assert out.report.certificate.untrained == []
    assert out.report.certificate.gradient_error == pytest.approx(0, abs=1e-12)
    small = out.model.train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


class Keyworded(nn.Module):
    """Its parts have names that code cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"class": nn.Linear(3, 8), "classes": nn.Linear(16, 4), "a b": nn.Linear(4, 4)})
        self.scales = nn.ParameterDict({"lambda": torch.ones(4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["classes"](self.parts["class"](x).relu().view(-1, 16)) * self.scales["lambda"]
        return self.parts["a b"](x)


def test_names_that_code_cannot_say_are_no_obstacle() -> None:
    torch.manual_seed(0)
    net, x = Keyworded(), torch.randn(4, 2, 3)
    dg.gate(net, "neurons", include="parts.class.*")
    all_gates(net)[0].gamma.data[::2] = 0
    out = dg.export(net, x, latency=False)
    assert out.report.rewritten == [""]
    assert out.report.removed == 4


class Decoder(nn.Module):
    """A loop over frames, the last of which is not fed, with a state of a size that is written in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(4, 8), nn.LSTMCell(8, 12), nn.Linear(12, 4)
        self.size = 12

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1)
        h = c = x.new_zeros(x.shape[1], self._size())
        frames: list[Tensor] = []
        for i in range(len(x) - 1):
            h, c = self.cell(self.first(x[i]).relu(), (h, c))
            frames.append(self.last(h))
        return torch.stack(frames)

    def _size(self) -> int:
        return self.size


class Written(Decoder):
    def _size(self) -> int:
        return 12


@pytest.mark.parametrize(("kind", "removed"), [(Decoder, 10), (Written, 4)])
def test_a_loop_over_frames_of_which_one_is_not_fed_is_cut(kind: type[nn.Module], removed: int) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(2, 4, 6)
    report = halved(net, "channels", x).report
    assert report.pruning.dead == 10
    assert report.removed == removed
    assert not report.inputs


class Spaced(RemembersHeads):
    """Attention over a grid of as many steps as there are tokens, and as many as there are channels."""

    def forward(self, x: Tensor, *, causal: bool = True) -> Tensor:
        along = torch.linspace(0, 1, x.shape[1], device=x.device)
        across = torch.linspace(-1.0, 1.0, steps=12, dtype=x.dtype)
        split = self.qkv(x * along[:, None] + across).view(*x.shape[:2], 3, 3, 12 // 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*split.unbind(0), is_causal=causal).transpose(1, 2).reshape(*x.shape[:2], 12)
        return self.out(y)


def test_steps_between_two_numbers_stay_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 12), Spaced(), nn.Linear(12, 3)).double(), torch.randn(2, 5, 4).double()
    dg.gate(net, "heads", example_inputs=x)
    all_gates(net)[0].gamma.data[1] = 0
    out = dg.export(net, x, latency=False)
    assert out.report.removed == out.report.pruning.dead
    fresh = nn.Sequential(nn.Linear(4, 12), Spaced(), nn.Linear(12, 3)).double()
    loaded = dg.load(dg.save(out, tmp_path / "small"), fresh)
    longer = torch.randn(3, 11, 4).double()
    torch.testing.assert_close(loaded.eval()(longer), net.eval()(longer))


class ReadsInTraining(nn.Module):
    """Reads what it is given in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.mix(x * keep if self.training else x).tanh()


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ReadsInTraining(), ReadsInTraining()
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.last(self.narrow(self.wide(self.first(x, a)).view(-1, 24).relu()), b)


@pytest.mark.parametrize("inside", [False, True])
def test_modules_are_given_what_they_were_given_among_arguments_that_are_alike(inside: bool) -> None:
    torch.manual_seed(0)
    net: nn.Module = Around(HandsOn()) if inside else HandsOn()
    x, ones = torch.randn(4, 12), torch.ones(4, 1)
    dg.gate(net, "hidden", example_inputs=(x, ones, ones.clone()))
    kill_every_second(net)
    out = dg.export(net, (x, ones, ones.clone()), latency=False)
    assert out.report.rewritten == (["inner"] if inside else [""])
    given = torch.randn(4, 12), torch.rand(4, 1), torch.rand(4, 1)
    torch.testing.assert_close(out.model.train()(*given), net.train()(*given))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.inner(x, a, b)


REGISTRY: dict[str, type[nn.Module]] = {}


class Registered(nn.Module):
    """Notes the classes that are derived from it."""

    def __init_subclass__(cls) -> None:
        REGISTRY["last"] = cls


class Noted(Registered, Literal):
    pass


def test_registries_of_classes_do_not_hold_those_of_forwards_written_anew() -> None:
    torch.manual_seed(0)
    net, x = Noted(), torch.randn(4, 1, 8, 8)
    out = halved(net, "channels", x)
    assert isinstance(out.model, Noted)
    assert {"last": Noted} == REGISTRY


class Spiking(nn.Module):
    """Remembers what it was given, until code around it resets that."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.seen, self.gain = torch.zeros(()), list[Tensor](), 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.level = self.gain * self.level + x
        self.seen.append(x)
        return torch.stack(self.seen).sum(0) + self.level


class Resets(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.wide, self.narrow, self.spike = nn.Linear(12, 24), nn.Linear(24, 12), Spiking()
        self.nothing = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.wide(x).view(-1, 24).relu())
        if self.how == "resets":
            self.spike.level, self.spike.seen = torch.zeros(()), []
        else:  # each of which stays what it was
            self.spike.gain = 0.25
            self.spike.level = self.nothing
            self.spike.seen.clear()
        return self.spike(x)


@pytest.mark.parametrize("how", ["resets", "sets"])
def test_what_a_forward_resets_in_a_module_before_it_calls_it_is_reset_when_written_anew(
    how: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 12), Resets(how), nn.Linear(12, 2)), torch.randn(4, 5)
    net(x)
    out = halved(net, "hidden", x)
    assert out.report.rewritten == ["1"]
    fresh = nn.Sequential(nn.Linear(5, 12), Resets(how), nn.Linear(12, 2))
    loaded = dg.load(dg.save(out, tmp_path / "small"), fresh)
    for _ in range(2):
        for given in (x, torch.randn(3, 5)):
            expected = net.eval()(given)
            torch.testing.assert_close(out.model.eval()(given), expected)
            torch.testing.assert_close(loaded.eval()(given), expected)


class SharesJump(nn.Module):
    """Layers of a decoder of learned queries, which share what they do in training."""

    def __init__(self) -> None:
        super().__init__()
        self.jump = Sometimes()
        self.layers = nn.ModuleList(Queries(self.jump) for _ in range(2))
        self.queries, self.embed = nn.Parameter(torch.randn(1, 5, 12)), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        queries, x = self.queries.expand(x.shape[0], -1, -1), self.embed(x)
        for layer in self.layers:
            queries = layer(queries, x)
        return queries


class Queries(nn.Module):
    def __init__(self, jump: nn.Module) -> None:
        super().__init__()
        self.jump, self.own = jump, Attention()
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        q = q + self.jump(self.own(q, causal=False).tanh())  # of the queries alone, in the first layer
        q = q + self.jump((q @ x.transpose(1, 2)).softmax(-1) @ x)
        return q + self.jump(self.narrow(self.wide(q).view(-1, 5, 24).relu()))


def test_modules_that_are_shared_or_given_parameters_alone_are_called_in_training() -> None:
    torch.manual_seed(0)
    net, x = SharesJump(), torch.randn(4, 7, 6)
    out = halved(net, "hidden", x)
    assert out.report.rewritten == ["layers.0", "layers.1"]
    outputs: list[Tensor] = []
    for model in (net, out.model):
        for module in model.train().modules():
            module.training = not isinstance(module, nn.Dropout)
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(out.model.eval()(x), outputs[0])


class Freezes(Literal):
    """Keeps a part of it from training, in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.first.eval()
        return super().forward(x)


class StopsInTraining(Literal):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.stem(x)), 2.0)["out"]
        return self.head(self.norm((x.detach() if self.training else x).view(-1, 288)))


def test_parts_that_a_forward_keeps_from_training_and_stops_in_training_are_told() -> None:
    for kind, untrained in ((Freezes, [""]), (StopsInTraining, [])):
        torch.manual_seed(0)
        net, x = kind(Still).double(), torch.randn(4, 1, 8, 8, dtype=torch.double)
        net.first = Still()
        dg.gate(net.double(), "channels", example_inputs=x)
        kill_every_second(net)
        certificate = dg.export(net, x, latency=False).report.certificate
        assert certificate.untrained == untrained
        assert (certificate.gradient_error or 0.0) > 1e-3 if kind is StopsInTraining else True


class Still(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0, **_: Any) -> dict[str, Tensor]:
        return {"out": x + F.relu(self.conv(x)) * scale}


class Twins(nn.Module):
    """Takes, and gives, tensors that are alike in the example: before and after what training, or a mask, changes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.wide, self.narrow, self.jump = nn.Linear(12, 24), nn.Linear(24, 12), Leaps()

    def forward(self, x: Tensor, skip: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = self.narrow(self.wide(x).view(-1, 24).relu()) + skip
        return h, h * mask if self.how == "mask" else self.jump(h)


class Leaps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1) if self.training else x


class GivesTwins(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.twins, self.jump = nn.Linear(5, 12), Twins(how), Leaps()

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        before, after = self.twins(self.jump(h), h, mask)
        return {"before": before, "after": after}


@pytest.mark.parametrize("how", ["mask", "training"])
def test_tensors_that_are_alike_in_the_example_are_told_apart(how: str) -> None:
    torch.manual_seed(0)
    net, given = GivesTwins(how), (torch.randn(4, 5), torch.ones(4, 1))
    out = halved(net, "hidden", given)
    assert out.report.removed == out.report.pruning.dead
    outputs: list[dict[str, Tensor]] = []
    for model in (net, out.model):
        torch.manual_seed(1)
        outputs.append(model.train()(given[0], torch.rand(4, 1, generator=torch.Generator().manual_seed(0))))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0]["before"], outputs[0]["after"])


class Measured(nn.Module):
    """Gives the sizes of what it gives, as embeddings of images do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.mix(x)
        y = self.last(x.flatten(2).transpose(1, 2).reshape(-1, 16).relu())
        return y.view(x.shape[0], -1, 8), x.shape[2], x.shape[3]


class Measures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.aux = Measured(), nn.Linear(8, 2), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, height, width = self.embed(x)
        if self.training:
            return self.aux(y.transpose(1, 2).reshape(-1, 8, height, width))
        return self.head(y.mean(1))


def test_a_forward_written_anew_gives_no_number_that_other_sizes_change() -> None:
    torch.manual_seed(0)
    net, x = Measures(), torch.randn(2, 3, 8, 8)
    out = halved(net, "hidden", x)
    assert "embed" not in out.report.rewritten
    larger = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(out.model.eval()(larger), net.eval()(larger))
    told = out.report.certificate.untrained
    assert told == [""] or out.model.train()(larger).shape == net.train()(larger).shape


class BackToShape(nn.Module):
    """Has a size in its code, and gives its result the shape of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).view(-1, 24).relu()).view(x.shape)


def test_what_code_takes_the_shape_of_keeps_its_size_where_nothing_can_be_written_anew() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 12), BackToShape(), nn.Linear(12, 8), nn.Linear(8, 2)), torch.randn(4, 5)
    dg.gate(net, "hidden", example_inputs=x)
    kill_every_second(net)
    out = dg.export(net, x, latency=False, rewrite=False)
    assert out.report.frozen == ["1"]
    assert {*out.plan.scatters} == {"0", "1.wide", "1.narrow"}
    assert out.report.removed == 28
    torch.testing.assert_close(out.model(x), net(x))


class Backcasts(nn.Module):
    """Blocks of N-BEATS: what the last one takes away from its input nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 12)]) for _ in range(2))
        self.forecast, self.jump = nn.Linear(12, 3), Leaps()

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 3)
        for wide, narrow in self.blocks:
            h = narrow(wide(x).view(-1, 24).relu())
            total = total + self.forecast(h)
            x = x - self.jump(h)
        return total


def test_modules_of_which_nobody_reads_the_last_result_are_called_in_training() -> None:
    torch.manual_seed(0)
    net, x = Backcasts(), torch.randn(4, 12)
    dg.gate(net, "neurons", include="blocks.*.0.*")
    kill_every_second(net)
    out = dg.export(net, x, latency=False)
    assert out.report.rewritten == [""]
    steps = [step[2] for step in out.plan.recipes[""].steps if step[1] == "call_module"]
    assert steps.count("jump") == 1
    torch.manual_seed(1)
    expected = net.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out.model.train()(x), expected)


class FirstToken(nn.Module):
    """Attention whose heads are merged with the batch, and which takes the first token apart by a plain colon."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = (self.q(x), *self.kv(x).chunk(2, -1))
        q, k, v = (t.reshape(batch, tokens, 3, 4).transpose(1, 2).reshape(batch * 3, tokens, 4) for t in heads)
        q = torch.cat([q[:, :1], q[:, 1:] * 2], 1)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out(y.reshape(batch, 3, tokens, 4).transpose(1, 2).reshape(batch, tokens, width))


class Halves(nn.Module):
    """A gated unit that cuts its input into two by plain colons."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x)
        return self.out(x[:, :, :8] * torch.sigmoid(x[:, :, 8:]))


class Flagged(nn.Module):
    """Branches on a tensor, so that it is traced for the example's sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.flag, self.halves = torch.tensor([True]), Halves()

    def forward(self, x: Tensor) -> Tensor:
        return self.halves(x) if self.flag[0] else x


def test_plain_colons_over_open_axes_are_no_obstacle_to_writing_anew() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 12), FirstToken(), nn.Linear(12, 3)), torch.randn(2, 5, 5)
    out = halved(net, "heads", x)
    assert (out.report.rewritten, out.report.kept) == (["1"], [])
    longer = torch.randn(3, 8, 5)
    torch.testing.assert_close(out.model(longer), net(longer))


@pytest.mark.filterwarnings("ignore::dgate_wrap.errors.TraceWarning")
def test_plain_colons_are_none_in_a_module_that_is_traced_alone() -> None:
    torch.manual_seed(0)
    net, x = Flagged(), torch.randn(2, 4, 6)
    out = halved(net, "hidden", x)
    assert (out.report.rewritten, out.report.kept) == (["halves"], [])
    torch.testing.assert_close(out.model(x[:1]), net(x[:1]))


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class WithGraph(nn.Module):
    """A module that torch.fx made, whose forward is of no file."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tail = nn.Linear(8, 32), torch.fx.symbolic_trace(Tail())

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.first(x).relu().view(-1, 2, 16).unbind(1)
        return self.tail(u * v)


def test_forwards_around_graphs_of_fx_are_written_anew() -> None:
    torch.manual_seed(0)
    model = WithGraph()
    small = halved(model, "hidden", torch.randn(3, 8)).model
    x = torch.randn(4, 8)
    assert small.first.weight.shape[0] < 32
    torch.testing.assert_close(small(x), model(x))


class Mixture(nn.Module):
    """Experts in tensors of three dimensions, all computed and weighed by a softmax, or by the largest of it."""

    def __init__(self, chosen: bool) -> None:
        super().__init__()
        self.router = nn.Linear(12, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 20, 12)), nn.Parameter(torch.randn(4, 12, 20))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        if self.chosen:
            best, index = weights.topk(2)
            weights = torch.zeros_like(weights).scatter(1, index, best)
        h = torch.einsum("td,efd->tef", x, self.up).relu()
        return x + (torch.einsum("tef,edf->ted", h, self.down) * weights[..., None]).sum(1)


@pytest.mark.parametrize("chosen", [True, False])
def test_dead_experts_go_where_the_router_has_to_stay(chosen: bool) -> None:
    torch.manual_seed(0)
    model, x = Mixture(chosen), torch.randn(6, 12)
    gated = dg.gate(model, "experts", example_inputs=x)
    with torch.no_grad():
        dg.gates.gated_tensors(gated)[0].gates.gamma[:2] = 0
    exported = dg.export(gated.eval(), x, latency=False)
    shapes = {n: tuple(p.shape) for n, p in exported.model.named_parameters()}
    assert shapes == {"up": (2, 20, 12), "down": (2, 12, 20), "router.weight": (4, 12), "router.bias": (4,)}
    assert exported.report.removed == 2
    more = torch.randn(9, 12)
    torch.testing.assert_close(exported.model(more), gated(more))


def test_constants_that_are_lost_on_the_meta_device_are_not_read() -> None:
    torch.manual_seed(0)
    gated, x = dg.gate(Mixture(False), "experts", example_inputs=torch.randn(6, 12)), torch.randn(6, 12)
    with torch.no_grad():
        dg.gates.gated_tensors(gated)[0].gates.gamma[1] = 0
    small = dg.export(gated.eval(), x, latency=False).model
    empty = copy.deepcopy(small).to("meta")
    assert empty(x.to("meta")).shape == x.shape
    empty.load_state_dict(small.state_dict(), assign=True)
    with pytest.raises(dg.ExportError, match="lost its constants"):
        empty(x)
