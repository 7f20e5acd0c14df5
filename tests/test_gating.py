"""What `gate` and `ungate` do beyond the laws: arguments, sharing, dtypes, optimizers, and what they refuse."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from oracles import all_gates, randomize_gates
from torch import Tensor, nn
from torch.nn.utils import prune
from zoo import ZOO, Recurrent, Tied, Twice, named, outputs

import dgate_wrap as dg
from dgate_wrap.gates import gated_tensors


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a refused call must leave alone."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [type(m) for m in model.modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][k], before[0][k]) for k in before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize("D", [2, 3, 4, 7])
def test_shape_and_start_of_the_gates(D: int) -> None:
    model = dg.gate(mlp(), "neurons", D=D)
    assert [tuple(g.gamma.shape) for g in all_gates(model)] == [(6, D - 1), (3, D - 1)]
    assert all(bool((g.gamma == 1).all()) and g.D == D for g in all_gates(model))
    assert f"Gates('neurons', groups=6, D={D})" in repr(model)
    assert isinstance(model[0], nn.Linear)


def test_the_default_is_filters_with_d_3() -> None:
    model = dg.gate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2)))
    assert [(g.kind, g.num_groups, g.D) for g in all_gates(model)] == [("filters", 4, 3)]


# -- what the gates multiply -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "part", "slice"])
def test_effective_weight_is_omega_times_the_product(layout: str) -> None:
    labels = {
        "rows": torch.tensor([0, 1, 2, 3]).view(4, 1),
        "columns": torch.tensor([7, 3, 7]),
        "part": torch.tensor([[0], [-1], [1], [1]]),
        "slice": torch.tensor([[-1], [5], [-1], [6]]),
    }[layout]
    layer = nn.Linear(3, 4)
    dg.gate(layer, {"weight": labels}, D=4)
    randomize_gates(layer)
    [gates] = all_gates(layer)
    order = sorted(set(labels.flatten().tolist()) - {-1})
    for i in range(4):
        for j in range(3):
            label = int(labels.broadcast_to(4, 3)[i, j])
            factor = gates.gamma[order.index(label)].prod().item() if label >= 0 else 1.0
            original = layer.parametrizations.weight.original[i, j].item()
            assert layer.weight[i, j].item() == pytest.approx(original * factor, rel=1e-6)


def test_one_group_over_several_parameters_has_one_gate() -> None:
    channel = torch.arange(4)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    labels = {"0.weight": channel.view(4, 1, 1, 1), "0.bias": channel, "1.weight": channel, "1.bias": channel}
    dg.gate(model, labels, D=2)
    [gates] = all_gates(model)
    gates.gamma.data[1] = 0
    out = model(torch.randn(2, 2, 5, 5))
    assert [bool(out[:, c].any()) for c in range(4)] == [True, False, True, True]
    assert len([n for n, _ in model.named_parameters() if n.endswith("gamma")]) == 1


def test_parameters_without_common_groups_have_gates_of_their_own() -> None:
    labels = {
        "0.weight": torch.arange(6).view(6, 1),
        "0.bias": torch.arange(6),
        "2.weight": torch.arange(6, 9).view(3, 1),
    }
    model = dg.gate(mlp(), labels)
    assert [g.num_groups for g in all_gates(model)] == [6, 3]


def test_two_groupings_share_a_parameter() -> None:
    top, bottom = torch.tensor([0, 1, -1, -1, -1, -1]).view(6, 1), torch.tensor([-1, -1, 0, 0, 0, 0]).view(6, 1)
    model = mlp()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    dg.gate(model, [{"0.weight": top}, {"0.weight": bottom}], D=2)
    first, second = all_gates(model)
    first.gamma.data[0], second.gamma.data[0] = 2.0, 3.0
    expected = state["0.weight"] * torch.tensor([2.0, 1, 3, 3, 3, 3]).view(6, 1)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    sizes = dg.groups(model).size.tolist()
    assert sizes == [4, 4, 16]
    dg.ungate(model)
    torch.testing.assert_close(model[0].weight.detach(), expected)


@pytest.mark.parametrize("groups", ["weights", "neurons"])
def test_tied_weights_stay_tied(groups: str) -> None:
    model = dg.gate(Tied(), groups)
    randomize_gates(model)
    assert torch.equal(model.embedding.weight, model.out.weight)
    assert not torch.equal(model.embedding.weight, model.embedding.parametrizations.weight.original)
    assert model.embedding.parametrizations.weight[0].gates is model.out.parametrizations.weight[0].gates
    twin = copy.deepcopy(model)
    assert twin.embedding.parametrizations.weight[0].gates is twin.out.parametrizations.weight[0].gates
    for m in (twin, model):
        dg.ungate(m)
        assert m.out.weight is m.embedding.weight


def test_a_module_under_two_names_is_gated_once() -> None:
    model = dg.gate(Twice(), "neurons")
    assert len(dg.groups(model)) == 4
    model.a.parametrizations.weight[0].gates.gamma.data[2] = 0
    x = torch.randn(5, 4)
    expected = model.a(torch.tanh(model.a(x)))
    assert torch.equal(model(x), expected)
    assert bool((model.a(x)[:, 2] == model.a.bias[2]).all())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_read_at_each_call(kind: type[nn.RNNBase]) -> None:
    model = Recurrent(kind).eval()
    x = torch.randn(2, 5, 3)
    dg.gate(model, dg.Select("rnn.weight_hh*", axis=0))
    before = model(x)
    all_gates(model)[0].gamma.data.zero_()
    manual = copy.deepcopy(model)
    dg.ungate(manual)
    assert not manual.rnn.weight_hh_l0.any()
    assert torch.equal(model(x), manual(x))
    assert not torch.allclose(model(x), before)
    # after folding, the list of flat weights holds the Parameters again, and training reaches them
    assert [
        w is getattr(manual.rnn, n)
        for w, n in zip(manual.rnn._flat_weights, manual.rnn._flat_weights_names, strict=True)
    ]
    manual.rnn.weight_hh_l0.data.fill_(0.5)
    assert not torch.allclose(manual(x), model(x))


# -- casts, devices, optimizers, serialization -------------------------------------------------------------------------


def test_casting_back_and_forth_keeps_the_values_of_gates() -> None:
    model = randomize_gates(dg.gate(mlp(), "neurons"))
    exact = [g.gamma.detach().clone() for g in all_gates(model)]
    for m in (model.bfloat16(), model.float(), model.half(), model.float()):
        assert all(torch.equal(g.gamma, e) for g, e in zip(all_gates(m), exact, strict=True))
    model.double()
    assert {g.gamma.dtype for g in all_gates(model)} == {torch.float64}


def test_mixed_dtypes_share_gates_of_the_widest() -> None:
    model = nn.Module()
    model.a, model.b = (
        nn.Parameter(torch.ones(3, dtype=torch.float16)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
    )
    dg.gate(model, {"a": torch.arange(3), "b": torch.arange(3)})
    assert [g.gamma.dtype for g in all_gates(model)] == [torch.float64]
    assert (model.a.dtype, model.b.dtype) == (torch.float16, torch.float64)


def test_an_optimizer_made_before_still_trains_omega() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    dg.gate(model, "neurons")
    before = weight.detach().clone()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert model[0].parametrizations.weight.original is weight
    assert not torch.equal(weight, before)


def test_train_gates_freezes_all_else_until_ungated() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    dg.gate(model, "neurons", include="0.*", D=2)
    dg.gate(model, "neurons", include="2.*", D=3, train="gates")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{i}.parametrizations.weight.0.gates.gamma" for i in (0, 2)]
    model(torch.randn(5, 4)).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    twin = dg.ungate(copy.deepcopy(model))
    for m in (twin, dg.ungate(model)):
        # what the user had frozen stays frozen
        assert {n: p.requires_grad for n, p in m.named_parameters()} == {
            "0.weight": True, "0.bias": True, "2.weight": True, "2.bias": False,
        }  # fmt: skip


@pytest.mark.parametrize("D", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_start_has_no_misalignment(D: int, dtype: torch.dtype) -> None:
    plain = mlp().to(dtype)
    with torch.no_grad():
        plain[0].weight[2] = 0  # a group that is zero keeps gates of one, or it could never open
    model = dg.gate(copy.deepcopy(plain), "neurons", D=D, init="balanced")
    eps = torch.finfo(dtype).eps
    live = torch.arange(9) != 2
    assert float(dg.misalignment(model)[live].max()) < 10 * eps
    assert float(dg.imbalance(model)[live].max()) < 20 * eps
    assert bool((all_gates(model)[0].gamma[2] == 1).all())
    for t in gated_tensors(model):
        torch.testing.assert_close(getattr(*t.hosts[0]), plain.get_parameter(t.name), rtol=8 * eps, atol=0)


def test_an_ungated_model_is_saved_and_loaded_whole() -> None:
    model = dg.ungate(dg.gate(mlp(), "neurons"))
    buffer = io.BytesIO()
    torch.save(model, buffer)  # a module of an injected class could not be pickled
    buffer.seek(0)
    x = torch.randn(5, 4)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_gating_again_after_ungating() -> None:
    model = mlp()
    x = torch.randn(5, 4)
    before = model(x)
    for D in (2, 4, 3):
        dg.ungate(dg.gate(model, "neurons", D=D))
    assert torch.equal(dg.gate(model, "weights")(x), before)


def test_autocast_trains_like_float32() -> None:
    [entry] = named("cnn")
    # eval: in training, a filter before a batch norm has next to no gradient along itself, and rounding is all there is
    model = dg.gate(entry.make(), "filters").eval()
    twin = copy.deepcopy(model)
    for m, low in ((model, True), (twin, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = sum(o.float().square().mean() for o in outputs(m, entry.make_inputs()))
        loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm(), n


def test_stacked_copies_run_under_vmap() -> None:
    base = dg.gate(mlp(), "neurons")
    models = [randomize_gates(copy.deepcopy(base)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 4)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            out = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
            torch.testing.assert_close(out, torch.stack([m(x) for m in models]))


def test_per_sample_gradients_reach_the_gates() -> None:
    model = dg.gate(mlp(), "neurons").double()
    x = torch.randn(5, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for n, p in parameters.items():
        torch.testing.assert_close(each[n].sum(0), p.grad)


# -- include and exclude -----------------------------------------------------------------------------------------------

RESTRICTIONS = [
    ({"include": "0.*"}, ["0.weight"]),
    ({"include": ["0.*", "4.*"]}, ["0.weight", "4.weight"]),
    ({"exclude": "0.*"}, ["2.weight", "4.weight"]),
    ({"exclude": ["0.*", "4.w*"]}, ["2.weight"]),
    ({"include": "*.weight", "exclude": "2.*"}, ["0.weight", "4.weight"]),
    ({"include": "[02].weight"}, ["0.weight", "2.weight"]),
]


@pytest.mark.parametrize(("options", "gated"), RESTRICTIONS)
def test_include_and_exclude(options: dict[str, Any], gated: list[str]) -> None:
    [entry] = named("mlp")
    model = dg.gate(entry.make(), "neurons", **options)
    assert [t.name for t in gated_tensors(model)] == gated


def test_a_group_is_kept_whole_or_not_at_all() -> None:
    rows = torch.arange(6)
    labels = {"0.weight": rows.view(6, 1), "0.bias": torch.where(rows < 3, rows, -1)}
    # groups 0..2 also stand on the bias, so that excluding it leaves 3..5; including the weight alone does the same
    for options in ({"exclude": "0.bias"}, {"include": "0.weight"}):
        model = dg.gate(mlp(), labels, **options)
        assert [t.name for t in gated_tensors(model)] == ["0.weight"]
        assert [g.name for g in dg.groups(model)] == ["0.weight[3]", "0.weight[4]", "0.weight[5]"]


# -- refusals, which leave the model as it was -------------------------------------------------------------------------


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.randn(4, 3))
        self.view = nn.Parameter(self.whole.data.view(12))
        self.complex = nn.Parameter(torch.randn(4, dtype=torch.complex64))


def _wrapped() -> nn.Module:
    """A DistributedDataParallel as far as anybody looks, without a process group."""
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = mlp()
    return model


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.jit.script(mlp())


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 3))


def _gated() -> nn.Module:
    return dg.gate(mlp(), "neurons")


ROWS = torch.arange(6).view(6, 1)
GROUPING, GATE = dg.GroupingError, dg.GateError
# what is gated, how, the class of the error, and what its text names: found, then expected, then the mend
REFUSED: dict[str, tuple[Any, dict[str, Any], type[dg.DGateError], str]] = {
    "unknown name": (mlp, {"groups": "neuron"}, dg.UnknownGroupingError, "'neuron'.*weights.*'neurons'"),
    "D of 1": (mlp, {"D": 1}, GATE, "D=1"),
    "D of 2.0": (mlp, {"D": 2.0}, GATE, "D=2.0"),
    "D of True": (mlp, {"D": True}, GATE, "D=True"),
    "D as text": (mlp, {"D": "3"}, GATE, "D='3'"),
    "init": (mlp, {"init": "zeros"}, GATE, "init='zeros'"),
    "train": (mlp, {"train": "none"}, GATE, "train='none'"),
    "nothing to gate": (mlp, {"groups": "filters"}, GROUPING, "no weight .*Linear, ReLU, Seq"),
    "selection of nothing": (mlp, {"groups": dg.Select("9.*")}, GROUPING, "selects no weight"),
    "labels of nobody": (mlp, {"groups": {"0.weight": torch.full((6, 1), -1)}}, GROUPING, "selects no weight"),
    "labels of a stranger": (mlp, {"groups": {"w": ROWS}}, GROUPING, "'w' is not a parameter"),
    "labels of a wrong shape": (mlp, {"groups": {"0.weight": torch.arange(6)}}, GROUPING, r"\(6,\), .* \(6, 4\)"),
    "labels of a wrong dtype": (mlp, {"groups": {"0.weight": ROWS.int()}}, GROUPING, "torch.int32"),
    "labels of floats": (mlp, {"groups": {"0.weight": ROWS.float()}}, GROUPING, "torch.float32"),
    "labels in a list": (mlp, {"groups": {"0.weight": [0, 1]}}, GROUPING, "are list"),
    "labels below -1": (mlp, {"groups": {"0.weight": ROWS - 2}}, GROUPING, "down to -2"),
    "several faults": (mlp, {"groups": {"a": ROWS, "0.bias": ROWS.int()}}, GROUPING, "'a' is not.*'0.bias' are"),
    "overlap": (mlp, {"groups": ["neurons", "weights"]}, GROUPING, "overlapping.*24 of '0.weight', 18 of '2"),
    "overlap with itself": (mlp, {"groups": ["neurons", "neurons"]}, GROUPING, "overlapping"),
    "no groupings": (mlp, {"groups": []}, GROUPING, "is empty"),
    "a number": (mlp, {"groups": 3}, GROUPING, "groups is a int"),
    "a callable that gives nothing": (mlp, {"groups": lambda model, trace: None}, GROUPING, "gave NoneType"),
    "include of nobody": (mlp, {"include": "9.*"}, GROUPING, r"'9\.\*' in include"),
    "exclude of nobody": (mlp, {"exclude": ["0.*", "9.*"]}, GROUPING, r"'9\.\*' in include or exclude"),
    "include and exclude of the same": (mlp, {"include": "0.*", "exclude": "0.*"}, GROUPING, "leave no group"),
    "another parametrization": (_weight_norm, {}, GATE, "'0.weight' has another parametrization"),
    "parts of a parametrization": (_weight_norm, {"groups": "weights"}, GATE, "'0.weight' has another"),
    "meta": (lambda: mlp().to("meta"), {}, GATE, "meta device"),
    "complex": (_Frozen, {"groups": dg.Select("complex", axis=0)}, GATE, "'complex' is of torch.complex64"),
    "memory of another": (_Frozen, {"groups": dg.Select("whole", axis=0)}, GATE, "'whole' shares .* 'view'"),
    "its view": (_Frozen, {"groups": dg.Select("view", axis=0)}, GATE, "'view' shares .* 'whole'"),
    "distributed": (_wrapped, {}, GATE, "inside DistributedDataParallel"),
    "gated already": (_gated, {}, GATE, "'neurons' and 'neurons', which is gated already, share 42 weights"),
    "gated already, by another kind": (_gated, {"groups": "in_channels"}, GATE, "'in_channels' and 'neurons', which"),
    "gates of gates": (lambda: _gated()[0], {"groups": "weights"}, GATE, "share 24 weights: 24 of 'weight'"),
    "D of another kind": (mlp, {"D": {"heads": 2}}, GATE, "'neurons' and names 'heads'.*{\"neurons\": 3}"),
    "D of 1 in a mapping": (mlp, {"D": {"neurons": 1}}, GATE, "D={'neurons': 1}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_fault_and_touch_nothing(name: str) -> None:
    factory, options, error, pattern = REFUSED[name]
    model = factory()
    on_meta = name == "meta"
    before = None if on_meta else snapshot(model)
    with pytest.raises(error, match=f"(?s){pattern}") as caught:
        dg.gate(model, **{"groups": "neurons", **options})
    assert isinstance(caught.value, ValueError)
    assert "\nExpected: " in str(caught.value)
    assert "\nMend: " in str(caught.value)
    if before is not None:
        assert_untouched(model, before)


@pytest.mark.parametrize("model", [_scripted(), "model", None, nn.Linear], ids=["scripted", "text", "None", "class"])
def test_only_modules_are_gated(model: Any) -> None:
    with pytest.raises(dg.GateError, match=r"a torch\.nn\.Module that is not scripted"):
        dg.gate(model, "neurons")


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Conv2d(1, 2, 3))
    for groups in ("filters", "weights", "neurons"):
        with pytest.raises(dg.GateError, match=r"'0\.weight', '0\.bias' of a lazy module"):
            dg.gate(model, groups)
    assert isinstance(model[0], nn.LazyLinear)


def test_parameters_cut_from_one_buffer_are_gated() -> None:
    """A common storage is no common memory: cuDNN keeps all weights of an RNN in one buffer."""
    buffer = torch.randn(24)
    model = nn.Module()
    model.a, model.b = nn.Parameter(buffer[:12].view(4, 3)), nn.Parameter(buffer[12:].view(4, 3))
    assert [t.name for t in gated_tensors(dg.gate(model, dg.Select("*", axis=0)))] == ["a", "b"]


def test_a_model_gated_in_part_is_gated_in_another() -> None:
    model = dg.gate(mlp(), "neurons", D=2, include="0.*")
    before = snapshot(model)
    with pytest.raises(dg.GateError, match=r"gated already, share 24 weights: 24 of '0\.weight'\."):
        dg.gate(model, "neurons")
    assert_untouched(model, before)
    dg.gate(model, "neurons", D=4, include="2.*")
    assert [(t.name, t.gates.D) for t in gated_tensors(model)] == [("0.weight", 2), ("2.weight", 4)]
    assert list(dg.ungate(model).state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_ungating_refuses_what_it_cannot_fold() -> None:
    with pytest.raises(dg.NotGatedError, match="cannot ungate: the model holds no gates"):
        dg.ungate(mlp())
    model = dg.gate(mlp(), "neurons")
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    before = snapshot(model)
    with pytest.raises(dg.GateError, match=r"'0\.weight'.*another parametrization"):
        dg.ungate(model)
    assert_untouched(model, before)


def test_other_parametrizations_are_left_alone() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    before, keys = model(x), list(model.state_dict())
    dg.gate(model, "neurons", exclude="0.*")
    assert torch.equal(model(x), before)
    dg.ungate(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.parametrize("grouping", ["neurons", "in_channels"])
def test_weights_that_hooks_compute_are_left_alone(wrap: str, grouping: str) -> None:
    def make(x: nn.Module) -> nn.Module:
        if wrap == "prune":
            return prune.l1_unstructured(x, "weight", amount=0.5)
        return getattr(nn.utils, wrap)(x)

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), make(nn.Linear(6, 2)))
    with pytest.raises(dg.GateError, match=r"'2.weight' has another parametrization"):
        dg.gate(model, grouping)
    gated = dg.gate(model, grouping, exclude="2.*")
    assert {t.name for t in dg.gates.gated_tensors(gated)} == {"0.weight"}
    dg.ungate(gated)
    assert len(dg.groups(dg.gate(model, dg.Select(grouping) - "2.*"))) == (6 if grouping == "neurons" else 4)


def test_every_model_of_the_zoo_trains_while_gated() -> None:
    for entry in ZOO:
        model = dg.gate(entry.make(), "weights", D=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        dg.Penalty(model, 0.1).attach(optimizer)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = sum(o.square().mean() for o in outputs(model, entry.make_inputs()))
            loss.backward()
            optimizer.step()
            losses.append(loss.item() + dg.Penalty(model, 0.1).value())
        assert losses[-1] < losses[0], entry.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_of_traced_submodules_are_refused_and_others_are_gated() -> None:
    def build() -> nn.Module:
        inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        return nn.Sequential(nn.Linear(4, 6), torch.jit.trace(inner, torch.randn(2, 6)), nn.Linear(6, 2))

    with pytest.raises(dg.GateError, match=r"'1\.0\.weight' is in a ScriptModule"):
        dg.gate(build(), "weights")
    model, x = build(), torch.randn(3, 4)
    before = model(x)
    dg.gate(model, "neurons", include="0.*")
    assert torch.equal(model(x), before)
