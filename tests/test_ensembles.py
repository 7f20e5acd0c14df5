"""Members of ensembles: each group, once zeroed, silences exactly one member that the model itself can show."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Residual

import dgate_wrap as dg
from dgate_wrap.groupings import resolve
from dgate_wrap.tracing import capture


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [[nn.Linear(a, b), act()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[m for pair in layers for m in pair][:-1])


def groups_of(name: str, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    [(_, labels)] = resolve(name, model, capture(model, inputs))
    return labels


def zeroed(model: nn.Module, labels: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    """Draw all parameters anew and zero those of one group, with a loop over single weights."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        value = torch.randn_like(p).flatten()
        if name in labels:
            for i, label in enumerate(labels[name].broadcast_to(p.shape).flatten().tolist()):
                if label == group:
                    value[i] = 0.0
        out[name] = value.view_as(p)
    return out


def refuses(name: str, model: nn.Module, *inputs: Any) -> dg.GroupingError:
    with pytest.raises(dg.GroupingError) as e:
        groups_of(name, model, inputs)
    assert e.value.expected
    assert e.value.mend
    return e.value


def acts(model: nn.Module, parameters: dict[str, Tensor], x: tuple[Any, ...]) -> bool:
    """Tell whether the output changes with the weights that are zero (any of a few draws: units may be dead)."""
    y = torch.func.functional_call(model, parameters, x)
    for _ in range(5):
        full = {n: torch.where(p == 0, torch.randn_like(p), p) for n, p in parameters.items()}
        if not torch.equal(torch.func.functional_call(model, full, x), y):
            return True
    return False


def parts_of(model: nn.Module, parameters: dict[str, Tensor], x: Any) -> list[Tensor]:
    """Compute what each member answers, by the model's own ``parts``."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> list[Tensor]:
            return list(self.model.parts(*inputs))

    return torch.func.functional_call(Shown(), {f"model.{n}": p for n, p in parameters.items()}, x)


def assert_silences(name: str, model: nn.Module, x: Tensor, members: int, *, zero: bool = False) -> None:
    """Zero each group in turn: exactly one member, another each time, becomes constant, and the rest still varies."""
    model = model.double().eval()
    x = x.double()
    labels = groups_of(name, model, (x,))
    groups = sorted({i for t in labels.values() for i in t.unique().tolist()} - {-1})
    assert len(groups) == members
    heard: list[int] = []
    for g in groups:
        parameters = zeroed(model, labels, g)
        runs = [parts_of(model, parameters, (torch.randn(16, *x.shape[1:], dtype=x.dtype),)) for _ in range(4)]
        constant = [
            i
            for i, several in enumerate(zip(*runs, strict=True))
            if all((r - several[0]).abs().max() < 1e-9 for r in several)
        ]
        assert len(constant) == 1, f"group {g} silences {constant}"
        heard += constant
        if zero:
            assert not runs[0][constant[0]].any()
        assert acts(model, parameters, (x,)), f"group {g} does nothing"
    assert sorted(heard) == list(range(members))


# ----------------------------------------------------------------------------------------------------- shape functions


class Nam(nn.Module):
    """One MLP per column (or tuple of columns), joined in one of several ways."""

    def __init__(
        self, join: str, columns: list[tuple[int, ...]], classes: int = 1, act: Any = nn.Tanh, deep: bool = True
    ):
        super().__init__()
        self.join, self.columns = join, columns
        sizes = (5, 4) if deep else (5,)
        self.nets = nn.ModuleList([mlp(len(c), *sizes, classes, act=act) for c in columns])
        self.bias = nn.Parameter(torch.zeros(classes))
        self.mix = nn.Linear(len(columns) * classes, 2)

    def parts(self, x: Tensor) -> list[Tensor]:
        return [
            net(x[:, list(c)] if len(c) > 1 else x[:, c[0] : c[0] + 1])
            for c, net in zip(self.columns, self.nets, strict=True)
        ]

    def forward(self, x: Tensor) -> Any:
        f = self.parts(x)
        match self.join:
            case "sum":
                return sum(f) + self.bias
            case "link":
                return torch.sigmoid(torch.stack(f).sum(0) + self.bias)
            case "mean":
                return torch.stack(f, -1).mean(-1)
            case "linear":
                return self.mix(torch.cat(f, -1))
            case "both":
                together = torch.cat(f, -1)
                return together.sum(-1, keepdim=True) + self.bias, together
            case _:
                return self.mix(torch.cat(f, 1).tanh()).softmax(-1)


SINGLE = [(i,) for i in range(4)]


@pytest.mark.parametrize("join", ["sum", "link", "mean", "linear", "both", "bent"])
@pytest.mark.parametrize("deep", [True, False])
def test_shape_functions_of_an_mlp_per_feature(join: str, deep: bool) -> None:
    model = Nam(join, SINGLE, deep=deep)
    model.double()
    if join == "both":
        model.forward = lambda x: torch.cat(Nam.forward(model, x), -1)  # type: ignore[method-assign]
    assert_silences("shape_functions", model, torch.randn(3, 4), 4)


def test_shape_functions_of_pairs_and_single_features_are_one_group_each() -> None:
    columns = [*SINGLE, (0, 1), (1, 3), (0, 2)]
    assert_silences("shape_functions", Nam("sum", columns, classes=3), torch.randn(3, 4), len(columns))
    assert_silences("shape_functions", Nam("linear", columns, act=nn.Tanh, deep=False), torch.randn(3, 4), len(columns))


class GroupedNam(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        f, h = features, hidden
        self.f = f
        self.body = nn.Sequential(
            nn.Conv1d(f, f * h, 1, groups=f), nn.Tanh(), nn.Conv1d(f * h, f * h, 1, groups=f), nn.Tanh(),
            nn.Conv1d(f * h, f, 1, groups=f),
        )  # fmt: skip

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x.unsqueeze(-1)).squeeze(-1).unbind(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.unsqueeze(-1)).flatten(1).sum(1)


class BatchedNam(nn.Module):
    def __init__(self, how: str, features: int = 4, hidden: int = 5) -> None:
        super().__init__()
        f, h = features, hidden
        self.how = how
        self.w1, self.b1 = nn.Parameter(torch.randn(f, 1, h)), nn.Parameter(torch.randn(f, h))
        self.w2, self.b2 = nn.Parameter(torch.randn(f, h, h)), nn.Parameter(torch.randn(f, h))
        self.w3 = nn.Parameter(torch.randn(f, h, 2))

    def hidden(self, x: Tensor) -> Tensor:
        match self.how:
            case "einsum":
                h = torch.einsum("bfi,fih->bfh", x[:, :, None], self.w1) + self.b1
                h = torch.einsum("bfh,fhk->bfk", h.tanh(), self.w2) + self.b2
                return torch.einsum("bfh,fho->bfo", h.tanh(), self.w3)
            case "bmm":
                h = torch.bmm(x.t()[:, :, None], self.w1) + self.b1[:, None]
                h = torch.baddbmm(self.b2[:, None], h.tanh(), self.w2)
                return torch.bmm(h.tanh(), self.w3).transpose(0, 1)
            case "matmul":
                h = (x[:, :, None, None] @ self.w1).squeeze(2) + self.b1
                h = (h.tanh()[:, :, None] @ self.w2).squeeze(2) + self.b2
                return (h.tanh()[:, :, None] @ self.w3).squeeze(2)
            case _:
                h = (x[:, :, None] * self.w1[:, 0] + self.b1).tanh()
                h = torch.einsum("bfh,fhk->bfk", h, self.w2) + self.b2
                return torch.einsum("bfh,fho->bfo", h.tanh(), self.w3)

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(self.hidden(x).unbind(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "all":
            return torch.einsum("bfh,fho->bo", self.hidden(x)[..., :1].expand(-1, -1, 5), self.w3)
        return self.hidden(x).sum(1)


def test_shape_functions_of_a_grouped_convolution() -> None:
    assert_silences("shape_functions", GroupedNam(5, 3), torch.randn(3, 5), 5)


@pytest.mark.parametrize("how", ["einsum", "bmm", "matmul", "broadcast"])
def test_shape_functions_of_batched_parameters(how: str) -> None:
    assert_silences("shape_functions", BatchedNam(how), torch.randn(3, 4), 4)


class Categorical(nn.Module):
    """Inputs of several kinds: a number, a category and a pair of numbers, each an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.table, self.pair = mlp(1, 4, 1), nn.Embedding(5, 1), mlp(2, 4, 1)

    def forward(self, number: Tensor, category: Tensor, pair: Tensor) -> Tensor:
        return self.number(number[:, None]) + self.table(category).tanh() + self.pair(pair)


def test_shape_functions_of_several_inputs_and_a_category() -> None:
    model = Categorical()
    labels = groups_of("shape_functions", model, (torch.randn(3), torch.randint(5, (3,)), torch.randn(3, 2)))
    assert set(labels) == {"number.0.weight", "table.weight", "pair.0.weight"}
    assert len({int(t.unique()) for t in labels.values()}) == 3


def test_shape_functions_behind_a_normalization_and_on_features_of_a_basis() -> None:
    net = Nam("sum", SINGLE, classes=2)
    normed = Spliced(lambda m, x: m.net(F.dropout(m.norm(x), 0.1, m.training)), norm=nn.BatchNorm1d(4), net=net)
    normed.parts = lambda x: net.parts(normed.norm(x))  # type: ignore[assignment]
    assert_silences("shape_functions", normed, torch.randn(3, 4), 4)
    basis = Spliced(lambda m, x: m.out(torch.cat([x, x**2, x.sin()], 1)), out=nn.Linear(12, 1))
    basis.parts = (
        lambda x: [  # type: ignore[assignment]
            torch.stack([x[:, i], x[:, i] ** 2, x[:, i].sin()], 1) @ basis.out.weight[0, i::4] for i in range(4)
        ]
    )
    assert_silences("shape_functions", basis, torch.randn(3, 4), 4)


class Exu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3, 1))
        self.last = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = (x[:, :, None] - self.b) * torch.exp(self.w)
        return (h.clamp(0, 1) * self.last).sum((1, 2))


class Spliced(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, *x: Tensor) -> Tensor:
        return self.body(self, *x)


def test_what_is_not_additive_is_refused_with_the_place_where_features_meet() -> None:
    x = torch.randn(3, 4)
    e = refuses("shape_functions", mlp(4, 8, 8, 1), x)
    assert "aten.linear" in e.found
    assert "linear.py" in e.found or "container.py" in e.found or "test_ensembles.py" in e.found
    assert "aten.exp" in refuses("shape_functions", Exu(), torch.randn(2, 3)).found
    assert "linear operations only" in refuses("shape_functions", nn.Linear(4, 2), x).found
    skip = Spliced(lambda m, x: sum(m.f[i](x[:, i : i + 1]) for i in range(4)) + x.sum(1, keepdim=True),
                   f=nn.ModuleList([mlp(1, 3, 1) for _ in range(4)]))  # fmt: skip
    assert "past all weights" in refuses("shape_functions", skip, x).found
    late = Spliced(lambda m, x: m.top(torch.cat([m.f[i](x[:, i : i + 1]) for i in range(4)], 1)),
                   f=nn.ModuleList([mlp(1, 3, 2) for _ in range(4)]), top=mlp(8, 4, 1))  # fmt: skip
    refuses("shape_functions", late, x)
    shared = Spliced(lambda m, x: m.f(x[:, :, None]).sum(1), f=mlp(1, 6, 1))
    refuses("shape_functions", shared, x)
    routed = Spliced(lambda m, x: m.out(x.tanh() * m.gate(x).softmax(-1)), gate=nn.Linear(4, 4), out=nn.Linear(4, 1))
    refuses("shape_functions", routed, x)
    beside = Spliced(lambda m, x: m.out(torch.cat([m.deep(x).tanh(), x], 1)), deep=nn.Linear(4, 3), out=nn.Linear(7, 1))
    refuses("shape_functions", beside, x)
    refuses("shape_functions", Spliced(lambda m, x, t: m.f(x) * t, f=mlp(4, 5, 1)), x, torch.tensor(2.0))
    bags = Spliced(lambda m, x: m.top(m.bag(x)), bag=nn.EmbeddingBag(9, 6), top=mlp(6, 4, 1))
    refuses("shape_functions", bags, torch.randint(9, (2, 5)))
    wide = Spliced(lambda m, x: m.wide(x) + m.deep(x), wide=nn.Linear(4, 1), deep=mlp(4, 5, 1))
    refuses("shape_functions", wide, x)
    refuses("shape_functions", nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
            torch.randn(2, 3, 6, 6))  # fmt: skip
    refuses("shape_functions", nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(2, 3, 4))


# --------------------------------------------------------------------------------------------------------------- trees


def codes(depth: int) -> Tensor:
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=depth)))
    return torch.stack([bits, 1 - bits], -1)  # (leaves, depth, 2)


def entmoid15(x: Tensor) -> Tensor:
    positive, x = x >= 0, x.abs()
    tau = (x + torch.sqrt(F.relu(8 - x**2))) / 2
    tau = tau.masked_fill(tau <= x, 2.0)
    y = 0.25 * F.relu(tau - x) ** 2
    return torch.where(positive, 1 - y, y)


BINS = {
    "sigmoid": torch.sigmoid,
    "sparsemoid": lambda x: (0.5 * x + 0.5).clamp(0, 1),
    "entmoid15": entmoid15,
    "tanh": lambda x: 0.5 * (x.tanh() + 1),
}


class Oblivious(nn.Module):
    """A layer of NODE: oblivious trees of one depth, with their responses applied in one of several ways."""

    def __init__(
        self, features: int, trees: int, depth: int, answers: int, bins: str = "sigmoid", how: str = "bnl,ncl->bnc"
    ):
        super().__init__()
        self.how, self.bins, self.trees = how, BINS[bins], trees
        self.select = nn.Parameter(torch.randn(features, trees, depth))
        self.threshold, self.heat = nn.Parameter(torch.randn(trees, depth)), nn.Parameter(torch.randn(trees, depth))
        self.register_buffer("codes", codes(depth))
        shape = {"l": 2**depth, "n": trees, "c": answers}
        letters = {"broadcast": "ncl", "flat": "nlc"}.get(how) or ("nlc" if how in ("matmul", "bmm") else how[4:7])
        self.response = nn.Parameter(torch.randn([shape[c] for c in letters]))

    def leaves(self, x: Tensor) -> Tensor:
        f = torch.einsum("bi,ind->bnd", x, self.select.softmax(0))
        t = (f - self.threshold) * torch.exp(-self.heat)
        bins = self.bins(torch.stack([-t, t], -1))
        return torch.einsum("bnds,lds->bndl", bins, self.codes).prod(2)

    def answers(self, p: Tensor) -> Tensor:
        match self.how:
            case "broadcast":
                return (p[:, :, None] * self.response).sum(-1)
            case "matmul":
                return (p[:, :, None] @ self.response).squeeze(2)
            case "bmm":
                return torch.bmm(p.transpose(0, 1), self.response).transpose(0, 1)
            case "flat":
                return p.flatten(1) @ self.response.flatten(0, 1)
            case _:
                return torch.einsum(self.how, p, self.response)

    def parts(self, x: Tensor) -> list[Tensor]:
        p = self.leaves(x)
        return [self.answers(p * (torch.arange(self.trees) == i)[:, None].to(p)) for i in range(self.trees)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.answers(self.leaves(x))
        return y.mean(1) if y.dim() == 3 else y


HOW = ["bnl,ncl->bnc", "bnl,nlc->bnc", "bnl,lnc->bcn", "bnl,nlc->bc", "broadcast", "matmul", "bmm", "flat"]


@pytest.mark.parametrize("how", HOW)
def test_trees_of_oblivious_ensembles(how: str) -> None:
    assert_silences("trees", Oblivious(5, 6, 3, 2, how=how), torch.randn(3, 5), 6, zero=True)


@pytest.mark.parametrize("bins", BINS)
def test_trees_whatever_opens_the_gates(bins: str) -> None:
    assert_silences("trees", Oblivious(5, 4, 2, 3, bins), torch.randn(3, 5), 4, zero=True)


class DenseNode(nn.Module):
    """Layers of trees that each read the input and the answers of all layers before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList([Oblivious(4, 3, 2, 2), Oblivious(10, 5, 2, 2, "entmoid15")])

    def parts(self, x: Tensor) -> list[Tensor]:
        x, out = self.norm(x), []
        for layer in self.layers:
            out += layer.parts(x)
            x = torch.cat([x, layer.answers(layer.leaves(x)).flatten(1)], 1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x, out = self.norm(x), []
        for layer in self.layers:
            y = layer.answers(layer.leaves(x))
            out.append(y)
            x = torch.cat([x, y.flatten(1)], 1)
        return torch.cat(out, 1).mean(1)


def test_trees_of_every_layer_of_a_dense_ensemble() -> None:
    assert_silences("trees", DenseNode(), torch.randn(3, 4), 8, zero=True)


class SoftTree(nn.Module):
    """A soft decision tree whose path probabilities are multiplied level by level."""

    def __init__(self, features: int, depth: int, classes: int, *, distribution: bool = False) -> None:
        super().__init__()
        self.depth, self.distribution = depth, distribution
        self.inner = nn.Linear(features, 2**depth - 1)
        self.leaf = nn.Parameter(torch.randn(2**depth, classes))

    def forward(self, x: Tensor) -> Tensor:
        p = self.inner(x).sigmoid()
        mu = x.new_ones(len(x), 1)
        for level in range(self.depth):
            here = p[:, 2**level - 1 : 2 ** (level + 1) - 1]
            mu = torch.stack([mu * here, mu * (1 - here)], -1).flatten(1)
        return mu @ (self.leaf.softmax(-1) if self.distribution else self.leaf)


class SoftmaxTree(nn.Module):
    def __init__(self, features: int, leaves: int, classes: int) -> None:
        super().__init__()
        self.route, self.leaf = nn.Linear(features, leaves), nn.Linear(leaves, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(self.route(x).softmax(-1))


class Forest(nn.Module):
    def __init__(self, trees: list[nn.Module], join: str) -> None:
        super().__init__()
        self.trees, self.join = nn.ModuleList(trees), join

    def parts(self, x: Tensor) -> list[Tensor]:
        return [t(x) for t in self.trees]

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts(x)
        return sum(y) if self.join == "sum" else torch.stack(y).mean(0) if self.join == "mean" else torch.cat(y, 1)


@pytest.mark.parametrize("join", ["sum", "mean", "cat"])
def test_trees_of_a_list_are_a_group_each(join: str) -> None:
    assert_silences("trees", Forest([SoftTree(4, 3, 2) for _ in range(3)], join), torch.randn(3, 4), 3, zero=True)
    forest = Forest([SoftTree(4, 2, 2, distribution=True) for _ in range(3)], join)
    assert_silences("trees", forest, torch.randn(3, 4), 3)
    assert_silences("trees", Forest([SoftmaxTree(4, 5, 2) for _ in range(3)], join), torch.randn(3, 4), 3, zero=True)


class BatchedSoftTrees(nn.Module):
    """Soft trees side by side, whose paths are gathered by constant indices."""

    def __init__(self, features: int, trees: int, depth: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(trees, features, 2**depth - 1))
        self.leaf = nn.Parameter(torch.randn(trees, 2**depth, classes))
        node, right = torch.zeros(2**depth, depth).long(), torch.zeros(2**depth, depth)
        for leaf, path in enumerate(itertools.product((0, 1), repeat=depth)):
            at = 0
            for level, bit in enumerate(path):
                node[leaf, level], right[leaf, level] = at, float(bit)
                at = 2 * at + 1 + bit
        self.register_buffer("node", node)
        self.register_buffer("right", right)

    def parts(self, x: Tensor) -> list[Tensor]:
        p = torch.einsum("bi,tin->btn", x, self.inner).sigmoid()[:, :, self.node]
        p = (p * self.right + (1 - p) * (1 - self.right)).prod(-1)
        return list(torch.einsum("btl,tlc->btc", p, self.leaf).unbind(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.parts(x)).sum(0)


def test_trees_of_batched_soft_trees() -> None:
    assert_silences("trees", BatchedSoftTrees(4, 5, 3, 2), torch.randn(3, 4), 5, zero=True)


class Experts(nn.Module):
    """A mixture of linear experts, written so that it looks as much like trees as it can."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.router = how, nn.Linear(4, 3)
        self.w, self.v = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        match self.how:
            case "outer":
                return torch.einsum("bei,eio->bo", gates[:, :, None] * x[:, None], self.w)
            case "ffn":
                h = torch.einsum("bi,eih->beh", x, self.w).relu()
                return torch.einsum("beh,eho->bo", h * gates[:, :, None], self.v)
            case "sigmoid":
                h = torch.einsum("bi,eih->beh", x, self.w).sigmoid()
                return torch.einsum("beh,eho->bo", h * gates[:, :, None], self.v)
            case _:
                h = torch.einsum("bi,eih->beh", x, self.w).relu()
                return torch.einsum("be,beo->bo", gates, torch.einsum("beh,eho->beo", h, self.v))


@pytest.mark.parametrize("how", ["outer", "ffn", "sigmoid", "mixed"])
def test_experts_are_no_trees(how: str) -> None:
    refuses("trees", Experts(how), torch.randn(3, 4))


def test_what_has_no_trees_is_refused() -> None:
    x = torch.randn(3, 4)
    refuses("trees", mlp(4, 8, 8, 1), x)
    refuses("trees", mlp(4, 8, 1, act=nn.Sigmoid), x)
    assert "lone softmax" in refuses("trees", SoftmaxTree(4, 5, 2), x).found
    refuses("trees", nn.Sequential(SoftmaxTree(4, 5, 3), SoftmaxTree(3, 5, 2)), x)
    refuses("trees", nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(2, 3, 4))
    refuses("trees", GroupedNam(4, 3), x)
    talking = Spliced(lambda m, x: m.talk(m.q(x).unflatten(-1, (2, 6)).softmax(-1).transpose(1, 2)).mean(1),
                      q=nn.Linear(4, 12), talk=nn.Linear(2, 3))  # fmt: skip
    refuses("trees", talking, x)
    glu = Spliced(lambda m, x: m.c(m.a(x).sigmoid() * m.b(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 2))
    refuses("trees", glu, x)


# ---------------------------------------------------------------------------------------------------------- modalities


class Late(nn.Module):
    """Branches, each on its part of the inputs, and one of several fusions behind them."""

    def __init__(self, join: str, branches: int = 3, act: Any = nn.Tanh) -> None:
        super().__init__()
        self.join = join
        self.branches = nn.ModuleList([mlp(4, 6, 5, act=act) for _ in range(branches)])
        self.norm, self.layer_norm = nn.BatchNorm1d(5 * branches), nn.LayerNorm(5 * branches)
        self.top, self.side = mlp(5 * branches, 6, 2), nn.Linear(5 * branches, 3)
        self.head, self.shared = mlp(5, 4, 2), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(branches))

    def forward(self, *x: Tensor) -> Tensor:
        x = x if len(x) > 1 else x * len(self.branches)
        h = [b(xi) for b, xi in zip(self.branches, x, strict=True)]
        match self.join:
            case "cat":
                return self.top(torch.cat(h, 1))
            case "two heads":
                z = torch.cat(h, 1)
                return torch.cat([self.top(z), self.side(z)], 1)
            case "activated":
                return self.top(F.dropout(self.norm(torch.cat(h, -1)).relu(), 0.1, self.training))
            case "stacked":
                return self.top(torch.stack(h, 2).flatten(1))
            case "layer norm":
                return self.top(self.layer_norm(torch.cat(h, 1)))
            case "sum":
                return self.head(sum(h))
            case "mean":
                return self.head(torch.stack(h).mean(0).relu())
            case "scaled":
                return self.head(sum(s * v for s, v in zip(self.scale, h, strict=True)))
            case "projected":
                return self.head(self.shared(torch.stack(h, 1)).sum(1))
            case _:
                z = torch.cat(h, 1).unflatten(1, (-1, 5))
                return self.head(z.sum(1))


JOINS = ["cat", "two heads", "activated", "stacked", "layer norm", "sum", "mean", "scaled", "projected", "unflattened"]


def silences_branches(
    model: nn.Module, x: tuple[Tensor, ...], branches: list[nn.Module], name: str = "modalities"
) -> None:
    """Zero each group in turn: the parameters of exactly one branch then do not matter, those of the others do."""
    model = model.double().eval()
    x = tuple(t.double() if t.is_floating_point() else t for t in x)
    labels = groups_of(name, model, x)
    groups = sorted({i for t in labels.values() for i in t.unique().tolist()} - {-1})
    assert len(groups) == len(branches)
    owned = [{n for n, p in model.named_parameters() if any(p is q for q in b.parameters())} for b in branches]
    heard: list[int] = []
    for g in groups:
        parameters = zeroed(model, labels, g)
        gone = {n: (labels[n] == g).broadcast_to(p.shape) for n, p in parameters.items() if n in labels}
        y = torch.func.functional_call(model, parameters, x)
        idle: list[int] = []
        for i, names in enumerate(owned):
            other = {n: torch.randn_like(p) if n in names else p for n, p in parameters.items()}
            other = {n: p.masked_fill(gone[n], 0.0) if n in gone else p for n, p in other.items()}
            if torch.allclose(torch.func.functional_call(model, other, x), y, atol=1e-9):
                idle.append(i)
        assert len(idle) == 1, f"group {g} silences {idle}"
        heard += idle
        assert acts(model, parameters, x), f"group {g} does nothing"
    assert sorted(heard) == list(range(len(branches)))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("inputs", ["own", "same"])
def test_modalities_of_a_late_fusion(join: str, inputs: str) -> None:
    model = Late(join)
    x = tuple(torch.randn(3, 4) for _ in range(3 if inputs == "own" else 1))
    silences_branches(model, x, list(model.branches), "modalities" if inputs == "own" else "subnetworks")


class Multimodal(nn.Module):
    """An image, a text and a table, fused at the feature map of the image or at the end."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.image[3] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.embed, self.text = nn.Embedding(9, 6), nn.GRU(6, 5, batch_first=True)
        self.table = table
        self.fusion = nn.Linear(4 + 5 + 3, 2)

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> Tensor:
        sentence = self.text(self.embed(text))[0][:, -1].tanh()
        return self.fusion(torch.cat([self.image(image), sentence, self.table(table)], 1))


def test_modalities_of_three_kinds_of_data() -> None:
    x = (torch.randn(2, 3, 6, 6), torch.randint(9, (2, 5)), torch.randn(2, 4))
    for table in (mlp(4, 6, 3), nn.Linear(4, 3)):  # the shallow one alone reads its input
        model = Multimodal(table)
        silences_branches(model, x, [model.image, nn.ModuleList([model.embed, model.text]), model.table])


def test_modalities_that_are_fused_twice_are_taken_at_the_last_fusion() -> None:
    a, b, c = (mlp(4, 5, 3) for _ in range(3))
    first, last = mlp(6, 4, 3), nn.Linear(6, 2)
    body = lambda m, x, y, z: m.last(torch.cat([m.first(torch.cat([m.a(x), m.b(y)], 1)), m.c(z)], 1))  # noqa: E731
    model = Spliced(body, a=a, b=b, c=c, first=first, last=last)
    silences_branches(model, tuple(torch.randn(3, 4) for _ in range(3)), [nn.ModuleList([a, b, first]), c])


def test_subnetworks_of_an_additive_model_are_its_shape_functions() -> None:
    for join in ("sum", "mean", "linear"):
        model = Nam(join, SINGLE, classes=2)
        silences_branches(model, (torch.randn(3, 4),), list(model.nets), "subnetworks")


def test_many_summands_are_as_many_branches() -> None:
    model = Nam("sum", [(i,) for i in range(40)])
    labels = groups_of("subnetworks", model, (torch.randn(2, 40),))
    assert len({int(i) for t in labels.values() for i in t.unique()}) == 40
    labels = groups_of("shape_functions", model, (torch.randn(2, 40),))
    assert len({int(i) for t in labels.values() for i in t.unique()}) == 40


class Inception(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x).relu(), self.b(x).relu()], 1)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.kind, self.norm = nn.Embedding(9, 6), nn.Embedding(2, 6), nn.LayerNorm(6)
        self.top = mlp(6, 8, 2)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        return self.top(self.norm(self.token(tokens) + self.kind(kinds)).mean(1))


class Leaking(nn.Module):
    """A branch that also reaches the output past the fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = mlp(4, 5, 3), mlp(4, 5, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.top(torch.cat([a, self.b(x)], 1)) * a.sigmoid()


def test_what_has_no_late_fusion_is_refused() -> None:
    x, image = torch.randn(3, 4), torch.randn(2, 3, 6, 6)
    refuses("modalities", mlp(4, 8, 8, 1), x)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    refuses("modalities", nn.Sequential(stem, Inception(8), Inception(8), nn.Flatten(), nn.Linear(288, 2)), image)
    block = Spliced(
        lambda m, x: m.out(m.stem(x) + m.f(m.stem(x))), stem=nn.Linear(4, 4), f=mlp(4, 6, 4), out=nn.Linear(4, 2)
    )
    refuses("modalities", block, x)
    refuses("modalities", Embedded(), torch.randint(9, (2, 3)), torch.randint(2, (2, 3)))
    refuses("modalities", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8))
    refuses("modalities", Experts("mixed"), x)
    mixture = Spliced(lambda m, x: (torch.stack([f(x) for f in m.f], -1) * m.router(x).softmax(-1)[:, None]).sum(-1),
                      f=nn.ModuleList([mlp(4, 5, 2) for _ in range(3)]), router=nn.Linear(4, 3))  # fmt: skip
    assert "as a router does" in refuses("modalities", mixture, x).found
    mirrored = Spliced(
        lambda m, x: m.b(torch.cat([m.a(x).relu(), (-m.a(x)).relu()], 1)), a=nn.Linear(4, 3), b=nn.Linear(6, 2)
    )
    refuses("modalities", mirrored, x)
    leak = Leaking()
    refuses("modalities", leak, x)
    bare = Spliced(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=mlp(4, 5, 3), b=mlp(4, 5, 3))
    assert "returns" in refuses("modalities", bare, x).found
    ends = Spliced(lambda m, x: m.a(x).sigmoid() + m.b(x).sigmoid(), a=mlp(4, 5, 3), b=mlp(4, 5, 3))
    assert "aten.sigmoid" in refuses("modalities", ends, x).found


# ------------------------------------------------------------------------------------------------------------ all three


def test_each_is_one_line_and_wrapping_keeps_every_bit() -> None:
    for name, model, x in (
        ("trees", DenseNode(), torch.randn(3, 4)),
        ("shape_functions", Nam("sum", SINGLE), torch.randn(3, 4)),
        ("modalities", Late("cat"), torch.randn(3, 4)),
    ):
        model.eval()
        before = model(x)
        dg.gate(model, name, example_inputs=x)
        assert torch.equal(model(x), before)
        for gates in [m for m in model.modules() if isinstance(m, dg.Gates)]:
            with torch.no_grad():
                gates.gamma[0] = 0
        assert not torch.allclose(model(x), before)


def test_models_that_have_none_are_refused_quickly() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    tokens = torch.randint(99, (2, 64))
    trace = capture(
        transformers.BertModel(config).eval(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    )
    for name in ("trees", "shape_functions", "modalities"):
        start = time.perf_counter()
        with pytest.raises(dg.GroupingError):
            resolve(name, nn.Linear(1, 1), trace)
        assert time.perf_counter() - start < 2
