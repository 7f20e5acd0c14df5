"""Groupings together: several at once and in turn, λ by kind and by cost, what they exclude, and groups that merge."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handwritten import HANDWRITTEN
from oracles import all_gates, randomize_gates
from patterns import PATTERNS, Net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors
from dgate_wrap.groupings import resolve
from dgate_wrap.tracing import capture

CASES = {c.name: c for c in [*PATTERNS, *HANDWRITTEN]}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """A transformer layer without norms: four heads from one fused projection, and an MLP."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def resnet() -> nn.Module:
    return CASES["hand_resnet"].build()[0]


def table(model: nn.Module) -> list[tuple[str, str, int, int]]:
    return sorted((g.kind, g.name, g.D, g.size) for g in dg.groups(model))


def state(model: nn.Module) -> dict[str, tuple[int, bool, Tensor]]:
    return {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_same(model: nn.Module, before: dict[str, tuple[int, bool, Tensor]]) -> None:
    after = state(model)
    assert list(after) == list(before)
    assert all(after[n][:2] == before[n][:2] and torch.equal(after[n][2], before[n][2]) for n in before)


# several at once, and in turn


def test_every_kind_has_its_own_D() -> None:
    model = Block()
    y = model(X)
    dg.gate(model, ["heads", "hidden"], D={"heads": 2, "hidden": 4}, example_inputs=X)
    assert torch.equal(model(X), y)
    assert {(g.kind, g.D) for g in dg.groups(model)} == {("heads", 2), ("hidden", 4)}
    assert [g.kind for g in dg.groups(model)].count("heads") == 4
    # (λ/D)(‖ω‖² + Σγ²), by hand
    omegas = {"heads": [model.qkv.weight[16:], model.qkv.bias[16:]], "hidden": [model.up.weight, model.up.bias]}
    by_hand = sum(w.square().sum() for w in omegas["heads"]) / 2 + 4 * 1 / 2
    by_hand += sum(w.square().sum() for w in omegas["hidden"]) / 4 + 12 * 3 / 4
    assert dg.Penalty(model, 1.0).value() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("D", "texts"),
    [
        ({"heads": 2}, ["D={'heads': 2} has no number for 'hidden'.", '{"heads": 2, "hidden": 3}']),
        ({"heads": 2, "hidden": 3, "head": 4}, ["names 'head', of which", '{"heads": 2, "hidden": 3}']),
        ({"channels": 2}, ["has no number for 'heads', 'hidden' and names 'channels'"]),
        ({}, ["has no number for 'heads', 'hidden'"]),
        ({"heads": 2, "hidden": 1}, ["D={'heads': 2, 'hidden': 1}", "at least 2"]),
    ],
)
def test_a_mapping_names_exactly_the_kinds(D: dict[str, int], texts: list[str]) -> None:
    model = Block()
    before = state(model)
    with pytest.raises(dg.GateError) as e:
        dg.gate(model, ["heads", "hidden"], D=D)  # without inputs: it is checked before anything is traced
    assert all(t in str(e.value) for t in texts)
    assert_same(model, before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("train", ["all", "gates"])
def test_gating_in_turn_is_gating_at_once(fused: bool, train: Any) -> None:
    torch.manual_seed(0)
    model, twin = Block(fused), Block(fused)
    twin.load_state_dict(model.state_dict())
    y = model(X)
    dg.gate(twin, ["heads", "hidden"], D={"heads": 2, "hidden": 3}, example_inputs=X, train=train)
    dg.gate(model, "heads", D=2, example_inputs=X, train=train)
    before = state(model)
    dg.gate(model, "hidden", D=3, example_inputs=X, train=train)
    held = state(model)
    assert all(held[n][0] == before[n][0] for n in before if "up" not in n)  # the same Parameter objects
    assert torch.equal(model(X), y)
    assert table(model) == table(twin)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in twin.named_parameters() if p.requires_grad}
    dg.ungate(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in Block().named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(X), y)


def test_a_trained_model_is_gated_again() -> None:
    """Groups are found, and data is followed, with the weights as they are: ω times the gates."""
    model = randomize_gates(dg.gate(Block(), "heads", D=2, example_inputs=X))
    y, before = model(X), state(model)
    dg.gate(model, "hidden", D=3, init="balanced", example_inputs=X)
    torch.testing.assert_close(model(X), y)
    after = state(model)
    assert all(torch.equal(after[n][2], before[n][2]) for n in before if "up" not in n)  # the heads' factors stay
    assert float(dg.misalignment(model)[[g.kind == "hidden" for g in dg.groups(model)]].max()) < 1e-6


def test_other_rows_of_a_gated_weight_are_gated() -> None:
    model = dg.gate(Block(), "heads", D=2, example_inputs=X)
    y = model(X)
    queries = dg.Select(names="qkv.weight", axis=0, at=slice(0, 8))
    dg.gate(model, queries, D=4)
    keys = {"qkv.weight": torch.arange(24).view(24, 1).where((torch.arange(24) // 8 == 1).view(24, 1), -1)}
    dg.gate(model, keys, D=3)
    assert torch.equal(model(X), y)
    assert [(t.name, t.gates.kind, t.gates.D) for t in gated_tensors(model) if t.name == "qkv.weight"] == [
        ("qkv.weight", "heads", 2),
        ("qkv.weight", "select", 4),
        ("qkv.weight", "labels", 3),
    ]
    assert [g.size for g in dg.groups(model)] == [18] * 4 + [8] * 16
    for gates in all_gates(model):  # each gate acts
        with torch.no_grad():
            gates.gamma[0] *= 2
            assert not torch.equal(model(X), y)
            gates.gamma[0] /= 2
    randomize_gates(model)
    y, before = model(X), model.qkv.weight.clone()
    dg.balance_(model)
    torch.testing.assert_close(model(X), y)
    dg.ungate(model)
    assert type(model.qkv) is nn.Linear
    assert [n for n, _ in model.qkv.named_parameters()] == ["weight", "bias"]
    torch.testing.assert_close(model.qkv.weight, before)


def test_a_model_gated_twice_on_one_weight_is_exported() -> None:
    model = dg.gate(_mlp(4, 6).eval(), dg.Select("0.weight", axis=0, at=[0, 2]))
    dg.gate(model, dg.Select("0.weight", axis=0, at=[1, 3]), D=2)
    randomize_gates(model)
    with torch.no_grad():
        for gates, row in zip(all_gates(model), (1, 0), strict=True):  # the weights of unit 2, and those of unit 1
            gates.gamma[row] = 0
    small = dg.export(model, X[0], latency=False)
    torch.testing.assert_close(small.model(X[0]), model(X[0]))
    assert small.model[0].out_features == 2


def test_gates_on_gated_weights_are_refused_and_nothing_changes() -> None:
    model = dg.gate(Block(), "heads", example_inputs=X)
    before = state(model)
    rows = dg.Select("qkv.*", axis=0, block=2)
    with pytest.raises(dg.GateError) as e:
        dg.gate(model, [rows, "hidden"], example_inputs=X)
    # the values: eight rows of eight weights, and eight biases
    assert "'select' and 'heads', which is gated already, share 72 weights: 8 of 'qkv.bias', 64 of 'qkv.w" in str(
        e.value
    )
    with pytest.raises(dg.GateError) as e:
        dg.gate(model, ["neurons", "hidden"], example_inputs=X)
    assert "'neurons' and 'heads', which is gated already, share 64 weights: 64 of 'qkv.weight'" in str(e.value)
    assert_same(model, before)
    mend = e.value.mend.partition(", or ")[0]
    assert mend == 'dg.gate(model, [dg.Select("neurons") - "heads" - "hidden", "hidden"], example_inputs=x)'
    eval(mend, {"dg": dg, "model": model, "x": X})
    kinds = [g.kind for g in dg.groups(model)]
    assert {k: kinds.count(k) for k in kinds} == {"heads": 4, "neurons": 16 + 8 + 8, "hidden": 12}


def test_a_tied_weight_is_gated_again_under_all_its_names() -> None:
    model, inputs, _ = CASES["hand_nano_gpt"].build()
    y = model(*inputs)
    dg.gate(model, dg.Select("tokens.weight", axis=0, at=range(9)))
    dg.gate(model, ["heads", dg.Select("tokens.weight", axis=0, at=range(20, 29))], example_inputs=inputs)
    assert torch.equal(model(*inputs), y)
    randomize_gates(model)
    assert model.out.weight.data_ptr() != model.tokens.weight.data_ptr()
    assert torch.equal(model.out.weight, model.tokens.weight)
    dg.ungate(model)
    assert model.out.weight is model.tokens.weight


def test_a_recurrent_layer_is_gated_in_turn() -> None:
    model = _recurrent(4, 6)
    y, names = model(X), [n for n, _ in model.named_parameters()]
    dg.gate(model, dg.Select("lstm.weight_ih*", axis=0, at=range(8)))
    dg.gate(model, dg.Select("lstm.weight_*", axis=0) - "lstm.weight_ih*")
    dg.gate(model, dg.Select("lstm.weight_ih*", axis=0, at=range(8, 16)))
    assert torch.equal(model(X), y)
    assert len(dg.groups(model)) == 32
    for gates in all_gates(model):
        with torch.no_grad():
            gates.gamma[0] = 0
        assert not torch.equal(model(X), y)
        y = model(X)
    dg.ungate(model)
    assert [n for n, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(X), y)


def test_a_model_that_holds_results_of_its_forward_is_gated_twice_and_exported() -> None:
    model = dg.gate(Block(), "heads", example_inputs=X)
    held = model.hold = model(X)  # with autograd history, as attention maps that are kept to be looked at
    model.holds = {"maps": [held * 2]}
    dg.gate(model, "hidden", example_inputs=X)
    with torch.no_grad():
        all_gates(model)[1].gamma[0] = 0
    exported = dg.export(model, X)
    assert exported.report.removed == 1
    assert model.hold is held
    assert held.grad_fn is not None
    assert torch.equal(exported.model.hold, held)
    assert exported.model.hold.is_leaf


def test_a_gated_model_that_cannot_be_copied_says_so() -> None:
    model = dg.gate(Block(), "heads", example_inputs=X)
    model.hold = threading.Lock()
    with pytest.raises(dg.GateError, match=r"Block is gated and cannot be copied.*(?s:.*)\[first, second\]"):
        dg.gate(model, "hidden", example_inputs=X)


# disjointness in one call


OVERLAPS: list[tuple[Callable[[], nn.Module], Tensor, list[str], str, str]] = [
    (Block, X, ["heads", "neurons"], "'heads' and 'neurons' share 64 weights: 64 of 'qkv.weight'",
     'dg.gate(model, ["heads", dg.Select("neurons") - "heads"], example_inputs=x)'),
    (Block, X, ["neurons", "heads"], "'neurons' and 'heads' share 64 weights: 64 of 'qkv.weight'",
     'dg.gate(model, [dg.Select("neurons") - "heads", "heads"], example_inputs=x)'),
    (Block, X, ["hidden", "heads", "channels"], "'heads' and 'channels' share 72 weights: 8 of 'qkv.bias', 64 of 'qk",
     'dg.gate(model, ["hidden", "heads", dg.Select("channels") - "hidden" - "heads"], example_inputs=x)'),
    (resnet, IMAGES, ["channels", "filters"], "'channels' and 'filters' share", ""),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x", "groups", "found", "mend"), OVERLAPS)
def test_overlaps_are_counted_and_the_mend_can_be_pasted(
    make: Callable[[], nn.Module], x: Tensor, groups: list[str], found: str, mend: str
) -> None:
    model = make()
    before = state(model)
    with pytest.raises(dg.GroupingError) as e:
        dg.gate(model, groups, example_inputs=x)
    assert_same(model, before)
    assert found in e.value.found
    if mend:
        assert e.value.mend == mend
    y = model(x)
    gated = eval(e.value.mend, {"dg": dg, "model": model, "x": x})
    assert torch.equal(gated(x), y)


def test_overlaps_of_selections_show_the_idea() -> None:
    with pytest.raises(dg.GroupingError, match=r"'select' and 'hidden' share 96 weights.*(?s:.*)\[a, b - a\]"):
        dg.gate(Block(), [dg.Select("up.weight"), "hidden"], example_inputs=X)


# Select on top of graph groupings


def labels_of(groups: object, model: nn.Module, x: Any) -> dict[str, Tensor]:
    [(_, labels)] = resolve(groups, model, capture(model, x))
    return labels


def names_of_groups(labels: dict[str, Tensor]) -> dict[int, set[str]]:
    out: dict[int, set[str]] = {}
    for name, t in labels.items():
        for g in t.unique().tolist():
            if g >= 0:
                out.setdefault(g, set()).add(name)
    return out


def test_a_difference_with_a_glob_drops_the_groups_that_touch_it() -> None:
    model = resnet()
    everything = names_of_groups(labels_of("channels", model, IMAGES))
    glob = next(n for n in sorted({n for names in everything.values() for n in names}) if n.endswith("weight"))
    layer = glob.rpartition(".")[0] + ".*"
    kept = names_of_groups(labels_of(dg.Select("channels") - layer, model, IMAGES))
    prefix = layer[:-1]
    assert kept == {g: names for g, names in everything.items() if not any(n.startswith(prefix) for n in names)}
    assert 0 < len(kept) < len(everything)
    y = model(IMAGES)
    dg.gate(model, dg.Select("channels") - layer, example_inputs=IMAGES)
    assert {g.kind for g in dg.groups(model)} == {"channels"}
    assert len(dg.groups(model)) == len(kept)
    assert torch.equal(model(IMAGES), y)


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (dg.Select("heads") | dg.Select("hidden"), 4 + 12),
        (dg.Select("heads") | "hidden", 4 + 12),
        (dg.Select("heads") + "up.weight" - "up.*", 4),
        (dg.Select("neurons") - dg.Select("heads"), 16 + 8 + 12 + 8),
        (dg.Select("neurons") - (dg.Select("heads") | "hidden"), 16 + 8 + 8),
        (dg.Select("qkv.weight", axis=0) - "heads", 16),
        (dg.Select("channels") - dg.Select("heads"), 8 + 12),
        (dg.Select("hidden", names="up.*") | (dg.Select("neurons", names="qkv.*") - "heads"), 12 + 16),
    ],
)
def test_graph_groupings_combine(selection: Any, count: int) -> None:
    model = Block()
    y = model(X)
    with pytest.raises(dg.TraceError, match="example inputs are needed"):
        dg.gate(model, selection)
    dg.gate(model, selection, example_inputs=X)
    assert len(dg.groups(model)) == count
    assert torch.equal(model(X), y)


def test_a_callable_beside_an_operator_reads_the_trace_if_it_says_so() -> None:
    def values(model: nn.Module, trace: Any) -> dg.Select:
        assert trace is not None
        return dg.Select("heads")

    values.needs_trace = True  # type: ignore[attr-defined]
    model = dg.gate(Block(), dg.Select("neurons", names="qkv.*") - values, example_inputs=X)
    assert len(dg.groups(model)) == 16


# weights of the penalty per kind


def _train(model: nn.Module, form: str, weights: Any, x: Tensor, steps: int = 20) -> list[Tensor]:
    parameters = dg.param_groups(model, 0.02, weights=weights) if form == "weight decay" else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    penalty = None if form == "weight decay" else dg.Penalty(model, 0.02, weights=weights)
    if form == "attached":
        assert penalty is not None
        penalty.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if form == "term":
            assert penalty is not None
            loss = loss + penalty()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _costs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return dg.group_costs(model, x, unit="flops")


WEIGHTS: list[Any] = [
    "size",
    "sqrt_size",
    {"heads": 3.0},
    {"heads": "size", "hidden": 0.25},
    {"hidden": torch.arange(12.0)},
    {"*": "sqrt_size", "heads": torch.tensor([1.0, 2.0, 0.0, 4.0])},
    _costs,
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_three_forms_agree_for_every_weighting(weights: Any) -> None:
    torch.manual_seed(0)
    model = dg.gate(Block().double(), ["heads", "hidden"], D={"heads": 2, "hidden": 3}, example_inputs=X.double())
    given = weights(model, X.double()) if callable(weights) else weights
    start = [p.detach().clone() for p in model.parameters()]
    found = [_train(copy.deepcopy(model), form, given, X.double()) for form in ("term", "attached")]
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-12
    plain = _train(copy.deepcopy(model), "attached", "uniform", X.double())
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], plain, strict=True)) > 1e-6
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], start, strict=True)) > 1e-3

    # by hand: one group after the other
    sizes = dg.groups(model).size.tolist()
    kinds = [g.kind for g in dg.groups(model)]
    w = [
        _by_hand(given, kind, size, kinds[:i].count(kind))
        for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    misaligned = [m * c for m, c in zip(dg.misalignment(model).tolist(), w, strict=True)]
    norms = [c * g.norm ** (2 / g.D) for g, c in zip(dg.groups(model), w, strict=True)]
    assert dg.group_penalty(model, 2.0, weights=given) == pytest.approx(2 * sum(norms), rel=1e-9)
    assert dg.Penalty(model, 2.0, weights=given).value() == pytest.approx(2 * (sum(norms) + sum(misaligned)), rel=1e-9)


def _by_hand(weights: Any, kind: str, size: int, number: int) -> float:
    value = weights if isinstance(weights, str) else weights.get(kind, weights.get("*", 1.0))
    if isinstance(value, Tensor):
        return float(value[number])
    return {"size": size, "sqrt_size": size**0.5, "uniform": 1.0}[value] if isinstance(value, str) else value


@pytest.mark.parametrize(
    "weights", ["size", {"neurons": 2.0}, {"0.*": "size"}, {"neurons": torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5])}]
)
def test_weight_decay_agrees_where_it_can_say_it(weights: Any) -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    found = []
    for form in ("term", "attached", "weight decay"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        found.append(_train(dg.gate(model, "neurons"), form, weights, x))
    for other in found[1:]:
        order = sorted(range(len(other)), key=lambda i: (other[i].shape, i))
        assert len(order) == len(found[0])
        assert max(float((a - b).abs().max()) for a, b in zip(found[0], other, strict=True)) < 1e-12


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"heads": torch.ones(3)}, r"'heads' have shape \(3,\) for 4 groups"),
        ({"heads": torch.ones(4, 1)}, r"shape \(4, 1\) for 4 groups"),
        ({"heads": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "the smallest is -1"),
        ({"heads": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "the smallest is nan"),
        ({"heads": "flops"}, "the weight of 'heads' is 'flops'.*(?s:.*)'sqrt_size', 'size', or a tensor"),
        ({"head": "size"}, "'head' match no kind"),
        ("flops", "weights='flops'"),
        (2.0, "weights=2.0"),
    ],
)
def test_wrong_weights_say_what_is_wrong(weights: Any, match: str) -> None:
    model = dg.gate(Block(), ["heads", "hidden"], example_inputs=X)
    with pytest.raises(dg.PenaltyError, match=match) as e:
        dg.Penalty(model, 1.0, weights=weights)
    assert e.value.expected
    assert e.value.mend


# what groups cost, against models that are cut by hand


def _mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, a), nn.ReLU(), nn.Linear(a, b, bias=False), nn.GELU(), nn.Linear(b, 3))


def _gated_mlp(a: int, b: int) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(F.relu(m.down(F.silu(m.gate(x)) * m.up(x))))

    return Net(run, gate=nn.Linear(8, a), up=nn.Linear(8, a), down=nn.Linear(a, b), out=nn.Linear(b, 5))


def _conv(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
        *(nn.Conv2d(a, b, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(b * 9, 4)),
    )


def _separable(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, a, 1),
            nn.ReLU(),
            nn.Conv2d(a, a, 3, groups=a),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 1),
        ),
        *(nn.ReLU(), nn.ConvTranspose2d(b, 2, 2, stride=2)),
    )


def _residual(a: int, b: int) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.out(F.relu(x + m.second(F.relu(m.norm(m.first(x))))).mean((2, 3)))

    parts = {"stem": nn.Conv2d(3, a, 3), "first": nn.Conv2d(a, b, 3, padding=1), "norm": nn.BatchNorm2d(b)}
    return Net(run, **parts, second=nn.Conv2d(b, a, 1), out=nn.Linear(a, 4))


def _recurrent(a: int, b: int) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.gru(m.lstm(x)[0])[0])

    return Net(run, lstm=nn.LSTM(8, a, batch_first=True), gru=nn.GRU(a, b, batch_first=True), out=nn.Linear(b, 2))


CUTS: dict[str, tuple[Callable[[int, int], nn.Module], str, Tensor]] = {
    "mlp": (_mlp, "hidden", X[0]),
    "gated mlp": (_gated_mlp, "hidden", X),
    "conv net": (_conv, "channels", IMAGES),
    "filters of it": (_conv, "filters", IMAGES),
    "depthwise and transposed": (_separable, "channels", IMAGES),
    "residual": (_residual, "channels", IMAGES),
    "recurrent": (_recurrent, "rnn", X),
}


def count(model: nn.Module, x: Tensor, unit: str) -> int:
    if unit == "parameters":
        return sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(x.to("meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize("unit", ["parameters", "flops"])
@pytest.mark.parametrize("name", CUTS)
def test_costs_are_what_a_cut_by_hand_saves(name: str, unit: Any) -> None:
    make, kind, x = CUTS[name]
    if name == "filters of it":  # the last layer is no convolution, so that all filters can go
        assert isinstance(make(4, 6)[-1], nn.Linear)
    model = dg.gate(make(4, 6).eval(), kind, example_inputs=x)
    before = state(model)
    costs = dg.group_costs(model, x, unit=unit)
    assert_same(model, before)
    assert list(costs) == [kind]
    whole = count(make(4, 6).eval(), x, unit)
    saved = {4: whole - count(make(3, 6).eval(), x, unit), 6: whole - count(make(4, 5).eval(), x, unit)}
    assert saved[4] != saved[6]
    per_part = [p.size.numel() for p in dg.groups(model).parts]
    assert sorted(per_part) == [4, 6]
    by_hand = torch.tensor([saved[n] for n in per_part for _ in range(n)], dtype=torch.float64)
    torch.testing.assert_close(costs[kind], by_hand / by_hand.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_costs_of_heads_are_their_values_and_what_mixes_and_reads_them(fused: bool) -> None:
    model = dg.gate(Block(fused), ["heads", "hidden"], example_inputs=X)
    costs = dg.group_costs(model, X)
    head, unit = 2 * 9 + 2 * 8, 9 + 8
    mean = (4 * head + 12 * unit) / 16
    torch.testing.assert_close(costs["heads"], torch.full((4,), head / mean, dtype=torch.float64))
    torch.testing.assert_close(costs["hidden"], torch.full((12,), unit / mean, dtype=torch.float64))
    costs = dg.group_costs(model, X, unit="flops")
    tokens = 2 * 5
    head = tokens * (2 * 8 + 2 * 8) + 2 * 5 * 5 * 2  # its rows, what reads them, and 5 x 5 weights over 2 dimensions
    unit = tokens * (8 + 8)
    mean = (4 * head + 12 * unit) / 16
    torch.testing.assert_close(costs["heads"], torch.full((4,), head / mean, dtype=torch.float64))
    torch.testing.assert_close(costs["hidden"], torch.full((12,), unit / mean, dtype=torch.float64))


def test_a_group_that_makes_no_channel_alone_costs_its_own_weights() -> None:
    for groups in ("in_channels", dg.Select("*weight", axis=(0, 1))):
        model = dg.gate(_mlp(4, 6), groups)
        [costs] = dg.group_costs(model, X).values()
        own = dg.groups(model).size.double()
        torch.testing.assert_close(costs, own / own.mean())


@pytest.mark.parametrize("name", ["hand_densenet", "hand_unet", "hand_ghostnet", "hand_vit", "hand_nam", "hand_lstm"])
def test_costs_of_models_that_nobody_cut_are_weights(name: str) -> None:
    case = CASES[name]
    kind = next(k for k in ("channels", "hidden", "rnn") if k in case.applies)
    model, args, kwargs = case.build()
    dg.gate(model, kind, example_inputs=args, example_kwargs=kwargs)
    own = dg.groups(model).size.double()
    for unit in ("parameters", "flops"):
        costs = dg.group_costs(model, args, kwargs, unit=unit)[kind]
        assert costs.shape == own.shape
        assert bool((costs.isfinite() & (costs > 0)).all())
        assert float(costs.mean()) == pytest.approx(1)
        assert dg.Penalty(model, 1.0, weights={kind: costs}).value() > 0


def test_costs_refuse() -> None:
    with pytest.raises(dg.NotGatedError, match="cannot tell what groups cost"):
        dg.group_costs(Block(), X)
    model = dg.gate(Block(), dg.Select("*.bias"))
    with pytest.raises(dg.PenaltyError, match="unit='bytes'"):
        dg.group_costs(model, X, unit="bytes")  # type: ignore[arg-type]
    with pytest.raises(dg.PenaltyError, match="no group has a share in the flops"):
        dg.group_costs(model, X, unit="flops")
    with pytest.raises(dg.TraceError, match="example inputs are needed"):
        dg.group_costs(model)


# include and exclude


def test_a_group_on_an_excluded_parameter_goes_whole() -> None:
    model = dg.gate(_residual(4, 6), "channels", example_inputs=IMAGES, exclude="second.bias")
    assert {n for p in dg.groups(model).parts for n in p.parameters} == {
        "first.weight",
        "first.bias",
        "norm.weight",
        "norm.bias",
    }
    model = dg.gate(_residual(4, 6), "channels", example_inputs=IMAGES, include=["first.*", "norm.*", "stem.*"])
    assert len(dg.groups(model)) == 6


def test_excluding_all_groups_names_the_kind_and_where_they_stand() -> None:
    with pytest.raises(dg.GroupingError) as e:
        dg.gate(_residual(4, 6), "channels", example_inputs=IMAGES, exclude=["norm.*", "stem.*"])
    assert "leave no group of 'channels': each of its 10 groups stands on" in e.value.found
    assert "6 on 'norm.weight', 6 on 'norm.bias', 4 on 'stem.weight', 4 on 'stem.bias'" in e.value.found
    assert e.value.mend == "narrow exclude or widen include, so that 'norm.weight' is in, or leave 'channels' out"
    with pytest.raises(dg.GroupingError, match=r"leave no group of 'hidden': .*12 on 'up\.bias'"):
        dg.gate(Block(), ["heads", "hidden"], example_inputs=X, exclude="up.bias")


# groups that merge


def _table_net() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.deep(F.relu(m.norm(m.first(x)))) + m.wide(x)

    return Net(run, first=nn.Linear(10, 7), norm=nn.BatchNorm1d(7), deep=nn.Linear(7, 2), wide=nn.Linear(10, 2)).eval()


def test_one_hot_columns_are_one_group() -> None:
    model, x = _table_net(), torch.randn(6, 10)
    blocks = [range(3, 6), [7, 8, 9]]
    dg.gate(model, dg.Select("input_features", merge=blocks), D=2, example_inputs=x)
    assert [g.size for g in dg.groups(model)] == [9, 9, 9, 27, 9, 27]  # 7 + 2 weights read each feature
    assert {g.kind for g in dg.groups(model)} == {"input_features"}
    [gates] = all_gates(model)
    with torch.no_grad():
        gates.gamma[3] = 0
    y = model(x)
    for column in range(10):
        other = x.clone()
        other[:, column] += 1
        assert torch.equal(model(other), y) == (column in blocks[0]), column


def test_merging_is_for_any_groups() -> None:
    model = dg.gate(Block(), dg.Select("heads", merge=[(0, 3)]), example_inputs=X)
    assert [g.size for g in dg.groups(model)] == [36, 18, 18]
    model = dg.gate(Block(), dg.Select("*.weight", axis=0, merge=[range(24, 32), [0], []]))  # all rows of the second
    assert [g.size for g in dg.groups(model)] == [8] * 24 + [64] + [8] * 12 + [12] * 8
    model = dg.gate(Block(), dg.Select("neurons", names="up.*", merge=[range(6)]) | "heads", example_inputs=X)
    assert sorted(g.size for g in dg.groups(model)) == [8] * 6 + [18] * 4 + [48]
    across = dg.gate(Block(), dg.Select("neurons", names=["up.*", "down.*"], merge=[[0, 12]]))
    assert next(iter(dg.groups(across))).size == 8 + 12  # a row of each layer


@pytest.mark.parametrize(
    ("merge", "match"),
    [
        ([range(8, 11)], r"names 10 of 10 groups.*(?s:.*)from 0 to 9 that share none"),
        ([[-1, 2]], "names -1 of 10 groups"),
        ([[1.5]], "names 1.5 of 10 groups"),
        ([range(3), range(2, 5)], "names 2 more than once, of 10 groups"),
        ([[4, 4]], "names 4 more than once"),
        (range(3, 6), r"merge=range\(3, 6\) holds something else than ranges"),
        ([3, 4], "holds something else"),
        (["34"], "holds something else"),
    ],
)
def test_wrong_merges_say_what_is_wrong(merge: Any, match: str) -> None:
    model = _table_net()
    before = state(model)
    with pytest.raises(dg.GroupingError, match=match) as e:
        dg.gate(model, dg.Select("input_features", merge=merge), example_inputs=torch.randn(6, 10))
    assert e.value.mend
    assert_same(model, before)
