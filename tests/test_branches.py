"""Residual blocks, and the weights nearest to a value: zeroing a block does what leaving it out does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skips import SMALL, Branched, check_skips, from_config, ids, labels_of, output, randomized, run_without, without
from torch import Tensor, nn

import dgate_wrap as dg
from dgate_wrap.groupings import groupings
from dgate_wrap.tracing import capture
from dgate_wrap.tracing.branches import last_projections
from dgate_wrap.tracing.flow import Flow


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.Conv2d(outside, outside, 3, 1, 1)
        self.n1, self.n2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def branch(self, x: Tensor) -> Tensor:
        return self.n2(self.b(self.n1(self.a(x)).relu()))


class ResNet(Branched):
    """BatchNorm ends each branch; the second block has a linear shortcut."""

    branches = 2

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BasicBlock(3, 3, 1), BasicBlock(3, 6, 2)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            skip = x if block.down is None else block.down(x)
            x = (self.keep(i, block.branch(x)) + skip).relu()
        return self.head(x.mean((2, 3)))


class Gated(Branched):
    """Squeeze-excite, a concatenation, a gate and functions with f(0) = 0 after the last weights; scales."""

    branches = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.squeeze = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.left, self.right = nn.Conv1d(4, 1, 1), nn.Conv1d(4, 3, 1, bias=False)
        self.wide = nn.Conv1d(4, 8, 1)
        self.gamma, self.inner = nn.Parameter(torch.ones(4, 1)), nn.Conv1d(4, 4, 1)
        self.alpha, self.depth = nn.Parameter(torch.zeros(1)), nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.bias, self.matrix = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        x = x + self.keep(0, y * self.squeeze(y.mean(2)).sigmoid()[:, :, None])
        x = x + self.keep(1, torch.cat([self.left(x).relu(), F.gelu(self.right(x))], 1))
        x = x + self.keep(2, F.glu(self.wide(x), 1))
        x = self.keep(3, self.gamma * self.inner(x).sigmoid()) + x
        x = x + self.keep(4, F.dropout(self.alpha * self.depth(x).relu(), 0.5, self.training))
        return x - self.keep(5, (self.matrix @ x.tanh() + self.bias).clamp(-50, 50) / 2)


class Transformer(Branched):
    """One layer with attention and feed-forward side by side, then one after the other; no final projection once."""

    branches = 5

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(8, 8, bias=i > 0) for i in range(2))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.fused, self.last = nn.Linear(8, 32), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def attend(self, i: int, x: Tensor, *, explicit: bool) -> Tensor:
        q, k, v = self.qkv[i](x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT).softmax(-1) @ v if explicit else F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        attention, mlp = self.out[0](self.attend(0, y, explicit=True)), self.down(F.gelu(self.up(y)))
        x = x + (self.keep(0, attention) + self.keep(1, mlp))
        x = x + self.keep(2, self.out[1](self.attend(1, self.norms[1](x), explicit=False)))
        x = x + self.keep(3, self.attend(2, self.norms[2](x), explicit=True))
        a, b = self.fused(self.norms[3](x)).chunk(2, -1)
        return self.head(x + self.keep(4, self.last(F.silu(a) * b)))


class Rescaled(Branched):
    """Skips that a parameter scales, of all channels or of each; beside a state space, such a skip is no skip."""

    branches = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.steps, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)
        self.norm, self.whole, self.each = nn.LayerNorm(4), nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))

    def scan(self, x: Tensor) -> Tensor:
        read, write = self.steps(x).chunk(2, -1)
        state, out = torch.zeros(4, dtype=x.dtype), []
        for i in range(len(x)):
            state = state * 0.5 + write[i] * x[i]
            out.append(state * read[i])
        return torch.stack(out) + x * self.each

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.whole + self.keep(0, self.a(self.norm(x).relu()))
        x = x * self.each + self.keep(1, self.b(x.tanh()))
        return x + self.keep(2, self.out(self.scan(x)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(ResNet, (2, 3, 8, 8)), (Gated, (2, 4, 6)), (Transformer, (2, 5, 8)), (Rescaled, (3, 4))],
    ids=str,
)
def test_zeroing_a_block_leaves_the_skip(model: type[Branched], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check_skips("blocks", model(), torch.randn(shape).double())


def test_a_block_is_its_weights_nearest_to_the_addition() -> None:
    labels = labels_of("blocks", randomized(Gated()), torch.randn(2, 4, 6).double())
    by_group = {g: {n for n, t in labels.items() if bool((t == g).any())} for g in ids(labels)}
    assert sorted(map(sorted, by_group.values())) == [
        ["alpha"],
        ["bias", "matrix"],
        ["gamma"],
        ["left.bias", "left.weight", "right.weight"],
        ["norm.bias", "norm.weight"],
        ["wide.bias", "wide.weight"],
    ]
    assert (labels["wide.bias"] >= 0).tolist() == [True] * 4 + [False] * 4  # what is multiplied, not its gate


class Looped(nn.Module):
    """One layer used several times, and once more outside, where asked."""

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.outside = nn.Linear(4, 4), nn.LayerNorm(4), outside

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(self.norm(x).tanh())
        return self.layer(x.tanh()) if self.outside else x.tanh()


def test_uses_of_a_shared_layer_are_one_block_unless_it_serves_elsewhere_too() -> None:
    x = torch.randn(2, 4).double()
    model = randomized(Looped(outside=False))
    labels = labels_of("blocks", model, x)
    assert {n: t.tolist() for n, t in labels.items()} == {"layer.weight": 0, "layer.bias": 0}
    assert torch.equal(output(model, without(model, labels, 0), x), x.tanh())
    with pytest.raises(dg.GroupingError, match="also used elsewhere"):
        labels_of("blocks", randomized(Looped(outside=True)), x)


class Dense(nn.Module):
    """Concatenation instead of addition, and sums that are no residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(12, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x).relu()], 1)
        y = self.c(torch.cat([y, self.b(y).relu()], 1))
        y = self.scale * (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-5).sqrt() + self.shift
        return y * 0.5 * (1 + torch.tanh(0.8 * (y + 0.04 * y**3)))


class Escaping(nn.Module):
    """The branch is also returned by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x.relu())
        return x + y, y


class Unzeroable(nn.Module):
    """What ends the branch is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).sigmoid()


class Recurrent(nn.Module):
    """A recurrent cell: its sums are no residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(3):
            h = torch.tanh(self.w(x[:, t]) + self.u(h))
        return h


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (Dense, (2, 4), "none has its form"),
        (Escaping, (2, 4), "used elsewhere than in the addition"),
        (Unzeroable, (2, 4), r"aten.sigmoid of zero is not zero \(test_branches.py:\d+ in forward\)"),
        (Recurrent, (2, 3, 3), "none has its form"),
    ],
)
def test_what_is_no_block_is_refused_with_its_reason(model: type[nn.Module], shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(dg.GroupingError, match=why) as e:
        labels_of("blocks", randomized(model()), torch.randn(shape).double())
    assert "dg.explain" in e.value.mend


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}
TRANSFORMERS: list[tuple[str, dict[str, Any], int]] = [
    ("BertModel", SMALL, 4),
    ("AlbertModel", {**SMALL, "embedding_size": 8}, 2),
    ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1, "use_cache": False}, 4),
    ("Gemma2ForCausalLM", {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False}, 4),
    ("GPTJModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "vocab_size": 40, "use_cache": False}, 4),
    ("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, 4),
    ("ViTModel", {**SMALL, "image_size": 16, "patch_size": 8}, 4),
    ("ResNetModel", RESNET, 3),
    ("MambaModel", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "use_cache": False}, 2),
]


@pytest.mark.parametrize(("name", "config", "count"), TRANSFORMERS, ids=lambda v: v if isinstance(v, str) else "")
def test_blocks_of_transformers(name: str, config: dict[str, Any], count: int) -> None:
    model, kwargs = from_config(name, config)
    trace = capture(model, (), kwargs)
    labels = dict(groupings()["blocks"].function(model, trace))
    assert len(ids(labels)) == count
    whole = trace.run()
    outputs = trace.nodes[-1].all_input_nodes
    additions = [n for n in trace.nodes if str(n.target).startswith("aten.add.") and len(n.all_input_nodes) == 2]
    for group in ids(labels):
        values = run_without(trace, labels, group)
        dead = [n for a in additions for n in a.all_input_nodes if whole[n].any() and not values[n].any()]
        assert dead
        assert any(not torch.equal(values[n], whole[n]) for n in outputs)


class Values(nn.Module):
    """Values, with the parameters that make them zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 6), nn.Linear(4, 6), nn.LayerNorm(6)
        self.table, self.experts = nn.Embedding(5, 6), nn.Parameter(torch.randn(3, 4, 6))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))

    def forward(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        left, right = self.a(x).chunk(2, -1)
        return {
            "left": left * right.sigmoid(),
            "norm": F.leaky_relu(self.norm(self.b(x))),
            "both": torch.stack([self.b(x).sum(-1), right[:, 0]]),
            "table": self.table(tokens).mean(1) / 3,
            "experts": torch.einsum("bi,eio->beo", x, self.experts),
            "weighted": F.pad(self.weighted(x), (1, 1)),
            "pooled": F.max_pool1d(self.b(x)[:, None], 2),
            "nothing": x * 2,
            "shifted": self.b(x) + 1,
            "padded": F.pad(self.b(x), (1, 1), value=1.0),
        }


ZEROED = {
    "left": {"a.weight": 12, "a.bias": 3},
    "norm": {"norm.weight": 6, "norm.bias": 6},
    "both": {"b.weight": 24, "b.bias": 6, "a.weight": 4, "a.bias": 1},
    "table": {"table.weight": 30},
    "experts": {"experts": 72},
    "weighted": {"weighted.parametrizations.weight.original0": 6, "weighted.bias": 6},
    "pooled": {"b.weight": 24, "b.bias": 6},
    "nothing": {},
    "shifted": {},
    "padded": {},
}


def test_last_projections_make_a_value_exactly_zero() -> None:
    model = randomized(Values())
    trace = capture(model, (torch.randn(2, 4).double(), torch.randint(0, 5, (2, 3))))
    flow = Flow(trace)
    nodes = dict(zip(ZEROED, trace.nodes[-1].all_input_nodes, strict=True))
    shapes = {s.name: s.value.shape for s in trace.sources.values() if s.kind == "parameter"}
    whole = trace.run()
    for what, expected in ZEROED.items():
        found = last_projections(flow, nodes[what])
        counts = {n: int((t >= 0).broadcast_to(shapes[n]).sum()) for n, t in found.labels.items()}
        assert counts == expected, what
        assert bool(found.reason) == (not expected)
        if expected:
            assert not run_without(trace, found.labels, 0)[nodes[what]].any()
        assert whole[nodes[what]].any()


def test_last_projections_of_labelled_parts() -> None:
    model = randomized(Values())
    trace = capture(model, (torch.randn(2, 4).double(), torch.randint(0, 5, (2, 3))))
    nodes = dict(zip(ZEROED, trace.nodes[-1].all_input_nodes, strict=True))
    for what, axis in (("left", 1), ("norm", 1), ("both", 0), ("experts", 1), ("experts", 2), ("weighted", 1)):
        shape = nodes[what].meta["val"].shape
        labels = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
        found = last_projections(trace, nodes[what], labels)
        assert not found.reason, what
        for label in range(shape[axis]):
            value = run_without(trace, found.labels, label)[nodes[what]]
            padded = what == "weighted" and label in (0, shape[axis] - 1)
            assert not value.select(axis, label).any()
            assert padded or value.any()
    over_batch = torch.arange(2)[:, None].expand(2, 3)
    found = last_projections(trace, nodes["left"], over_batch)
    assert found.conflict
    assert "several groups" in found.reason


def test_gating_by_name() -> None:
    torch.manual_seed(0)
    model, x = randomized(Transformer()), torch.randn(2, 5, 8).double()
    before = output(model, {}, x)
    dg.gate(model, "blocks", example_inputs=x)
    assert torch.equal(model(x), before)
    assert len(dg.groups(model)) == Transformer.branches


def test_meta_models() -> None:
    with torch.device("meta"):
        model = ResNet().eval()
        x = torch.empty(2, 3, 8, 8)
    trace = capture(model, (x,))
    assert len(ids(dict(groupings()["blocks"].function(model, trace)))) == ResNet.branches
