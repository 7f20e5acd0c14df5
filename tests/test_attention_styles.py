"""Attention as people write it: what belongs to a head goes with it, wherever it is made and whoever shares it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import randomize
from oracles import kill_every_second
from torch import Tensor, nn

import dgate_wrap as dg

WIDTH, HEADS, SIZE = 12, 3, 4


class TimeFirst(nn.Module):
    """Of shape (time, batch, width), with batch and heads merged and the time left to be told (fairseq)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        time, batch, width = x.shape
        assert width == WIDTH
        q = self.query(x).view(time, batch * HEADS, SIZE).transpose(0, 1)
        k, v = (t.contiguous().view(-1, batch * HEADS, SIZE).transpose(0, 1) for t in (self.key(x), self.value(x)))
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            scores = bias.baddbmm(q, k.transpose(1, 2), alpha=0.5)
        return self.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(time, batch, width))


class Scored(TimeFirst):
    """Adds to its scores, per head, what it is given: a bias and a mask in one, as large as the scores (T5)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is not None
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, -1, HEADS, SIZE).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3) + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))


class Copying(TimeFirst):
    """Copies what it is given per head before one operation does the rest (UDOP)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is not None
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, -1, HEADS, SIZE).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous())
        return self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Relative(TimeFirst):
    """Adds scores of its own for distances, as a mask of torch's attention (conformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.distance, self.start = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(torch.zeros(HEADS, SIZE))
        self.heads = HEADS

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, -1, SIZE).transpose(1, 2) for f in (self.query, self.key, self.value))
        at = torch.arange(tokens, dtype=x.dtype).view(1, -1, 1).expand(1, -1, WIDTH)
        distances = self.distance((at / 3).sin()).view(1, tokens, -1, SIZE).permute(0, 2, 3, 1)
        bias = (q + self.start[:, None]) @ distances
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(x[:, None, :, :1] > 9, -1e4))
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Masked(TimeFirst):
    """Cuts its mask to the tokens that there are (nanoGPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril())
        self.heads = HEADS

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        sizes = batch, tokens, self.heads, width // self.heads
        q, k, v = (f(x).view(sizes).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = (q @ k.transpose(2, 3)).masked_fill(~self.mask[:tokens, :tokens], -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Stack(nn.Module):
    """Two layers of one attention, called through a slice of their list, which has a second name."""

    def __init__(self, attention: type[TimeFirst]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([attention(), attention()])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.first, self.head = self.layers[0], nn.Linear(WIDTH, 2)

    def bias(self, x: Tensor) -> Tensor | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(x)
        for layer, norm in zip(self.layers[:2], self.norms, strict=True):
            x = x + layer(norm(x), bias)
        return self.head(x)


class Slopes(Stack):
    """ALiBi: distances, at a slope of its own for each head, once for all layers; batch and heads are merged."""

    def bias(self, x: Tensor) -> Tensor | None:
        slopes = torch.pow(0.5, torch.arange(1, HEADS + 1)).to(x.dtype)
        distances = torch.arange(x.shape[0]).expand(x.shape[1], 1, -1)
        return (slopes[:, None] * distances).view(x.shape[1] * HEADS, 1, x.shape[0])


class Table(Stack):
    """A table of one bias per head and distance, with a mask, once for all layers."""

    def __init__(self, attention: type[TimeFirst]) -> None:
        super().__init__(attention)
        self.table = nn.Embedding(9, HEADS)

    def bias(self, x: Tensor) -> Tensor | None:
        at = torch.arange(x.shape[1])
        found = self.table((at[:, None] - at).clamp(-4, 4) + 4).permute(2, 0, 1).unsqueeze(0)
        return found + torch.where(x[:, None, None, :, 0] > -9, 0.0, -1e4).to(x.dtype)


class Boxes(Table):
    """A table of one bias per head and distance in space, which the data tell."""

    def bias(self, x: Tensor) -> Tensor | None:
        at = (4 * x[..., 0]).long()
        return self.table((at[:, :, None] - at[:, None]).clamp(-4, 4) + 4).permute(0, 3, 1, 2)


def with_dead_heads(model: nn.Module, dead: list[int], x: Tensor) -> nn.Module:
    randomize(model, torch.Generator().manual_seed(1))
    dg.gate(model.eval(), "heads", example_inputs=x)
    gates = list(dict.fromkeys(t.gates for t in dg.gates.gated_tensors(model)))
    starts = [sum(g.num_groups for g in gates[:i]) for i in range(len(gates))]
    with torch.no_grad():
        for g, start in zip(gates, starts, strict=True):
            g.gamma[[i - start for i in dead if start <= i < start + g.num_groups]] = 0
    return model


CASES = {
    "merged batch and heads": (lambda: Stack(TimeFirst), (6, 3)),
    "slopes that all layers share": (lambda: Slopes(TimeFirst), (6, 3)),
    "a table that all layers share": (lambda: Table(Scored), (3, 6)),
    "copies of a table for places": (lambda: Boxes(Copying), (3, 6)),
    "scores for distances": (lambda: Stack(Relative), (3, 6)),
    "as long as its buffer": (lambda: Stack(Masked), (2, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_other_heads_die_in_every_layer(name: str) -> None:
    build, shape = CASES[name]
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(0))
    model = with_dead_heads(build(), [0, 4, 5], x)  # one in the first layer, two in the second
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 3
    assert not exported.report.kept
    small = exported.model
    assert small.layers[0].query.out_features == 2 * SIZE
    assert small.layers[1].out.in_features == SIZE
    assert small.first is small.layers[0]
    for sizes in (shape, (4, 2), (1, 1)):
        probe = torch.randn(*sizes, WIDTH, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert torch.allclose(model(probe), small(probe), rtol=1e-4, atol=1e-5)


def test_keys_with_fewer_heads_than_values_hold_their_heads_and_nothing_else() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
            self.q, self.k, self.v, self.out = (nn.Linear(16, n) for n in (16, 8, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.up(x).relu())
            q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 16)
    net = dg.gate(Shared(), "neurons").eval()
    kill_every_second(net)
    exported = dg.export(net, x, latency=False)
    assert exported.model.up.out_features == 12
    assert exported.model.v.out_features == 16
    assert any("scaled_dot_product_attention" in kept.reason for kept in exported.report.kept)
    torch.testing.assert_close(exported.model(x), net(x))
    with pytest.raises(dg.GroupingError, match="attention head"):
        dg.gate(Shared(), "heads", example_inputs=x)


class Feedforward(nn.Module):
    """Holds a function that reads its modules from around it (minGPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"up": nn.Linear(6, 8, bias=False), "down": nn.Linear(8, 3)})
        parts = self.parts
        self.run = lambda x: parts["down"](parts["up"](x).relu())
        self.runs = {"run": self.run}

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + self.runs["run"](x)


def test_functions_that_hold_modules_follow_the_exported_model() -> None:
    model, x = Feedforward(), torch.randn(5, 6)
    dg.gate(model, "neurons", exclude="parts.down.*")
    dg.prune(model, ratio=0.5)
    exported = dg.export(model, x, latency=False)
    small, before = exported.model, model(x)
    assert small.parts["up"].out_features == 4
    with torch.no_grad():
        assert torch.allclose(before, small(x), rtol=1e-5, atol=1e-6)
        small.parts["down"].bias += 1
    assert torch.allclose(before, model(x))
    assert torch.allclose(before + 2, small(x), rtol=1e-5, atol=1e-5)


class Languages(nn.Module):
    """An adapter per language, of which one has nothing to do on the example (X-MOD)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.adapters = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        x = self.up(x).relu()
        out = torch.zeros_like(x)
        for i, adapter in enumerate(self.adapters):
            out[language == i] = adapter(x[language == i])
        return self.head(out)


@pytest.mark.filterwarnings("ignore::dgate_wrap.TraceWarning")
def test_an_adapter_without_tokens_stays_whole_with_all_that_it_reads() -> None:
    model = Languages().eval()
    x, language = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    before = copy.deepcopy(model)(x, language)
    with pytest.raises(dg.GroupingError, match=r"8 held back: an operation without a rule"):
        dg.gate(model, "channels", example_inputs=(x, language))
    dg.gate(model, dg.Select(names="up.*", axis=0))
    assert torch.equal(model(x, language), before)
    with torch.no_grad():
        next(iter(dg.gates.gated_tensors(model))).gates.gamma[:3] = 0
    small = dg.export(model, (x, language), latency=False).model
    assert small.adapters[1].weight.shape == (8, 8)
    assert small.up.out_features == 8
    for value in (language, 1 - language):
        assert torch.allclose(model(x, value), small(x, value), rtol=1e-5, atol=1e-6)


class Words(nn.Module):
    """Convolutions that span whole words and a few of them in a row (Kim, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(10, 2)
        self.convs = nn.ModuleList([nn.Conv2d(2, 5, (n, 8), padding=(n - 1, 0)) for n in (2, 3)])

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(x)
        words = torch.stack([words, words.tanh()], 1)
        found = [conv(words).relu().squeeze(3) for conv in self.convs]
        return self.head(torch.cat([F.max_pool1d(f, f.shape[2]).squeeze(2) for f in found], 1))


def test_convolutions_over_whole_words_lose_filters() -> None:
    model, x = Words().eval(), torch.randint(0, 20, (3, 7))
    dg.gate(model, "hidden", example_inputs=x)
    dg.prune(model, ratio=0.4)
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 4
    assert exported.model.head.in_features == 6
    with torch.no_grad():
        assert torch.allclose(model(x), exported.model(x), rtol=1e-5, atol=1e-6)


class Asking(nn.Module):
    """Attention whose code reads the width of a head from an attribute, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (self.heads(f) for f in (self.q(x), self.k(y), self.v(y)))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.size**-0.5).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one projection, whose forward has to be written anew to lose a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LearnedQueries(nn.Module):
    """Learned queries that attend to each other, which is the same for all inputs, and then to what is encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 4, 16))
        self.encode, self.among, self.ask, self.norm = Fused(), Asking(), Asking(), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x, queries = x + self.encode(x), self.tokens.expand(len(x), -1, -1)
        queries = self.norm(queries + self.among(queries, queries))
        return queries + self.ask(queries, x)


def test_learned_queries_keep_the_scores_between_them() -> None:
    model, x = LearnedQueries().eval(), torch.randn(2, 6, 16)
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        for t in dg.gates.gated_tensors(model):
            t.gates.gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    small = exported.model
    assert exported.report.removed == exported.report.pruning.dead == 2
    assert exported.report.rewritten == ["encode"]
    assert [small.among.q.out_features, small.ask.q.out_features] == [16, 8]
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
    small(x).sum().backward()
    assert small.among.k.weight.grad.any()


class Remembered(nn.Module):
    """An LSTM, beside which a trace leaves no time open, and self-attention by torch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_self_attention_behind_an_lstm_loses_heads_at_any_length() -> None:
    model, x = Remembered().eval(), torch.randn(2, 5, 3)
    dg.gate(model, "heads", example_inputs=x)
    with torch.no_grad():
        dg.gates.gated_tensors(model)[0].gates.gamma[0] = 0
    exported = dg.export(model, x, latency=False)
    assert exported.report.removed == 1
    assert exported.report.rewritten == ["attention"]
    for shape in ((2, 5, 3), (3, 9, 3), (1, 2, 3)):
        other = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(exported.model(other), model(other))


class Clipped(nn.Module):
    """Values between bounds that are buffers, then normalized without a weight, as in Gemma 4: zeros stay zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.register_buffer("low", torch.tensor(-torch.inf))
        self.register_buffer("high", torch.tensor(torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        values = torch.clamp(self.v(x), self.low, self.high)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), self.k(x), values))
        v = F.rms_norm(v, v.shape[-1:])
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_whose_values_are_clipped_by_buffers_and_normalized() -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    model = with_dead_heads(Clipped(), [1], x)
    exported = dg.export(model, x, latency=False)
    assert (exported.report.removed, exported.report.kept) == (1, [])


class CrossCovariance(nn.Module):
    """Attention of the channels of a head to each other, at a temperature per head (XCiT, EdgeNeXt)."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.temperature = fused, nn.Parameter(torch.ones(HEADS, 1, 1))
        self.first, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, length, width = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 4, 1).unbind(0)
        else:
            q, k, v = (f(x).view(batch, length, HEADS, -1).permute(0, 2, 3, 1) for f in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.temperature
        y = (scores.softmax(-1) @ v).permute(0, 3, 1, 2)
        return x + self.out(y.reshape(batch, length, -1))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_of_attention_among_channels_go(fused: bool) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    model = with_dead_heads(CrossCovariance(fused), [1], x)
    assert len(dg.groups(model)) == HEADS
    exported = dg.export(model, x, latency=False)
    assert (exported.report.removed, exported.report.kept) == (1, [])
    assert exported.model.get_parameter("temperature").shape == (HEADS - 1, 1, 1)


class Selected(nn.Module):
    """Branches that are weighed per channel by a softmax over them (selective kernels): these are no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 4, k, padding=k // 2) for k in (1, 3))
        self.weigh, self.head = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([b(x) for b in self.branches], 1)
        weights = self.weigh(each.sum(1).mean((2, 3), keepdim=True)).view(x.shape[0], 2, 4, 1, 1).softmax(1)
        return self.head((each * weights).sum(1))


def test_channels_that_a_softmax_weighs_are_no_heads() -> None:
    with pytest.raises(dg.GroupingError, match="no attention head"):
        dg.gate(Selected(), "heads", example_inputs=torch.randn(2, 3, 5, 5))
